"""Fronts, gains, hypervolume, intervals: constructed curves with known answers, brute force, invariances."""

import dataclasses
import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from driftrl.checks import InputError
from driftrl.evaluation import pareto
from driftrl.evaluation.pareto import (
    bootstrap_interval,
    difference_at_equal,
    front_area,
    gain_at_equal,
    hypervolume,
    upper_envelope,
)

POINTS = st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=1, max_size=12)


def _dominated(p, others):
    return any(o[0] >= p[0] and o[1] >= p[1] and o != p for o in others)


# --- upper envelope


@settings(deadline=None)
@given(points=POINTS)
def test_envelope_is_what_nothing_dominates(points):
    expected = sorted({p for p in points if not _dominated(p, points)})
    assert upper_envelope(points).tolist() == [list(map(float, p)) for p in expected]


def test_envelope_of_a_non_monotone_curve():
    curve = [[0.0, 1.0], [0.4, 0.6], [0.3, 0.7], [0.6, 0.65], [0.9, 0.2], [0.8, 0.1], [0.9, 0.15]]
    assert upper_envelope(curve).tolist() == [[0.0, 1.0], [0.3, 0.7], [0.6, 0.65], [0.9, 0.2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_envelope_returns_rows_of_the_kind_it_was_given(dtype):
    points = torch.tensor([[0.1, 0.9], [0.7, 0.3], [0.5, 0.2]], dtype=dtype, requires_grad=True)
    front = upper_envelope(points)
    torch.testing.assert_close(front, points[:2])
    assert isinstance(upper_envelope(points.detach().numpy()), np.ndarray)
    assert isinstance(upper_envelope(points.tolist()), np.ndarray)


# --- gain at equal level


def test_parallel_lines_differ_by_their_distance_on_either_axis():
    a = [[0.0, 0.8], [1.0, 0.3]]
    b = [[0.0, 0.6], [1.0, 0.1]]
    diversity = gain_at_equal(a, b, "reward")
    assert (diversity.gained, diversity.held) == ("diversity", "reward")
    assert diversity.absolute == pytest.approx(0.2)
    assert diversity.relative == pytest.approx(0.2 / 0.35)
    assert (diversity.smallest, diversity.largest) == pytest.approx((0.2, 0.2))
    assert (diversity.low, diversity.high) == (0.0, 1.0)
    reward = gain_at_equal(a, b, "diversity")
    assert (reward.gained, reward.held) == ("reward", "diversity")
    assert reward.absolute == pytest.approx(0.4)  # 0.2 of diversity at slope -1/2
    assert (reward.low, reward.high) == (0.3, 0.6)
    assert reward.relative == pytest.approx(0.4 / 0.3)  # B's reward runs from 0.6 to 0 there
    assert float(reward) == reward.absolute


def test_crossing_curves_cancel_in_the_mean_but_show_in_the_extremes():
    a = [[0.0, 1.0], [1.0, 0.0]]
    b = [[0.0, 0.75], [1.0, 0.25]]
    gain = gain_at_equal(a, b, "reward")
    assert gain.absolute == pytest.approx(0.0, abs=1e-15)
    assert gain.relative == pytest.approx(0.0, abs=1e-15)
    assert (gain.smallest, gain.largest) == (-0.25, 0.25)


def test_knots_of_both_curves_count_and_only_the_shared_range():
    a = [[0.0, 1.0], [1.0, 0.8], [2.0, 0.0]]
    b = [[0.5, 0.5], [3.0, 0.25]]
    gain = gain_at_equal(a, b, "reward")
    # on [0.5, 2]: A integrates to 0.5 (0.9 + 0.8) / 2 + (0.8 + 0) / 2, B, a line, to 1.5 (0.5 + 0.35) / 2
    assert (gain.low, gain.high) == (0.5, 2.0)
    assert gain.absolute == pytest.approx((0.425 + 0.4 - 0.6375) / 1.5)
    assert gain.relative == pytest.approx((0.425 + 0.4 - 0.6375) / 0.6375)
    assert gain.largest == pytest.approx(0.9 - 0.5)
    assert gain.smallest == pytest.approx(0.0 - 0.35)


def test_non_monotone_curves_are_compared_by_their_envelopes_in_any_order():
    a = [[0.0, 0.9], [0.5, 0.2], [0.4, 0.1], [1.0, 0.7]]  # the dips are dominated
    b = [[1.0, 0.5], [0.2, 0.3], [0.0, 0.7]]
    gain = gain_at_equal(a, b, "reward")
    assert gain.absolute == pytest.approx(0.2)
    for shuffled in itertools.permutations(a):
        assert gain_at_equal(shuffled, b, "reward") == gain


def test_single_points():
    line = [[0.0, 1.0], [1.0, 0.0]]
    gain = gain_at_equal([[0.25, 0.9]], line, "reward")
    assert gain.absolute == pytest.approx(0.15)
    assert gain.relative == pytest.approx(0.2)
    assert gain.low == gain.high == 0.25
    assert gain_at_equal([[0.25, 0.9]], line, "diversity").absolute == pytest.approx(0.15)
    assert gain_at_equal(line, [[0.25, 0.9]], "reward").absolute == pytest.approx(-0.15)
    assert gain_at_equal([[0.5, 0.9]], [[0.5, 0.6]], "reward").absolute == pytest.approx(0.3)
    with pytest.raises(InputError, match="no reward at which both"):
        gain_at_equal([[0.5, 0.9]], [[0.4, 0.9]], "reward")


def test_curves_that_touch_compare_at_the_level_they_share():
    gain = gain_at_equal([[0.0, 1.0], [1.0, 0.5]], [[1.0, 0.4], [2.0, 0.1]], "reward")
    assert gain.absolute == pytest.approx(0.1)
    assert gain.low == gain.high == 1.0


def test_disjoint_curves_are_refused_with_both_ranges():
    with pytest.raises(InputError, match=r"no reward .* curve_a spans 0 to 1, that of curve_b 2 to 3"):
        gain_at_equal([[0.0, 1.0], [1.0, 0.5]], [[2.0, 0.8], [3.0, 0.4]], "reward")
    # where one envelope is a point above everything of the other, no level is shared either
    with pytest.raises(InputError, match="no diversity at which both can be compared"):
        gain_at_equal([[0.0, 0.5], [2.0, 0.9]], [[0.0, 0.8], [1.0, 0.6]], "diversity")


def test_no_relative_gain_over_nothing_and_the_sign_kept_over_negative_rewards():
    assert gain_at_equal([[0.5, 0.5]], [[0.5, 0.0]], "reward").relative is None
    gain = gain_at_equal([[-1.0, 0.5]], [[-2.0, 0.5]], "diversity")
    assert (gain.absolute, gain.relative) == (1.0, 0.5)


def test_axis_by_number_is_the_axis_held_equal():
    a, b = [[0.0, 0.8], [1.0, 0.3]], [[0.0, 0.6], [1.0, 0.1]]
    assert gain_at_equal(a, b, 0) == gain_at_equal(a, b, "reward")
    assert gain_at_equal(a, b, 1) == gain_at_equal(a, b, "diversity")
    assert gain_at_equal(a, b, 0) != gain_at_equal(a, b, 1)


@settings(deadline=None)
@given(a=POINTS, b=POINTS, axis=st.sampled_from(["reward", "diversity"]), c=st.integers(-5, 5))
def test_gain_is_antisymmetric_ignores_a_common_shift_and_equals_dense_sampling(a, b, axis, c):
    held = 0 if axis == "reward" else 1
    fronts = [sorted((p[held], p[1 - held]) for p in map(tuple, upper_envelope(x).tolist())) for x in (a, b)]
    low, high = max(f[0][0] for f in fronts), min(f[-1][0] for f in fronts)
    assume(low <= high)
    gain = gain_at_equal(a, b, axis)
    assert gain.absolute == pytest.approx(-gain_at_equal(b, a, axis).absolute, abs=1e-12)
    shifted = [[(x + c, y - c) for x, y in points] for points in (a, b)]
    assert gain_at_equal(*shifted, axis).absolute == pytest.approx(gain.absolute, abs=1e-12)
    middles = low + (high - low) * (np.arange(4000) + 0.5) / 4000
    sampled = [np.interp(middles, *np.array(f).T) for f in fronts]
    assert gain.absolute == pytest.approx((sampled[0] - sampled[1]).mean(), abs=2e-3 * (high - low + 1))
    assert gain.smallest - 1e-12 <= gain.absolute <= gain.largest + 1e-12
    along = difference_at_equal(a, b, axis)
    assert [along[0, 0], along[-1, 0]] == [gain.low, gain.high] and (np.diff(along[:, 0]) > 0).all()
    assert [along[:, 1].min(), along[:, 1].max()] == [gain.smallest, gain.largest]
    np.testing.assert_allclose(np.interp(middles, *along.T), sampled[0] - sampled[1], atol=1e-12)


def test_records_are_frozen_and_of_plain_numbers():
    gain = gain_at_equal(torch.tensor([[0.0, 0.8], [1.0, 0.3]]), np.array([[0.0, 0.6], [1.0, 0.1]]), "reward")
    interval = bootstrap_interval(torch.tensor([1.0, 2.0]))
    for record in (gain, interval):
        json.dumps(dataclasses.asdict(record))
        for value in dataclasses.asdict(record).values():
            assert type(value) in (float, str, int)
    with pytest.raises(AttributeError):
        gain.absolute = 1.0


# --- hypervolume


def test_hypervolume_of_known_unions():
    assert hypervolume([[1.0, 1.0]], [0.0, 0.0]) == pytest.approx(1.0)
    assert hypervolume([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [0.0, 0.0]) == pytest.approx(6.0)
    assert hypervolume([[0.5, 0.4], [0.9, 0.1]], [-1.0, -1.0]) == pytest.approx(1.5 * 1.4 + 0.4 * 1.1)
    assert type(hypervolume(torch.tensor([[1.0, 1.0]]), torch.zeros(2))) is float


def test_dominated_points_and_points_beyond_the_reference_add_nothing():
    front = [[1.0, 3.0], [3.0, 1.0]]
    area = hypervolume(front, [0.5, 0.5])
    assert area == pytest.approx(0.5 * 2.5 + 2.5 * 0.5 - 0.5 * 0.5)
    extra = [[0.9, 0.9], [1.0, 1.0], [0.4, 99.0], [99.0, 0.5], [-5.0, -5.0]]
    assert hypervolume(front + extra, [0.5, 0.5]) == pytest.approx(area)
    assert hypervolume([[0.4, 99.0], [0.5, 7.0]], [0.5, 0.5]) == 0.0


@settings(deadline=None)
@given(points=POINTS, corner=st.tuples(st.integers(-7, 7), st.integers(-7, 7)))
def test_hypervolume_counts_the_unit_squares_below_the_points(points, corner):
    squares = {
        (i, j) for x, y in points for i in range(corner[0], x) for j in range(corner[1], y)
    }  # all coordinates are whole numbers
    assert hypervolume(points, corner) == pytest.approx(len(squares))


@settings(deadline=None)
@given(points=POINTS, corner=st.tuples(st.integers(-7, 7), st.integers(-7, 7)))
def test_the_area_of_a_front_is_the_hypervolume_of_one_that_is_measured_ever_more_closely(points, corner):
    front = np.asarray(upper_envelope(points))
    close = np.linspace(front[0, 0], front[-1, 0], 4001)
    dense = np.stack([close, np.interp(close, front[:, 0], front[:, 1])], 1)
    area = front_area(points, corner)
    assert area >= hypervolume(points, corner) - 1e-9
    assert area == pytest.approx(hypervolume(np.concatenate([dense, front]), corner), abs=0.05)
    assert front_area([*points, points[0]], corner) == area
    assert type(area) is float


# --- bootstrap


def test_bootstrap_of_many_values_approaches_the_normal_interval():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    half = 1.6449 * values.std() / math.sqrt(400)
    interval = bootstrap_interval(values, level=0.9)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (interval.level, interval.count) == (0.9, 400)
    wider = bootstrap_interval(values, level=0.99)
    assert wider.low < interval.low < interval.high < wider.high


def test_bootstrap_of_two_values_has_the_binomial_quantiles():
    # a resample's mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0], level=0.9).low == 0.0
    assert bootstrap_interval([0.0, 1.0], level=0.9).high == 1.0
    narrow = bootstrap_interval([0.0, 1.0], level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    samples = generator.normal(0.0, 1.0, (300, 40))
    intervals = [bootstrap_interval(sample, level=0.9, resamples=500) for sample in samples]
    covered = sum(interval.low <= 0.0 <= interval.high for interval in intervals) / 300
    assert 0.83 < covered < 0.95


def test_bootstrap_depends_on_the_seed_and_not_on_order():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values[::-1], seed=1)
    assert bootstrap_interval(values, seed=1, resamples=50) != bootstrap_interval(
        values, seed=2, resamples=50
    )


@pytest.mark.parametrize("n", [1, 7, 45])
def test_bootstrap_gives_the_same_however_many_are_drawn_at_a_time(n, monkeypatch):
    values = np.random.default_rng(n).normal(size=n)
    together = np.sort(values)[np.random.default_rng(3).integers(n, size=(501, n))].mean(axis=1)
    for drawn in (1, 100, 2**20):
        monkeypatch.setattr(pareto, "DRAWN", drawn)
        interval = bootstrap_interval(values, resamples=501, seed=3)
        assert (interval.low, interval.high) == tuple(np.quantile(together, [(1 - 0.9) / 2, (1 + 0.9) / 2]))


def test_bootstrap_memory_does_not_grow_with_the_resamples():
    tracemalloc.start()
    bootstrap_interval(np.arange(2000.0), resamples=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26  # 20 million draws at once would be 305 MiB


def test_one_value_has_no_spread():
    interval = bootstrap_interval([2.5])
    assert (interval.mean, interval.low, interval.high, interval.count) == (2.5, 2.5, 2.5, 1)


# --- refusals


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"points: expected shape \[n, 2\].*got \[0\]"),
        (np.zeros((0, 2)), r"got \[0, 2\]"),
        ([0.0, 1.0], r"got \[2\]"),
        (torch.zeros(3, 3), r"got \[3, 3\]"),
        ([[0.0, math.nan]], "points: 1 of 2 values are not finite"),
        ([["a", "b"]], "points: expected numbers"),
        ([[0.0, 1.0], [2.0]], "points: expected numbers"),
    ],
)
def test_bad_points_are_refused(points, message):
    for call in (upper_envelope, lambda p: hypervolume(p, [0.0, 0.0])):
        with pytest.raises(InputError, match=message):
            call(points)
    with pytest.raises(InputError, match=message.replace("points", "curve_b")):
        gain_at_equal([[0.0, 1.0]], points, "reward")


def test_bad_settings_are_refused():
    line = [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(
        InputError, match="axis: expected one of reward, diversity; got 'rewards'; did you mean"
    ):
        gain_at_equal(line, line, "rewards")
    for axis in (2, None, True):
        with pytest.raises(InputError, match="the axis held equal"):
            gain_at_equal(line, line, axis)
    with pytest.raises(InputError, match=r"reference: expected shape \[2\]"):
        hypervolume(line, [0.0])
    with pytest.raises(InputError, match="reference: 1 of 2 values are not finite"):
        hypervolume(line, [0.0, math.inf])
    for level in (0.0, 1.0, 90.0, math.nan):
        with pytest.raises(InputError, match="level: expected a share between 0 and 1"):
            bootstrap_interval([1.0, 2.0], level=level)
    with pytest.raises(InputError, match="resamples: expected at least 1"):
        bootstrap_interval([1.0, 2.0], resamples=0)
    with pytest.raises(InputError, match=r"resamples: expected a whole number; got 10\.5"):
        bootstrap_interval([1.0, 2.0], resamples=10.5)
    with pytest.raises(InputError, match="seed: expected at least 0; got -1"):
        bootstrap_interval([1.0, 2.0], seed=-1)
    for values in ([], [[1.0]], 3.0):
        with pytest.raises(InputError, match=r"values: expected shape \[n\]"):
            bootstrap_interval(values)
    with pytest.raises(InputError, match="values: 1 of 2 values are not finite"):
        bootstrap_interval([1.0, math.nan])


def test_a_baseline_of_nothing_but_rounding_is_none():
    gain = gain_at_equal([(4, 1), (3, 3), (7, -4)], [(-5, -2), (2, 1), (-1, 4), (8, -1), (-4, -3)], 0)
    assert gain.relative is None and math.isfinite(gain.absolute)


def test_numbers_too_large_to_compare_are_refused():
    line = [[0.0, 1e149], [1.0, -9e149]]
    gain = gain_at_equal(line, [[0.0, -9e149], [1.0, -9.5e149]], "reward")
    assert math.isfinite(gain.absolute) and math.isfinite(hypervolume(line, [-9e149, -9e149]))
    assert math.isfinite(bootstrap_interval([9e149, -9e149] * 50).high)
    for call in (
        lambda: gain_at_equal([[0.0, 1.7e308], [1.0, -1.7e308]], [[0.0, 0.0], [1.0, -1.7e308]], "reward"),
        lambda: bootstrap_interval([1.7e308, 1.6e308, 1.0]),
        lambda: hypervolume([[1e200, 1e200]], [0.0, 0.0]),
    ):
        with pytest.raises(InputError, match="expected magnitudes below 1e"):
            call()


def test_no_points_at_all_are_said_so():
    with pytest.raises(InputError, match="points: expected numbers; got None"):
        upper_envelope(None)
