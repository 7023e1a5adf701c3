"""Flow-matching transitions: against the published formulas, the flow's marginals, and diffusers."""

import math
from itertools import pairwise

import pytest
import torch

from driftrl.checks import InputError
from driftrl.transitions.flow_sde import (
    cps_transition,
    dance_sde_transition,
    flow_noised,
    flow_sde_transition,
)

TRANSITIONS = [flow_sde_transition, dance_sde_transition, cps_transition]


def _normal(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_flow_sde_is_equation_9_of_flow_grpo():
    x, v, t, t_prev = (
        _normal(3, 4, seed=0),
        _normal(3, 4, seed=1),
        _times(0.9, 0.5, 0.2),
        _times(0.8, 0.3, 0.0),
    )
    mean, std, x0 = flow_sde_transition(v, x, t, t_prev, noise_level=0.7)
    for i in range(3):
        now, dt = float(t[i]), float(t[i] - t_prev[i])
        sigma = 0.7 * math.sqrt(now / (1 - now))
        drift = v[i] + sigma**2 / (2 * now) * (x[i] + (1 - now) * v[i])
        torch.testing.assert_close(mean[i], x[i] - drift * dt)
        assert float(std[i]) == pytest.approx(sigma * math.sqrt(dt))
        torch.testing.assert_close(x0[i], x[i] - now * v[i])


def test_dance_sde_is_the_reverse_sde_with_constant_noise():
    """The flow's drift and half of eta squared times the score of x_t given the predicted x_0, as DanceGRPO writes it."""
    x, v, t, t_prev = (
        _normal(3, 4, seed=0),
        _normal(3, 4, seed=1),
        _times(1.0, 0.5, 0.2),
        _times(0.8, 0.3, 0.0),
    )
    mean, std, x0 = dance_sde_transition(v, x, t, t_prev, noise_level=0.3)
    for i in range(3):
        now, dt = float(t[i]), float(t[i] - t_prev[i])
        clean = x[i] - now * v[i]
        score = -(x[i] - (1 - now) * clean) / now**2
        torch.testing.assert_close(mean[i], x[i] - v[i] * dt + 0.5 * 0.3**2 * score * dt)
        assert float(std[i]) == pytest.approx(0.3 * math.sqrt(dt))
        torch.testing.assert_close(x0[i], clean)


def test_flow_sde_at_pure_noise_takes_the_next_time():
    x, v = _normal(1, 4, seed=0), _normal(1, 4, seed=1)
    mean, std, _ = flow_sde_transition(v, x, _times(1.0), _times(0.9), noise_level=0.7)
    sigma_squared = 0.7**2 * 1.0 / (1 - 0.9)
    torch.testing.assert_close(mean, x * (1 - sigma_squared / 2 * 0.1) - v * 0.1)
    assert float(std) == pytest.approx(math.sqrt(sigma_squared * 0.1))
    every = flow_sde_transition(v, x, _times(1.0), _times(0.0))
    assert all(bool(torch.isfinite(part).all()) for part in every)


def test_a_schedule_that_begins_just_below_pure_noise_begins_as_one_that_begins_there():
    """SANA's first time is 0.99967: with 1 - t in sigma_t the first step's std was 7."""
    x, v = _normal(1, 4, seed=0), _normal(1, 4, seed=1)
    near, at = (flow_sde_transition(v, x, _times(t), _times(0.964)) for t in (0.99967, 1.0))
    for one, other in zip(near, at, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def test_cps_is_the_published_formula():
    x, v, t, t_prev = (
        _normal(3, 4, seed=0),
        _normal(3, 4, seed=1),
        _times(1.0, 0.5, 0.2),
        _times(0.8, 0.3, 0.0),
    )
    mean, std, x0 = cps_transition(v, x, t, t_prev, noise_level=0.8)
    for i in range(3):
        now, after = float(t[i]), float(t_prev[i])
        sigma = after * math.sin(0.8 * math.pi / 2)
        clean, noise = x[i] - now * v[i], x[i] + (1 - now) * v[i]
        torch.testing.assert_close(mean[i], (1 - after) * clean + math.sqrt(after**2 - sigma**2) * noise)
        assert float(std[i]) == pytest.approx(sigma)
        torch.testing.assert_close(x0[i], clean)
    assert float(std[2]) == 0.0  # exactly


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_without_noise_it_is_diffusers_euler_step(transition):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    x = _normal(2, 4, seed=0, dtype=torch.float32)
    for step, timestep in enumerate(scheduler.timesteps):
        v = _normal(2, 4, seed=step + 1, dtype=torch.float32)
        expected = scheduler.step(v, timestep, x, return_dict=False)[0]
        mean, std, _ = transition(
            v, x, scheduler.sigmas[step].expand(2), scheduler.sigmas[step + 1].expand(2), noise_level=0.0
        )
        assert not bool(std.any())
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
        x = expected


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_cps_keeps_the_marginals_of_a_point_mass_at_any_step_size(noise_level):
    m, count = 0.7, 200_000
    for t, t_prev in ((1.0, 0.6), (0.6, 0.1)):
        noise, fresh = _normal(count, 1, seed=0), _normal(count, 1, seed=1)
        x = (1 - t) * m + t * noise
        mean, std, x0 = cps_transition(
            noise - m, x, _times(t).expand(count), _times(t_prev).expand(count), noise_level
        )
        after = mean + std * fresh
        torch.testing.assert_close(x0, torch.full_like(x0, m))
        assert abs(float(after.mean()) - (1 - t_prev) * m) < 5 * t_prev / count**0.5
        assert float(after.std()) == pytest.approx(t_prev, rel=0.01)


def _marginal_after(steps: int, noise_level: float) -> tuple[float, float]:
    """Mean and std at t = 0.2 of data N(0.5, 0.4^2) sampled from t = 0.8 with the exact velocity.

    The exact velocity is linear in x, and so is a step's mean: mean and variance are carried exactly, the
    step's coefficients read off by probing it.
    """
    m, s = 0.5, 0.4
    times = torch.linspace(0.8, 0.2, steps + 1, dtype=torch.float64)

    def velocity(x, t):
        posterior = m + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * m)
        return (x - posterior) / t

    mean, variance = 0.2 * m, 0.2**2 * s**2 + 0.8**2
    for now, after in pairwise(times):
        probe = _times(0.0, 1.0)[:, None]
        at, std, _ = flow_sde_transition(
            velocity(probe, now), probe, now.expand(2), after.expand(2), noise_level
        )
        offset, slope = float(at[0]), float(at[1] - at[0])
        mean, variance = offset + slope * mean, slope**2 * variance + float(std[0]) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("noise_level", [0.7, 1.5])
def test_flow_sde_keeps_the_marginals_as_steps_get_small(noise_level):
    """The error halves with the step, towards zero: the drift correction is the right one for the noise."""
    truth = (0.8 * 0.5, math.sqrt(0.8**2 * 0.4**2 + 0.2**2))
    errors = [
        [abs(got - want) for got, want in zip(_marginal_after(n, noise_level), truth, strict=True)]
        for n in (200, 400)
    ]
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 2e-3
        assert fine == pytest.approx(coarse / 2, rel=0.1)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_gradient_through_the_mean(transition):
    x, v = _normal(2, 3, seed=0), _normal(2, 3, seed=1).requires_grad_()
    t, t_prev = _times(1.0, 0.4), _times(0.7, 0.1)
    assert torch.autograd.gradcheck(lambda u: transition(u, x, t, t_prev)[::2], v)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_half_precision_is_computed_in_float32_and_std_broadcasts(transition):
    x, v = (_normal(2, 3, 4, 4, seed=s, dtype=torch.float32).bfloat16() for s in (0, 1))
    mean, std, x0 = transition(v, x, torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.2]))
    assert mean.dtype == std.dtype == x0.dtype == torch.float32
    assert std.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_refuses_what_it_cannot_use(transition):
    x, half = torch.zeros(1, 2), torch.tensor([0.5])
    with pytest.raises(InputError, match="velocity"):
        transition(torch.zeros(1, 3), x, half, half)
    with pytest.raises(InputError, match="one per sample"):
        transition(x, x, half, torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match="noise_level"):
        transition(x, x, half, half, noise_level=-0.1)


def test_noised_in_half_precision_rounds_once():
    """t itself would round to 1, and nothing of the image be left."""
    x0 = torch.full((1, 1), 300.0).bfloat16()
    got = flow_noised(x0, torch.zeros(1, 1), torch.tensor([0.9985]))
    assert got.dtype == torch.bfloat16 and got.item() == pytest.approx(0.45, rel=2**-7)
    for wrong in ((x0, torch.zeros(3), torch.tensor([0.5])), (x0, x0, torch.tensor([0.5, 0.5]))):
        with pytest.raises(InputError, match="expected"):
            flow_noised(*wrong)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_one_number_counts_for_all_samples(transition):
    x, v = _normal(3, 4, seed=0), _normal(3, 4, seed=1)
    each = transition(v, x, torch.full((3,), 0.5), torch.full((3,), 0.25))
    for a, b in zip(transition(v, x, 0.5, torch.tensor(0.25)), each, strict=True):
        torch.testing.assert_close(a, b)
