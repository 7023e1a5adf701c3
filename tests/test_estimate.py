"""Estimates against what a real iteration does: calls of the network and bytes exactly, no times."""

import dataclasses

import pytest
import torch

from conftest import driftrl
from driftrl import probe, trainer
from driftrl.build import build_loop
from driftrl.checks import RunFailedError
from driftrl.config import dump_config
from driftrl.estimate import (
    Calls,
    Costs,
    Phases,
    Plan,
    Standing,
    calls,
    evaluation_seconds,
    peaks,
    remedies,
    seconds,
    stored_bytes,
)
from driftrl.rollout import rollout
from driftrl.scoring import Scoring

CHANGES = [
    {},
    {"sampling__guidance_scale": 1.0, "model__gradient_checkpointing": True},
    {"objective__kl_weight": 0.1, "sampling__batch_size": 5, "optimizer__batch_size": 4},
    {"model__dtype": "bfloat16", "optimizer__batch_size": 7, "optimizer__epochs": 2},
    {"optimizer__updates": 1, "optimizer__batch_size": 7, "objective__timesteps": 1.0},
    {"objective__timesteps": 1.0, "optimizer__updates": 5, "optimizer__batch_size": 3},
    {"objective__loss": "nft", "objective__timesteps": 1.0},
    {
        "objective__loss": "nft",
        "objective__timestep_choice": "random",
        "objective__kl_weight": 0.1,
        "model__dtype": "bfloat16",
    },
    {"sampling__window": 2, "objective__timesteps": 1.0},
    {
        "objective__loss": "awm",
        "objective__timesteps": 1.0,
        "optimizer__updates": 3,
        "optimizer__batch_size": 5,
    },
    {
        "objective__loss": "dgpo",
        "objective__timesteps": 1.0,
        "optimizer__updates": 5,
        "optimizer__batch_size": 5,
    },
    {"objective__loss": "adjoint", "optimizer__batch_size": 5, "reward": "test_reward_gradients:smooth"},
    {
        "objective__loss": "draft",
        "objective__draft_steps": 2,
        "objective__kl_weight": 0.1,
        "reward": "test_reward_gradients:smooth",
    },
]


ONE_PASS = {
    "optimizer__updates": 1,
    "selection__strategy": "all",
    "selection__keep": 6,
    "shaping__ratio": 0.0,
}


@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
@pytest.mark.parametrize("changes", CHANGES)
def test_the_network_is_called_as_often_as_estimated(config, tmp_path, changes):
    """Counted by a hook, and the optimiser's steps too."""
    loop = build_loop(config(**changes), tmp_path)
    plan = probe.plan_of(loop)
    rows, steps = [], []
    loop.policy.fast = None  # which is called as often, and calls no hooks
    loop.policy.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    loop.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    loop.iterate()
    expected = calls(plan)
    assert len(rows) == expected.forward
    assert len(steps) == expected.optimizer
    replayed = 0 if plan.backward else plan.pairs * plan.epochs * (1 + plan.reference + plan.rescored)
    spared = plan.parts[0] if plan.spared else 0
    carried = plan.carried * plan.kept
    assert sum(rows) == plan.branches * (plan.images * plan.steps + replayed - spared + carried)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"prompt_noise__eta": 0.0}, {"shaping__potential": "stepwise"}, ONE_PASS,
        {"objective__loss": "nft", "objective__timesteps": 1.0},
    ],
)  # fmt: skip
def test_bytes_are_those_of_a_real_iteration(config, tmp_path, monkeypatch, changes):
    loop = build_loop(config(**changes), tmp_path)
    plan, standing, kept = probe.plan_of(loop), probe.standing_of(loop), []

    def watched(*arguments, **named):
        kept.append(rollout(*arguments, **named))
        return kept[0]

    monkeypatch.setattr(trainer, "rollout", watched)
    loop.iterate()
    tensors = [getattr(kept[0], field.name) for field in dataclasses.fields(kept[0])]
    real = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    assert probe.stored_of(loop, plan) == real
    states = [v for state in loop.optimizer.state.values() for k, v in state.items() if k != "step"]
    assert standing.optimizer == sum(t.numel() * t.element_size() for t in states)
    network = {p.data_ptr(): p.numel() * 4 for p in loop.policy.network.parameters()}
    parts = [loop.policy.pipeline.vae, loop.policy.pipeline.text_encoder]
    rest = sum(t.numel() * t.element_size() for m in parts for t in (*m.parameters(), *m.buffers()))
    behavior = (
        sum(p.numel() * 4 for p in loop.policy.parameters()) if loop.objective.denoising else 0
    )  # a copy
    assert standing.model == sum(network.values()) + rest + behavior
    assert standing.instruments == sum(
        t.numel() * t.element_size()
        for t in (*loop.encoder.model.parameters(), *loop.encoder.model.buffers())
    )


@pytest.mark.parametrize(
    ("loss", "alone"), [("clipped_surrogate", False), ("adjoint", False), ("adjoint", True)]
)
def test_the_probe_covers_every_phase(config, tmp_path, loss, alone):
    """Also with few pairs, more of them than images are drawn at once, and a reference."""
    changes = {"sampling__batch_size": 2, "objective__kl_weight": 0.1, "objective__timesteps": 1.0}
    changes |= {"shaping__ratio": 0.0, "selection__keep": 6} if alone else {}
    changes |= {"objective__loss": loss, "reward": "test_reward_gradients:smooth"}
    loop, told = build_loop(config(**changes), tmp_path), []
    costs = probe.measure(loop, told.append)
    assert list(dict.fromkeys(told)) == [name for name, _ in costs.working.items()]
    assert (costs.followed > 0) == (loss == "adjoint")
    assert probe.plan_of(loop).at_once == alone
    assert min(costs.step, costs.decode, costs.reward, costs.encode, costs.pair, costs.optimizer) > 0
    assert all(value >= 0 for _, value in costs.working.items())


def test_seconds_and_peaks_add_up():
    """By hand: 2 prompts x 4 candidates, 2 kept, 3 steps of which 2 are scored."""
    plan = Plan(2, 4, 2, 3, 2, 1.0, 2, 3, 2, 1, 3, True, False, 1)
    assert (plan.images, plan.kept, plan.pairs, plan.parts) == (8, 4, 8, [4, 4])
    assert calls(plan).rollout == 9 and calls(plan).update == calls(plan).reference == 4
    costs = Costs(1.0, 10.0, 100.0, 1000.0, 5.0, 7.0, Phases(1, 2, 3, 4, 5))
    assert seconds(plan, costs) == Phases(24.0, 80.0, 1600.0, 4000.0, 8 * 5.0 + 2 * 7.0)
    every = dataclasses.replace(plan, all_embedded=True)
    assert seconds(every, costs) == dataclasses.replace(seconds(plan, costs), diversity=8000.0)
    followed = dataclasses.replace(costs, followed=50.0)
    assert seconds(plan, followed).update == seconds(plan, costs).update + 4 * 50.0
    at_once = seconds(dataclasses.replace(plan, keep=4, at_once=True), followed)
    assert (at_once.decoding, at_once.reward) == (8 * 50.0, 800.0)  # what is left is the judge's
    assert at_once.update == seconds(dataclasses.replace(plan, keep=4), costs).update
    assert evaluation_seconds(plan, costs, 2) == 2 * (3 + 10 + 100 + 1000)
    assert evaluation_seconds(plan, costs, 2, steps=40) == 2 * (40 + 10 + 100 + 1000)
    most = peaks(plan, Standing(1, 2, 3, 4, 10), 100, 40, 50, costs.working)
    assert most == Phases(20 + 100 + 1, 20 + 102, 20 + 103, 20 + 154, 20 + 40 + 30 + 50 + 5)


def test_one_pass_by_hand():
    """The same plan with two steps backward: nothing is replayed, and gradients of 50 weights are stored."""
    plan = Plan(2, 4, 2, 3, 2, 1.0, 2, 3, 1, 1, 3, False, False, 0, backward=2)
    assert calls(plan) == Calls(rollout=9, update=0, reference=0, rescoring=0, optimizer=1, backward=6)
    costs = Costs(1.0, 10.0, 100.0, 1000.0, 5.0, 7.0, Phases(1, 2, 3, 4, 5), backward=3.0)
    assert seconds(plan, costs) == Phases(8 * (1 + 2 * 3.0), 80.0, 800.0, 4000.0, 7.0)
    latent, image = (4, 2, 2), (3, 8, 8)
    more = stored_bytes(plan, latent, image, gradients=50) - stored_bytes(plan, latent, image)
    assert more == 4 * 8 * 50


def test_the_probe_measures_one_pass(config, tmp_path):
    """Its stored bytes are those of a real rollout, and a fitted batch is the one that gradients are taken in."""
    loop = build_loop(config(**ONE_PASS), tmp_path)
    plan = probe.plan_of(loop)
    assert plan.backward == 1 and plan.rollout_batch == loop.update_batch.now
    drawn = loop._sample(
        loop.conditioning.rows(torch.arange(3)), [0, 1, 2], [0, 0, 0], 0, Scoring((), [], False)
    )
    tensors = [getattr(drawn, field.name) for field in dataclasses.fields(drawn)]
    assert probe.stored_of(loop, plan) == sum(t.numel() * t.element_size() for t in tensors if t is not None)
    probe.fit(loop, 8.0, rollout=False, update=True)
    assert loop.update_batch.now >= 18
    costs = probe.measure(loop)
    assert costs.backward > 0 and costs.optimizer > 0


def test_out_of_memory_is_one_line_that_says_what_to_change(config, tmp_path):
    loop = build_loop(config(), tmp_path)

    def full(latents):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(latents), 3, 16, 16)

    loop.policy.decode = full
    with pytest.raises(
        RunFailedError, match=r"probe of decoding, 18 at once.*vae_slicing=true.*batch_size=9"
    ):
        probe.measure(loop)


def test_other_errors_of_the_probe_are_not_hidden(config, tmp_path):
    loop = build_loop(config(guards__reward_attempts=1), tmp_path)
    loop.encoder = lambda images: (_ for _ in ()).throw(RuntimeError("a fault of the encoder"))
    with pytest.raises(RuntimeError, match="a fault of the encoder"):
        probe.measure(loop)


def test_remedies_end_where_nothing_is_left():
    plan = Plan(1, 4, 2, 3, 2, 1.0, 2, 1, 2, 1, 1, False, False, 0)
    done = {"checkpointing": True, "slicing": True, "half": True, "full": False}
    assert all(remedies(phase, plan, **done) == [] for phase, _ in Phases(0, 0, 0, 0, 0).items())
    first = remedies("update", plan, **(done | {"checkpointing": False}))
    assert first == ["model.gradient_checkpointing=true"]


def test_in_one_pass_it_is_the_update_s_batch_that_has_to_shrink(config, tmp_path):
    """Where gradients are taken while images are drawn, and where these are decoded."""
    loop = build_loop(config(**ONE_PASS), tmp_path)
    plan = probe.plan_of(loop)
    assert plan.backward
    state = {"checkpointing": False, "slicing": True, "half": True, "full": False}
    told = ["model.gradient_checkpointing=true", "optimizer.batch_size=9"]
    assert remedies("denoising", plan, **state)[:2] == told
    assert remedies("decoding", plan, **state)[0] == "optimizer.batch_size=9"

    def full(samples):
        raise torch.OutOfMemoryError("CUDA out of memory")

    loop.policy.sample_gradients = full
    with pytest.raises(RunFailedError, match=r"probe of denoising.*gradient_checkpointing=true"):
        probe.measure(loop)


@pytest.mark.parametrize("probed", [True, False])
def test_the_command(config, tmp_path, probed):
    """Times only with the probe; nothing is written."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config()))
    result = driftrl("estimate", path, *([] if probed else ["--no-probe"]), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "18 images, 4 steps: 4 forward" in result.stdout
    assert ("2 iterations" in result.stdout) == probed == ("computing" in result.stdout)
    assert "most in use, during" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_the_command_refuses_bad_settings(tmp_path):
    result = driftrl("estimate", "--set", "sampling.step=3", cwd=tmp_path)
    assert result.returncode == 2
    assert "did you mean 'steps'" in result.stderr
