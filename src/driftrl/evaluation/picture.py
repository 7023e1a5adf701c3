"""One PNG that says what a report says: rows of pictures, side by side on the same seeds, and charts beside them."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

INK, MUTED, RULE = "#23211d", "#6b665d", "#e2dcd0"
COLOURS = ("#0f766e", "#c2571a", "#6a4fb0", "#b0305f", "#2f70b3", "#6f7015")
"""Of methods, as on the pages (assets/look.css)."""


@dataclass(frozen=True)
class Side:
    """A model's pictures."""

    name: str
    colour: str
    rows: list[list[Image.Image]]
    """A list of pictures for each prompt."""


@dataclass(frozen=True)
class Stroke:
    """A line of a chart."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.8
    alpha: float = 1.0
    marker: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis."""

    title: str
    below: str
    """What the horizontal axis is."""
    strokes: Sequence[Stroke]
    whole: bool = False
    """Whether its horizontal axis counts something: ticks are whole numbers."""


def draw(path: Path, prompts: Sequence[str], sides: Sequence[Side], charts: Sequence[Chart]) -> Path:
    """Write the PNG, whole or not at all: a row for each prompt, a block for each side, charts at the right."""
    from matplotlib import rc_context

    from driftrl.fonts import families

    with rc_context({"font.family": families()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # scripts that no font here has, emoji
        return _draw(path, prompts, sides, charts)


def _draw(path: Path, prompts: Sequence[str], sides: Sequence[Side], charts: Sequence[Chart]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max((len(row) for side in sides for row in side.rows), default=0)
    cell, gap, left, top = 0.62, 0.28, 1.5, 0.42
    block, tall = columns * cell, max(len(prompts) * cell, 1.2 * len(charts))  # room for their axes
    beside = 2.75 if charts else 0.0
    width, height = left + len(sides) * (block + gap) + beside + 0.1, top + tall + 0.12
    figure = Figure(figsize=(width, height), dpi=150, facecolor="#ffffff")
    FigureCanvasAgg(figure)
    for s, side in enumerate(sides):
        x0 = left + s * (block + gap)
        figure.text(
            x0 / width,
            1 - 0.27 / height,
            side.name,
            color=side.colour,
            fontsize=11,
            weight="bold",
            parse_math=False,
        )
        for r, row in enumerate(side.rows):
            for c, picture in enumerate(row):
                corner = ((x0 + c * cell) / width, 1 - (top + (r + 1) * cell) / height)
                axes = figure.add_axes((*corner, (cell - 0.04) / width, (cell - 0.04) / height))
                axes.imshow(picture, interpolation="lanczos")
                axes.set_axis_off()
    for r, prompt in enumerate(prompts):
        y = 1 - (top + (r + 0.5) * cell) / height
        lines = "\n".join(textwrap.wrap(" ".join(prompt.split()), 17, max_lines=3, placeholder="\u2026"))
        label = figure.text(
            (left - 0.12) / width, y, lines, ha="right", va="center", fontsize=9, color=INK, parse_math=False
        )
        room, taken = left - 0.18, label.get_window_extent().width / figure.dpi
        label.set_fontsize(9 * min(1.0, room / max(room, taken)))
    for k, chart in enumerate(charts):
        x0 = left + len(sides) * (block + gap) + 0.55
        each = max(0.2, (tall - 0.75 * len(charts)) / len(charts))
        y0 = height - top - (k + 1) * each - k * 0.75 - 0.08
        _chart(figure.add_axes((x0 / width, y0 / height, (beside - 0.65) / width, each / height)), chart)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", facecolor="#ffffff")
    temporary.replace(path)
    return path


def _chart(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    for stroke in chart.strokes:
        axes.plot(*zip(*stroke.points, strict=True), color=stroke.colour, alpha=stroke.alpha, linewidth=stroke.width,
                  marker=stroke.marker or None, markersize=3.5)  # fmt: skip
    axes.set_title(chart.title, fontsize=10, color=INK, loc="left")
    if chart.whole:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(chart.below, fontsize=8, color=MUTED, labelpad=2)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    for edge, spine in axes.spines.items():
        spine.set_visible(edge == "bottom")
        spine.set_color("#bdb6a8")
