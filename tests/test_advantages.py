"""Group-relative advantages: against NumPy, their invariances, vanishing spread, and each scale."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.advantages import (
    SCALES,
    AdvantageRule,
    History,
    advantages_of,
    constant_rewards,
    group_relative,
    no_history,
    remember,
    running_relative,
)
from driftrl.checks import InputError


def _rewards(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equals_numpy(correction, eps):
    rewards = _rewards(5, 8)
    r = rewards.numpy()
    expected = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=correction, keepdims=True) + eps)
    np.testing.assert_allclose(
        group_relative(rewards, eps=eps, correction=correction).numpy(), expected, rtol=1e-12
    )


def test_each_scale_divides_by_what_it_says():
    candidates = _rewards(3, 16) * torch.tensor([[1.0], [5.0], [0.1]], dtype=torch.float64)
    selected = candidates[:, :8]
    centred = selected - selected.mean(1, keepdim=True)
    divisors = {
        "selected": selected.std(1, keepdim=True, correction=0),
        "candidates": candidates.std(1, keepdim=True, correction=0),
        "global": candidates.std(correction=0),
        "none": torch.tensor(1.0, dtype=torch.float64),
    }
    assert set(divisors) == set(SCALES)
    for scale, divisor in divisors.items():
        torch.testing.assert_close(group_relative(selected, scale, candidates), centred / divisor)
    torch.testing.assert_close(group_relative(selected, "global"), centred / selected.std(correction=0))


def test_dancegrpo_compares_with_all_candidates_and_picks_then():
    """Its order: mean and standard deviation of everything that was drawn, then the best and the worst."""
    candidates = _rewards(3, 16).exp()
    r = candidates.numpy()
    of_all = (r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True)
    order = r.argsort(1)
    picked = np.concatenate([order[:, :4], order[:, -4:]], 1)
    expected = np.take_along_axis(of_all, picked, 1)
    kept = torch.tensor(np.take_along_axis(r, picked, 1))
    rule = AdvantageRule(scale="candidates", center="candidates")
    np.testing.assert_allclose(advantages_of(kept, rule, candidates), expected, rtol=1e-12)
    assert np.abs(expected.mean(1)).min() > 0.01  # the picked ones alone have another mean
    plain = group_relative(kept, "none", candidates, center="candidates")
    np.testing.assert_allclose(plain, kept.numpy() - r.mean(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("part", ["center", "scale"])
def test_comparing_with_candidates_needs_them(part):
    with pytest.raises(InputError, match=rf"candidates: {part} 'candidates' needs .* got None"):
        group_relative(_rewards(2, 4), **{part: "candidates"})
    with pytest.raises(InputError, match="one row per prompt, 2"):
        group_relative(_rewards(2, 4), candidates=_rewards(3, 4), **{part: "candidates"})


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-50, 50), min_size=4, max_size=4), min_size=1, max_size=4),
    factor=st.sampled_from([1e-6, 0.3, 1.0, 1e6]),
    shift=st.sampled_from([-5.0, 0.0, 12.5]),
)
def test_zero_mean_unit_spread_and_invariant_to_unit_and_origin(rows, factor, shift):
    rewards = torch.tensor(rows, dtype=torch.float64)
    advantages = group_relative(rewards)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(len(rows), dtype=torch.float64))
    constant = rewards.amax(1) == rewards.amin(1)
    assert bool((advantages[constant] == 0).all())
    spread = advantages.std(1, correction=0)[~constant]
    torch.testing.assert_close(spread, torch.ones_like(spread))
    torch.testing.assert_close(group_relative(factor * (rewards + shift)), advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero(scale):
    advantages = group_relative(torch.full((2, 8), 21.37), scale, torch.full((2, 16), 21.37))
    assert advantages.abs().max() <= (1e-5 if scale == "none" else 0.0)
    assert bool(torch.isfinite(advantages).all())


def test_rounding_noise_on_large_equal_rewards_is_not_enlarged():
    value = torch.tensor(1234.567)
    up = torch.nextafter(value, torch.tensor(torch.inf))
    rewards = torch.stack([value, up, value, up])[None]
    assert rewards.std() > 0
    assert group_relative(rewards).tolist() == [[0.0] * 4]
    # A spread a hundred times as large is signal and is kept.
    assert group_relative(torch.tensor([[1234.5, 1234.6, 1234.5, 1234.6]])).abs().min() > 0.9


def test_one_group_without_spread_leaves_the_others_alone():
    rewards = _rewards(2, 4)
    rewards[0] = 3.0
    advantages = group_relative(rewards)
    assert bool((advantages[0] == 0).all())
    torch.testing.assert_close(advantages[1], group_relative(rewards[1:])[0])


def test_dtypes_and_single_member_groups():
    assert group_relative(torch.tensor([[1, 2, 3]])).dtype == torch.get_default_dtype()
    assert group_relative(torch.tensor([[1.0, 2.0]], dtype=torch.float64)).dtype == torch.float64
    whole = torch.tensor([[1, 2, 3]])
    past = remember(no_history(1, 4), [0], whole)
    assert torch.equal(
        running_relative(whole, past, whole, 2), running_relative(whole.float(), past, whole.float(), 2)
    )
    assert group_relative(torch.tensor([[5.0], [7.0]]), correction=1).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: group_relative(torch.zeros(4)), r"expected shape \[P, G\]"),
        (lambda: group_relative(torch.full((1, 2), torch.nan)), "not finite"),
        (lambda: group_relative(torch.zeros(1, 2), "globl"), "did you mean 'global'"),
        (lambda: group_relative(torch.zeros(1, 2), "candidates"), "needs the rewards before selection"),
        (lambda: group_relative(torch.zeros(2, 2), "candidates", torch.zeros(3, 4)), "one row per prompt"),
        (lambda: group_relative(torch.zeros(1, 2), eps=-1.0), "at least 0"),
    ],
)
def test_refuses_what_it_cannot_use(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_running_statistics_are_those_of_the_last_rewards():
    """Three rounds of a set of three prompts, against deques, as the formula has it."""
    length, least, eps = 5, 3, 1e-6
    history, books = no_history(3, length), [deque(maxlen=length) for _ in range(3)]
    for turn, which in enumerate([[0, 1], [2, 0], [1, 1]]):  # the last asks for one prompt twice
        rewards = _rewards(2, 4, seed=turn, dtype=torch.float32)[:, : 2 + turn]
        history = remember(history, which, rewards)
        for row, index in enumerate(which):
            books[index].extend(rewards[row].tolist())
        rows = history.rows(which)
        kept = rewards[:, :2]
        found = running_relative(kept, rows, rewards, least, eps=eps)
        for row, index in enumerate(which):
            past = np.array(books[index] if len(books[index]) >= least else rewards.flatten().tolist())
            expected = (kept[row].numpy() - past.mean()) / (past.std() + eps)
            np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert history.filled.tolist() == [5, 5, 3]
    assert [row[-c:].tolist() for row, c in zip(*history, strict=True)] == [list(b) for b in books]


def test_a_history_of_just_this_group_is_the_group_relative_advantage():
    rewards = _rewards(3, 8, dtype=torch.float32)
    history = remember(no_history(3, 8), [0, 1, 2], rewards)
    found = running_relative(rewards, history, rewards, 8, eps=0.0)
    torch.testing.assert_close(found, group_relative(rewards))
    rule = AdvantageRule(clip=0.5)
    torch.testing.assert_close(
        advantages_of(rewards, rule, rewards), group_relative(rewards).clamp(-0.5, 0.5)
    )
    running = AdvantageRule(baseline="running", clip=0.5, min_history=8)
    torch.testing.assert_close(advantages_of(rewards, running, rewards, history), found.clamp(-0.5, 0.5))


def test_remembering_leaves_the_past_alone():
    before = remember(no_history(2, 3), [0], torch.tensor([[1.0, 2.0]]))
    copies = before.values.clone(), before.filled.clone()
    remember(before, [0, 1], torch.ones(2, 4))
    assert torch.equal(before.values, copies[0])
    assert torch.equal(before.filled, copies[1])


def test_running_statistics_of_equal_rewards_teach_nothing():
    equal = torch.full((2, 4), 0.1)
    history = remember(no_history(2, 8), [0, 1], equal)
    for least in (1, 100):
        assert running_relative(equal, history, equal, least).tolist() == [[0.0] * 4] * 2


def test_the_running_baseline_refuses_what_does_not_fit():
    rewards = torch.zeros(2, 4)
    with pytest.raises(InputError, match="history"):
        advantages_of(rewards, AdvantageRule(baseline="running"), rewards)
    with pytest.raises(InputError, match="a row for each of 2"):
        running_relative(rewards, no_history(3, 4), rewards)
    with pytest.raises(InputError, match="2 rows"):
        remember(no_history(3, 4), [0, 1], torch.zeros(1, 4))
    with pytest.raises(InputError, match="did you mean 'running'"):
        advantages_of(rewards, AdvantageRule(baseline="runing"), rewards)


@pytest.mark.parametrize("scale", ["selected", "candidates", "global"])
@pytest.mark.parametrize("unit", [2.0**560, 2.0**-560])
def test_units_whose_squares_over_or_underflow(scale, unit):
    candidates = _rewards(3, 6)
    rewards = candidates[:, :4]
    found = group_relative(unit * rewards, scale, unit * candidates)
    torch.testing.assert_close(found, group_relative(rewards, scale, candidates))
    assert constant_rewards(unit * rewards).tolist() == [False] * 3
    history = no_history(3, 4)
    own = running_relative(unit * rewards, history, unit * candidates, eps=0.0)
    torch.testing.assert_close(own, running_relative(rewards, history, candidates, eps=0.0))


def test_the_largest_rewards_that_there_are():
    rewards = torch.tensor([[-1.7e308, -1.7e308, -1.7e308, 1.7e308]], dtype=torch.float64)
    torch.testing.assert_close(group_relative(rewards), group_relative(rewards.sign()))


def test_half_precision_is_rounding_by_one_rule():
    """Two steps between neighbouring numbers are signal for a running baseline too, rounded once as they are."""
    for dtype in (torch.bfloat16, torch.float16):
        step = torch.finfo(dtype).eps * 16  # between neighbours at 20
        for values, signal in (
            ([20.0, 20 + 2 * step, 20 + 4 * step], True),
            ([20.0, 20.0, 20 + step], False),
        ):
            rewards = torch.tensor([values]).to(dtype)
            history = remember(no_history(1, 3), [0], rewards)
            found = running_relative(rewards, history, rewards, 3, eps=0.0)
            assert bool(found.any()) == bool(group_relative(rewards).any()) == signal
            torch.testing.assert_close(found, group_relative(rewards))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: group_relative(torch.zeros(1, 3), correction=2), "correction: expected 0 or 1; got 2"),
        (lambda: group_relative(torch.zeros(1, 3), correction=0.5), "correction: expected a whole number"),
        (lambda: no_history(-2, 3), "prompts: expected at least 0; got -2"),
        (lambda: no_history(2, 0), "length: expected at least 1; got 0"),
        (lambda: remember(no_history(2, 3), [-1], torch.ones(1, 2)), "which: expected 0 to 1, .*; got -1"),
        (lambda: remember(no_history(2, 3), [5], torch.ones(1, 2)), "which: expected 0 to 1, .*; got 5"),
        (lambda: remember(no_history(2, 3), [0.5], torch.ones(1, 2)), "which: expected a whole number"),
        (lambda: no_history(2, 3).rows([-1]), "which: expected 0 to 1"),
        (lambda: remember(no_history(1, 3), [0], torch.tensor([[1.0, torch.nan]])), "rewards: 1 of 2 values"),
        (
            lambda: remember(no_history(1, 3), [0], torch.tensor([[1.0, 1e160]], dtype=torch.float64)),
            "rewards as torch.float32: 1 of 2 values are not finite",
        ),
        (
            lambda: running_relative(
                torch.ones(1, 2),
                History(torch.tensor([[0.0, torch.nan]]), torch.tensor([1])),
                torch.ones(1, 2),
            ),
            "history: 1 of 2 values are not finite",
        ),
    ],
)
def test_a_history_refuses_what_it_would_not_notice(call, says):
    with pytest.raises(InputError, match=says):
        call()
