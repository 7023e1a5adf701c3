"""Group preference: DPO's loss written out, its gradient, its clip, and pairs as Diffusion-DPO has them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from driftrl.checks import InputError
from driftrl.objectives.advantage_weighted import velocity_error
from driftrl.objectives.group_preference import GroupPreference, group_preference, group_weights

P, G, SHAPE = 3, 4, (2, 3, 3)
FREE = 1e36
"""A clip range that nothing leaves."""


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEW, OLD, BASE, DRAWN = (normal(P * G, *SHAPE, seed=seed) for seed in range(4))
SIGMA = torch.tensor([0.2, 0.6, 1.0]).double().repeat_interleave(G)
ADVANTAGES = normal(P, G, seed=9)


def errors(x0):
    return velocity_error(x0, DRAWN, SIGMA).unflatten(0, (P, G))


def weighed(x0, beta):
    return (ADVANTAGES * group_weights(errors(x0), errors(BASE), ADVANTAGES, beta)[:, None]).flatten()


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_its_gradient_is_that_of_dpo_over_groups(beta):
    """-log sigmoid(-s) differentiated as it stands, times 1 / beta."""
    prediction = NEW.clone().requires_grad_()
    group_preference(prediction, OLD, DRAWN, SIGMA, weighed(NEW, beta), FREE).loss.mean().backward()
    again = NEW.clone().requires_grad_()
    s = beta * (ADVANTAGES * (errors(again) - errors(BASE))).mean(1)
    (-F.logsigmoid(-s).mean() / beta).backward()
    torch.testing.assert_close(prediction.grad, again.grad, rtol=1e-9, atol=1e-12)


def test_the_weights_are_the_formula():
    own, reference = (x.tolist() for x in (errors(NEW), errors(BASE)))
    for p, found in enumerate(group_weights(errors(NEW), errors(BASE), ADVANTAGES, 0.7).tolist()):
        s = sum(0.7 * ADVANTAGES[p, g].item() * (own[p][g] - reference[p][g]) for g in range(G)) / G
        assert found == pytest.approx(1 / (1 + math.exp(-s)), rel=1e-12)
    assert torch.equal(group_weights(errors(BASE), errors(BASE), ADVANTAGES), torch.full((P,), 0.5).double())


def test_a_pair_is_diffusion_dpo():
    """Of a winner and a loser: -log sigmoid(-beta / 2 ((e_w - e_w_ref) - (e_l - e_l_ref))), its gradient times 2 / beta / 2."""
    beta, advantages = 3.0, torch.tensor([[1.0, -1.0]]).double()
    winner, loser = (normal(1, *SHAPE, seed=s).requires_grad_() for s in (20, 21))
    drawn, base, sigma = normal(2, *SHAPE, seed=22), normal(2, *SHAPE, seed=23), SIGMA[5:7]
    both = torch.cat([winner, loser])
    own, reference = (velocity_error(x, drawn, sigma) for x in (both, base))
    weight = group_weights(own[None], reference[None], advantages, beta)
    group_preference(both, base, drawn, sigma, (advantages * weight)[0], FREE).loss.sum().backward()
    found = [x.grad.clone() for x in (winner, loser)]
    again = [x.detach().clone().requires_grad_() for x in (winner, loser)]
    e = [velocity_error(x, drawn[i : i + 1], sigma[i : i + 1]) for i, x in enumerate(again)]
    inside = -beta / 2 * ((e[0] - reference[0]) - (e[1] - reference[1]))
    (-F.logsigmoid(inside).sum() * 2 / beta).backward()
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-9, atol=1e-12)


def test_what_is_preferred_already_counts_less():
    better = BASE + torch.where((ADVANTAGES.flatten() > 0).view(-1, 1, 1, 1), 0.5, -0.5) * (DRAWN - BASE)
    right = group_weights(errors(better), errors(BASE), ADVANTAGES, 1.0)
    wrong = group_weights(errors(BASE), errors(better), ADVANTAGES, 1.0)
    assert (right < 0.5).all() and (wrong > 0.5).all()
    torch.testing.assert_close(right + wrong, torch.ones(P).double())
    sharp = group_weights(errors(better), errors(BASE), ADVANTAGES, 100.0)
    assert (sharp < right).all() and torch.isfinite(sharp).all()


def test_beyond_the_clip_range_there_is_no_gradient_in_the_direction_that_is_asked_for():
    """Good images that are predicted well enough, and bad ones badly enough."""
    toward, away = OLD + 0.3 * (DRAWN - OLD), OLD - 0.3 * (DRAWN - OLD)
    for good, there, gone in (
        (1.0, toward, True),
        (1.0, away, False),
        (-1.0, away, True),
        (-1.0, toward, False),
    ):
        prediction = there.clone().requires_grad_()
        found = group_preference(prediction, OLD, DRAWN, SIGMA, torch.full((P * G,), good).double(), 0.01)
        found.loss.sum().backward()
        assert (prediction.grad == 0).flatten(1).all(1).tolist() == [gone] * (P * G)
        assert found.clip_fraction == 1
        np.testing.assert_allclose(found.loss.detach(), good * velocity_error(there, DRAWN, SIGMA), rtol=1e-12)  # fmt: skip


def test_where_the_policy_is_the_one_that_drew_nothing_is_clipped():
    found = group_preference(OLD, OLD, DRAWN, SIGMA, ADVANTAGES.flatten(), 1e-12)
    assert found.clip_fraction == 0 == found.approx_kl and found.ratio_mean == 1


def test_gradient_flows_through_the_trained_prediction_only():
    tensors = [x.clone().requires_grad_() for x in (NEW, OLD, DRAWN, SIGMA, ADVANTAGES.flatten())]
    group_preference(*tensors, FREE).loss.sum().backward()
    assert [x.grad is None for x in (*tensors[:3], tensors[4])] == [False, True, True, True]
    own = errors(NEW).requires_grad_()
    assert not group_weights(own, errors(BASE), ADVANTAGES).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_computed_in_float32_at_least(dtype):
    given = [x.to(dtype) for x in (NEW, OLD, DRAWN, SIGMA, ADVANTAGES.flatten())]
    found = group_preference(*given, FREE).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), group_preference(*(x.double() for x in given), FREE).loss,
                               rtol=1e-5, atol=1e-4)  # fmt: skip
    assert (
        group_weights(*(x.to(dtype) for x in (errors(NEW), errors(BASE), ADVANTAGES))).dtype == torch.float32
    )


def test_called_by_its_settings():
    settings = GroupPreference(0.7, 0.3)
    found = settings(NEW, OLD, DRAWN, SIGMA, ADVANTAGES.flatten())
    assert torch.equal(found.loss, group_preference(NEW, OLD, DRAWN, SIGMA, ADVANTAGES.flatten(), 0.3).loss)
    wanted = group_weights(errors(NEW), errors(BASE), ADVANTAGES, 0.7)
    assert torch.equal(settings.weights(errors(NEW), errors(BASE), ADVANTAGES), wanted)
    assert settings.kept(9) == settings.anchor_kept == 0.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: group_weights(errors(NEW), errors(BASE), ADVANTAGES, 0.0), "beta: expected more than 0"),
        (lambda: group_weights(errors(NEW), errors(BASE), ADVANTAGES, math.inf), "beta: expected more than 0"),
        (lambda: group_weights(errors(NEW)[0], errors(BASE), ADVANTAGES), r"error: expected shape \[P, G\]"),
        (lambda: group_weights(errors(NEW), errors(BASE)[:2], ADVANTAGES), "reference: expected the shape of error"),
        (lambda: group_weights(errors(NEW), errors(BASE), ADVANTAGES[:, :2]), "advantages: expected the shape of error"),
        (lambda: group_preference(NEW, OLD, DRAWN, SIGMA, SIGMA, 0.0), "clip_range: expected more than 0; got 0.0"),
        (lambda: group_preference(NEW, OLD[:2], DRAWN, SIGMA, SIGMA), "x0: expected the shape of x0_hat"),
        (lambda: group_preference(NEW, OLD, DRAWN, SIGMA[:2], SIGMA), r"sigma: expected one per sample, \[12\]; got \[2\]"),
        (lambda: group_preference(NEW, OLD, DRAWN, SIGMA, SIGMA[:2]), "advantages: expected the shape of sigma"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_use(call, says):
    with pytest.raises(InputError, match=says):
        call()
