"""Advantage weighted matching: its closed form, its gradient where the policy is the one that drew, and what holds it back."""

import numpy as np
import pytest
import torch

from driftrl.checks import InputError
from driftrl.objectives.advantage_weighted import AdvantageWeighted, advantage_weighted, matching_score

SHAPE = (4, 2, 3, 3)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEW, OLD, DRAWN, EPS = (normal(*SHAPE, seed=seed) for seed in range(4))
SIGMA = torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
ADVANTAGES = torch.tensor([2.0, -1.0, 0.0, 5.0]).double()


def velocities_of_a_flow(x0):
    """At the latents that DRAWN and EPS give: x_t = (1 - t) x0 + t eps, v = eps - x0."""
    t = SIGMA.view(-1, 1, 1, 1)
    return ((1 - t) * DRAWN + t * EPS - x0) / t


def velocities_of_a_diffusion(x0):
    """The same of x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0."""
    sigma = SIGMA.view(-1, 1, 1, 1)
    alpha = (1 - sigma**2).sqrt()
    x_t = alpha * DRAWN + sigma * EPS
    return alpha * (x_t - alpha * x0) / sigma - sigma * x0


@pytest.mark.parametrize("velocities", [velocities_of_a_flow, velocities_of_a_diffusion])
@pytest.mark.parametrize(("power", "proximal", "clip"), [(0.25, 5.0, 1.0), (1.0, 0.0, 0.05), (0.5, 1.0, 0.3)])
def test_is_the_loss_of_velocities(velocities, power, proximal, clip):
    """Written anew with velocities, where the paper has it."""
    new, old, target = (velocities(x).numpy() for x in (NEW, OLD, DRAWN))
    expected = []
    for i, advantage in enumerate(ADVANTAGES.tolist()):
        scores = [-float(SIGMA[i]) * np.mean((v[i] - target[i]) ** 2) ** power / power for v in (new, old)]
        ratio = np.exp(scores[0] - scores[1])
        surrogate = min(advantage * ratio, advantage * np.clip(ratio, 1 - clip, 1 + clip))
        expected.append(proximal * np.mean((new[i] - old[i]) ** 2) - surrogate)
    found = advantage_weighted(NEW, OLD, DRAWN, SIGMA, ADVANTAGES, power, proximal, clip)
    np.testing.assert_allclose(found.loss.numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_where_the_policy_is_the_one_that_drew_it_is_the_pretraining_loss_by_advantages(power):
    prediction = OLD.clone().requires_grad_()
    advantage_weighted(prediction, OLD, DRAWN, SIGMA, ADVANTAGES, power).loss.sum().backward()
    again = OLD.clone().requires_grad_()
    error = (velocities_of_a_flow(again) - velocities_of_a_flow(DRAWN)).flatten(1).square().mean(1)
    (ADVANTAGES * SIGMA * error.detach() ** (power - 1) * error).sum().backward()
    torch.testing.assert_close(prediction.grad, again.grad, rtol=1e-6, atol=1e-8)


def test_the_score_has_its_maximum_where_the_images_were():
    score = matching_score(DRAWN, DRAWN, SIGMA)
    assert (score > matching_score(DRAWN + 0.01 * NEW, DRAWN, SIGMA)).all()
    perfect = DRAWN.clone().requires_grad_()
    matching_score(perfect, DRAWN, SIGMA).sum().backward()
    assert torch.isfinite(perfect.grad).all()


def test_the_proximal_term_leads_back_and_has_no_gradient_at_home():
    zeros = torch.zeros(4).double()
    home = OLD.clone().requires_grad_()
    advantage_weighted(home, OLD, DRAWN, SIGMA, zeros).loss.sum().backward()
    assert torch.equal(home.grad, torch.zeros_like(home))
    away = NEW.clone().requires_grad_()
    advantage_weighted(away, OLD, DRAWN, SIGMA, zeros).loss.sum().backward()
    assert ((away.grad * (NEW - OLD)).flatten(1).sum(1) > 0).all()  # downhill is homewards
    free = NEW.clone().requires_grad_()
    advantage_weighted(free, OLD, DRAWN, SIGMA, zeros, proximal=0.0).loss.sum().backward()
    assert torch.equal(free.grad, torch.zeros_like(free))


def test_bad_images_push_away_ever_less():
    """The ratio of what is already unlikely is small, so no prediction is driven away for ever."""

    def pull(displacement):
        prediction = (DRAWN + displacement * (OLD - DRAWN)).requires_grad_()
        bad = torch.full((4,), -1.0).double()
        advantage_weighted(
            prediction, OLD, DRAWN, SIGMA, bad, power=1.0, proximal=0.0, clip_range=1e9
        ).loss.sum().backward()
        return (prediction.grad * (OLD - DRAWN)).flatten(1).sum(1)

    assert (pull(1.0) < 0).all()  # away from the drawn image
    assert (pull(30.0).abs() < 1e-6 * pull(1.0).abs()).all()


def test_gradient_flows_through_the_trained_prediction_only_and_samples_are_apart():
    tensors = [x.clone().requires_grad_() for x in (NEW, OLD, DRAWN, SIGMA, ADVANTAGES)]
    whole = advantage_weighted(*tensors).loss
    whole.sum().backward()
    assert [x.grad is None for x in tensors[:3]] == [False, True, True] and tensors[4].grad is None
    each = [advantage_weighted(*(x.detach()[i : i + 1] for x in tensors)).loss for i in range(4)]
    torch.testing.assert_close(whole.detach(), torch.cat(each))


def test_latents_of_a_single_number():
    flat = [x.flatten(1)[:, 0] for x in (NEW, OLD, DRAWN)]
    expected = advantage_weighted(*(x[:, None] for x in flat), SIGMA, ADVANTAGES).loss
    assert torch.equal(advantage_weighted(*flat, SIGMA, ADVANTAGES).loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_computed_in_float32_at_least(dtype):
    given = [x.to(dtype) for x in (NEW, OLD, DRAWN, SIGMA, ADVANTAGES)]
    found = advantage_weighted(*given).loss
    assert found.dtype == torch.float32
    expected = advantage_weighted(*(x.double() for x in given)).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_called_by_its_settings():
    settings = AdvantageWeighted(0.5, 2.0, 0.3)
    found = settings(NEW, OLD, DRAWN, SIGMA, ADVANTAGES)
    expected = advantage_weighted(NEW, OLD, DRAWN, SIGMA, ADVANTAGES, 0.5, 2.0, 0.3)
    assert torch.equal(found.loss, expected.loss) and settings.kept(9) == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"power": 0.0}, "power: expected more than 0 and at most 1; got 0.0"),
        ({"power": 1.5}, "power: expected more than 0 and at most 1; got 1.5"),
        ({"proximal": -1.0}, "proximal: expected at least 0; got -1.0"),
        ({"clip_range": 0.0}, "clip_range: expected more than 0; got 0.0"),
        ({"x0_old": OLD[:2]}, "x0: expected the shape of x0_hat"),
        ({"x0": DRAWN[..., :1]}, "x0: expected the shape of x0_hat"),
        ({"sigma": SIGMA[:3]}, r"sigma: expected one per sample, \[4\]; got \[3\]"),
        ({"sigma": SIGMA[:, None]}, r"sigma: expected shape \[N\]"),
        ({"advantages": ADVANTAGES[:3]}, "advantages: expected the shape of log_prob"),
    ],
)
def test_refuses_what_it_cannot_use(change, says):
    arguments = {
        "x0_hat": NEW, "x0_old": OLD, "x0": DRAWN, "sigma": SIGMA, "advantages": ADVANTAGES,
    } | change  # fmt: skip
    with pytest.raises(InputError, match=says):
        advantage_weighted(**arguments)
