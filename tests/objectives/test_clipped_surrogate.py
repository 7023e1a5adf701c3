"""The clipped surrogate against its definition, finite differences and the policy gradient."""

import pytest
import torch

from driftrl.checks import InputError
from driftrl.objectives.clipped_surrogate import clipped_surrogate


def _t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# (log-ratio, advantage, has gradient): inside the range, outside it both ways, with either sign.
CASES = [
    (0.0, 1.0, True),
    (0.05, -2.0, True),
    (0.5, 1.0, False),  # already likelier than the range allows
    (0.5, -1.0, True),  # likelier although it is bad: must come back
    (-0.5, 1.0, True),
    (-0.5, -1.0, False),
]


@pytest.mark.parametrize(("log_ratio", "advantage", "has_gradient"), CASES)
def test_value_and_gradient_case_by_case(log_ratio, advantage, has_gradient):
    old, ratio = _t(-1.3), torch.tensor(log_ratio, dtype=torch.float64).exp()
    new = (old + log_ratio).requires_grad_()
    loss = clipped_surrogate(new, old, _t(advantage), clip_range=0.2).loss
    expected = max(-advantage * float(ratio), -advantage * min(max(float(ratio), 0.8), 1.2))
    assert float(loss.detach()) == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert float(gradient) == pytest.approx(-advantage * float(ratio) if has_gradient else 0.0)


def test_gradient_against_finite_differences():
    log_ratios, advantages = (_t(*column) for column in zip(*[case[:2] for case in CASES], strict=True))
    old = torch.linspace(-2, 1, len(CASES), dtype=torch.float64)
    new = (old + log_ratios).requires_grad_()
    assert torch.autograd.gradcheck(lambda lp: clipped_surrogate(lp, old, advantages, 0.2).loss, new)


def test_untouched_policy_gives_the_policy_gradient():
    """At ratio 1 the loss is -A and its gradient is -A grad log pi: REINFORCE."""
    advantages = _t(0.3, -1.7)
    new = _t(-0.4, -0.9).requires_grad_()
    result = clipped_surrogate(new, new.detach().clone(), advantages)
    torch.testing.assert_close(result.loss.detach(), -advantages)
    (gradient,) = torch.autograd.grad(result.loss.sum(), new)
    torch.testing.assert_close(gradient, -advantages)
    assert float(result.ratio_mean) == 1.0
    assert float(result.clip_fraction) == 0.0
    assert float(result.approx_kl) == 0.0


def test_no_gradient_into_old_log_prob_or_advantages():
    new, old, advantages = (_t(0.1, 0.2).requires_grad_() for _ in range(3))
    clipped_surrogate(new, old, advantages).loss.sum().backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_half_precision_is_widened_before_the_ratio():
    """1.0002 is 1 there, and nothing would ever be clipped."""
    new, old = torch.tensor([2e-4], dtype=torch.float16), torch.zeros(1, dtype=torch.float16)
    result = clipped_surrogate(new, old, torch.ones(1, dtype=torch.float16))
    assert result.loss.dtype == torch.float32
    wide = clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.float64))
    assert wide.loss.dtype == torch.float32
    assert float(result.loss) == pytest.approx(-1.0001, abs=1e-7)
    assert float(result.clip_fraction) == 1.0


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_ratio_that_overflows_is_clipped_too(advantage):
    """exp(100) is no float32: infinity times the 0 of a clipped gradient, or of no advantage, would be NaN."""
    log_prob = torch.tensor([100.0], requires_grad=True)
    loss = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage])).loss
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([-advantage * 1.0001]))
    assert log_prob.grad.tolist() == [0.0]


def test_at_the_edge_of_the_range_nothing_is_clipped():
    edge = torch.tensor([1.0 + 1e-4]).log()
    inside = clipped_surrogate(edge.nextafter(torch.zeros(1)), torch.zeros(1), torch.ones(1))
    assert inside.clip_fraction == 0


def test_diagnostics():
    log_ratio = _t(0.0, 0.5, -0.5, 0.01)
    result = clipped_surrogate(
        log_ratio.clone().requires_grad_(), torch.zeros_like(log_ratio), _t(1, 1, 1, 1), 0.2
    )
    assert float(result.clip_fraction) == 0.5
    assert float(result.ratio_mean) == pytest.approx(float(log_ratio.exp().mean()))
    assert float(result.approx_kl) == pytest.approx(float(log_ratio.square().mean() / 2))
    assert not any(value.requires_grad for value in result[1:])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b: clipped_surrogate(a, a, b), "advantages"),
        (lambda a, b: clipped_surrogate(a, b, a), "old_log_prob"),
        (lambda a, b: clipped_surrogate(a[None], a[None], a[None]), r"\[B\]"),
        (lambda a, b: clipped_surrogate(a, a, a, clip_range=0.0), "clip_range"),
    ],
)
def test_refuses_what_it_cannot_use(call, says):
    with pytest.raises(InputError, match=says):
        call(torch.zeros(2), torch.zeros(3))
