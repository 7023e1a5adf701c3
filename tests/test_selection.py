"""Selection against brute force over all subsets, its invariances, its ties and its errors."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.checks import InputError
from driftrl.selection import STRATEGIES, select

DETERMINISTIC = [name for name in STRATEGIES if name not in ("random", "all")]


def rewards_and_keep(max_prompts: int = 3, max_candidates: int = 7):
    """Small groups; whole numbers among the values, so that ties are common."""
    value = st.one_of(
        st.integers(-4, 4).map(float), st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
    )

    def build(shape):
        prompts, candidates = shape
        row = st.lists(value, min_size=candidates, max_size=candidates)
        rows = st.lists(row, min_size=prompts, max_size=prompts)
        return st.tuples(rows.map(lambda r: torch.tensor(r, dtype=torch.float64)), st.integers(1, candidates))

    return st.tuples(st.integers(1, max_prompts), st.integers(1, max_candidates)).flatmap(build)


def brute_force(strategy: str, row: np.ndarray, keep: int) -> list[float]:
    """The sorted rewards that each rule's definition keeps, by trying every subset or sorting plainly."""
    median, mean = float(np.median(row)), float(np.mean(row))
    by_value = sorted(row.tolist())
    if strategy == "top":
        return by_value[len(by_value) - keep :]
    if strategy == "contrast":
        low = keep // 2
        return by_value[:low] + by_value[len(by_value) - (keep - low) :]
    if strategy in ("nearest_to_mean", "nearest_to_median"):
        centre = mean if strategy == "nearest_to_mean" else median
        return sorted(sorted(by_value, key=lambda r: (round(abs(r - centre), 9), -r))[:keep])
    if strategy == "nearest_neighbor":

        def distance(i: int) -> float:
            return min((abs(row[i] - row[j]) for j in range(len(row)) if j != i), default=0.0)

        order = sorted(
            range(len(row)), key=lambda i: (round(distance(i), 9), round(abs(row[i] - median), 9), -row[i])
        )
        return sorted(row[i] for i in order[:keep])
    # concentrated: over all subsets, not only windows
    best = min(
        combinations(by_value, keep),
        key=lambda s: (round(max(s) - min(s), 9), *_concentrated_ties(s, by_value, keep, median)),
    )
    return list(best)


def _concentrated_ties(subset, by_value, keep, median):
    windows = [tuple(by_value[i : i + keep]) for i in range(len(by_value) - keep + 1)]
    is_window = subset in windows
    return (not is_window, round(abs(sum(subset) / keep - median), 9), -sum(subset))


@pytest.mark.parametrize("strategy", DETERMINISTIC)
@settings(max_examples=150, deadline=None)
@given(case=rewards_and_keep())
def test_keeps_what_the_definition_says(strategy, case):
    rewards, keep = case
    kept = rewards.gather(1, select(rewards, keep, strategy))
    for row, got in zip(rewards.numpy(), kept.numpy(), strict=True):
        assert sorted(got.tolist()) == pytest.approx(brute_force(strategy, row, keep), abs=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(case=rewards_and_keep())
def test_indices_are_ascending_distinct_and_in_range(strategy, case):
    rewards, keep = case
    keep = rewards.shape[1] if strategy == "all" else keep
    indices = select(rewards, keep, strategy, torch.Generator().manual_seed(0))
    assert indices.shape == (rewards.shape[0], keep)
    assert indices.dtype == torch.int64
    assert bool((indices.diff(dim=1) > 0).all())
    assert int(indices.min()) >= 0
    assert int(indices.max()) < rewards.shape[1]


@pytest.mark.parametrize("strategy", DETERMINISTIC)
@settings(max_examples=60, deadline=None)
@given(case=rewards_and_keep(max_prompts=1), seed=st.integers(0, 1000))
def test_order_of_candidates_does_not_change_the_rewards_kept(strategy, case, seed):
    rewards, keep = case
    shuffled = rewards[:, torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(seed))]
    kept = rewards.gather(1, select(rewards, keep, strategy)).sort().values
    kept_shuffled = shuffled.gather(1, select(shuffled, keep, strategy)).sort().values
    torch.testing.assert_close(kept, kept_shuffled, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", DETERMINISTIC)
def test_prompts_do_not_influence_each_other(strategy):
    rewards = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    together = select(rewards, 8, strategy)
    alone = torch.cat([select(row[None], 8, strategy) for row in rewards])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("strategy", DETERMINISTIC)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 3.0), (7.0, 0.0), (0.25, -100.0)])
def test_unit_and_origin_of_the_reward_do_not_matter(strategy, scale, shift):
    rewards = torch.randn(20, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(select(rewards, 8, strategy), select(scale * rewards + shift, 8, strategy))


@pytest.mark.parametrize("strategy", DETERMINISTIC)
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_of_identical_rewards_the_lowest_indices_are_kept(strategy, keep):
    assert select(torch.full((2, 5), 0.7), keep, strategy).tolist() == [list(range(keep))] * 2


def test_lowest_indices_also_where_a_window_starts_inside_a_run():
    # Sorted: 1 1 2 2. Both windows {1 1 2} and {1 2 2} have range 1 and are equally near the median: the
    # higher wins and takes one of the two ones, the first.
    assert select(torch.tensor([[2.0, 1.0, 1.0, 2.0]]), 3).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evenly_spaced_rewards_are_a_tie_whatever_their_rounding(dtype):
    rewards = torch.arange(1, 10, dtype=dtype).mul(0.1)[None]
    assert select(rewards, 3).tolist() == [[3, 4, 5]]  # around the median
    assert select(rewards, 4).tolist() == [[3, 4, 5, 6]]  # two windows equally near it: the higher
    assert select(rewards, 3, "nearest_neighbor").tolist() == [[3, 4, 5]]
    assert select(rewards, 2, "nearest_to_median").tolist() == [[4, 5]]


@pytest.mark.parametrize(
    "strategy", ["concentrated", "nearest_neighbor", "nearest_to_mean", "nearest_to_median"]
)
def test_rewards_whose_differences_overflow(strategy):
    rewards = torch.tensor([[1.7e308, -1.7e308, 1.6e308, 0.0, 1.5e308]], dtype=torch.float64)
    assert torch.equal(select(rewards, 3, strategy), select(rewards * 2.0**-600, 3, strategy))
    assert select(rewards, 3).tolist() == [[0, 2, 4]]


def test_a_real_difference_is_no_tie():
    rewards = torch.tensor([[0.0, 0.1, 0.5, 0.6, 0.9, 0.9999]])
    assert select(rewards, 2).tolist() == [[4, 5]]


def test_concentrated_and_nearest_neighbor_read_the_rule_differently():
    # Two tight pairs far apart and stragglers between: the window takes one stretch, the other both pairs.
    rewards = torch.tensor([[0.0, 0.01, 4.0, 4.7, 5.5, 9.0, 9.01]])
    assert select(rewards, 4, "concentrated").tolist() == [[3, 4, 5, 6]]
    assert select(rewards, 4, "nearest_neighbor").tolist() == [[0, 1, 5, 6]]


def test_an_outlier_is_filtered():
    rewards = torch.tensor([[0.5, 0.52, 0.49, 30.0, 0.51, -4.0]])
    for strategy in ("concentrated", "nearest_neighbor", "nearest_to_median"):
        assert select(rewards, 4, strategy).tolist() == [[0, 1, 2, 4]]


def test_contrast_gives_an_odd_candidate_to_the_best():
    assert select(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]), 3, "contrast").tolist() == [[0, 4, 5]]


def test_random_is_reproducible_and_uniform():
    rewards = torch.zeros(4000, 6)
    first = select(rewards, 2, "random", torch.Generator().manual_seed(5))
    assert torch.equal(first, select(rewards, 2, "random", torch.Generator().manual_seed(5)))
    assert not torch.equal(first, select(rewards, 2, "random", torch.Generator().manual_seed(6)))
    share = torch.bincount(first.flatten(), minlength=6) / 4000
    # Each of 6 is kept with probability 1/3; the standard error is 0.0075.
    torch.testing.assert_close(share, torch.full((6,), 1 / 3), rtol=0, atol=0.03)


def test_integers_and_no_prompts():
    assert select(torch.tensor([[1, 5, 6, 9]]), 2).tolist() == [[1, 2]]
    for strategy in DETERMINISTIC:
        assert select(torch.zeros(0, 4), 2, strategy).shape == (0, 2)


@pytest.mark.parametrize(
    ("rewards", "keep", "strategy", "says"),
    [
        (torch.zeros(2, 4), 5, "concentrated", "expected 1 to 4"),
        (torch.zeros(2, 4), 0, "concentrated", "expected 1 to 4"),
        (torch.zeros(2, 4), 2.0, "concentrated", "whole number"),
        (torch.zeros(4), 2, "concentrated", r"expected shape \[P, N\]"),
        (torch.zeros(2, 3, 4), 2, "top", r"expected shape \[P, N\]"),
        (torch.tensor([[0.0, float("nan")]]), 1, "top", "not finite"),
        (torch.tensor([[0.0, float("inf")]]), 1, "top", "not finite"),
        (torch.zeros(2, 4), 2, "concentratd", "did you mean 'concentrated'"),
        (torch.zeros(2, 4), 2, "all", "keeps all 4"),
        (torch.zeros(2, 4), 2, "random", "needs a torch.Generator"),
    ],
)
def test_refuses_what_it_cannot_use(rewards, keep, strategy, says):
    with pytest.raises(InputError, match=says):
        select(rewards, keep, strategy)


def test_how_many_to_keep_is_a_whole_number_of_any_kind():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(select(rewards, np.int64(2)), select(rewards, 2))
    with pytest.raises(InputError, match="rewards: expected at least one candidate"):
        select(torch.zeros(2, 0), 1)
