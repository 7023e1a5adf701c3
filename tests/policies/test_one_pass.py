"""Gradients that are taken while candidates are drawn make the step that replay makes."""

import dataclasses
import itertools
import json
import math

import families
import pytest
import torch
from torch import nn

from driftrl import one_pass
from driftrl.build import build_loop, build_policy
from driftrl.checks import InputError, NotFiniteError
from driftrl.one_pass import pays, score_gradients, update_from
from driftrl.policies import fast_linear
from driftrl.policies.per_sample import SampleGradients, add_outer
from driftrl.rollout import PromptNoise, rollout
from driftrl.update import Objective, noisiest_steps, update

NOISE = PromptNoise(0.1)
ADVANTAGES = torch.tensor([[1.0, -0.5, 0.2], [0.0, 2.0, -1.7]])
OBJECTIVE = Objective(timesteps=1.0, timestep_choice="noisiest", batch_size=5, max_grad_norm=1e9)
WHOLE = {
    "optimizer__updates": 1, "selection__strategy": "all", "sampling__candidates": 4, "selection__keep": 4,
    "shaping__ratio": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, epsilon_folder):
    root = tmp_path_factory.mktemp("one_pass")
    made = {
        name: getattr(families, f"make_{name}")(root / name)
        for name in ("sd2", "sdxl", "sd3", "flux", "klein")
    }
    return {"sd": epsilon_folder, **made}


@pytest.fixture
def make(config, folders):
    """A policy of a family, with guidance, and a LoRA that does something."""

    def policy(family, **changes):
        size = {"sampling__height": 16, "sampling__width": 16, "sampling__guidance_scale": 3.0}
        made = build_policy(config(**({"model__path": str(folders[family])} | size | changes)))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        return made

    return policy


def drawn_by(policy, objective=None, batch=6):
    """Six candidates, with the gradients that ``objective`` wants."""
    conditioning = policy.encode(["a cat", "a dog"])
    asked = None if objective is None else score_gradients(policy.scored, objective, 6)
    return conditioning, rollout(
        policy, conditioning, [(0, 0, 0), (0, 0, 1)], 3, batch, NOISE, score_gradients=asked
    )


def step(policy, objective, together, advantages=ADVANTAGES, batch=6):
    """Statistics of one step of gradient descent, and minus the gradient; the weights are put back."""
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    conditioning, drawn = drawn_by(policy, objective if together else None, batch)
    if together:
        stats = update_from(drawn, policy, optimizer, advantages, objective)
    else:
        stats = update(policy, optimizer, drawn, advantages, conditioning, objective, (0, 0), NOISE)
    assert all(p.grad is None for p in policy.parameters())
    with torch.no_grad():
        moved = torch.cat([(p - old).flatten() for p, old in zip(policy.parameters(), before, strict=True)])
        for parameter, old in zip(policy.parameters(), before, strict=True):
            parameter.copy_(old)
    return stats, moved, drawn


def near(one, other, relative=1e-4):
    return float((one - other).norm()) < relative * float(other.norm()) and float(other.norm()) > 0


def pairs():
    """Every family's own layers; the fast ones, and networks that are checkpointed, of one each. The other pairs are slow."""
    every = itertools.product(
        ("sd", "sd2", "sdxl", "sd3", "flux", "klein"), (("fast", 1.0), ("stock", 0.5), ("checkpointed", 1.0))
    )
    quick = {("sd", "fast"), ("flux", "checkpointed")}
    return [
        pytest.param(
            family, *how, marks=() if how[0] == "stock" or (family, how[0]) in quick else pytest.mark.slow
        )
        for family, how in every
    ]


@pytest.mark.parametrize(("family", "layers", "share"), pairs())
def test_every_family_takes_the_step_that_replay_takes(make, monkeypatch, family, layers, share):
    """With the layers of a CPU in float32, with PEFT's own, and with gradient checkpointing; guidance and noise on."""
    if layers == "stock":
        monkeypatch.setattr(fast_linear, "available", lambda network: False)
    policy = make(family, model__gradient_checkpointing=layers == "checkpointed")
    objective = dataclasses.replace(OBJECTIVE, timesteps=share)
    replayed, theirs, drawn = step(policy, objective, False)
    stats, own, again = step(policy, objective, True)
    assert torch.equal(drawn.images, again.images) and torch.equal(drawn.log_probs, again.log_probs)
    assert near(own, theirs)
    assert stats.pairs == replayed.pairs
    assert math.isclose(stats.loss, replayed.loss, abs_tol=1e-5)
    assert math.isclose(stats.grad_norm, replayed.grad_norm, rel_tol=1e-4)
    assert stats.ratio_deviation == 0 and replayed.ratio_deviation < 1e-6


def test_each_row_is_the_gradient_of_its_own_sample(make):
    policy = make("sd")
    _, _, drawn = step(policy, OBJECTIVE, True)
    for sample in range(6):
        only = torch.zeros(6)
        only[sample] = 1.0
        _, moved, _ = step(policy, OBJECTIVE, False, only.view(2, 3))
        assert near(drawn.gradients.flatten(0, 1)[sample], moved)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_batch_changes_nothing(make, family):
    policy = make(family)
    _, together, _ = step(policy, OBJECTIVE, True)
    _, apart, _ = step(policy, OBJECTIVE, True, batch=4)
    assert near(apart, together, 1e-5)


def test_the_scale_of_half_precision_is_divided_out(make):
    policy = make("sd")
    _, plain, _ = step(policy, OBJECTIVE, True)
    _, scaled, _ = step(policy, dataclasses.replace(OBJECTIVE, loss_scale=2.0**14), True)
    assert near(scaled, plain, 1e-6)


def test_in_bfloat16_replay_moves_as_one_pass_does(make):
    """What replay needs scoring again for, one pass has for nothing."""
    policy = make("sd", model__dtype="bfloat16")
    assert policy.has_sample_gradients and policy.fast is None
    objective = dataclasses.replace(OBJECTIVE, rescore=True)
    _, theirs, _ = step(policy, objective, False)
    _, own, _ = step(policy, objective, True)
    assert near(own, theirs, 0.1)


def test_afterwards_gradients_go_where_they_always_went(make):
    policy = make("sdxl")
    _, before, _ = step(policy, OBJECTIVE, False)
    step(policy, OBJECTIVE, True)
    _, after, _ = step(policy, OBJECTIVE, False)
    assert torch.equal(before, after)


@pytest.mark.parametrize("changes", [WHOLE, {**WHOLE, "selection__strategy": "random", "selection__keep": 3}])
def test_a_run_learns_the_same(config, tmp_path, changes):
    """Three iterations of AdamW."""
    weights, metrics = {}, {}
    for asked in (True, False):
        loop = build_loop(config(**changes, optimizer__one_pass=asked), tmp_path / str(asked))
        assert loop.in_one_pass == asked
        loop.optimizer.param_groups[0]["eps"] = 1e-4  # so that rounding does not decide a step's direction
        metrics[asked] = [loop.iterate().metrics for _ in range(3)]
        weights[asked] = torch.cat([p.detach().flatten() for p in loop.policy.parameters()])
    torch.testing.assert_close(weights[True], weights[False], atol=1e-5, rtol=0)
    for one, other in zip(metrics[True], metrics[False], strict=True):
        assert one.keys() == other.keys()
        assert one["policy/pairs"] == other["policy/pairs"]
        for name in ("reward/mean", "diversity/kept_mean", "loss", "policy/grad_norm"):
            assert math.isclose(one[name], other[name], rel_tol=1e-3, abs_tol=1e-5), name


def test_a_resumed_run_goes_on_bit_for_bit(config, tmp_path):
    made = config(**WHOLE)
    whole = build_loop(made, tmp_path / "whole")
    assert whole.in_one_pass
    straight = [whole.iterate().metrics for _ in range(3)]
    first = build_loop(made, tmp_path / "parts")
    first.iterate()
    second = build_loop(made, tmp_path / "parts")
    second.resume(first.save())
    again = [second.iterate().metrics for _ in range(2)]
    assert json.dumps(straight[1:]) == json.dumps(again)
    for one, other in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer__updates": 2}, "updates"),
        ({"optimizer__epochs": 2}, "epochs"),
        ({"objective__kl_weight": 0.1}, "kl_weight"),
        ({"objective__timesteps": 0.5, "objective__timestep_choice": "random"}, "noisiest"),
        ({"shaping__potential": "stepwise", "shaping__ratio": 0.5}, "terminal"),
        ({"adapter__targets": ["to_q", "conv1"]}, "linear layers"),
        ({"adapter__kind": "full"}, "linear layers"),
    ],
)
@pytest.mark.filterwarnings("ignore::driftrl.build.UnlikelySettingWarning")
def test_where_it_cannot_be_the_reason_is_said_and_auto_replays(config, tmp_path, changes, reason):
    assert not build_loop(config(**{**WHOLE, **changes}), tmp_path).in_one_pass
    with pytest.raises(InputError, match=rf"optimizer\.one_pass: .*{reason}"):
        build_loop(config(**{**WHOLE, **changes}, optimizer__one_pass=True), tmp_path)


def test_auto_takes_it_where_it_pays(config, tmp_path, monkeypatch):
    half = {**WHOLE, "selection__strategy": "random", "selection__keep": 2}
    assert build_loop(config(**WHOLE), tmp_path).in_one_pass
    assert not build_loop(config(**half), tmp_path).in_one_pass
    assert build_loop(config(**half, model__dtype="bfloat16"), tmp_path).in_one_pass
    assert not build_loop(config(**WHOLE, optimizer__one_pass=False), tmp_path).in_one_pass
    assert [pays(n, 8, rescored=False) for n in (8, 15, 16)] == [True, True, False]
    assert [pays(8, 8, rescored=False, held=n) for n in (2**28, 2**28 + 1)] == [True, False]
    monkeypatch.setattr(one_pass, "LARGEST", 4 * 12 * 100)  # of 12 candidates
    assert not build_loop(config(**WHOLE), tmp_path).in_one_pass


def test_the_steps_are_the_noisiest_that_have_a_density():
    scored = torch.tensor([False, True, True, True, True, False])
    assert noisiest_steps(scored, 0.5).tolist() == [False, True, True, False, False, False]
    assert torch.equal(noisiest_steps(scored, 1.0), scored)
    assert int(noisiest_steps(scored, 0.01).sum()) == 1


def test_what_is_not_finite_is_named_and_moves_nothing(make):
    policy = make("sd")
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = [p.detach().clone() for p in policy.parameters()]
    _, drawn = drawn_by(policy, OBJECTIVE)
    place = int(policy.scored.nonzero()[1])
    drawn.log_probs[1, 0, place] = drawn.gradients[1, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=f"'a dog', denoising step {place}"):
        update_from(drawn, policy, optimizer, ADVANTAGES, OBJECTIVE, ["a cat", "a dog"])
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters(), before, strict=True))
    assert all(p.grad is None for p in policy.parameters())


def test_outer_products_are_summed_over_tokens_and_branches():
    left, right, into = torch.randn(6, 5, 2), torch.randn(6, 5, 4), torch.ones(3, 2, 4)
    add_outer(into, left, right)
    expected = torch.einsum("bnsp,bnsq->npq", left.view(2, 3, 5, 2), right.view(2, 3, 5, 4))
    torch.testing.assert_close(into, 1 + expected)


def test_other_trained_weights_have_no_sample_gradients():
    assert SampleGradients.of(nn.Linear(2, 2)) is None
    assert SampleGradients.of(nn.Linear(2, 2).requires_grad_(False)) is None
