"""Group-relative advantages: against NumPy, their invariances, vanishing spread, and each scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.advantages import SCALES, group_relative
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
