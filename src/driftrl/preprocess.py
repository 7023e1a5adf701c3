"""Images as a network wants them: resized with antialiasing, cropped to a square, normalised. No torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Resize the shorter side to ``size`` (bicubic, antialiased), crop the centre, normalise.

    Args:
        images: float [N, 3, H, W] in 0..1.
        size: of the square that comes out.
        mean: per channel.
        std: per channel.

    Returns:
        float32 [N, 3, size, size].
    """
    height, width = images.shape[-2:]
    x = images.float()
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
        x = F.interpolate(x, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    x = x[..., top : top + size, left : left + size]
    return (x - torch.tensor(mean, device=x.device).view(3, 1, 1)) / torch.tensor(std, device=x.device).view(
        3, 1, 1
    )


def statistics(folder: Path | str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std from a model folder's ``preprocessor_config.json``; CLIP's where it has none."""
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        return CLIP_MEAN, CLIP_STD
    settings = json.loads(path.read_text("utf-8"))
    return tuple(settings.get("image_mean", CLIP_MEAN)), tuple(settings.get("image_std", CLIP_STD))
