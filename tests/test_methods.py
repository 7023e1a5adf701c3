"""Every method of experiments/methods: it trains, resumes exactly, and is GRPO once its own part is switched off."""

import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from driftrl import Trainer
from driftrl.advantages import AdvantageRule
from driftrl.build import build_loop, build_policy
from driftrl.checkpoint import MEMORY, damage
from driftrl.checks import InputError
from driftrl.config import load_config
from driftrl.memory import Memory
from driftrl.objectives.gate import Anchor
from driftrl.rollout import NO_NOISE, latent_features, rollout, score_step
from driftrl.update import Objective, update

FOLDER = Path(__file__).parents[1] / "experiments/methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
KEYS = [(0, 3, 0), (0, 3, 1)]


@pytest.fixture(scope="module")
def method(pipeline_folder, encoder_folder):
    """A method's configuration at the size of a second."""

    def make(name, *overrides):
        reward = (
            "test_reward_gradients:smooth" if name.startswith(("adjoint", "draft")) else "incompressibility"
        )
        small = [
            f"model.path={pipeline_folder}", "adapter.rank=2", "adapter.alpha=2.0", "prompts.per_iteration=3",
            "sampling.steps=4", "sampling.candidates=6", "sampling.guidance_scale=2.0", "selection.keep=4",
            f"reward={reward}", f"shaping.encoder={encoder_folder}", "advantage.history=9",
            "advantage.min_history=4", "iterations=1", "logging.trackers=[]", "logging.checkpoint_every=1",
            "evaluation.at_end=false", "optimizer.learning_rate=0.01",
        ]  # fmt: skip
        return load_config(FOLDER / f"{name}.yaml", [*small, *overrides])

    return make


@pytest.fixture(scope="module")
def two_iterations(method, tmp_path_factory):
    """The run folder of a method after two iterations: of a rival that is compared with several others, trained once."""

    @functools.cache
    def run(name, *overrides):
        return Trainer(
            method(name, "iterations=2", *overrides), tmp_path_factory.mktemp("rivals") / "run"
        ).run()

    return run


def tensors(folder, name="training.safetensors"):
    return load_file(folder / name) if (folder / name).is_file() else {}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_methods_are_small_differences():
    assert {"ddpo", "grpo", "gardo", "diversegrpo", "entropy", "drift", "dancegrpo", "flowgrpo"} <= set(
        METHODS
    )
    assert sum(name.startswith("grpo-kl-") for name in METHODS) == 3
    for name in METHODS:
        data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert name == "base" or ("base" in data and len(data) <= 6)
        assert load_config(FOLDER / f"{name}.yaml").name == ("grpo" if name == "base" else name)


@pytest.mark.parametrize("name", METHODS)
def test_one_iteration(method, tmp_path, name):
    config = method(name)
    run = Trainer(config, tmp_path / "run").run()
    (line,) = metrics(run)
    assert all(value is not None for value in line.values())
    assert line["policy/ratio_deviation"] <= 1e-6
    assert line["advantage/abs_mean"] > 0
    before, after = (tensors(run / f"checkpoints/00000{i}") for i in (0, 1))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.endswith("/value"))
    assert load_config(run / "config.yaml") == config
    assert "base:" not in (run / "config.yaml").read_text()


# What is switched off, and the rival that is left; what another pair of these says too is tried by `make test-slow`.
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "off", "rival", "settings"),
    [
        ("grpo-kl-1", ["objective.kl_weight=0.0"], "grpo", []),
        ("ddpo", ["advantage.baseline=group"], "grpo", []),
        ("dancegrpo", ["selection.strategy=random"], "grpo", []),
        ("flowgrpo", ["advantage.scale=selected"], "grpo", []),
        ("gardo", ["shaping.ratio=0.0", "objective.kl_weight=0.0"], "grpo", []),
        pytest.param(
            "gardo",
            ["shaping.ratio=0.0", "objective.kl_share=1.0", "objective.kl_weight=0.1",
             "objective.reference_kl=null", "objective.reference_every=null"],
            "grpo-kl-0.1",
            [],
            marks=SLOW,
        ),
        (
            "diversegrpo",
            ["shaping.ratio=0.0", "objective.divergence=kl", "objective.kl_schedule=uniform",
             "objective.kl_weight=0.1"],
            "grpo-kl-0.1",
            [],
        ),
        ("entropy", ["shaping.ratio=0.0"], "grpo", []),
        ("flow-dppo", ["objective.max_kl=1e9"], "grpo", ["objective.clip_range=1e9"]),  # neither holds anything
        pytest.param(
            "mixgrpo",
            ["sampling.window=null", "sampling.window_every=null", "objective.timesteps=0.4"],
            "grpo",
            [],
            marks=SLOW,
        ),
        ("mixgrpo", ["sampling.window_every=null"], "grpo", ["objective.timesteps=1.0"]),  # the three with noise
        pytest.param("nft", ["objective.loss=clipped_surrogate", "objective.timestep_choice=noisiest"], "grpo", [], marks=SLOW),
        pytest.param("nft-shaped", ["shaping.ratio=0.0"], "nft", [], marks=SLOW),
        pytest.param("awm", ["objective.loss=clipped_surrogate", "objective.timestep_choice=noisiest"], "grpo", [], marks=SLOW),
        ("awm-shaped", ["shaping.ratio=0.0"], "awm", ["objective.awm_proximal=50.0"]),
        pytest.param("dgpo", ["objective.loss=clipped_surrogate", "objective.timestep_choice=noisiest"], "grpo", [], marks=SLOW),
        ("dgpo-shaped", ["shaping.ratio=0.0"], "dgpo", []),
        ("drift", ["selection.strategy=random", "prompt_noise.eta=0.0", "shaping.ratio=0.0"], "grpo", []),
        pytest.param("drift-no-shaping", ["selection.strategy=random", "prompt_noise.eta=0.0"], "grpo", [], marks=SLOW),
        pytest.param("drift-no-selection", ["selection.strategy=nearest_neighbor"], "drift", [], marks=SLOW),
        pytest.param("drift-stepwise", ["shaping.potential=terminal"], "drift", [], marks=SLOW),
    ],
)  # fmt: skip
def test_switched_off_it_is_its_rival(two_iterations, name, off, rival, settings):
    ours, theirs = two_iterations(name, *off), two_iterations(rival, *settings)
    assert_same(tensors(ours / "checkpoints/000002"), tensors(theirs / "checkpoints/000002"))
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()


def test_all_of_a_group_in_one_cluster_is_grpo_up_to_rounding(method, tmp_path):
    off = ["shaping.clusters=1", "objective.kl_weight=0.0"]
    ours = Trainer(method("diversegrpo", *off), tmp_path / "ours").run()
    theirs = Trainer(method("grpo"), tmp_path / "theirs").run()
    a, b = (metrics(run)[0] for run in (ours, theirs))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ddpo", ["prompts.set=animals8", "prompts.per_iteration=5"]),  # a prompt comes twice in iteration 2
        ("gardo", ["objective.reference_every=2", "objective.reference_kl=null"]),
        pytest.param(
            "gardo",
            ["objective.reference_every=null", "objective.reference_kl=1e-9", "objective.kl_share=1.0"],
            marks=pytest.mark.slow,
        ),
        pytest.param("drift-stepwise", [], marks=pytest.mark.slow),  # it remembers nothing
    ],
)
def test_resumed_equals_uninterrupted(method, tmp_path, name, overrides):
    def config(iterations):
        return method(name, *overrides, f"iterations={iterations}")

    whole = Trainer(config(4), tmp_path / "whole").run()
    for stop in (1, 3, 4):
        parts = Trainer(config(stop), tmp_path / "parts", resume=stop > 1).run()
    for file in ("training.safetensors", MEMORY):
        assert_same(*(tensors(run / "checkpoints/000004", file) for run in (whole, parts)))
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    memory = tensors(parts / "checkpoints/000004", MEMORY)
    if name == "ddpo":
        assert int(memory["history/filled"].max()) == 9
    if name == "gardo":
        moved = [line["reference/moved"] for line in metrics(whole)]
        assert moved == ([0, 1, 0, 1] if "objective.reference_every=2" in overrides else [1, 1, 1, 1])
        assert int(memory["age"]) == 0


def test_plain_methods_remember_nothing(method, tmp_path):
    run = Trainer(method("drift"), tmp_path / "run").run()
    assert not (run / "checkpoints/000001" / MEMORY).exists()


def test_a_damaged_memory_is_a_damaged_checkpoint(method, tmp_path):
    run = Trainer(method("ddpo"), tmp_path / "run").run()
    path = run / "checkpoints/000001"
    assert damage(path) is None
    (path / MEMORY).write_bytes(b"torn")
    assert "memory" in damage(path)


def test_a_skipped_iteration_leaves_the_memory(method, tmp_path):
    loop = build_loop(method("ddpo"), tmp_path)
    before = loop.memory
    loop.reward = lambda images, prompts: torch.full((len(images),), torch.nan)
    with pytest.warns(UserWarning, match="skipped"):
        loop.attempt()
    assert loop.memory is before


def test_the_memory_refuses_another_run(method):
    policy = build_policy(method("ddpo"))
    empty = Memory.empty(AdvantageRule(baseline="running", history=5), 3, policy)
    other = Memory.empty(AdvantageRule(baseline="running", history=5), 4, policy)
    with pytest.raises(InputError, match="prompt file"):
        empty.restored(other.tensors(), policy)
    with pytest.raises(InputError, match="reference does not fit"):
        empty.restored({"reference/00000": torch.zeros(1)}, policy)
    assert Memory().tensors() == {}


def drawn(policy, keep_clean=False):
    conditioning = policy.encode(["a cat", "a dog"])
    return conditioning, rollout(policy, conditioning, KEYS, 3, 4, keep_clean=keep_clean)


def shift(policy, seed):
    """Move the policy away from the base model."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def test_the_reference_stands_in_and_steps_back(method):
    policy = build_policy(method("gardo"))
    conditioning, sample = drawn(policy)
    shift(policy, 0)

    @torch.no_grad()
    def mean():
        step = torch.zeros(2, dtype=torch.long)
        return score_step(policy, sample.latents[:, 0, 0], step, conditioning, None, NO_NOISE).mean

    then = mean()
    anchor = Anchor(every=2)
    young = Memory().after(0.0, anchor, policy)
    assert (young.reference, young.age) == (None, 1)
    memory = young.after(0.0, anchor, policy)
    assert memory.age == 0
    shift(policy, 1)
    now, held = mean(), [p.data_ptr() for p in policy.parameters()]
    with memory.reference_of(policy):
        assert torch.equal(mean(), then)
    assert torch.equal(mean(), now)
    assert [p.data_ptr() for p in policy.parameters()] == held
    with pytest.raises(ZeroDivisionError), memory.reference_of(policy):
        1 / 0  # noqa: B018
    assert torch.equal(mean(), now)
    assert not torch.equal(now, then)
    assert Memory().after(9.0, Anchor(), policy) == Memory()


def trained(method, advantages, objective=None, gate=None, reference=None, seed=0):
    """Weights and figures after one optimiser step from a policy away from the base model."""
    policy = build_policy(method("grpo"))
    shift(policy, 5)
    conditioning, sample = drawn(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    around = None if reference is None else (lambda: reference(policy))
    stats = update(
        policy, optimizer, sample, advantages, conditioning, objective or Objective(kl_weight=0.5), (seed, 0),
        gate=gate, reference=around,
    )  # fmt: skip
    return [p.detach().clone() for p in policy.parameters()], stats


def test_a_gate_of_ones_is_no_gate_and_of_zeros_no_divergence(method):
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    plain, plain_stats = trained(method, advantages)
    ones, ones_stats = trained(method, advantages, gate=torch.ones(2, 3))
    assert all(map(torch.equal, plain, ones))
    assert plain_stats == ones_stats
    zeros, zeros_stats = trained(method, advantages, gate=torch.zeros(2, 3))
    without, _ = trained(method, advantages, Objective())
    torch.testing.assert_close(zeros, without)
    assert zeros_stats.kl == 0
    assert not all(map(torch.equal, plain, without))


def test_the_gated_divergence_is_averaged_over_whom_it_holds(method):
    """A gate on one sample: only its divergence counts, in the figure and in the loss."""
    nothing = torch.zeros(2, 3)
    each = []
    for i in range(6):
        gate = torch.zeros(6).index_fill(0, torch.tensor([i]), 1.0).view(2, 3)
        _, stats = trained(method, nothing, gate=gate)
        assert stats.loss == pytest.approx(0.5 * stats.kl / 6, rel=1e-4)
        each.append(stats.kl)
    _, every = trained(method, nothing)
    assert every.kl == pytest.approx(sum(each) / 6, rel=1e-4)
    assert len(set(each)) == 6


def test_the_divergence_from_itself_is_nothing_and_pulls_nowhere(method):
    """A reference that has just moved to the policy."""
    start, stats = trained(
        method,
        torch.zeros(2, 3),
        reference=lambda p: Memory().after(1.0, Anchor(threshold=0.5), p).reference_of(p),
    )
    assert stats.kl == 0
    policy = build_policy(method("grpo"))
    shift(policy, 5)
    assert all(map(torch.equal, start, policy.parameters()))


@pytest.mark.parametrize(
    ("kind", "schedule"), [("kl", "uniform"), ("kl", "early"), ("kl", "durations"), ("wasserstein", "early")]
)
def test_every_divergence_pulls_towards_the_reference(method, kind, schedule):
    objective = Objective(kl_weight=5.0, divergence=kind, kl_schedule=schedule, updates=1)
    weights, before = trained(method, torch.zeros(2, 3), objective)
    policy = build_policy(method("grpo"))
    with torch.no_grad():
        for p, value in zip(policy.parameters(), weights, strict=True):
            p.copy_(value)
    shifted = build_policy(method("grpo"))
    shift(shifted, 5)
    conditioning, sample = drawn(shifted)  # the same transitions as before
    after = update(
        policy,
        torch.optim.SGD(policy.parameters(), lr=0.0),
        sample,
        torch.zeros(2, 3),
        conditioning,
        objective,
        (0, 0),
    )
    assert 0 < after.kl < before.kl


def test_advantages_per_step_that_are_all_alike_are_advantages_per_sample(method):
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    plain, _ = trained(method, advantages, Objective())
    expanded, _ = trained(method, advantages[..., None].repeat(1, 1, 4), Objective())
    assert all(map(torch.equal, plain, expanded))
    only_first = torch.zeros(2, 3, 4)
    only_first[..., 0] = advantages
    first, _ = trained(method, only_first, Objective())
    assert not all(map(torch.equal, plain, first))


def test_clean_latents_are_kept_only_when_asked_for(method):
    policy = build_policy(method("grpo"))
    conditioning, plain = drawn(policy)
    _, full = drawn(policy, keep_clean=True)
    assert plain.clean is None
    assert torch.equal(plain.latents, full.latents)
    assert torch.equal(plain.images, full.images)
    steps = len(policy.timesteps)
    assert full.clean.shape == (2, 3, steps + 1, 4 * 8 * 8)
    torch.testing.assert_close(
        full.clean[:, :, -1], full.latents[:, :, -1].flatten(2)
    )  # 8 x 8 latents as they are
    with torch.no_grad():
        for step in range(steps):
            at = torch.full((2,), step)
            move = policy.transition(full.latents[:, 1, step], at, conditioning)
            torch.testing.assert_close(full.clean[:, 1, step], latent_features(move.x0), atol=1e-5, rtol=1e-4)
    kept = full.keep(torch.tensor([[2, 0], [1, 2]]))
    assert torch.equal(kept.clean[0, 0], full.clean[0, 2])


def test_latent_features_are_averages_over_a_coarse_grid():
    latents = torch.arange(2 * 3 * 16 * 32.0).view(2, 3, 16, 32)
    expected = latents.unflatten(2, (8, 2)).unflatten(4, (8, 4)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(latent_features(latents), expected)
