"""JPEG compressibility and incompressibility: DDPO's rewards that need no model (arXiv 2305.13301, section 5)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def jpeg_size(images: Tensor, quality: int = 95) -> Tensor:
    """Kilobytes of each image [N, 3, H, W] in 0..1 as a JPEG: float32 [N]."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def compressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Minus the JPEG size in kilobytes: float32 [N]; the prompts do not matter."""
    return -jpeg_size(images)


def incompressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The JPEG size in kilobytes: float32 [N]; the prompts do not matter."""
    return jpeg_size(images)
