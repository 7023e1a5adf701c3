"""Images as a network wants them, by its own ``preprocessor_config.json``: resized, cropped, normalised.

No torchvision, no detour through PIL: the images stay where they are. Resizing gives the very numbers of PIL, which
the networks' own code calls, so that scores agree with theirs to float32's rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from driftrl.gradients import asked

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODES = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers for ways to resample; others are taken as bicubic."""
REACH = {"bilinear": 1.0, "bicubic": 2.0}
"""How far a filter looks, in pixels of the smaller picture."""
UNIT = 2**22
"""PIL's weights are whole numbers, that many to one."""


@dataclass(frozen=True)
class Preprocessing:
    """What happens to images [N, 3, H, W] in 0..1 before a network sees them."""

    resize: int | tuple[int, int] | None
    """The length of the shorter side (with ``pad`` of the longer one), or (height, width) whatever the aspect; None
    leaves the size alone."""
    crop: tuple[int, int] | None
    """(height, width) cut from the centre."""
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    pad: bool = False
    """Instead of a crop: the whole picture, black around it to a square of side ``resize``."""
    rounded: bool = False
    """Where there is no middle, the crop begins at the even one of two places, as torchvision has it; else at the
    first, as transformers has it."""

    def __call__(self, images: Tensor) -> Tensor:
        """Resize with antialiasing, crop or pad, normalise: float32 [N, 3, height, width].

        Pictures that are resized become 8-bit ones first, as the networks' own code has them (`resized`); with
        ``pad`` they do not, for the code that pads (HPSv2's) resizes floats. Others keep their floats.
        """
        x = images.float()
        target = self._target(x.shape[-2], x.shape[-1])
        if target != tuple(x.shape[-2:]):
            if self.pad:
                x = F.interpolate(x, target, mode=self.mode, antialias=True, align_corners=False)
            else:
                x = resized(x, target, self.mode)
        if self.pad and isinstance(self.resize, int):
            down, right = self.resize - x.shape[-2], self.resize - x.shape[-1]
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        if self.crop is not None:
            spare = x.shape[-2] - self.crop[0], x.shape[-1] - self.crop[1]
            top, left = (round(s / 2) if self.rounded else s // 2 for s in spare)
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        if self.pad:
            scale = self.resize / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        short, long = sorted((height, width))
        side = int(self.resize * long / short)  # rounded down, as torchvision and transformers do
        return (self.resize, side) if height <= width else (side, self.resize)


def resized(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Pictures as `PIL.Image.resize` makes them of the same 8-bit pictures, to the last bit where the aspect is kept.

    Two passes of weighted sums, rounded to whole levels after each, with PIL's whole-number weights. Where the aspect
    is not kept, new releases of PIL may take the passes in the other order, and round some pixels differently. On MPS,
    which has no float64, a level may be off by one in a few pixels of a million. Gradients, where they are asked for, are those without rounding.

    Args:
        images: [N, 3, H, W] in 0..1, rounded here to 256 levels.
        size: (height, width).
        mode: ``bilinear`` or ``bicubic``.

    Returns:
        float32 [N, 3, height, width] in 0..1, multiples of 1/255.

    Source: Pillow, ``src/libImaging/Resample.c`` (what it computes; written anew).

    Example:
        >>> import torch
        >>> from driftrl.preprocess import resized
        >>> (resized(torch.tensor([[[[0.0, 1.0, 0.5, 0.5]]]]), (1, 2)) * 255).round()
        tensor([[[[128., 148.]]]])
    """
    wide = torch.float32 if images.device.type == "mps" else torch.float64
    x = _through((images.clamp(0, 1) * 255).to(wide), torch.round)
    height, width = images.shape[-2:]
    if width != size[1]:
        x = _levels(x @ _weights(width, size[1], mode).to(x.device, wide).T)
    if height != size[0]:
        x = _levels(_weights(height, size[0], mode).to(x.device, wide) @ x)
    return (x / 255).float()


def _levels(sums: Tensor) -> Tensor:
    return _through(sums / UNIT, lambda x: ((x * UNIT + UNIT // 2) / UNIT).floor()).clamp(0, 255)


def _through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """``rounded(x)``, whose gradient is taken for that of x: a staircase has none of its own."""
    return x + (rounded(x) - x).detach() if asked(x) else rounded(x)


@lru_cache(16)
def _weights(length: int, target: int, mode: str) -> Tensor:
    """What each of ``length`` pixels weighs in each of ``target`` ones: float64 [target, length], whole numbers."""
    scale = length / target
    stretch = max(scale, 1.0)
    reach = REACH[mode] * stretch
    weights = torch.zeros(target, length, dtype=torch.float64)
    for place in range(target):
        centre = (place + 0.5) * scale
        first, last = max(0, int(centre - reach + 0.5)), min(length, int(centre + reach + 0.5))
        own = [_filter((pixel - centre + 0.5) / stretch, mode) for pixel in range(first, last)]
        whole = sum(own)
        weights[place, first:last] = torch.tensor(
            [math.copysign(math.floor(abs(w / whole) * UNIT + 0.5), w) for w in own], dtype=torch.float64
        )
    return weights


def _filter(x: float, mode: str) -> float:
    """The triangle, or Keys' cubic with a = -1/2."""
    x = abs(x)
    if mode == "bilinear":
        return max(0.0, 1.0 - x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def preprocessing_of(name: Path | str, size: int | None) -> Preprocessing:
    """What a model's ``preprocessor_config.json`` asks for, in a folder or on the hub.

    Args:
        name: folder or hub name.
        size: of the model's input, used with CLIP's statistics where there is no such file; None leaves images
            as large as they are.
    """
    path = _find(name)
    if path is None:
        return Preprocessing(size, None if size is None else (size, size))
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    resize = _size(settings.get("size")) if settings.get("do_resize", True) else None
    crop = _square(_size(settings.get("crop_size"))) if settings.get("do_center_crop") else None
    if (
        "crop_pct" in settings and isinstance(resize, int) and resize < 384
    ):  # ConvNeXt's convention, and ResNet's
        resize, crop = int(resize / (settings["crop_pct"] or 224 / 256)), (resize, resize)
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    return Preprocessing(
        resize, crop, tuple(mean), tuple(std), MODES.get(settings.get("resample", 3), "bicubic")
    )


def _find(name: Path | str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / "preprocessor_config.json"
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(name), "preprocessor_config.json")
    except OSError:
        return None
    return None if found is None else Path(found)


def _size(value: Any) -> int | tuple[int, int] | None:
    """A size as the files have it: a number, or a mapping."""
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return int(value["shortest_edge"])
        if "height" in value and "width" in value:
            return int(value["height"]), int(value["width"])
        return None
    return None if value is None else int(value)


def _square(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size
