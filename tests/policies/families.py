"""Pipelines of every family at tiny size with random weights, saved to folders."""

import math
import string
from pathlib import Path

import torch

from conftest import save_tokenizer, text_settings


def autoencoder(channels: int, shift: float | None = None):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=16,
        shift_factor=shift, scaling_factor=0.8,
    )  # fmt: skip


def clip_text(tokenizer, projection: bool, width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(CLIPTextConfig(**text_settings(tokenizer, width)))


def t5(folder: Path, width: int = 16):
    """A T5 encoder and a tokenizer that spells everything out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    raw = Tokenizer(models.Unigram([*pieces, *((c, -3.0) for c in string.ascii_lowercase)], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
        model_max_length=16,
    )
    tokenizer.save_pretrained(folder)
    model = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    return model, T5TokenizerFast.from_pretrained(folder)


def make_sdxl(folder: Path, second: int = 16) -> Path:
    """SDXL, its second text encoder ``second`` wide."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip_text(tokenizer, False),
        text_encoder_2=clip_text(tokenizer, True, second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=6 * 8 + second,
            cross_attention_dim=16 + second,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd2(folder: Path) -> Path:
    """As 2.1: v-prediction, linear projections, heads of one width."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=autoencoder(4),
        text_encoder=clip_text(tokenizer, False),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=(2, 4),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True, upcast_attention=True,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
            set_alpha_to_one=False, prediction_type="v_prediction",
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sd3(folder: Path, medium35: bool = False) -> Path:
    """SD3; or as SD3.5 medium, with a second attention in a layer and normalised queries, and without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    encoder_3, tokenizer_3 = (None, None) if medium35 else t5(folder / "tokenizer_3", 32)
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if medium35 else {}
    StableDiffusion3Pipeline(
        vae=autoencoder(4, 0.1),
        text_encoder=clip_text(tokenizer, True),
        text_encoder_2=clip_text(tokenizer, True),
        text_encoder_3=encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
            **newer,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_flux(folder: Path, guidance: bool = True) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    encoder_2, tokenizer_2 = t5(folder / "tokenizer_2")
    FluxPipeline(
        vae=autoencoder(4, 0.1),
        text_encoder=clip_text(tokenizer, False),
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def speller(folder: Path, *special: str, template: str | None = None):
    """A tokenizer that spells everything out, saved and loaded again; it begins with the first of the ``special`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ("pad", *special, "unk")
    words = [*(f"<{name}>" for name in names), *sorted(set(string.printable))]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if special:
        first = f"<{special[0]}>"
        raw.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **{f"{name}_token": f"<{name}>" for name in names}
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def gemma(folder: Path):
    """Gemma, as it reads prompts for SANA."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = speller(folder, "bos", "eos")
    model = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=4096,
        )
    )  # fmt: skip
    return model, tokenizer


def make_sana(folder: Path) -> Path:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(0)
    encoder, tokenizer = gemma(folder / "tokenizer")
    SanaPipeline(
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=2, scaling_factor=0.41407,
            encoder_block_types=(*("ResBlock",) * 5, "EfficientViTBlock"), encoder_block_out_channels=(8,) * 6,
            decoder_block_types=(*("ResBlock",) * 5, "EfficientViTBlock"), decoder_block_out_channels=(8,) * 6,
            encoder_qkv_multiscales=(*((),) * 5, (5,)), decoder_qkv_multiscales=(*((),) * 5, (5,)),
            encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6, downsample_block_type="Conv",
            upsample_block_type="interpolate",
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            sample_size=2,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen(folder: Path):
    """Qwen2.5-VL, as it reads prompts for Qwen-Image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = speller(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return model, tokenizer


def make_qwen(folder: Path) -> Path:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    encoder, tokenizer = qwen(folder / "tokenizer")
    QwenImagePipeline(
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 1.0],
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift=1.0,
            shift_terminal=0.02, time_shift_type="exponential",
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen3(folder: Path, kind=None, **more):
    """Qwen3, as it reads prompts for Z-Image and FLUX.2 [klein]."""
    from transformers import Qwen3Config, Qwen3Model

    template = "{% for one in messages %}[{{ one.role }}] {{ one.content }}{% endfor %}"
    tokenizer = speller(folder, template=template)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    return (kind or Qwen3Model)(Qwen3Config(**(settings | more))), tokenizer


def make_zimage(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    encoder, tokenizer = qwen3(folder / "tokenizer")
    network = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[512, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        for token in (network.x_pad_token, network.cap_pad_token):
            token.normal_()  # which a published one has learned
    ZImagePipeline(
        vae=autoencoder(4, 0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def flux2_autoencoder():
    """That of FLUX.2, with statistics that are not those of white noise."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def flux2_parts(width: int, guidance: bool):
    """Autoencoder, transformer and scheduler of a FLUX.2 whose text encoder is ``width`` wide."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    return {
        "vae": flux2_autoencoder(),
        "transformer": Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * width, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }  # fmt: skip


def make_klein(folder: Path) -> Path:
    """FLUX.2 [klein], not distilled."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    encoder, tokenizer = qwen3(folder / "tokenizer", Qwen3ForCausalLM, num_hidden_layers=27)
    Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(16, False)).save_pretrained(
        folder
    )
    return folder


def mistral3(folder: Path):
    """Mistral Small 3, as it reads prompts for FLUX.2 [dev]; padding comes first. A processor of sound stands for Pixtral's, of
    images, which needs torchvision.
    """
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    template = "{% for one in messages %}[{{ one.role }}] {{ one.content[0].text }}{% endfor %}"
    tokenizer = speller(folder, template=template)
    tokenizer.padding_side = "left"
    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return model, Qwen2AudioProcessor(WhisperFeatureExtractor(), tokenizer, chat_template=template)


def make_flux2(folder: Path) -> Path:
    """FLUX.2 [dev]."""
    from diffusers import Flux2Pipeline

    torch.manual_seed(0)
    encoder, tokenizer = mistral3(folder / "tokenizer")
    Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(16, True)).save_pretrained(folder)
    return folder


def make_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 at full size: the published configurations of its parts, the tokenizer but for."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer", 77)
    text = {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
    }  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**(text_settings(tokenizer) | text))),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        ),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1,
            set_alpha_to_one=False,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_clip_h(folder: Path) -> Path:
    """CLIP-H, which PickScore and HPSv2 are, at full size; the tokenizer spells words out."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder, 77)
    text = {
        **text_settings(tokenizer, 1024), "intermediate_size": 4096, "num_hidden_layers": 24, "hidden_act": "gelu",
        "num_attention_heads": 16, "max_position_embeddings": 77, "vocab_size": 49408,
    }  # fmt: skip
    vision = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(folder)
    return folder


def make_full_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL at full size, in bfloat16: the published configurations of its parts, the tokenizers but for."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer", 77)
    shared = text_settings(tokenizer) | {"vocab_size": 49408, "max_position_embeddings": 77}
    first = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu",
    }  # fmt: skip
    second = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "hidden_act": "gelu",
    }  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        parts = {
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
                scaling_factor=0.13025,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**(shared | first))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**(shared | second))),
            "unet": UNet2DConditionModel(
                sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
                transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
                addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        }  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
    )
    StableDiffusionXLPipeline(
        tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, **parts
    ).save_pretrained(folder)  # fmt: skip
    return folder
