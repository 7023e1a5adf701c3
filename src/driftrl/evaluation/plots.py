"""Small line plots as inline SVG, coloured by the page's style sheet so that light and dark both fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

from driftrl.evaluation.page import COLOURS

WIDTH, HEIGHT = 372, 282
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 44
DIGIT = 7.5
"""About the width of a digit of a tick's label."""
MARKS = 4
"""Shapes of points; with colour they tell methods apart."""


@dataclass(frozen=True)
class Line:
    """A path of points in order."""

    points: Sequence[tuple[float, float]]
    colour: int = 0
    """Number of the page's colour, or of the method where there are more of these; -1 is the base model's."""
    stroke: str = "path"
    """CSS class of the path: 'path', 'faint', 'bold', or 'none' for points only."""
    tips: Sequence[str] = ()
    """What hovering over each point shows; without, no points are drawn."""
    names: dict[int, str] = field(default_factory=dict)
    """Text beside some points, by their number."""
    spread: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)
    """Whiskers of some points: (x low, x high, y low, y high)."""
    band: Sequence[tuple[float, float]] = ()
    """Low and high of each point, as a shaded band."""


def plot(
    lines: Sequence[Line],
    x_label: str,
    description: str,
    corner: str = "",
    integer_x: bool = False,
) -> Markup:
    """An SVG element with axes that fit all points.

    Args:
        lines: drawn in order; points that are not finite are left out.
        x_label: under the horizontal axis.
        description: what the plot shows, for those who do not see it.
        corner: a short hint in the lower right corner, where nothing is drawn.
        integer_x: whether ticks of the horizontal axis are whole numbers.
    """
    xs, ys = _extent(lines)
    x_ticks, y_ticks = ticks(*xs, integer=integer_x), ticks(*ys)
    x_low, x_high = _padded(*xs)
    y_low, y_high = _padded(*ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
    ]
    for tick in y_ticks:
        _, y = at(x_low, tick)
        if TOP - 1 <= y <= HEIGHT - BOTTOM + 1:
            parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(tick, y_ticks)}</text>'
            )
    for tick in x_ticks:
        x, _ = at(tick, y_low)
        if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
            parts.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v5"/>')
            text = label(tick, x_ticks)
            across, anchor = (WIDTH, "end") if x + DIGIT * len(text) / 2 > WIDTH else (x, "middle")
            parts.append(
                f'<text class="tick" x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{text}</text>'
            )
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    beside = bool(corner) and middle + DIGIT * len(x_label) / 2 > WIDTH - RIGHT - DIGIT * len(corner)
    across, anchor = (0.0, "start") if beside else (middle, "middle")
    parts.append(
        f'<text class="label" x="{across}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(x_label)}</text>'
    )
    if corner:
        parts.append(
            f'<text class="hint" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(corner)}</text>'
        )
    marks = [at(*line.points[k]) for line in lines for k in range(len(line.tips)) if _finite(line.points[k])]
    for line in lines:
        parts += _draw(line, at, marks)
    parts.append("</svg>")
    return Markup("".join(parts))  # every text in it is escaped above


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _clear(x: float, y: float, text: str, marks: Sequence[tuple[float, float]]) -> tuple[float, float, str]:
    """Where a name about a point covers fewest marks: above it, below, or on its right; and its anchor."""
    wide = DIGIT * len(text)
    places = [(x, y - 10, "middle"), (x, y + 20, "middle"), (x + 10, y + 4, "start")]

    def covered(place: tuple[float, float, str]) -> int:
        left = place[0] - (wide / 2 if place[2] == "middle" else 0)
        return sum(left - 4 <= u <= left + wide + 4 and place[1] - 13 <= v <= place[1] + 4 for u, v in marks)

    return min((place for place in places if place[1] < HEIGHT - BOTTOM), key=covered)


def _draw(
    line: Line, place: Callable[[float, float], tuple[float, float]], marks: list[tuple[float, float]]
) -> list[str]:
    colour = _class(line.colour)
    parts = []
    finite = [k for k, point in enumerate(line.points) if _finite(point)]
    where = {k: place(*line.points[k]) for k in finite}
    if line.band and len(finite) > 1:
        x_of = {k: line.points[k][0] for k in finite}
        upper = [place(x_of[k], line.band[k][1]) for k in finite]
        lower = [place(x_of[k], line.band[k][0]) for k in reversed(finite)]
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *lower])
        parts.append(f'<polygon class="band {colour}" points="{outline}"/>')
    if line.stroke != "none" and len(finite) > 1:
        route = " ".join(f"{x:.1f},{y:.1f}" for x, y in where.values())
        parts.append(f'<polyline class="{line.stroke} {colour}" points="{route}"/>')
    for k, (x_low, x_high, y_low, y_high) in line.spread.items():
        if k not in where:
            continue
        x, y = line.points[k]
        (x1, _), (x2, _), (_, y1), (_, y2) = (
            place(x_low, y),
            place(x_high, y),
            place(x, y_low),
            place(x, y_high),
        )
        px, py = where[k]
        parts.append(
            f'<path class="whisker {colour}" d="M{x1:.1f} {py:.1f}H{x2:.1f}M{px:.1f} {y1:.1f}V{y2:.1f}"/>'
        )
    for k, tip in enumerate(line.tips):
        if k in where:
            named = k in line.names
            parts.append(_mark(where[k], line.colour, 5.5 if named else 3.5, tip))
    for k, name in line.names.items():
        if k in where:
            x, y = where[k]
            anchor, x = ("end", x - 9) if x > WIDTH * 0.7 else ("start", x + 9)
            y = y + 17 if y < TOP + 26 else y - 9
            if line.colour < 0:  # the base model is often the leftmost: clear of the ticks' labels
                x, y, anchor = _clear(*where[k], name, marks)
            parts.append(
                f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
            )
            wide = DIGIT * len(name)
            left = x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
            marks += [(left + k * wide / 8, y - 5) for k in range(9)]  # the next name keeps clear of this one
    return parts


def _class(number: int) -> str:
    """The style sheet's name of a colour."""
    return "cb" if number < 0 else f"c{number % COLOURS}"


def _mark(where: tuple[float, float], number: int, r: float, tip: str) -> str:
    (x, y), colour = where, _class(number)
    # After as many methods as there are colours shapes go on by one: so no two of 64 are alike.
    shape = 0 if number < 0 else (number + number // COLOURS) % MARKS
    if shape == 0:
        body = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    elif shape == 1:
        body = f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"/>'
    elif shape == 2:
        body = f'<path d="M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}z"/>'
    else:
        body = f'<path d="M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {-1.3 * r:.1f}z"/>'
    return f'<g class="mark {colour}">{body}<title>{escape(tip)}</title></g>'


def ticks(low: float, high: float, count: int = 5, integer: bool = False) -> list[float]:
    """About ``count`` round numbers that span [low, high].

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    if integer:
        step = max(1.0, round(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]


def label(value: float, among: Sequence[float]) -> str:
    """A tick's text, with as many decimals as its neighbours need."""
    step = min((b - a for a, b in pairwise(among)), default=abs(value) or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:.{min(decimals, 8)}f}".replace("-", "\N{MINUS SIGN}")


def _extent(lines: Sequence[Line]) -> tuple[tuple[float, float], tuple[float, float]]:
    xs, ys = [], []
    for line in lines:
        for k, (x, y) in enumerate(line.points):
            if not _finite((x, y)):
                continue
            xs.append(x)
            ys += [y, *(line.band[k] if line.band else ())]
            if k in line.spread:
                xs += line.spread[k][:2]
                ys += line.spread[k][2:]
    if not xs:
        return (0.0, 1.0), (0.0, 1.0)
    return _opened(min(xs), max(xs)), _opened(min(ys), max(ys))


def _opened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around a single value."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-12):
        return low, high
    half = 0.05 * abs(low) or 0.5
    return low - half, high + half


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low)
    return low - margin, high + margin
