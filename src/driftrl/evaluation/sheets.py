"""Sheets of pictures beside an evaluation, for reports: small, and read again picture by picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from driftrl.pictures import to_pil

SHOWN, CELL = 16, 128
"""Images per prompt on a sheet for reports, and the greatest side of each in pixels."""


def save_sheet(images: Tensor, path: Path) -> None:
    """The first images [n, 3, H, W] in rows of four without gaps, as a small WebP."""
    pictures = [to_pil(image) for image in images[:SHOWN]]
    scale = min(1.0, CELL / max(pictures[0].size))
    width, height = (max(1, round(side * scale)) for side in pictures[0].size)
    columns = sheet_columns(len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for k, picture in enumerate(pictures):
        small = picture if scale == 1.0 else picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small, ((k % columns) * width, (k // columns) * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "WEBP", quality=88, method=4)


def sheet_columns(count: int) -> int:
    """Columns of a sheet of ``count`` images."""
    return min(4, count)


def sheet_cells(sheet: Path, images: int) -> list[Image.Image]:
    """The single images of a sheet; none if it is not there."""
    try:
        with Image.open(sheet) as file:
            whole = file.convert("RGB")
    except OSError:
        return []
    count = min(SHOWN, images)
    columns = sheet_columns(count)
    width, height = whole.width // columns, whole.height // -(-count // columns)
    corners = [((k % columns) * width, (k // columns) * height) for k in range(count)]
    return [whole.crop((x, y, x + width, y + height)) for x, y in corners]
