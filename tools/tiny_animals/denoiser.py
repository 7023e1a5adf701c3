"""Train the text encoder and the UNet together on latents, and assemble the pipeline folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiny_animals.bank import Bank, caption, composite
from tiny_animals.tokens import LENGTH, save_tokenizer
from tiny_animals.training import Training, join_processes, rank, wait_for_all, world

WIDTH = 128  # of the text encoder, and so of the cross-attention
UNCONDITIONAL = 0.1


class Denoiser(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, vocabulary: int, end: int, start: int) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH,
                eos_token_id=end, bos_token_id=start, pad_token_id=end,
            )
        )  # fmt: skip
        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128, 192), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
        )  # fmt: skip

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict v, [n, 4, 16, 16], from noisy latents, timesteps [n] and tokens [n, 16]."""
        return self.unet(latents, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def scheduler() -> DDIMScheduler:
    """v-prediction from pure noise (zero terminal SNR), so that ten steps are enough and any background possible."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


@torch.no_grad()
def encode_bank(
    bank: Bank, vae: AutoencoderKL, cache: Path, copies: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode every drawing and pose on `copies` backgrounds: latents float16 [m, 4, 16, 16], drawing and background [m].

    The processes share the work; the result is cached.
    """
    part = cache / f"latents-still-{rank()}-of-{world()}.safetensors"
    if not part.is_file():
        poses = bank.pixels.shape[1]
        index = torch.arange(len(bank.keys) * poses * copies)[rank() :: world()]
        generator, latents, backgrounds = torch.Generator().manual_seed(7 + rank()), [], []
        for chunk in index.split(64):
            drawing, pose = chunk // (poses * copies), chunk // copies % poses
            x, background = composite(bank.pixels[drawing, pose], bank.style[drawing], generator)
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.encode(x * 2 - 1).latent_dist.mean
            latents.append((z.float() * vae.config.scaling_factor).half())
            backgrounds.append(background)
        drawing = index // (poses * copies)
        save_file({"z": torch.cat(latents), "drawing": drawing, "background": torch.cat(backgrounds)}, part)
    data = load_file(part)
    return data["z"], data["drawing"], data["background"]


def train(bank: Bank, cache: Path, images: int, batch: int = 32) -> None:
    """Train on the latents of `cache/autoencoder`; write the pipeline to `cache/pipeline`."""
    join_processes()
    torch.manual_seed(0)
    folder = cache / "denoiser"
    vae = AutoencoderKL.from_pretrained(cache / "autoencoder").eval().requires_grad_(False)
    z, drawing, background = encode_bank(bank, vae, cache)
    if rank() == 0:  # one writes, the others read
        save_tokenizer(folder / "tokenizer")
    wait_for_all()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = Denoiser(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
    noise_scale = scheduler().alphas_cumprod
    weight = bank.weight[drawing]
    start = folder / "start.safetensors"  # weights to begin with, where there are any
    if start.is_file():
        model.load_state_dict(load_file(start))
    training = Training(model, folder / "training", images, batch, lr=4e-4, ema_decay=0.999)
    if rank() == 0:
        print(
            {k: sum(p.numel() for p in m.parameters()) for k, m in model.named_children()}, len(z), flush=True
        )

    def loss(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        which = torch.multinomial(weight, n, replacement=True, generator=generator)
        d = drawing[which]
        texts = [
            "" if rng.random() < UNCONDITIONAL else caption(a, s, v, b, rng)
            for a, s, v, b in zip(
                bank.animal[d].tolist(),
                bank.style[d].tolist(),
                bank.view[d].tolist(),
                background[which].tolist(),
                strict=True,
            )
        ]
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids
        x = z[which].float()
        noise = torch.randn(x.shape, generator=generator)
        # Stratified timesteps: every batch covers the whole range evenly.
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long().clamp(max=999)
        a = noise_scale[t][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            v = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, tokens).float()
        error = (v - (a.sqrt() * noise - (1 - a).sqrt() * x)).pow(2).mean()
        return {"loss": error}

    ema = training.run(loss)
    if rank() == 0:
        assemble(cache, ema)


def assemble(cache: Path, model: Denoiser | None = None) -> StableDiffusionPipeline:
    """Put the trained parts together as a stock pipeline folder, `cache/pipeline` (float16 weights)."""
    tokenizer = CLIPTokenizer.from_pretrained(cache / "denoiser" / "tokenizer")
    if model is None:
        model = Denoiser(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
        model.load_state_dict(load_file(cache / "denoiser" / "training" / "ema.safetensors"))
    decoder = cache / "decoder"
    vae = AutoencoderKL.from_pretrained(
        decoder if (decoder / "config.json").is_file() else cache / "autoencoder"
    )
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(cache / "pipeline")
    return pipeline
