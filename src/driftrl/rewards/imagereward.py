"""ImageReward (Xu et al. 2023, arXiv 2304.05977): a BLIP model that reads the prompt while it looks at the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.checks import InputError
from driftrl.gradients import on_demand
from driftrl.loading import demand_words
from driftrl.preprocess import preprocessing_of
from driftrl.rewards.aesthetic import head

WEIGHTS = "model.safetensors"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the network's output over the published data; the reward is standardised by them."""
LENGTH = 35
"""Tokens of a prompt: shorter ones are padded, longer ones cut."""
HEAD_WIDTH = 64
"""Of every attention head, in the image encoder (ViT-L) as in the text encoder (BERT base)."""
RENAMED = (
    ("blip.visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision_model.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision_model.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("blip.text_encoder.", "text_encoder."),
    ("mlp.layers.", "mlp."),
)
"""Parts of the published weights' names and what transformers calls them."""


class ImageReward:
    """How well people find that an image answers its prompt, about -2 to 2, 0 on average."""

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        dtype: str = "float32",
    ) -> None:
        """Load what `convert` wrote, and a BERT tokenizer beside it.

        Args:
            folder: where they are.
            device: where it computes.
            batch_size: images at once.
            dtype: ``bfloat16`` computes under autocast: weights and the last layers stay float32.

        Raises:
            InputError: if the weights are missing, or are others.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import BertTokenizer, BlipConfig

        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise InputError(
                f"reward: {folder} has no {WEIGHTS}; docs/rewards.md says how to make one of the published weights"
            )
        config: Any = BlipConfig.from_pretrained(folder)
        self.network = network(config)
        try:
            self.network.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: expected ImageReward's weights, converted: {reason}") from error
        self.network.to(device).eval().requires_grad_(False)
        self.tokenizer = demand_words(BertTokenizer.from_pretrained(folder), folder)
        self.device, self.batch_size, self.dtype = torch.device(device), batch_size, dtype
        self.preprocess = replace(
            preprocessing_of(folder, int(config.vision_config.image_size)), rounded=True
        )

    @on_demand
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1 against N prompts: float32 [N]."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        chunks = (x.split(self.batch_size) for x in (images, ids, mask))
        return torch.cat([self._score(*chunk) for chunk in zip(*chunks, strict=True)])

    def _score(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        pixels = self.preprocess(images.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            seen = self.network["vision_model"](pixel_values=pixels).last_hidden_state
            read = self.network["text_encoder"](
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
            ).last_hidden_state
        scores: Tensor = self.network["mlp"](read[:, 0].float())[:, 0]
        return (scores - MEAN) / STD


def network(config: Any) -> nn.ModuleDict:
    """Of a `BlipConfig`: BLIP's image encoder, its text encoder with cross-attention, and the layers on the first token."""
    from transformers import BlipTextModel, BlipVisionModel

    parts: dict[str, nn.Module] = {
        "vision_model": BlipVisionModel(config.vision_config),
        "text_encoder": BlipTextModel(config.text_config, add_pooling_layer=False),
        "mlp": head(config.text_config.hidden_size),
    }
    return nn.ModuleDict(parts)


def convert(published: Mapping[str, Tensor], folder: Path | str) -> None:
    """Write ``config.json`` and ``model.safetensors`` of the published weights; a tokenizer must join them.

    Args:
        published: what ``ImageReward.pt`` holds: tensors by the names of its authors' code. Sizes are read off them;
            what scoring does not need is left out.
        folder: where to write; made if it is not there.

    Raises:
        InputError: if something that scoring needs is missing.
    """
    from safetensors.torch import save_file

    try:
        config = _config_of(published)
    except (KeyError, IndexError) as error:
        raise InputError(f"ImageReward: expected the published weights, but they lack {error}") from error
    found = {_renamed(name): value.detach().float().contiguous() for name, value in published.items()}
    needed = {name: value.shape for name, value in network(config).state_dict().items()}
    wrong = [name for name, shape in needed.items() if name not in found or found[name].shape != shape]
    if wrong:
        raise InputError(
            f"ImageReward: expected the published weights, but {len(wrong)} of {len(needed)} tensors are missing or "
            f"of another shape; the first would become {wrong[0]}"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({name: found[name] for name in needed}, Path(folder) / WEIGHTS, {"format": "pt"})


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def _config_of(published: Mapping[str, Tensor]) -> Any:
    """Sizes as the tensors have them; what no tensor tells is as in the authors' code."""
    from transformers import BlipConfig

    def layers(prefix: str) -> int:
        return 1 + max(int(n.removeprefix(prefix).split(".")[0]) for n in published if n.startswith(prefix))

    image, text = "blip.visual_encoder", "blip.text_encoder"
    patch, places = (
        published[f"{image}.patch_embed.proj.weight"],
        published[f"{image}.pos_embed"].shape[1] - 1,
    )
    words, positions = (published[f"{text}.embeddings.{n}_embeddings.weight"] for n in ("word", "position"))
    inner = published[f"{text}.encoder.layer.0.intermediate.dense.weight"]
    vision_config: dict[str, Any] = {
        "hidden_size": len(patch),
        "intermediate_size": len(published[f"{image}.blocks.0.mlp.fc1.weight"]),
        "num_hidden_layers": layers(f"{image}.blocks."),
        "num_attention_heads": len(patch) // HEAD_WIDTH,
        "image_size": patch.shape[-1] * round(places**0.5),
        "patch_size": patch.shape[-1],
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    text_config: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": words.shape[1],
        "encoder_hidden_size": len(patch),
        "intermediate_size": len(inner),
        "num_hidden_layers": layers(f"{text}.encoder.layer."),
        "num_attention_heads": words.shape[1] // HEAD_WIDTH,
        "max_position_embeddings": len(positions),
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "is_decoder": True,  # transformers' name for having cross-attention
    }
    return BlipConfig(text_config=text_config, vision_config=vision_config)
