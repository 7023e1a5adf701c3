"""The learning rate over the iterations, and what an average of the weights keeps."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from driftrl.checks import InputError
from driftrl.schedule import SCHEDULES, kept_share, rate_share


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("iterations", "warmup"), [(10, 0), (10, 3), (1, 0)])
def test_it_is_that_of_diffusers(kind, iterations, warmup):
    """After the warm-up, which begins at 1/N here and at 0 there."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=iterations)
    for iteration in range(iterations):
        share = rate_share(iteration, iterations, warmup, kind)
        if iteration < warmup:
            assert share == pytest.approx((iteration + 1) / warmup)
        else:
            assert share == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_beyond_the_last_iteration_and_warm_up_alone():
    assert rate_share(30, 10, 0, "linear") == rate_share(9, 10, 0, "linear") == pytest.approx(0.1)
    assert [rate_share(i, 2, 4, "cosine") for i in range(2)] == [0.25, 0.5]  # no time to fall
    for kind in SCHEDULES:
        assert (
            rate_share(7, 2, 4, kind) == rate_share(1, 2, 4, kind) == 0.5
        )  # nor to warm up: the last one's share stays
    assert [rate_share(i, 0, 0, "linear") for i in (0, 3)] == [1.0, 1.0]


def test_an_average_keeps_what_that_of_diffusers_does():
    weights = [torch.zeros(3, requires_grad=True)]
    theirs = EMAModel(weights, decay=0.3, use_ema_warmup=False)
    ours = weights[0].detach().clone()
    for iteration in range(8):
        with torch.no_grad():
            weights[0].copy_(torch.randn(3, generator=torch.Generator().manual_seed(iteration)))
        theirs.step(weights)
        kept = kept_share(iteration, 0.3)
        ours = kept * ours + (1 - kept) * weights[0].detach()
        torch.testing.assert_close(theirs.shadow_params[0], ours)


@pytest.mark.parametrize("bad", [(-1, 2), (0, -1), (0, 2, -1), (0, 2, 0, "cosin")])
def test_what_is_refused(bad):
    with pytest.raises(InputError, match="expected"):
        rate_share(*bad)


@pytest.mark.parametrize("bad", [(-1, 0.5), (0, 1.0), (0, -0.1), (0, float("nan"))])
def test_no_average(bad):
    with pytest.raises(InputError, match="expected"):
        kept_share(*bad)
