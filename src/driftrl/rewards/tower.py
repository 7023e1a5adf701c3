"""A CLIP model that embeds images and prompts, shared by every reward that stands on it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.gradients import asked, on_demand
from driftrl.loading import demand_words, load_whole
from driftrl.preprocess import preprocessing_of

PROMPTS_KEPT = 4096
"""Prompts whose embeddings are kept; of more, those that were not asked for longest go."""
WORDS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Where the tokenizer comes from if the model brings none: it is that of every published CLIP, and PickScore's model
card takes it from here."""


class CLIPTower:
    """Unit embeddings by a `transformers.CLIPModel`, in float32 or with its image part in bfloat16.

    Asked about the same images again, as by several rewards in turn, it answers from memory; each prompt is embedded
    once, in float32.
    """

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        dtype: str = "float32",
        pad: bool = False,
    ) -> None:
        """Load the model from a folder or the hub.

        Args:
            folder: where model, tokenizer and ``preprocessor_config.json`` are.
            device: where it computes.
            batch_size: images, or prompts, at once.
            dtype: ``bfloat16`` embeds images under autocast: weights and what comes out stay float32.
            pad: pictures that are not square are padded with black, not cropped.

        Raises:
            InputError: if weights are missing.
            OSError: if there is no such model in safetensors.
        """
        from transformers import CLIPModel

        self.model: Any = load_whole(CLIPModel, folder).to(device).eval().requires_grad_(False)
        self.folder, self.device, self.batch_size, self.dtype = (
            folder,
            torch.device(device),
            batch_size,
            dtype,
        )
        size = int(self.model.config.vision_config.image_size)
        self.preprocess = preprocessing_of(folder, size)
        if pad:
            self.preprocess = replace(self.preprocess, resize=size, crop=None, pad=True)
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, or that of every published CLIP.

        Raises:
            InputError: if neither can be had, or the latter does not fit.
        """
        from transformers import CLIPTokenizer

        try:
            found = demand_words(CLIPTokenizer.from_pretrained(self.folder), self.folder)
        except (OSError, InputError) as lack:
            try:
                found = demand_words(CLIPTokenizer.from_pretrained(WORDS), WORDS)
            except (OSError, InputError) as error:
                raise InputError(
                    f"reward: {self.folder} has no tokenizer, and that of {WORDS} cannot be had either; copy "
                    "tokenizer.json and tokenizer_config.json of a CLIP there"
                ) from error
            if len(found) != int(self.model.config.text_config.vocab_size):
                raise InputError(
                    f"reward: {self.folder} has no tokenizer, and CLIP's does not fit it"
                ) from lack
        return found

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return int(self.model.config.projection_dim)

    @property
    def scale(self) -> Tensor:
        """``exp(logit_scale)``."""
        return self.model.logit_scale.exp()

    @on_demand
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors float32 [N, D] of images [N, 3, H, W] in 0..1; embedded anew where they have a gradient coming."""
        if asked(images):
            return torch.cat([self._embed(chunk.to(self.device)) for chunk in images.split(self.batch_size)])
        # The very tensor, unchanged since: `_version` counts what is written into it.
        version = -1 if images.is_inference() else images._version
        if self._last is not None and self._last[0]() is images and self._last[1] == version >= 0:
            return self._last[2]
        embeds = torch.cat([self._embed(chunk.to(self.device)) for chunk in images.split(self.batch_size)])
        self._last = (weakref.ref(images), version, embeds)
        return embeds

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [N, D] of N prompts."""
        asked = list(dict.fromkeys(prompts))
        new = [prompt for prompt in asked if prompt not in self._texts]
        for start in range(0, len(new), self.batch_size):
            chunk = new[start : start + self.batch_size]
            tokens = self.tokenizer(
                chunk,
                padding="max_length",
                truncation=True,
                max_length=int(self.model.config.text_config.max_position_embeddings),
                return_tensors="pt",
            ).to(self.device)
            pooled = self.model.text_model(**tokens).pooler_output
            self._texts.update(zip(chunk, _unit(self.model.text_projection(pooled)), strict=True))
        for prompt in asked:
            self._texts.move_to_end(prompt)
        embeds = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > PROMPTS_KEPT:
            self._texts.popitem(last=False)
        return embeds

    def _embed(self, images: Tensor) -> Tensor:
        pixels = self.preprocess(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            embeds = self.model.visual_projection(pooled)
        return _unit(embeds)


def _unit(embeds: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeds.float(), dim=-1)
