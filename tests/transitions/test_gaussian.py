"""Gaussian transitions: against torch.distributions, entropy by Monte Carlo, gradients, conventions."""

import pytest
import torch

from driftrl.checks import InputError
from driftrl.transitions.gaussian import entropy, log_prob, sample


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4, 4)])
def test_log_prob_is_the_mean_over_dimensions(shape):
    x, mean = _normal(*shape), _normal(*shape, seed=1)
    std = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    wide = std.view(-1, *[1] * (len(shape) - 1))
    expected = torch.distributions.Normal(mean, wide).log_prob(x).reshape(5, -1).mean(dim=1)
    for form in (std, wide, wide.expand(shape)):
        torch.testing.assert_close(log_prob(x, mean, form), expected)
    torch.testing.assert_close(
        log_prob(x, mean, 0.7), torch.distributions.Normal(mean, 0.7).log_prob(x).reshape(5, -1).mean(dim=1)
    )


def test_a_vector_of_stds_belongs_to_the_samples_even_where_the_shape_is_square():
    x, mean, std = torch.zeros(3, 3), torch.zeros(3, 3), torch.tensor([1.0, 2.0, 4.0])
    assert log_prob(x, mean, std).diff().tolist() == pytest.approx([-0.6931, -0.6931], abs=1e-4)
    assert sample(mean, std, torch.ones(3, 3)).tolist() == [[1.0] * 3, [2.0] * 3, [4.0] * 3]


def test_entropy_is_the_expectation_of_minus_log_prob():
    std = torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64)
    mean = _normal(3, 2, 100_000, seed=3)
    x = sample(mean, std, _normal(3, 2, 100_000, seed=4))
    # -log p has variance 1/2 per dimension, whatever the std: standard error sqrt(0.5 / 200000) = 0.0016.
    torch.testing.assert_close(-log_prob(x, mean, std), entropy(std), rtol=0, atol=0.007)
    torch.testing.assert_close(entropy(std), torch.distributions.Normal(0.0, std).entropy())
    torch.testing.assert_close(entropy(std.view(3, 1, 1, 1)), entropy(std))
    assert float(entropy(0.4)) == pytest.approx(float(entropy(std)[1]))


def test_score_function_identities():
    """E[grad log p] = 0 and its variance is 1 / (D std)^2: the mean convention, seen in the gradient."""
    dimensions, count, std = 4, 200_000, 0.3
    mean = torch.zeros(count, dimensions, dtype=torch.float64, requires_grad=True)
    x = sample(mean.detach(), std, _normal(count, dimensions, seed=5))
    (score,) = torch.autograd.grad(log_prob(x, mean, std).sum(), mean)
    assert float(score.mean(0).abs().max()) < 5 / (dimensions * std * count**0.5)
    assert float(score.square().mean()) == pytest.approx(1 / (dimensions * std) ** 2, rel=0.02)


def test_log_prob_gradient():
    x, mean = _normal(3, 2, 2), _normal(3, 2, 2, seed=1).requires_grad_()
    std = torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: log_prob(x, m, s), (mean, std))


def test_half_precision_is_scored_in_float32():
    x, mean = (
        _normal(2, 8, dtype=torch.float32).bfloat16(),
        _normal(2, 8, seed=1, dtype=torch.float32).bfloat16(),
    )
    got = log_prob(x, mean, 0.1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, log_prob(x.float(), mean.float(), 0.1), rtol=0, atol=0)
    assert log_prob(x, mean, torch.tensor([0.1, 0.2]).bfloat16()).dtype == torch.float32
    assert entropy(torch.tensor([0.1]).bfloat16()).dtype == torch.float32


def test_other_batch_sizes_score_alike():
    x, mean = _normal(7, 4, 8, 8, dtype=torch.float32), _normal(7, 4, 8, 8, seed=1, dtype=torch.float32)
    together = log_prob(x, mean, 0.2)
    alone = torch.cat([log_prob(x[i : i + 1], mean[i : i + 1], 0.2) for i in range(7)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_no_noise_leaves_the_mean():
    mean = _normal(3, 2)
    assert torch.equal(sample(mean, 0.0, _normal(3, 2, seed=1)), mean)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: log_prob(torch.zeros(2, 3), torch.zeros(2, 4), 1.0), "shape of x"),
        (lambda: log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)), "std"),
        (lambda: log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 2)), "std"),
        (lambda: sample(torch.zeros(2, 3), 1.0, torch.zeros(3)), "noise"),
    ],
)
def test_refuses_shapes_that_do_not_agree(call, says):
    with pytest.raises(InputError, match=says):
        call()
