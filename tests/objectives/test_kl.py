"""The closed-form KL against torch.distributions, Monte Carlo through log_prob, and autograd."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from driftrl.checks import InputError
from driftrl.objectives.kl import divergence, kl_equal_variance, step_weights, wasserstein_equal_variance
from driftrl.transitions.flow_sde import flow_sde_transition
from driftrl.transitions.gaussian import log_prob, sample


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 4, 4)])
def test_equals_torch_distributions(shape):
    mean, ref, std = _normal(*shape, seed=0), _normal(*shape, seed=1), torch.tensor([0.1, 1.0, 3.0]).double()
    wide = std.view(-1, *[1] * (len(shape) - 1))
    expected = kl_divergence(Normal(mean, wide), Normal(ref, wide)).reshape(3, -1).mean(dim=1)
    for form in (std, wide):
        torch.testing.assert_close(kl_equal_variance(mean, ref, form), expected)
    torch.testing.assert_close(
        kl_equal_variance(mean, ref, torch.tensor(0.5).double()),
        kl_divergence(Normal(mean, 0.5), Normal(ref, 0.5)).reshape(3, -1).mean(dim=1),
    )


def test_is_the_expected_log_ratio_under_the_same_convention():
    mean, ref, std = torch.zeros(1, 400_000).double(), torch.full((1, 400_000), 0.3).double(), 0.5
    x = sample(mean, std, _normal(1, 400_000, seed=2))
    estimate = log_prob(x, mean, std) - log_prob(x, ref, std)
    # The log-ratio has standard deviation 0.3 / 0.5 per draw: standard error 0.001.
    torch.testing.assert_close(
        estimate, kl_equal_variance(mean, ref, torch.tensor([std])), rtol=0, atol=0.005
    )


def test_gradient_flows_through_the_policy_mean_only():
    mean, ref = _normal(2, 3, seed=0).requires_grad_(), _normal(2, 3, seed=1).requires_grad_()
    std = torch.tensor([0.4, 2.0], dtype=torch.float64, requires_grad=True)
    kl_equal_variance(mean, ref, std).sum().backward()
    torch.testing.assert_close(mean.grad, (mean - ref).detach() / std.detach()[:, None] ** 2 / 3)
    assert ref.grad is None
    assert std.grad is None
    assert torch.autograd.gradcheck(lambda m: kl_equal_variance(m, ref, std), mean)


def test_zero_for_the_reference_itself_and_float32_for_half():
    mean = _normal(2, 3, seed=0).bfloat16()
    assert kl_equal_variance(mean, mean, torch.tensor([0.1])).tolist() == [0.0, 0.0]
    assert kl_equal_variance(mean, mean, torch.tensor([0.1]).bfloat16()).dtype == torch.float32


def test_refuses_shapes_that_do_not_agree():
    with pytest.raises(InputError, match="mean_ref"):
        kl_equal_variance(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2))
    with pytest.raises(InputError, match="std"):
        kl_equal_variance(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))


def test_wasserstein_is_the_squared_distance_of_the_means():
    """Of Gaussians of equal covariance; by optimal coupling of sorted draws in one dimension."""
    mean, ref = _normal(3, 2, 4, seed=0), _normal(3, 2, 4, seed=1)
    found = divergence("wasserstein", mean, ref, torch.ones(3))
    torch.testing.assert_close(
        found, torch.stack([((a - b) ** 2).mean() for a, b in zip(mean, ref, strict=True)])
    )
    one, other = (m + 0.7 * _normal(400_000, seed=s) for m, s in ((0.2, 2), (-0.3, 3)))
    coupled = (one.sort().values - other.sort().values).square().mean()
    alone = wasserstein_equal_variance(torch.tensor([[0.2]]), torch.tensor([[-0.3]]))
    assert float(coupled) == pytest.approx(float(alone), abs=0.01)
    std = torch.tensor([0.1, 1.0, 3.0]).double()
    torch.testing.assert_close(found, divergence("kl", mean, ref, std) * 2 * std**2)


def test_gradient_of_wasserstein_flows_through_the_policy_mean_only():
    mean, ref = _normal(2, 3, seed=0).requires_grad_(), _normal(2, 3, seed=1).requires_grad_()
    wasserstein_equal_variance(mean, ref).sum().backward()
    torch.testing.assert_close(mean.grad, 2 * (mean - ref).detach() / 3)
    assert ref.grad is None


def test_early_steps_weigh_more_and_the_mean_stays():
    scored = torch.tensor([True, True, False, True, True])
    assert step_weights(scored).tolist() == [1.0] * 5
    early = step_weights(scored, "early")
    assert early.tolist() == pytest.approx([1.6, 1.2, 0.0, 0.8, 0.4])
    assert float(early[scored].mean()) == pytest.approx(1.0)


def test_weighed_by_durations_it_is_the_kl_of_flow_grpos_code():
    """Which divides by twice sigma_t squared, without the step's time."""
    times = torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64)
    now, after = times[:-1], times[1:]
    x, v, u = (_normal(2, 6, seed=seed) for seed in (0, 1, 2))
    mean, std, _ = flow_sde_transition(v, x, now, after, 0.7)
    reference, _, _ = flow_sde_transition(u, x, now, after, 0.7)
    sigma = 0.7 * (now / (1 - now)).sqrt()
    code = (mean - reference).square().mean(1) / (2 * sigma.square())
    weights = step_weights(torch.ones(2, dtype=torch.bool), "durations", now - after)
    torch.testing.assert_close(weights * kl_equal_variance(mean, reference, std), code, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: wasserstein_equal_variance(torch.zeros(2, 3), torch.zeros(2, 4)), "mean_ref"),
        (lambda: divergence("w2", torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)), "divergence"),
        (lambda: step_weights(torch.ones(3, dtype=torch.bool), "late"), "schedule"),
        (lambda: step_weights(torch.ones(3, dtype=torch.bool), "durations"), "durations: .* got None"),
        (
            lambda: step_weights(torch.ones(3, dtype=torch.bool), "durations", torch.ones(2)),
            "durations: expected",
        ),
    ],
)
def test_refuses_what_does_not_fit(call, name):
    with pytest.raises(InputError, match=name):
        call()


def test_a_number_is_not_rounded_on_the_way():
    mean, reference = _normal(3, 4, seed=0), _normal(3, 4, seed=1)
    assert torch.equal(
        kl_equal_variance(mean, reference, 0.1),
        kl_equal_variance(mean, reference, torch.tensor(0.1, dtype=torch.float64)),
    )


def test_one_std_for_all():
    mean, reference = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    each = kl_equal_variance(mean, reference, torch.full((3,), 0.5))
    torch.testing.assert_close(kl_equal_variance(mean, reference, 0.5), each)
