"""The negative-aware loss: its closed form, its gradient where the policy is the one that drew, and what holds it back."""

import math

import numpy as np
import pytest
import torch

from driftrl.checks import InputError
from driftrl.objectives.negative_aware import NegativeAware, negative_aware

SHAPE = (4, 2, 3, 3)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEW, OLD, DRAWN = (normal(*SHAPE, seed=seed) for seed in range(3))
ADVANTAGES = torch.tensor([2.0, -1.0, 0.0, 9.0]).double()


@pytest.mark.parametrize(("beta", "bound"), [(1.0, 5.0), (0.1, 5.0), (2.0, 1.0)])
def test_is_the_papers_loss_of_velocities(beta, bound):
    """Written anew for a flow, where the paper has it: velocities are mixed, and turned into images of x_t."""
    t = np.array([0.1, 0.4, 0.7, 1.0]).reshape(-1, 1, 1, 1)
    new, old, drawn = NEW.numpy(), OLD.numpy(), DRAWN.numpy()
    noised = (1 - t) * drawn + t * normal(*SHAPE, seed=3).numpy()
    v_new, v_old = (noised - new) / t, (noised - old) / t
    expected = []
    for i, advantage in enumerate(ADVANTAGES.tolist()):
        good = 0.5 + 0.5 * min(1.0, max(-1.0, advantage / bound))
        total = 0.0
        for share, v in (
            (good, (1 - beta) * v_old[i] + beta * v_new[i]),
            (1 - good, (1 + beta) * v_old[i] - beta * v_new[i]),
        ):
            error = noised[i] - t[i] * v - drawn[i]
            total += share * np.mean(error**2) / np.mean(np.abs(error))
        expected.append(total * bound / beta)
    found = negative_aware(NEW, OLD, DRAWN, ADVANTAGES, beta, bound)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_where_the_policy_is_the_one_that_drew_it_weighs_errors_by_advantages(beta):
    prediction = OLD.clone().requires_grad_()
    negative_aware(prediction, OLD, DRAWN, ADVANTAGES, beta, bound=5.0).sum().backward()
    again = OLD.clone().requires_grad_()
    error = (again - DRAWN).flatten(1)
    weight = ADVANTAGES.clamp(-5, 5) / error.detach().abs().mean(1)
    (weight * error.square().mean(1)).sum().backward()
    torch.testing.assert_close(prediction.grad, again.grad)


def test_without_an_advantage_it_pulls_back_to_the_one_that_drew():
    zeros = torch.zeros(4).double()
    at_home = OLD.clone().requires_grad_()
    negative_aware(at_home, OLD, DRAWN, zeros).sum().backward()
    torch.testing.assert_close(at_home.grad, torch.zeros_like(at_home))
    away = (OLD + 3 * (DRAWN - OLD)).requires_grad_()  # beyond what was drawn
    loss = negative_aware(away, OLD, DRAWN, zeros)
    loss.sum().backward()
    assert (loss > negative_aware(OLD, OLD, DRAWN, zeros)).all()
    assert ((away.grad * (away - OLD)).flatten(1).sum(1) > 0).all()  # downhill is homewards


def test_on_the_way_to_what_was_drawn_the_pull_is_the_same_and_off_it_there_is_one_back():
    def gradient(displacement, advantage):
        prediction = (OLD + displacement).requires_grad_()
        negative_aware(prediction, OLD, DRAWN, torch.full((4,), advantage).double()).sum().backward()
        return prediction.grad

    towards, zero = DRAWN - OLD, torch.zeros_like(OLD)
    for share in (-0.9, -0.4, 0.3, 0.9):
        torch.testing.assert_close(gradient(share * towards, 0.0), zero)
        torch.testing.assert_close(gradient(share * towards, 2.0), gradient(zero, 2.0))
    sideways = normal(*SHAPE, seed=9)
    flat, line = sideways.flatten(1), towards.flatten(1)
    sideways = (
        flat - (flat * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True) * line
    ).view_as(OLD)
    for size in (0.1, 1.0):
        back = (gradient(size * sideways, 0.0) * sideways).flatten(1).sum(1)
        assert (back > 0).all()


def test_good_images_draw_near_and_bad_ones_push_away():
    for advantage, sign in ((5.0, 1), (-5.0, -1)):
        prediction = OLD.clone().requires_grad_()
        negative_aware(prediction, OLD, DRAWN, torch.full((4,), advantage).double()).sum().backward()
        towards = ((DRAWN - OLD) * -prediction.grad).flatten(1).sum(1)
        assert (sign * towards > 0).all()


def test_gradient_flows_through_the_trained_prediction_only():
    tensors = [x.clone().requires_grad_() for x in (NEW, OLD, DRAWN, ADVANTAGES)]
    negative_aware(*tensors).sum().backward()
    assert [x.grad is None for x in tensors] == [False, True, True, True]


def test_advantages_are_bounded_and_samples_apart():
    def at(advantage):
        return negative_aware(NEW, OLD, DRAWN, torch.full((4,), advantage).double(), bound=2.0)

    assert (
        torch.equal(at(2.0), at(7.0))
        and torch.equal(at(-2.0), at(-7.0))
        and not torch.equal(at(2.0), at(1.9))
    )
    whole = negative_aware(NEW, OLD, DRAWN, ADVANTAGES)
    each = [negative_aware(*(x[i : i + 1] for x in (NEW, OLD, DRAWN, ADVANTAGES))) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(each))


def test_a_perfect_prediction_is_finite():
    prediction = DRAWN.clone().requires_grad_()
    loss = negative_aware(prediction, DRAWN, DRAWN, ADVANTAGES)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss)) and torch.isfinite(prediction.grad).all()


def test_latents_of_a_single_number():
    flat = [x.flatten(1)[:, 0] for x in (NEW, OLD, DRAWN)]
    expected = negative_aware(*(x[:, None] for x in flat), ADVANTAGES)
    assert torch.equal(negative_aware(*flat, ADVANTAGES), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_computed_in_float32_at_least(dtype):
    new, old, drawn = (x.to(dtype) for x in (NEW, OLD, DRAWN))
    found = negative_aware(new, old, drawn, ADVANTAGES.to(dtype))
    assert found.dtype == torch.float32
    expected = negative_aware(new.double(), old.double(), drawn.double(), ADVANTAGES)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_draws_follows_sooner_at_first():
    settings = NegativeAware(decay=0.001, decay_max=0.5)
    assert [settings.kept(i) for i in (0, 100, 500, 9000)] == [0.0, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beta": 0.0}, "beta: expected more than 0, and a finite number; got 0.0"),
        ({"bound": -1.0}, "bound: expected more than 0, and a finite number; got -1.0"),
        ({"bound": math.inf}, "bound: expected more than 0, and a finite number; got inf"),
        ({"x0_old": OLD[:2]}, "x0_old: expected the shape of x0_hat"),
        ({"x0": DRAWN[..., :1]}, "x0: expected the shape of x0_hat"),
        ({"advantages": ADVANTAGES[:3]}, r"advantages: expected one per sample, \[4\]; got \[3\]"),
        ({"advantages": ADVANTAGES[:, None]}, r"advantages: expected shape \[N\]"),
    ],
)
def test_refuses_what_it_cannot_use(change, says):
    arguments = {"x0_hat": NEW, "x0_old": OLD, "x0": DRAWN, "advantages": ADVANTAGES} | change
    with pytest.raises(InputError, match=says):
        negative_aware(**arguments)
