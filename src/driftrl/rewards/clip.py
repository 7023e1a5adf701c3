"""A CLIP model as reward: how well an image matches its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import one_of
from driftrl.preprocess import preprocessing_of

KINDS = ("pickscore", "hpsv2", "clipscore")
CLIPSCORE_WEIGHT, CLIPSCORE_PREFIX = 2.5, "A photo depicts "


class CLIPReward:
    """A `transformers.CLIPModel`'s cosine of image and prompt, as PickScore, HPSv2 or CLIPScore scale it.

    - ``pickscore``: ``exp(logit_scale) cosine`` (arXiv 2305.01569, section 4; the embedded reward is of this kind);
    - ``hpsv2``: the cosine itself (arXiv 2306.09341; its published code leaves the scale out);
    - ``clipscore``: ``2.5 max(cosine, 0)``, the prompt behind "A photo depicts" (arXiv 2104.08718, section 3).

    Each prompt is embedded once and kept. Also gives the image embeddings, for CLIP diversity.
    """

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        kind: str = "pickscore",
    ) -> None:
        """Load model and tokenizer from a folder or the hub, in float32.

        Raises:
            InputError: for a kind that does not exist.
        """
        from transformers import CLIPModel, CLIPTokenizer

        self.kind = one_of("kind", kind, KINDS)
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
        cosine = (image * text).sum(-1)
        if self.kind == "clipscore":
            return CLIPSCORE_WEIGHT * cosine.clamp(min=0)
        return cosine if self.kind == "hpsv2" else self.model.logit_scale.exp() * cosine

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
            prefix = CLIPSCORE_PREFIX if self.kind == "clipscore" else ""
            tokens = self.tokenizer(
                [prefix + prompt for prompt in new],
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.device)
            pooled = self.model.text_model(**tokens).pooler_output
            embeds = torch.nn.functional.normalize(self.model.text_projection(pooled).float(), dim=-1)
            self._texts.update(zip(new, embeds, strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])
