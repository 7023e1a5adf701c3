"""The whole loop on random weights: deterministic, resumable, invariant to batches, and it learns."""

import json
import os
import re
import signal
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from driftrl import Trainer, checkpoint, noise
from driftrl.build import build_loop, objective_of
from driftrl.checkpoint import CheckpointWarning, Position, newest
from driftrl.checks import InputError
from driftrl.cli.train import train
from driftrl.config import dump_config, load_config
from driftrl.evaluation.generate import generate, open_policy
from driftrl.noise_check import CHECKED_EVERY, PromptNoiseWarning
from driftrl.pipelines import load_pipeline
from driftrl.prompts import draw
from driftrl.shaping import DiversityWarning
from driftrl.trainer import NotFiniteWarning, RewardWarning
from driftrl.update import training_pairs


def tensors(folder, name="training"):
    return {k: v.clone() for k, v in load_file(folder / f"{name}.safetensors").items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def brightness(images, prompts):
    """A reward with an easy answer."""
    return images.mean((1, 2, 3)) * 10


def test_run_folder_and_determinism(config, tmp_path):
    one = Trainer(config(), tmp_path / "one").run()
    two = Trainer(config(), tmp_path / "two").run()
    assert_same(tensors(one / "checkpoints/000002"), tensors(two / "checkpoints/000002"))
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(line["policy/ratio_deviation"] <= 1e-6 for line in lines)
    assert load_config(one / "config.yaml") == config()
    assert (one / "images/000001.png").is_file()
    other = Trainer(config(seed=1), tmp_path / "three").run()
    assert (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = Trainer(config(iterations=3), tmp_path / "whole").run()
    Trainer(config(iterations=1), tmp_path / "parts").run()
    parts = Trainer(config(iterations=3), tmp_path / "parts", resume=True).run()
    assert_same(tensors(whole / "checkpoints/000003"), tensors(parts / "checkpoints/000003"))
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_a_torn_checkpoint_is_passed_over(config, tmp_path):
    whole = Trainer(config(), tmp_path / "run").run()
    before = tensors(whole / "checkpoints/000002")
    (whole / "checkpoints/000002/training.safetensors").write_bytes(b"torn")
    with pytest.warns(CheckpointWarning, match="000002"):
        assert newest(whole / "checkpoints").name == "000001"
    with pytest.warns(CheckpointWarning):
        Trainer(config(), tmp_path / "run", resume=True).run()
    assert_same(before, tensors(whole / "checkpoints/000002"))


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_batch_sizes_change_nothing_but_rounding(config, tmp_path, kl):
    big = Trainer(config(iterations=1, objective__kl_weight=kl), tmp_path / "big").run()
    small = Trainer(
        config(iterations=1, objective__kl_weight=kl, sampling__batch_size=5, optimizer__batch_size=7),
        tmp_path / "small",
    ).run()
    a, b = (json.loads((run / "metrics.jsonl").read_text()) for run in (big, small))
    assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=1e-3)
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=1e-3)


def test_the_adapter_loads_into_a_stock_pipeline(config, tmp_path):
    settings = config(iterations=2, optimizer__learning_rate=0.05)
    run = Trainer(settings, tmp_path / "run").run()
    policy, _ = open_policy(run)
    ours = generate(policy, ["a cat"], 3, seed=5)[0]
    pipeline = load_pipeline(settings.model)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        generators = [noise.generator(5, 2**31, 0, k, "latents") for k in range(3)]
        return pipeline(["a cat"] * 3, num_inference_steps=4, guidance_scale=2.0, eta=1.0, generator=generators,
                        output_type="pt").images  # fmt: skip

    base = draw()
    pipeline.load_lora_weights(run / "checkpoints/000002")
    theirs = draw()
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def assert_brighter(settings, folder):
    """The last iterations are brighter than the first by far more than their noise."""
    rewards = []
    loop = build_loop(settings, folder)
    loop.reward = brightness
    loop.run(settings.iterations, lambda iteration: rewards.append(iteration.metrics["reward/mean"]))
    first, last = torch.tensor(rewards[:5]), torch.tensor(rewards[-5:])
    assert last.mean() - first.mean() > 4 * (first.std() + last.std()) / 5**0.5


@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
def test_learning_happens(config, tmp_path):
    """With an easy reward."""
    settings = config(
        iterations=25, optimizer__learning_rate=0.02, adapter__rank=4,
        selection__strategy="nearest_neighbor", sampling__candidates=12, selection__keep=8,
        sampling__guidance_scale=1.0, logging__checkpoint_every=100,
    )  # fmt: skip
    assert_brighter(settings, tmp_path)


def test_constant_rewards_teach_nothing_and_do_not_crash(config, tmp_path):
    settings = config(iterations=1, shaping__ratio=0.0)
    loop = build_loop(settings, tmp_path)
    loop.reward = lambda images, prompts: torch.ones(len(images))
    before = [p.detach().clone() for p in loop.policy.parameters()]
    seen = []
    with pytest.warns(RewardWarning, match="3 of 3 prompts"):
        loop.run(1, seen.append)
    assert seen[0].metrics["warning/constant_reward_groups"] == 3
    for old, new in zip(before, loop.policy.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("scale", "step", "groups"),
    [(1.0, 1e-4, 3), (1e-9, 1.0, 0)],
    ids=["large and alike", "small and different"],
)
def test_rewards_are_constant_where_they_give_no_advantage(config, tmp_path, scale, step, groups):
    """Whatever their unit: a thousand and some rounding errors are alike, billionths are not."""
    loop = build_loop(config(iterations=1, shaping__ratio=0.0), tmp_path)
    loop.reward = lambda images, prompts: (
        scale * (1000 * (scale == 1) + step * (torch.arange(len(images)) % 3))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        metrics = loop.iterate().metrics
    assert metrics["warning/constant_reward_groups"] == groups
    assert (metrics["advantage/abs_mean"] == 0) == (groups == 3)


@pytest.mark.parametrize("level", ["advantage", "reward", "multiply"])
def test_constant_diversity_is_said_at_every_level(config, tmp_path, level):
    loop = build_loop(config(iterations=1, shaping__level=level), tmp_path)
    loop.encoder = lambda images: torch.ones(len(images), 2)
    with pytest.warns(DiversityWarning, match="diversity of 3 of 3 groups is constant"):
        loop.iterate()


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_an_encoder_without_features_costs_an_iteration_and_no_run(config, tmp_path, value):
    loop = build_loop(config(iterations=1), tmp_path)
    loop.encoder = lambda images: torch.full((len(images), 2), value)
    with pytest.warns(
        NotFiniteWarning, match=r"features are all 0, or not finite, for '.*', kept candidate 0"
    ):
        assert loop.attempt().metrics["warning/skipped"] == 1


@pytest.mark.parametrize("scale", ["selected", "candidates", "global"])
def test_a_bonus_in_the_reward_counts_where_rewards_are_equal(config, tmp_path, scale):
    """What divides is the spread with the bonus, or equal rewards would erase it."""
    loop = build_loop(config(iterations=1, shaping__level="reward", advantage__scale=scale), tmp_path)
    loop.reward = lambda images, prompts: torch.full((len(images),), 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        assert loop.iterate().metrics["advantage/abs_mean"] > 0.1


def test_shaping_weighs_more_beside_the_batch_s_deviation_where_prompts_differ(config, tmp_path):
    """Lambda is beside a smaller part of the reward there."""
    weights = {}
    for scale in ("selected", "global"):
        loop = build_loop(config(iterations=1, advantage__scale=scale), tmp_path / scale)
        loop.reward = lambda images, prompts: (
            100.0 * torch.tensor([float(len(p)) for p in prompts]) + torch.arange(len(images)) % 4
        )
        weights[scale] = loop.iterate().metrics["advantage/shaping_weight"]
    assert 0.3 < weights["selected"] < 0.7  # lambda is 0.5
    assert weights["global"] > 10 * weights["selected"]


def test_a_prompt_that_comes_twice_is_no_copy_of_itself(config, tmp_path):
    """Where an iteration spans two passes over the set, and with noise on the prompt looked at: replay fits too."""
    (tmp_path / "two.txt").write_text("a cat\na dog\na cow\n")
    loop = build_loop(
        config(prompts__set=str(tmp_path / "two.txt"), prompts__per_iteration=2, iterations=9), tmp_path
    )
    loop.similarity = lambda images, prompts: images.mean((1, 2, 3))
    number = next(n for n in range(1, 99) if len(set(draw(3, 2, 0, n))) == 1)
    loop.position = Position(number)
    iteration = loop.iterate()
    assert iteration.prompts[0] == iteration.prompts[1]
    assert not torch.equal(iteration.images[0], iteration.images[1])
    assert iteration.metrics["policy/ratio_deviation"] <= 1e-6


def test_each_warning_is_said_once_and_counted_every_time(config, tmp_path):
    loop, seen = build_loop(config(iterations=3), tmp_path), []
    loop.reward = lambda images, prompts: torch.ones(len(images))
    loop.encoder = lambda images: torch.ones(len(images), 2)
    with pytest.warns(UserWarning) as caught:
        loop.run(3, seen.append)
    assert sorted(w.category.__name__ for w in caught) == ["DiversityWarning", "RewardWarning"]
    assert {w.category for w in caught} == {DiversityWarning, RewardWarning}
    for kind in ("reward", "diversity"):
        assert [i.metrics[f"warning/constant_{kind}_groups"] for i in seen] == [3, 3, 3]


@pytest.mark.parametrize(("lost", "falls"), [(0.0, 0), (4.0, 1)])
def test_noise_that_costs_similarity_is_logged_and_said_once(config, tmp_path, lost, falls):
    loop, seen = build_loop(config(iterations=CHECKED_EVERY + 1), tmp_path), []
    assert loop.similarity is None  # neither the reward nor the model brings one
    asked = []

    def similarity(images, prompts):
        """With the noise, without it, and to other prompts, in turn."""
        asked.append((images, list(prompts)))
        return torch.full((len(images),), (2.0, 10.0 - lost, 10.0)[len(asked) % 3])

    loop.similarity = similarity
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.run(CHECKED_EVERY + 1, seen.append)
    assert [w.category for w in caught] == [PromptNoiseWarning] * falls
    looked = [i.number for i in seen if "prompt_noise/lost" in i.metrics]
    assert looked == [1, CHECKED_EVERY + 1]
    for iteration in (seen[0], seen[-1]):
        assert iteration.metrics["prompt_noise/similarity_without"] == pytest.approx(10.0)
        assert iteration.metrics["prompt_noise/lost"] == pytest.approx(lost / 8)
        assert iteration.metrics["warning/prompt_noise"] == falls
    (noised, own), (clean, again), (same, other) = asked[:3]
    assert len(noised) == 3 * 3  # at least 8 of 3 prompts
    assert own == again == [text for text in seen[0].prompts for _ in range(3)]
    assert all(a != b for a, b in zip(own, other, strict=True))
    assert torch.equal(noised, seen[0].images[:, :3].flatten(0, 1))
    assert clean is same
    assert not torch.equal(clean, noised)


def test_without_noise_the_same_candidates_are_drawn_again(config, tmp_path):
    """A noise of almost nothing leaves the images as they are: everything else about them is the same."""
    loop, seen = build_loop(config(iterations=1, prompt_noise__eta=1e-6), tmp_path), []
    asked = []
    loop.similarity = lambda images, prompts: asked.append(images) or images.mean((1, 2, 3))
    loop.run(1, seen.append)
    torch.testing.assert_close(asked[0], asked[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"prompt_noise__eta": 0.0}, {"prompt_noise__where": "test"}])
def test_without_noise_in_training_nothing_is_looked_at(config, tmp_path, changes):
    assert build_loop(config(prompt_noise__similarity="tiny-animals", **changes), tmp_path).similarity is None


@pytest.mark.filterwarnings("ignore::driftrl.build.UnlikelySettingWarning")
def test_what_scores_similarity(config, tmp_path):
    loop = build_loop(config(reward="tiny-animals"), tmp_path)
    assert loop.similarity is loop.reward
    several = [{"name": "incompressibility"}, {"name": "tiny-animals", "weight": 0.5}]
    loop = build_loop(config(reward=several), tmp_path)
    assert loop.similarity.reward.tower is loop.reward.rewards[1].reward.tower
    assert (
        build_loop(config(reward="tiny-animals", prompt_noise__similarity="none"), tmp_path).similarity
        is None
    )
    with pytest.raises(InputError, match=r"prompt_noise\.similarity: .*did you mean 'tiny-animals'"):
        build_loop(config(prompt_noise__similarity="tiny-animal"), tmp_path)


@pytest.mark.parametrize("one_pass", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_learning_rate_rises_to_its_value(config, tmp_path, one_pass):
    """A step of AdamW is as long as its rate, whatever the gradient: at first a third of that without; resumed, the same."""
    single = {"optimizer__updates": 1, "optimizer__one_pass": one_pass, "optimizer__betas": (0.0, 0.0)}
    if one_pass:
        single |= {"optimizer__batch_size": 6}
    rising = Trainer(config(iterations=2, optimizer__warmup=3, **single), tmp_path / "rising").run()
    at_once = Trainer(config(iterations=1, **single), tmp_path / "at-once").run()

    def moved(run, since, until):
        one, two = (load_file(run / f"checkpoints/{n:06d}/training.safetensors") for n in (since, until))
        return torch.cat([(two[name] - one[name]).flatten() for name in two if name.endswith("/value")])

    torch.testing.assert_close(3 * moved(rising, 0, 1), moved(at_once, 0, 1), atol=1e-6, rtol=1e-3)
    longest = [float(moved(rising, n, n + 1).abs().max()) for n in (0, 1)]
    assert longest == pytest.approx([1e-3 / 3, 2e-3 / 3], rel=1e-2)
    for more in (3, 4):
        Trainer(config(iterations=more, optimizer__warmup=3, **single), rising, resume=True).run()
    whole = Trainer(config(iterations=4, optimizer__warmup=3, **single), tmp_path / "whole").run()
    assert torch.equal(moved(whole, 0, 4), moved(rising, 0, 4))
    assert float(moved(whole, 3, 4).abs().max()) == pytest.approx(1e-3, rel=1e-2)


MEANWHILE = {"evaluation__every": 2, "evaluation__images_meanwhile": 3, "evaluation__prompts": "animals5"}


def test_the_learning_rate_falls_as_is_asked(config, tmp_path):
    """A step of AdamW without memory is as long as its rate; a run that was stopped falls like one that was not."""
    falling = {"optimizer__schedule": "linear", "optimizer__updates": 1, "optimizer__betas": (0.0, 0.0)}
    whole = Trainer(config(iterations=4, **falling), tmp_path / "whole").run()
    trainer = Trainer(config(iterations=4, **falling), tmp_path / "parts")
    trainer.run(lambda iteration: trainer._stop(2) if iteration.number == 2 else None)
    Trainer(config(iterations=4, **falling), tmp_path / "parts", resume=True).run()
    assert (whole / "metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy/learning_rate"] for row in rows] == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    states = [load_file(whole / f"checkpoints/{n:06d}/training.safetensors") for n in range(5)]
    longest = [
        max(float((two[name] - one[name]).abs().max()) for name in two if name.endswith("/value"))
        for one, two in pairwise(states)
    ]
    assert longest == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3], rel=1e-2)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"adapter__kind": "full", "optimizer__learning_rate": 1e-4}, marks=pytest.mark.slow)]
)  # fmt: skip
def test_checkpoints_hand_out_an_average(config, tmp_path, changes):
    """It is that of the weights so far, drawn with by all that reads a checkpoint; training goes as without."""
    from driftrl.evaluation.evaluate import evaluate, load_evaluation

    averaged = config(iterations=4, optimizer__ema_decay=0.2, **changes | MEANWHILE)
    run = Trainer(averaged, tmp_path / "run").run()
    plain = Trainer(config(iterations=4, **changes | MEANWHILE), tmp_path / "plain").run()
    states = [load_file(run / f"checkpoints/{n:06d}/training.safetensors") for n in range(5)]
    last = load_file(plain / "checkpoints/000004/training.safetensors")
    assert all(torch.equal(last[name], value) for name, value in states[4].items())

    policy, _ = open_policy(run)
    for name, parameter in policy.named_parameters():
        expected = states[1][f"{name}/value"]
        for kept, state in zip((2 / 11, 0.2, 0.2), states[2:], strict=True):
            expected = kept * expected + (1 - kept) * state[f"{name}/value"]
        torch.testing.assert_close(parameter.detach(), expected)
    if not changes:
        rows = load_file(run / "checkpoints/000004/pytorch_lora_weights.safetensors")
        ours = sorted(float(p.detach().double().sum()) for _, p in policy.named_parameters())
        assert sorted(float(row.double().sum()) for row in rows.values()) == pytest.approx(ours)

    parts = Trainer(averaged.model_copy(update={"iterations": 3}), tmp_path / "parts").run()
    Trainer(averaged, parts, resume=True).run()
    for name in ("training.safetensors", "memory.safetensors"):
        one, two = ((each / "checkpoints/000004" / name).read_bytes() for each in (run, parts))
        assert one == two
    found = load_evaluation(evaluate(run, checkpoints="all", images=3))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    point = next(p for p in found.points if p.iteration == 4)
    assert rows[3]["evaluation/reward"] == pytest.approx(point.figures["reward"].mean, rel=1e-4)
    other = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["reward/mean"] == other[3]["reward/mean"]
    assert rows[3]["evaluation/reward"] != other[3]["evaluation/reward"]


WINDOW = {"sampling__window": 1, "sampling__window_every": 1}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        WINDOW | {"evaluation__deterministic": True, "evaluation__steps": 5},
    ],
    ids=["plain", "window"],
)
def test_what_is_measured_meanwhile_is_what_evaluation_measures(config, tmp_path, changes):
    """The same images, and training goes as it would; also where only a part of its steps has noise, or they are fewer."""
    from driftrl.evaluation.evaluate import evaluate, load_evaluation

    run = Trainer(config(iterations=4, **MEANWHILE, **changes), tmp_path / "run").run()
    plain = Trainer(config(iterations=4, **changes), tmp_path / "plain").run()
    rows, others = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (run, plain)
    )
    measured = [{name: row.pop(name) for name in list(row) if name.startswith("evaluation/")} for row in rows]
    assert rows == others
    assert [bool(figures) for figures in measured] == [False, True, False, True]
    adapters = [load_file(each / "checkpoints/000004/training.safetensors") for each in (run, plain)]
    assert all(torch.equal(adapters[1][name], value) for name, value in adapters[0].items())
    pictures = sorted(path.name for path in (run / "images").glob("*.png"))
    assert pictures == ["000001.png", "000004.png", "evaluation-000002.png", "evaluation-000004.png"]
    found = load_evaluation(evaluate(run, checkpoints="all", images=3))
    for point in found.points[0], *(p for p in found.points if p.iteration in (2, 4)):
        for name in ("reward", "diversity", "diversity/latents", "vendi"):
            for row in measured[1::2] if point.label == "base" else [measured[point.iteration - 1]]:
                key = f"evaluation/{name}" + ("/base" if point.label == "base" else "")
                assert row[key] == pytest.approx(point.figures[name].mean, rel=1e-4, abs=1e-6)


def test_a_resumed_run_measures_the_same(config, tmp_path):
    whole = Trainer(config(iterations=4, **MEANWHILE), tmp_path / "whole").run()
    parts = Trainer(config(iterations=3, **MEANWHILE), tmp_path / "parts").run()
    Trainer(config(iterations=4, **MEANWHILE), parts, resume=True).run()
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="expected a prompt set"):
        Trainer(config(**MEANWHILE | {"evaluation__prompts": "nowhere"}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_figures_meanwhile_are_told(config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(iterations=2, **MEANWHILE)))
    train(path, [], tmp_path / "run", None, False)
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    now, base = row["evaluation/reward"], row["evaluation/reward/base"]
    told = f"iteration 2: evaluated, next to the base: reward {now:.3f} ({now - base:+.3f}), diversity "
    assert told in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::driftrl.build.UnlikelySettingWarning")
def test_every_logged_name_is_documented(config, tmp_path):
    several = [{"name": "incompressibility"}, {"name": "tiny-animals", "weight": 0.5}]
    settings = config(iterations=1, reward=several, evaluation__every=1, shaping__target=0.7)
    run = Trainer(settings, tmp_path / "run").run()
    text = (
        (Path(__file__).parents[1] / "docs" / "metrics.md")
        .read_text("utf-8")
        .partition("## evaluation.json")[0]
    )
    documented = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line)
    }
    for line in (run / "metrics.jsonl").read_text().splitlines():
        names = {re.sub(r"^reward/[\w-]+/mean$", "reward/NAME/mean", name) for name in json.loads(line)}
        measured = {name for name in names if name.startswith("evaluation/")}
        assert {f"evaluation/reward/{part['name']}/base" for part in several} <= measured
        names -= measured
        names |= {
            re.sub(r"^(evaluation/reward)/(?!base)[\w-]+", r"\1/NAME", n.removesuffix("/base"))
            for n in measured
        }
        assert "prompt_noise/lost" in names
        assert names <= documented
    timed = json.loads((run / "timings.jsonl").read_text().splitlines()[0]).keys() - {"iteration"}
    assert timed == set(re.findall(r"`(\w+)`", re.search(r"seconds for (.*?) in iterations", text)[1]))


@pytest.mark.parametrize("choice", ["noisiest", "random"])
def test_pairs_are_chosen_as_asked(choice):
    scored = torch.tensor([True, True, False, True, True, False])
    pairs = training_pairs(scored, samples=5, share=0.5, seed=0, iteration=3, choice=choice)
    by_sample = {s: sorted(pairs.step[pairs.sample == s].tolist()) for s in range(5)}
    assert all(len(set(steps)) == 2 and set(steps) <= {0, 1, 3, 4} for steps in by_sample.values())
    first = [steps == [0, 1] for steps in by_sample.values()]
    assert all(first) if choice == "noisiest" else not all(first)
    assert pairs.sample.tolist() != sorted(pairs.sample.tolist())  # shuffled among the updates


def test_the_optimisers_state_lies_in_memory_as_before(config, tmp_path):
    """A fused optimiser refuses moments that are laid out otherwise than their weights; convolutions are channels last."""
    settings = config(iterations=1, adapter__kind="full", optimizer__learning_rate=1e-5)
    run = Trainer(settings, tmp_path / "run").run()
    loop = build_loop(settings, run)
    last = checkpoint.newest(run / "checkpoints")
    checkpoint.load(last, loop.policy, loop.optimizer)
    moments = [
        (parameter, value)
        for parameter, state in loop.optimizer.state.items()
        for value in state.values()
        if value.shape == parameter.shape and value.dim() == 4
    ]
    assert any(not parameter.is_contiguous() for parameter, _ in moments)
    assert all(value.stride() == parameter.stride() for parameter, value in moments)


class _Held(TorchDispatchMode):
    """The most bytes of numbers, made within, that were there at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.alive += [
            weakref.ref(t)
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.data_ptr() not in given
        ]
        self.most = max(self.most, sum(ref().nbytes for ref in self.alive if ref() is not None))
        return out


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_checkpoint_is_loaded_tensor_by_tensor(config, tmp_path, goes_on):
    """A large network's weights and moments would not fit into memory beside it once more."""
    settings = config(iterations=1, adapter__kind="full", optimizer__learning_rate=1e-5)
    run = Trainer(settings, tmp_path / "run").run()
    loop, last = build_loop(settings, run), checkpoint.newest(run / "checkpoints")
    sizes = [p.nbytes for p in loop.policy.parameters()]
    with _Held() as held:
        checkpoint.load(last, loop.policy, loop.optimizer if goes_on else None)
    assert sum(sizes) > 5 * max(sizes)
    assert held.most <= (2 * sum(sizes) if goes_on else 0) + 3 * max(sizes)
    found = checkpoint.gathered(loop.policy, loop.optimizer)
    stored = load_file(last / "training.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in found.items())
    assert (found.keys() == stored.keys()) == goes_on


def test_nothing_of_training_is_kept_for_the_evaluation_after_it(config, tmp_path, monkeypatch):
    """Two models may not have room beside each other."""
    path, made, alive = tmp_path / "run.yaml", [], []
    path.write_text(dump_config(config(iterations=1, evaluation__at_end=True)))

    def build(*arguments, **named):
        loop = build_loop(*arguments, **named)
        made.extend([weakref.ref(loop), weakref.ref(loop.policy), weakref.ref(loop.policy.network)])
        return loop

    monkeypatch.setattr("driftrl.run.build_loop", build)
    monkeypatch.setattr("driftrl.cli.evaluate.evaluate", lambda folder, **_: alive.extend(r() for r in made))
    train(path, [], tmp_path / "run", None, True)
    assert alive == [None, None, None]


def test_where_batches_round_differently_samples_are_scored_again(config):
    """TF32, which convolutions on a GPU compute float32 in, has errors beyond the clip range."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert torch.backends.cudnn.allow_tf32
    found = [objective_of(config(), device).rescore for device in (cpu, cuda)]
    assert found == [False, True]
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert not objective_of(config(), cuda).rescore


def test_a_trainer_that_is_stopped_goes_on_when_it_is_run_again(config, tmp_path):
    """From Python by `stop`, or by Ctrl-C in a notebook; what comes out is the run that nobody stopped."""
    trainer = Trainer(config(iterations=3), tmp_path / "parts")
    trainer.run(lambda iteration: trainer.stop())
    assert trainer.loop.position.iteration == 1 and trainer.stopped_by is None
    trainer.run(lambda iteration: os.kill(os.getpid(), signal.SIGINT))
    assert trainer.loop.position.iteration == 2 and trainer.stopped_by == signal.SIGINT
    trainer.run()
    whole = Trainer(config(iterations=3), tmp_path / "whole").run()
    for file in ("checkpoints/000003/training.safetensors", "metrics.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (whole / file).read_bytes()


def test_without_a_function_that_watches_a_bar_does(config, tmp_path, capsys):
    Trainer(config(iterations=2), tmp_path / "bar").run()
    assert re.search(r"training: 100%.* 2/2 .*diversity=[0-9.]+, reward=-?[0-9.]+", capsys.readouterr().err)
    Trainer(config(iterations=2), tmp_path / "own").run(lambda iteration: None)
    assert "training" not in capsys.readouterr().err


def test_what_the_watching_function_raises_loses_no_iteration(config, tmp_path):
    def watch(iteration):
        if iteration.number == 3:
            raise LookupError("enough")

    trainer = Trainer(config(iterations=5, logging__checkpoint_every=100), tmp_path / "run")
    with pytest.raises(LookupError, match="enough"):
        trainer.run(watch)
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000003"
    assert Trainer(resume=tmp_path / "run").loop.position.iteration == 3


def test_two_trainers_made_before_either_runs_do_not_share_a_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (Trainer(config(iterations=1, seed=3)) for _ in range(2))
    assert [str(each.folder) for each in (one, two)] == ["runs/drift-seed3", "runs/drift-seed3-2"]
    again = [Trainer(config(iterations=1), tmp_path / "same") for _ in range(2)]
    again[0].run()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "same").rglob("*"))
    with pytest.raises(InputError, match="exists and is not empty"):
        again[1].run()
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "same").rglob("*")) == before


def test_a_run_is_resumed_by_its_configuration_alone(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Trainer(config(iterations=1)).run()
    assert Trainer(config(iterations=2), resume=True).run() == folder
    with pytest.raises(InputError, match="config: expected a TrainConfig, as load_config reads it"):
        Trainer({"iterations": 1})
