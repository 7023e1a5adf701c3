"""Grids of pictures, as people look at them: labelled rows, candidates that were learned from marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

LONGEST = 60
"""Letters of a label."""
SMALLEST, LARGE, CANDIDATE = 72, 256, 128
"""Pixels of a picture's longer side in a grid: at least; at most; at most where all candidates are shown."""
KEPT, PAPER, INK, FAINT = (34, 139, 94), (255, 255, 255), (30, 30, 34), (120, 120, 128)


def pixels(images: Tensor) -> Tensor:
    """Images in 0..1 as uint8; those that are uint8 already as they are."""
    return images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One image [3, H, W] in 0..1, or uint8, as a PIL image."""
    return Image.fromarray(pixels(image).permute(1, 2, 0).cpu().numpy())


def grid(rows: Sequence[Tensor], labels: Sequence[str], title: str = "") -> Image.Image:
    """Rows of images [n, 3, H, W] with a label before each row."""
    return _draw(rows, labels, LARGE, title, [set()] * len(rows), None)


def candidates_grid(images: Tensor, prompts: Sequence[str], rewards: Tensor, chosen: Tensor) -> Image.Image:
    """All candidates [P, N, 3, H, W], best reward first; those that were learned from are framed in green."""
    order = rewards.argsort(dim=1, descending=True).cpu()
    rows = [images[p][order[p].to(images.device)] for p in range(len(prompts))]
    marks = []
    for p in range(len(prompts)):
        kept = set(chosen[p].tolist())
        marks.append({k for k, n in enumerate(order[p].tolist()) if n in kept})
    figures = [[float(rewards[p, n]) for n in order[p].tolist()] for p in range(len(prompts))]
    return _draw(
        rows, prompts, CANDIDATE, "candidates, best reward first; framed: learned from", marks, figures
    )


def beside(
    left: Sequence[Tensor], right: Sequence[Tensor], labels: Sequence[str], names: tuple[str, str]
) -> Image.Image:
    """Two sets of rows side by side, row by row the same prompt and seeds."""
    a, b = grid(left, labels, title=names[0]), grid(right, [""] * len(labels), title=names[1])
    sheet = Image.new("RGB", (a.width + b.width, max(a.height, b.height)), PAPER)
    sheet.paste(a, (0, 0))
    sheet.paste(b, (a.width, 0))
    return sheet


def _cell(rows: Sequence[Tensor], largest: int) -> tuple[int, int]:
    """Width and height of a picture in a grid, in the proportions that it has."""
    height, width = next((row.shape[-2:] for row in rows if len(row)), (SMALLEST, SMALLEST))
    scale = min(max(height, width, SMALLEST), largest) / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def image_folder(place: int, prompt: str) -> str:
    """Name of the folder of a prompt's images: its place, and what fits of its words."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    return f"{place:03d}-{words}"


def _shortened(label: str) -> str:
    """A label that leaves room for the pictures."""
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def save_png(image: Image.Image, path: Path, told: Mapping[str, object] | None = None) -> None:
    """Write a PNG, whole or not at all; ``told`` is kept in it as text, which ``Image.open(path).text`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    text = PngInfo()
    for key, value in (told or {}).items():
        text.add_itxt(key, str(value))
    image.save(temporary, "PNG", optimize=False, pnginfo=text)
    temporary.replace(path)


def _font(size: float, texts: Sequence[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, which has English letters alone, or where those are not enough another one."""
    if all(text.rstrip("\N{HORIZONTAL ELLIPSIS}").isascii() for text in texts):
        return ImageFont.load_default(size)
    from driftrl.fonts import font_file

    return ImageFont.truetype(font_file(texts), size)


def _draw(
    rows: Sequence[Tensor],
    labels: Sequence[str],
    largest: int,
    title: str,
    marks: Sequence[set[int]],
    figures: Sequence[Sequence[float]] | None,
) -> Image.Image:
    small = ImageFont.load_default(10)
    font = _font(13, [*labels, title])
    labels = [_shortened(label) for label in labels]
    gap, top = 4, 26 if title else 4
    across, down = _cell(rows, largest)
    line = down + gap + (13 if figures else 0)
    width = max((int(font.getlength(label)) for label in labels), default=0)
    left = width + 14 if width else gap
    columns = max((len(row) for row in rows), default=0)
    sheet = Image.new("RGB", (left + columns * (across + gap) + gap, top + len(rows) * line + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((gap + 2, 6), title, INK, font)
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + r * line
        pen.text((6, y + down // 2 - 8), label, INK, font)
        for k, image in enumerate(row):
            x = left + k * (across + gap)
            sheet.paste(to_pil(image).resize((across, down), Image.Resampling.LANCZOS), (x, y))
            if k in marks[r]:
                pen.rectangle((x - 2, y - 2, x + across + 1, y + down + 1), outline=KEPT, width=2)
            if figures:
                pen.text((x, y + down), f"{figures[r][k]:.2f}", KEPT if k in marks[r] else FAINT, small)
    return sheet
