"""Training reaches the optimum that is known in closed form, and without KL it ends in the Dirac delta.

The loop is the one that draws ``docs/figures/dirac_delta.png``, so the figure shows what is tested here.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from driftrl.objectives.clipped_surrogate import clipped_surrogate
from driftrl.objectives.kl import kl_equal_variance
from driftrl.transitions.gaussian import log_prob

SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "dirac_delta.py"


def _load_script():
    spec = importlib.util.spec_from_file_location("dirac_delta_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _load_script()
ONE = toy.one_dimension()


def _vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


TWO = toy.Problem(_vector(0.0, 1.0), _vector(1.0, 0.5), _vector(2.0, -1.0), _vector(1.0, 0.7))


def _settled(means: torch.Tensor) -> torch.Tensor:
    """Mean over the second half of training, which averages out the steps' noise."""
    return means[len(means) // 2 :].mean(dim=0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("problem", "beta"),
    [
        (TWO, 0.5),
        (TWO, 0.1),
        pytest.param(TWO, 2.0, marks=SLOW),
        *(pytest.param(ONE, b, marks=SLOW) for b in (2.0, 0.5, 0.1)),
    ],
)
def test_reaches_p_ref_times_exp_reward_over_beta(problem, beta):
    """Mean and std, with no Monte Carlo error to allow for.

    At the optimum R - beta log(p / p_ref) is the same for every sample, so all advantages are zero there and
    the noise of the gradient vanishes with the gradient. A penalty made of log-ratios that are means over D
    dimensions weighs the KL by beta / D, hence the D here.
    """
    means, stds = toy.train(problem, beta * len(problem.mean))
    mean, std = problem.optimum(beta)
    torch.testing.assert_close(means[-1], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(stds[-1], std, rtol=0, atol=1e-5)


def test_the_closed_form_optimum_is_that_of_the_density():
    """The reference of this file against brute force: p_ref exp(R / beta), normalised on a grid."""
    grid = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    weight = (-0.5 * grid.square() + ONE.reward(grid[:, None]) / 0.3).exp()
    weight = weight / weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean).square()).sum()
    best, spread = ONE.optimum(0.3)
    torch.testing.assert_close(mean, best[0])
    torch.testing.assert_close(variance.sqrt(), spread[0])


@pytest.mark.parametrize("problem", [pytest.param(ONE, marks=SLOW), TWO], ids=["1d", "2d"])
def test_kl_in_the_loss_reaches_the_optimal_mean(problem):
    """Surrogate and KL are both means over dimensions, so beta means the same in one dimension and in two."""
    means, stds = toy.train(problem, 0.5, penalty="loss", group=1024)
    # Four runs that differ by seed scatter by 0.002; the baseline shifts the mean by less than 0.001.
    torch.testing.assert_close(_settled(means), problem.optimum(0.5)[0], rtol=0, atol=0.01)
    assert torch.equal(stds[-1], problem.std.log().exp())  # the KL of equal variances leaves the std alone


@pytest.mark.parametrize("group", [2, 8])
def test_a_baseline_that_contains_the_image_itself_enlarges_beta(group):
    """R_i - mean(R) holds (1 - 1/G) of R_i, so the KL in the loss weighs G / (G - 1) times as much."""
    beta = 0.5
    means, _ = toy.train(ONE, beta, penalty="loss", group=group, prompts=1024 // group)
    torch.testing.assert_close(
        _settled(means), ONE.optimum(beta * group / (group - 1))[0], rtol=0, atol=0.015
    )
    assert abs(float(_settled(means)[0] - ONE.optimum(beta)[0])) > 0.03


def test_dividing_by_the_groups_std_multiplies_beta_by_it():
    """With GRPO's normalisation the optimum is that of beta * std R, the std taken where training ends."""
    beta = 0.5
    means, _ = toy.train(ONE, beta, penalty="loss", scale="selected", group=1024)

    def excess(mean: float) -> float:
        """Gradient of the objective: pull of the reward over its std, less that of the KL."""
        reward_std = math.sqrt(0.5 + (2.0 - mean) ** 2)  # of -(x - 2)^2 / 2 under N(mean, 1)
        return (2.0 - mean) / reward_std - beta * mean

    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    assert float(_settled(means)[0]) == pytest.approx(low, abs=0.01)
    assert abs(low - float(ONE.optimum(beta)[0])) > 0.015


def test_variance_falls_to_zero_with_beta():
    """The optimum's std is about width * sqrt(beta), and training follows it down."""
    ends = []
    for beta in (1.0, 0.1, 0.01):
        means, stds = toy.train(ONE, beta, iterations=1500)
        assert float(stds[-1]) == pytest.approx(float(ONE.optimum(beta)[1]), rel=0.01)
        assert float(means[-1]) == pytest.approx(float(ONE.optimum(beta)[0]), abs=0.01)
        ends.append(float(stds[-1]))
    assert ends[2] < 0.15 * ends[0]


@pytest.mark.parametrize(("scale", "left"), [pytest.param("none", 0.1, marks=SLOW), ("selected", 2e-3)])
def test_without_kl_training_ends_in_the_dirac_delta(scale, left):
    """All mass moves to the best reward and the variance keeps falling, faster with GRPO's normalisation."""
    means, stds = toy.train(ONE, 0.0, scale=scale)
    assert float(means[-1]) == pytest.approx(2.0, abs=0.01)
    checkpoints = stds[[50, 200, 800], 0]
    assert bool((checkpoints.diff() < 0).all())
    assert float(checkpoints[-1]) < left
    longer = toy.train(ONE, 0.0, scale=scale, iterations=1600)[1]
    assert float(longer[-1]) < 0.8 * float(checkpoints[-1])


@pytest.mark.parametrize("problem", [pytest.param(ONE, marks=SLOW), TWO], ids=["1d", "2d"])
def test_diversity_shaping_changes_the_optimum_by_exactly_its_ratio(problem):
    """The shaped optimum is p_ref exp((R + ratio d) / beta): wider, with the mean where it was."""
    beta, ratio, dimensions = 0.5, 0.2, len(problem.mean)
    means, stds = toy.train(problem, beta * dimensions, ratio=ratio)
    mean, std = problem.optimum(beta, ratio)
    torch.testing.assert_close(_settled(means), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(_settled(stds), std, rtol=0.01, atol=0)
    assert bool((std > 1.04 * problem.optimum(beta)[1]).all())


def test_the_whole_objective_has_the_gradient_of_its_closed_form():
    """Surrogate plus KL, expected over N(m, 1) by quadrature, has at m the gradient of -E[R] + beta KL."""
    beta, at = 0.3, 0.7
    nodes = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    weight = (-0.5 * nodes.square()).exp()
    weight = weight / weight.sum()
    mean = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    x = (at + nodes)[:, None]
    wide = mean.expand_as(x)
    log_probs = log_prob(x, wide, 1.0)
    rewards = ONE.reward(x)
    advantages = rewards - (weight * rewards).sum()
    surrogate = clipped_surrogate(log_probs, log_probs.detach(), advantages, 0.2).loss
    kl = kl_equal_variance(wide, torch.zeros_like(x), torch.ones(1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((weight * (surrogate + beta * kl)).sum(), mean)
    # E[R] = -((m - 2)^2 + 1) / 2 and KL = m^2 / 2.
    assert float(gradient) == pytest.approx((at - 2.0) + beta * at, abs=1e-9)
