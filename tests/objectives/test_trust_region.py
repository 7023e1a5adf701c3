"""Trust regions that look at the means: against their formulas, by finite differences, and as rivals of the clipped ratio."""

import pytest
import torch

from driftrl.checks import InputError
from driftrl.objectives.clipped_surrogate import clipped_surrogate
from driftrl.objectives.kl import kl_equal_variance
from driftrl.objectives.trust_region import divergence_surrogate, normalized_surrogate, time_weights
from driftrl.transitions import gaussian


def drawn(pairs, std, drift, seed=0, size=(4, 3, 3)):
    """Samples of a policy, and another one nearby: advantages, x, mean, old mean, std, eps."""
    generator = torch.Generator().manual_seed(seed)
    old, away, eps = (torch.randn(pairs, *size, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.full((pairs, 1, 1, 1), std, dtype=torch.float64)
    advantages = torch.randn(pairs, generator=generator, dtype=torch.float64)
    return advantages, old + std * eps, old + drift * away, old, std, eps


def scores(x, mean, old, std):
    return gaussian.log_prob(x, mean, std).double(), gaussian.log_prob(x, old, std).double()


def test_the_normalized_log_ratio_is_what_the_noise_has_in_common_with_the_move():
    _, x, mean, old, std, eps = drawn(64, 0.3, 0.1)
    new, before = scores(x, mean, old, std)
    found = normalized_surrogate(new, before, torch.ones(64).double(), mean, old, std, clip_range=1e9)
    expected = ((mean - old) * eps).mean((1, 2, 3))
    torch.testing.assert_close(-found.loss, expected.exp(), atol=1e-5, rtol=0)


def test_it_has_no_drift_and_the_same_scale_at_every_step():
    """The plain log-ratio has the mean -KL, and a spread that grows as the step's noise falls."""
    spreads = []
    for std in (0.05, 0.5):
        _, x, mean, old, deviation, _ = drawn(4096, std, 0.005)
        new, before = scores(x, mean, old, deviation)
        plain = new - before
        kl = kl_equal_variance(mean, old, deviation)
        assert abs(plain.mean() + kl.mean()) < 4 * plain.std() / 64
        one = torch.ones(4096).double()
        found = normalized_surrogate(new, before, one, mean, old, deviation, clip_range=1e9)
        free = torch.log(-found.loss)
        assert float(found.approx_kl) == pytest.approx(0.5 * float(plain.square().mean()))
        assert abs(free.mean()) < 4 * free.std() / 64
        spreads.append((plain.std(), free.std()))
        if std == 0.05:
            assert plain.mean() < -10 * plain.std() / 64
    (sharp, sharp_free), (soft, soft_free) = spreads
    assert float(sharp / soft) == pytest.approx(10, rel=0.1)
    assert float(sharp_free / soft_free) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("surrogate", [normalized_surrogate, divergence_surrogate])
def test_gradient_against_finite_differences(surrogate):
    """In the mean, which the log-probability comes from too; pairs well within the region."""
    advantages, x, mean, old, std, _ = drawn(3, 0.4, 1e-3, size=(2, 2, 2))

    def loss(mean):
        new, before = scores64(x, mean, old, std)
        return surrogate(new, before, advantages, mean, old, std, 1.0).loss.sum()

    def scores64(x, mean, old, std):
        return tuple(-(((x - m) / std) ** 2).mean((1, 2, 3)) / 2 for m in (mean, old))

    assert torch.autograd.gradcheck(loss, mean.requires_grad_())


@pytest.mark.parametrize(("advantage", "log_ratio"), [(1.0, 0.1), (1.0, -0.1), (-2.0, 0.1), (-2.0, -0.1)])
@pytest.mark.parametrize("far", [True, False])
def test_beyond_the_divergence_only_the_way_out_is_closed(advantage, log_ratio, far):
    kl = torch.tensor([2e-5 if far else 1e-6])
    old, std = torch.zeros(1, 4), torch.ones(1, 1)
    mean = old + (2 * kl).sqrt()
    new = torch.tensor([log_ratio], requires_grad=True)
    found = divergence_surrogate(new, torch.zeros(1), torch.tensor([advantage]), mean, old, std, 1e-5)
    assert found.loss.item() == pytest.approx(-advantage * torch.tensor(log_ratio).exp().item())
    (gradient,) = torch.autograd.grad(found.loss.sum(), new)
    out = advantage * log_ratio > 0
    assert found.clip_fraction == float(far and out)
    assert gradient.item() == pytest.approx(0.0 if far and out else found.loss.item())


def test_the_clipped_ratio_closes_what_the_divergence_leaves_open():
    """A policy that has hardly moved: one sample's ratio says that it has, the divergence that it has not."""
    _, x, mean, old, std, _ = drawn(256, 0.05, 1e-3)
    new, before = scores(x, mean, old, std)
    one = torch.ones(256).double()
    assert clipped_surrogate(new, before, one).clip_fraction > 0.5
    assert divergence_surrogate(new, before, one, mean, old, std, 1e-3).clip_fraction == 0


def test_no_gradient_into_what_drew():
    for surrogate in (normalized_surrogate, divergence_surrogate):
        advantages, x, mean, old, std, _ = drawn(5, 0.4, 1e-3)
        given = [t.requires_grad_() for t in (advantages, old)]
        new, before = scores(x, mean.requires_grad_(), old, std)
        before.retain_grad()
        surrogate(new, before, advantages, mean, old, std, 1.0).loss.sum().backward()
        assert mean.grad is not None and given[0].grad is None and before.grad is None


def test_long_steps_weigh_less_and_the_mean_over_those_that_are_trained_stays():
    scored = torch.tensor([True] * 9 + [False])
    torch.testing.assert_close(time_weights(torch.full((10,), 0.1), scored), scored.float())
    durations = torch.tensor([0.01, 0.09, 0.4, 0.5])  # as flow models have them, shifted
    weights = time_weights(durations, torch.tensor([True, True, False, True]))
    times = weights * durations
    torch.testing.assert_close(times[[0, 1, 3]], times[0].expand(3))
    assert weights.sum() / 3 == pytest.approx(1) and weights[2] == 0


def test_steps_that_are_not_learned_from_weigh_nothing_whatever_they_take():
    durations = torch.tensor([0.3, 0.6, 0.0])
    weights = time_weights(durations, torch.tensor([True, True, False]))
    torch.testing.assert_close(weights, torch.tensor([4 / 3, 2 / 3, 0.0]))
    assert time_weights(durations, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 3
    with pytest.raises(InputError, match="durations: expected more than 0 at the steps"):
        time_weights(durations, torch.tensor([True, False, True]))


@pytest.mark.parametrize("surrogate", [normalized_surrogate, divergence_surrogate])
def test_any_form_of_one_std_per_pair(surrogate):
    advantages, x, mean, old, std, _ = drawn(3, 0.4, 1e-3, size=(2, 2, 2))
    new, before = scores(x, mean, old, std)

    def loss(form, *means):
        return surrogate(new, before, advantages, *(means or (mean, old)), form, 1.0).loss

    for form in (std.flatten(), 0.4, torch.tensor(0.4, dtype=torch.float64), std[:1]):
        assert torch.equal(loss(form), loss(std))
    flat = mean[:, 0, 0, 0], old[:, 0, 0, 0]
    columns = tuple(each[:, None] for each in flat)
    assert torch.equal(loss(std.flatten(), *flat), loss(std.flatten()[:, None], *columns))


def test_a_std_of_every_dimension_is_no_scale():
    for std in (torch.ones(2, 4), torch.ones(1, 4), torch.ones(1, 2)):
        with pytest.raises(InputError, match="std: expected"):
            normalized_surrogate(*zeros()[:5], std)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: normalized_surrogate(*zeros(), clip_range=0.0), "clip_range: expected more than 0; got 0"),
        (lambda: divergence_surrogate(*zeros(), max_kl=0.0), "max_kl: expected more than 0; got 0"),
        (lambda: divergence_surrogate(*zeros(old=torch.zeros(2, 3))), "mean_ref: expected"),
        (lambda: normalized_surrogate(*zeros(before=torch.zeros(3))), "old_log_prob: expected"),
        (lambda: time_weights(torch.ones(3), torch.ones(2, dtype=torch.bool)), "durations: expected"),
    ],
)
def test_refuses_what_it_cannot_use(call, says):
    with pytest.raises(InputError, match=says):
        call()


def zeros(before=None, old=None):
    flat, mean = torch.zeros(2), torch.zeros(2, 4)
    return (
        flat,
        flat if before is None else before,
        flat,
        mean,
        mean if old is None else old,
        torch.ones(2, 1),
    )
