"""The LAION aesthetic predictor, the aesthetic reward of DDPO (arXiv 2305.13301, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.checks import InputError
from driftrl.preprocess import preprocessing_of

HEAD = "aesthetic.safetensors"
WIDTHS = (1024, 128, 64, 16, 1)


def head(width: int) -> nn.Sequential:
    """The predictor's linear layers on CLIP embeddings [N, width], numbered as in the published weights.

    There are no activations between them; dropout does nothing when scoring.
    """
    sizes = (width, *WIDTHS)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if number < len(WIDTHS) - 2:
            layers.append(nn.Dropout())
    return nn.Sequential(*layers)


class AestheticReward:
    """How beautiful people find an image, about 1 to 10; the prompt does not matter."""

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        """Load from a folder: a CLIP model (ViT-L/14) and ``aesthetic.safetensors``, in float32.

        Raises:
            InputError: if one of them is missing or they do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import CLIPModel

        path = Path(folder) / HEAD
        if not path.is_file():
            raise InputError(
                f"reward: {folder} has no {HEAD}; docs/rewards.md says how to make one of the published weights"
            )
        model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.head = head(int(model.config.projection_dim)).to(device).eval().requires_grad_(False)
        try:
            weights = load_file(path)
            self.head.load_state_dict({k.removeprefix("layers."): v.float() for k, v in weights.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: expected the predictor's five linear layers: {reason}") from error
        self.device, self.batch_size = torch.device(device), batch_size
        self.preprocess = preprocessing_of(folder, int(model.config.vision_config.image_size))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1: float32 [N]."""
        scores = []
        for chunk in images.split(self.batch_size):
            pooled = self.model.vision_model(
                pixel_values=self.preprocess(chunk.to(self.device))
            ).pooler_output
            embeds = nn.functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)
            scores.append(self.head(embeds)[:, 0])
        return torch.cat(scores)
