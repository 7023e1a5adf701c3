"""Comparing methods in the reward-diversity plane: fronts, gains at equal level, hypervolume, intervals.

A method's curve is a set of points (reward, diversity), one per evaluated checkpoint, both to be maximised.
Points may be a tensor, an array or nested sequences of shape [n, 2]; all arithmetic is float64. Magnitudes of 1e150 and
above are refused: areas of such sizes are not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from driftrl.checks import InputError, one_of, whole_number

Array: TypeAlias = NDArray[np.float64]
Points: TypeAlias = Tensor | NDArray[Any] | Sequence[Sequence[float]]
Numbers: TypeAlias = Tensor | NDArray[Any] | Sequence[float]

AXES = ("reward", "diversity")
LARGEST = 1e150
"""Of the magnitudes that can be compared: differences, means and areas of smaller ones are finite."""
DRAWN = 2**20
"""Values that a bootstrap draws at a time: 16 MiB of them and their indices."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What curve A has over curve B at equal level of one axis; ``float(gain)`` is ``absolute``.

    Attributes:
        gained: axis the gain is measured on, "reward" or "diversity".
        held: axis held equal, the other one.
        absolute: mean of A - B over the shared range of the held axis.
        relative: ``absolute`` over the magnitude of B's mean there; None where that mean is 0.
        smallest: least A - B in the range; below 0 while ``largest`` is above it, the curves cross.
        largest: greatest A - B in the range.
        low: lower end of the shared range of the held axis.
        high: upper end; equal to ``low`` where the curves share a single level.
    """

    gained: str
    held: str
    absolute: float
    relative: float | None
    smallest: float
    largest: float
    low: float
    high: float

    def __float__(self) -> float:
        """Return the absolute gain."""
        return self.absolute


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its bootstrap interval.

    Attributes:
        mean: mean of the values.
        low: lower end of the interval; equal to ``mean`` where there is one value only.
        high: upper end.
        level: nominal coverage, such as 0.9.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    level: float
    count: int


@overload
def upper_envelope(points: Tensor) -> Tensor: ...
@overload
def upper_envelope(points: NDArray[Any] | Sequence[Sequence[float]]) -> Array: ...
def upper_envelope(points: Points) -> Tensor | Array:
    """Return the points that no other point equals or exceeds in both reward and diversity.

    The Pareto front (Deb 2001, definition 2.5), sorted by reward: rewards strictly rise, diversities
    strictly fall, equal points appear once. Between neighbours the envelope runs straight.

    Args:
        points: [n, 2], each (reward, diversity), n >= 1, in any order.

    Returns:
        [m, 2] with m <= n, rows of ``points``: a tensor for a tensor (same dtype and device), else a
        float64 array.

    Raises:
        InputError: for another shape, no points, or values that are not finite or too large.

    Example:
        >>> upper_envelope([[0.8, 0.4], [0.0, 0.9], [0.5, 0.3]]).tolist()
        [[0.0, 0.9], [0.8, 0.4]]
    """
    values = _points("points", points)
    front = _front(values)
    if isinstance(points, Tensor):
        return points[torch.from_numpy(front).to(points.device)]
    return values[front]


def difference_at_equal(curve_a: Points, curve_b: Points, axis: str | int) -> Array:
    """Curve A less curve B at every level of one axis that both cover: what `gain_at_equal` takes the mean of.

    Args:
        curve_a: [n, 2] points (reward, diversity), n >= 1.
        curve_b: [m, 2] points likewise.
        axis: the axis held equal, "reward" (or 0) or "diversity" (or 1).

    Returns:
        [k, 2], rows of (level, A - B) by rising level, between which it runs straight; k is 1 where the curves share
        a single level.

    Raises:
        InputError: as in `gain_at_equal`.

    Example:
        >>> difference_at_equal([[0.0, 0.8], [1.0, 0.6]], [[0.0, 0.8], [1.0, 0.2]], axis="reward").tolist()
        [[0.0, 0.0], [1.0, 0.39999999999999997]]
    """
    levels, on_a, on_b = _at_equal(curve_a, curve_b, _axis(axis))
    return np.stack([levels, on_a - on_b], axis=1)


def gain_at_equal(curve_a: Points, curve_b: Points, axis: str | int) -> Gain:
    """How much more curve A offers than curve B of the one quantity, at equal level of the other.

    Both curves are reduced to their upper envelopes, which are joined by straight lines and compared over
    the range of the held axis that both cover; nothing is extrapolated. The mean over that range is exact,
    A - B being piecewise linear.

    Args:
        curve_a: [n, 2] points (reward, diversity), n >= 1.
        curve_b: [m, 2] points likewise; the method compared against.
        axis: the axis **held equal**. "reward" (or 0): diversity gain at equal reward. "diversity" (or 1):
            reward gain at equal diversity.

    Returns:
        The gain of A over B; positive where A is better. Exchanging the curves negates ``absolute``.

    Raises:
        InputError: if the envelopes share no level of the held axis, for an unknown axis, or for points as
            in `upper_envelope`.

    Example:
        >>> gain = gain_at_equal([[0.0, 0.8], [1.0, 0.6]], [[0.0, 0.8], [1.0, 0.2]], axis="reward")
        >>> gain.gained, round(gain.absolute, 6), round(gain.relative, 6)
        ('diversity', 0.2, 0.4)
    """
    held = _axis(axis)
    levels, on_a, on_b = _at_equal(curve_a, curve_b, held)
    difference = on_a - on_b
    absolute, baseline = _mean(levels, difference), abs(_mean(levels, on_b))
    return Gain(
        gained=AXES[1 - held],
        held=AXES[held],
        absolute=absolute,
        # What rounding leaves of a mean that is 0 is no baseline.
        relative=absolute / baseline if baseline > 8 * np.finfo(float).eps * np.abs(on_b).max() else None,
        smallest=float(difference.min()),
        largest=float(difference.max()),
        low=float(levels[0]),
        high=float(levels[-1]),
    )


def hypervolume(points: Points, reference: Numbers) -> float:
    """Area that the points dominate above a reference point, in two dimensions, exactly.

    Zitzler & Thiele 1999 (the S metric): the area of the union of the boxes between ``reference`` and each
    point. Dominated points add nothing; nor do points that do not exceed the reference in both coordinates.

    Args:
        points: [n, 2], each (reward, diversity), n >= 1.
        reference: [2], the least (reward, diversity) that counts. Methods compare only under the same one.

    Returns:
        The area, at least 0.

    Raises:
        InputError: for other shapes, no points, or values that are not finite or too large.

    Example:
        >>> hypervolume([[1.0, 2.0], [2.0, 1.0], [0.5, 0.5]], [0.0, 0.0])
        3.0
    """
    values = _points("points", points)
    corner = _array("reference", reference)
    if corner.shape != (2,):
        raise InputError(f"reference: expected shape [2], (reward, diversity); got {list(corner.shape)}")
    above = values[(values > corner).all(axis=1)]
    if len(above) == 0:
        return 0.0
    front = above[_front(above)]
    widths = np.diff(front[:, 0], prepend=corner[0])
    return float(widths @ (front[:, 1] - corner[1]))


def front_area(points: Points, reference: Numbers) -> float:
    """Area between a reference point and the upper envelope, joined by straight lines: what `hypervolume` comes to where the front
    between the points is measured ever more closely, and runs straight.

    The hypervolume of the points themselves is a staircase below it, with larger steps, and so smaller, the fewer points there are; so
    methods that were not measured equally closely compare by this rather.

    Args:
        points: [n, 2], each (reward, diversity), n >= 1.
        reference: [2], the least (reward, diversity) that counts.

    Returns:
        The area, at least 0 and at least the hypervolume.

    Raises:
        InputError: as `hypervolume`.

    Example:
        >>> front_area([[0.0, 2.0], [2.0, 1.0]], [0.0, 0.0]), hypervolume([[0.0, 2.0], [2.0, 1.0]], [0.0, 0.0])
        (3.0, 2.0)
    """
    values = _points("points", points)
    corner = _array("reference", reference)
    if corner.shape != (2,):
        raise InputError(f"reference: expected shape [2], (reward, diversity); got {list(corner.shape)}")
    rewards, diversities = values[_front(values)].T
    levels = np.unique(np.concatenate([corner[:1], rewards[rewards > corner[0]]]))
    heights = np.interp(levels, rewards, diversities) - corner[1]
    crossing = (heights[:-1] > 0) & (heights[1:] < 0)  # the envelope only falls, so there is one at most
    if crossing.any():
        at = int(crossing.argmax())
        zero = levels[at] + np.diff(levels)[at] * heights[at] / (heights[at] - heights[at + 1])
        levels, heights = np.append(levels[: at + 1], zero), np.append(heights[: at + 1], 0.0)
    return float(np.trapezoid(heights.clip(min=0.0), levels))


def bootstrap_interval(
    values: Numbers, level: float = 0.9, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean and percentile bootstrap interval (Efron & Tibshirani 1993, section 13.3).

    With few values the interval is too narrow (three seeds can give no more than ten different means): read
    it as a scale, not as a test. The order of the values does not matter.

    Args:
        values: [n], n >= 1: one number per seed or per prompt.
        level: coverage, between 0 and 1.
        resamples: number of resamples, at least 1; drawn some at a time, so that memory hardly grows with them.
        seed: seed of the resampling, at least 0.

    Returns:
        Mean, interval, level and n. One value gives an interval of zero width, for want of any spread.

    Raises:
        InputError: for another shape, no values, values that are not finite or too large, or settings out of range.

    Example:
        >>> interval = bootstrap_interval([1.0, 2.0, 3.0])
        >>> interval.mean, interval.low < 2.0 < interval.high
        (2.0, True)
    """
    data = _array("values", values)
    if data.ndim != 1 or len(data) == 0:
        raise InputError(f"values: expected shape [n] with at least one value; got {list(data.shape)}")
    if not 0.0 < level < 1.0:
        raise InputError(f"level: expected a share between 0 and 1, such as 0.9; got {level}")
    resamples, seed = whole_number("resamples", resamples), whole_number("seed", seed)
    for name, number, least in (("resamples", resamples, 1), ("seed", seed, 0)):
        if number < least:
            raise InputError(f"{name}: expected at least {least}; got {number}")
    data = np.sort(data)
    draw, n, means = np.random.default_rng(seed), len(data), np.empty(resamples)
    step = max(1, DRAWN // n)  # the generator gives the same numbers however many are asked for at a time
    for start in range(0, resamples, step):
        part = means[start : start + step]
        part[:] = data[draw.integers(n, size=(len(part), n))].mean(axis=1)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(data.mean()), float(low), float(high), float(level), len(data))


def _at_equal(curve_a: Points, curve_b: Points, held: int) -> tuple[Array, Array, Array]:
    """Every knot of either envelope in the range of the held axis that both cover, and both curves there."""
    a, b = (_curve(name, points, held) for name, points in (("curve_a", curve_a), ("curve_b", curve_b)))
    low, high = max(a[0, 0], b[0, 0]), min(a[-1, 0], b[-1, 0])
    if low > high:
        raise InputError(
            f"curve_a, curve_b: no {AXES[held]} at which both can be compared: the upper envelope of curve_a "
            f"spans {_span(a)}, that of curve_b {_span(b)}; evaluate more checkpoints or compare hypervolumes"
        )
    knots = np.concatenate([a[:, 0], b[:, 0]])
    levels = np.unique(np.concatenate([[low, high], knots[(knots > low) & (knots < high)]]))
    return levels, np.interp(levels, a[:, 0], a[:, 1]), np.interp(levels, b[:, 0], b[:, 1])


def _front(values: Array) -> NDArray[np.int64]:
    """Return the indices of the non-dominated rows, by rising first coordinate."""
    order = np.lexsort((-values[:, 1], -values[:, 0]))  # from the highest reward; among equals, most diverse
    diversity = values[order, 1]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(diversity)[:-1]])
    return order[diversity > best_before][::-1].copy()


def _curve(name: str, points: Points, held: int) -> Array:
    """Return the upper envelope as rows (held, gained), by rising held axis."""
    values = _points(name, points)
    front = values[_front(values)]
    return front if held == 0 else front[::-1, ::-1]


def _mean(levels: Array, heights: Array) -> float:
    """Return the mean of a piecewise linear function over the span of its knots."""
    width = levels[-1] - levels[0]
    if not width > 0:
        return float(heights[0])
    return float((0.5 * (heights[1:] + heights[:-1])) @ (np.diff(levels) / width))


def _span(curve: Array) -> str:
    return f"{curve[0, 0]:.6g} to {curve[-1, 0]:.6g}"


def _axis(axis: str | int) -> int:
    if isinstance(axis, str):
        return AXES.index(one_of("axis", axis, AXES))
    if isinstance(axis, bool) or axis not in (0, 1):
        raise InputError(f"axis: expected 'reward' (0) or 'diversity' (1), the axis held equal; got {axis!r}")
    return int(axis)


def _points(name: str, points: Points) -> Array:
    values = _array(name, points)
    if values.ndim != 2 or values.shape[1] != 2 or len(values) == 0:
        raise InputError(
            f"{name}: expected shape [n, 2], rows of (reward, diversity), n at least 1; "
            f"got {list(values.shape)}"
        )
    return values


def _array(name: str, values: Points | Numbers) -> Array:
    try:
        given = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
        array = np.asarray(given, dtype=np.float64)
        if given is None:
            raise TypeError("got None")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected numbers; {error}") from error
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise InputError(f"{name}: {bad} of {array.size} values are not finite")
    if array.size and np.abs(array).max() >= LARGEST:
        raise InputError(f"{name}: expected magnitudes below {LARGEST:g}; got {np.abs(array).max():g}")
    return array
