"""What stochastic samplers leave at the end: mean and variance of x_0 of Gaussian data, against the ODE's."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from driftrl.transitions.ddim import PREDICTION_TYPES, ddim_tables, ddim_transition
from driftrl.transitions.flow_sde import cps_transition, flow_sde_transition

MEAN, STD = 0.5, 0.6
"""Of the data."""


def carried(moments, transition):
    """Mean and variance after a step whose mean is linear in x: its coefficients are read off two points."""
    mean, variance = moments
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at, std, _ = transition(probe)
    offset, slope = float(at[0]), float(at[1] - at[0])
    return offset + slope * mean, slope**2 * variance + float(std[0]) ** 2


def ddim_end(steps, eta, prediction_type):
    """Moments of x_0 by the exact network: E[x_0 | x_t] is linear for Gaussian data."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    tables = ddim_tables(
        scheduler.alphas_cumprod, scheduler.timesteps, scheduler.final_alpha_cumprod, eta, prediction_type
    )
    first = float(tables.alpha[0])
    moments = (first**0.5 * MEAN, first * STD**2 + 1 - first)
    for a, after in zip(tables.alpha, tables.alpha_prev, strict=True):

        def step(x, a=a, after=after):
            clean = MEAN + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (x - a.sqrt() * MEAN)
            eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
            output = {
                "epsilon": eps,
                "sample": clean,
                "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * clean,
            }
            return ddim_transition(
                output[prediction_type], x, a.expand(2), after.expand(2), eta, prediction_type
            )

        moments = carried(moments, step)
    return moments


def flow_end(transition, steps, noise_level):
    """Moments of x_0 by the exact velocity, on the times of diffusers' scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(steps)
    moments = (0.0, 1.0)
    for now, after in pairwise(scheduler.sigmas.double()):

        def step(x, now=now, after=after):
            spread = (1 - now) ** 2 * STD**2 + now**2
            clean = MEAN + (1 - now) * STD**2 / spread * (x - (1 - now) * MEAN)
            return transition((x - clean) / now, x, now.expand(2), after.expand(2), noise_level)

        moments = carried(moments, step)
    return moments


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_with_noise_ends_where_the_ode_ends(prediction_type):
    """The more steps the nearer, and at 50, the paper's, within 5% of the data's standard deviation."""
    gaps = []
    for steps in (50, 500):
        ode, noisy = ddim_end(steps, 0.0, prediction_type), ddim_end(steps, 1.0, prediction_type)
        gaps.append(abs(ode[1] ** 0.5 - noisy[1] ** 0.5))
        assert ode[0] == pytest.approx(noisy[0], abs=1e-3) and noisy[0] == pytest.approx(MEAN, abs=1e-3)
    assert gaps[0] < 0.05 * STD
    assert gaps[1] < gaps[0] / 3
    assert noisy[1] ** 0.5 == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_the_flow_sde_ends_where_the_ode_ends(noise_level):
    """The error falls with the number of steps, towards the ODE's, which is the data's."""
    gaps = []
    for steps in (50, 800):
        ode, noisy = (flow_end(flow_sde_transition, steps, level) for level in (0.0, noise_level))
        gaps.append([abs(ode[0] - noisy[0]), abs(ode[1] ** 0.5 - noisy[1] ** 0.5)])
    assert max(gaps[1]) < 0.01
    assert gaps[1][1] < gaps[0][1] / 3


@pytest.mark.parametrize("steps", [10, 50])
def test_cps_keeps_the_mean_but_narrows_what_is_not_a_point(steps):
    """Its formula puts noise back for noise, not for what E[x_0 | x_t] leaves out of the data's own variance."""
    ode, noisy = (flow_end(cps_transition, steps, level) for level in (0.0, 0.7))
    assert noisy[0] == pytest.approx(MEAN, abs=0.01)
    assert 0.75 < (noisy[1] / ode[1]) ** 0.5 < 0.9
