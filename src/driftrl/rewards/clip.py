"""A CLIP model as reward: how well an image matches its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.preprocess import preprocessing_of


class CLIPReward:
    """``exp(logit_scale) * cosine(image, text)`` under a `transformers.CLIPModel`, as PickScore has it.

    Each prompt is embedded once and kept. Also gives the image embeddings, for CLIP diversity.
    """

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        """Load model and tokenizer from a folder or the hub, in float32."""
        from transformers import CLIPModel, CLIPTokenizer

        model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.device, self.batch_size = torch.device(device), batch_size
        self.preprocess = preprocessing_of(folder, int(self.model.config.vision_config.image_size))
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1 against N prompts: float32 [N]."""
        image, text = self.embed_images(images), self.embed_prompts(prompts)
        return self.model.logit_scale.exp() * (image * text).sum(-1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors float32 [N, D] of images [N, 3, H, W] in 0..1."""
        parts = []
        for chunk in images.split(self.batch_size):
            pixels = self.preprocess(chunk.to(self.device))
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            parts.append(torch.nn.functional.normalize(self.model.visual_projection(pooled).float(), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [N, D] of N prompts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            tokens = self.tokenizer(
                new, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
            ).to(self.device)
            pooled = self.model.text_model(**tokens).pooler_output
            embeds = torch.nn.functional.normalize(self.model.text_projection(pooled).float(), dim=-1)
            self._texts.update(zip(new, embeds, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])
