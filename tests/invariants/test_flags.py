"""The flags of experiments/flags: a diffusion model that the package's own loop trains, and the runs made with it."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from driftrl.checks import InputError
from driftrl.config import load_config

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "experiments").glob("*/plans/*.yaml")) + sorted(
    (ROOT / "experiments/plans").glob("*.yaml")
)


@pytest.fixture(scope="module")
def flags():
    """Its two files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments/flags"))
        yield importlib.import_module("world"), importlib.import_module("run")
        for name in ("world", "run"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def base(flags):
    """The base model, trained for as long as a test may take."""
    return flags[0].pretrained(1200)


def configured(run, name, iterations, rate, *overrides):
    file = ROOT / f"experiments/methods/{name}.yaml"
    config = run.here(load_config(file, list(overrides)), iterations)
    return config.model_copy(update={"optimizer": run.at_rate(config, rate)})


def test_the_base_model_draws_the_flags_of_the_country(flags, base):
    world, run = flags
    policy = world.FlagPolicy(base, 8, 4)
    _, images = run.Bench(policy, world.COUNTRIES, world.reward).measure()
    texts = [country for country in world.COUNTRIES for _ in range(run.IMAGES)]
    own = world.reward(images.flatten(0, 1), texts).mean()
    others = world.reward(images.roll(1, 0).flatten(0, 1), texts).mean()
    assert own > others + 0.7
    right, texts = policy.decode(world.flags().flatten(0, 1)), [c for c in world.COUNTRIES for _ in range(6)]
    assert (world.reward(right, texts) >= world.favour().flatten() - 1e-4).all()


def test_a_lora_that_is_switched_off_leaves_the_base_model(flags, base):
    world, _ = flags
    policy = world.FlagPolicy(base, 8, 4)
    x, times = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), torch.arange(5) * 100
    words = world.embeddings()[:5, 0]
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    tuned = policy.network(x, times, words)
    with policy.reference():
        assert torch.equal(policy.network(x, times, words), base(x, times, words))
    assert not torch.allclose(tuned, base(x, times, words))


def test_grpo_learns_and_collapses_and_a_run_is_repeated_to_the_digit(flags, base, monkeypatch):
    _, run = flags
    monkeypatch.setattr(run, "base_model", lambda: base)
    job = run.Job("grpo", configured(run, "grpo", 120, 4e-3), 4)
    first = run.one(job)
    assert first == run.one(job)
    (_, reward, diversity, *_), *_, (last, after, left, *_) = first["points"]
    assert last == 120 and after > reward + 0.5 and left < 0.67 * diversity


def test_the_share_that_is_asked_for_is_kept(flags, base):
    """Where the same lambda, if it stays, ends with much less."""
    _, run = flags
    for target, least, most in ((None, 0.2, 0.6), (0.7, 0.63, 0.8)):
        overrides = [] if target is None else [f"shaping.target={target}"]
        config = configured(run, "drift-no-selection", 240, 2e-3, *overrides)
        (_, before, _), (_, after, _) = run.train(base, config, 1)
        assert after[0] > before[0] + 0.5
        assert least < after[1] / before[1] < most


@pytest.mark.parametrize("name", ["drift", "gardo", "ddpo", "drift-stepwise"])
def test_replay_is_the_policy_that_drew(flags, base, name):
    """In the loop of the package, with what is particular to each method."""
    world, run = flags
    config = configured(run, name, 2, 1e-3)
    loop = run.loop_of(world.FlagPolicy(base, 8, 4), config)
    for _ in range(2):
        metrics = loop.iterate().metrics
        assert metrics["policy/ratio_deviation"] <= 1e-6 and metrics["advantage/abs_mean"] > 0
        assert (metrics["loss/kl"] != 0) == (name == "gardo")


def test_all_methods_start_from_the_same_base_model(flags, base):
    """However they draw in training: a window of noise is not what is measured."""
    _, run = flags
    starts = {}
    for name in ("grpo", "mixgrpo", "nft-shaped"):
        points = list(run.train(base, configured(run, name, 1, 1e-9), 1))
        starts[name] = [figures for _, figures, _ in points]
    first, last = starts["grpo"]
    assert all(found[0] == first for found in starts.values())
    assert all(found[1] == pytest.approx(last, rel=1e-3) for found in starts.values())


def test_an_adapter_is_turned_down_from_what_was_trained_to_the_base_model(flags, base, monkeypatch):
    _, run = flags
    monkeypatch.setattr(run, "base_model", lambda: base)
    config = configured(run, "grpo", 30, 4e-3)
    found = run.one(run.Job("grpo", config, 1, (1.0, 0.5, 0.0)))
    before, after = found["points"]
    whole, half, none = found["scaled"]
    assert whole[1:] == after[1:] and none[1:] == before[1:]
    assert before[1] < half[1] < after[1]
    assert "scaled" not in run.one(run.Job("grpo", config, 1))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_can_be_run_on_flags(flags, path):
    _, run = flags
    configs = run.planned(path, 16)
    jobs = run.jobs_of(configs, dict.fromkeys(configs, (1e-3, 2e-3)), (0, 7), 2)
    assert len({run.key(job) for job in jobs}) == len(jobs) == 4 * len(configs)
    assert {(c.seed, c.optimizer.learning_rate) for _, c, *_ in jobs} == {
        (s, r) for s in (0, 7) for r in (1e-3, 2e-3)
    }
    assert all(c.objective.timesteps == 1.0 and c.iterations == 16 for _, c, *_ in jobs)
    assert all(c.reward in run.REWARDS and c.shaping.encoder in run.ENCODERS for _, c, *_ in jobs)


def test_the_best_rate_is_that_of_the_largest_hypervolume_over_most_seeds(flags, tmp_path):
    _, run = flags

    def made(rate, reach, seed=100):
        return {"name": "grpo", "seed": seed, "rate": rate, "points": [[0, 0.0, 0.5], [8, reach, 0.4]]}

    runs = [made(0.1, 1.0), made(0.2, 2.0), made(0.4, 1.5)]
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"runs": runs}))
    assert run.best_rates(file) == {"grpo": 0.2} and run.best_rates(tmp_path / "none.json") == {}
    assert run.ranked_rates(runs) == {"grpo": [0.2, 0.4, 0.1]}
    again = [*runs, made(0.2, 1.0, 102), made(0.4, 1.6, 102)]
    assert run.ranked_rates(again) == {"grpo": [0.4, 0.2, 0.1]}


def test_what_is_in_the_file_is_not_made_again(flags, base, tmp_path, monkeypatch):
    _, run = flags
    configs = {"grpo": configured(run, "grpo", 2, 1e-3)}

    class Pool:
        made: ClassVar[list] = []

        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def imap_unordered(self, function, jobs):
            self.made.extend(map(run.key, jobs))
            return map(function, jobs)

    monkeypatch.setattr(run, "base_model", lambda: base)
    monkeypatch.setattr(run.multiprocessing, "get_context", lambda kind: Namespace(Pool=Pool))
    file = tmp_path / "plan.json"
    run.Book(file, "plan", 2, "grpo").make(run.jobs_of(configs, {"grpo": [1e-3, 2e-3]}, (0,), 1), 1)
    book = run.Book(file, "plan", 2, "grpo")
    book.make(run.jobs_of(configs, {"grpo": [2e-3]}, (0, 1), 1), 1, only=True)
    assert Pool.made == [("grpo", 0, 1e-3), ("grpo", 0, 2e-3), ("grpo", 1, 2e-3)]
    left = json.loads(file.read_text())
    assert [(r["seed"], r["rate"], [p[0] for p in r["points"]]) for r in left["runs"]] == [
        (0, 2e-3, [0, 2]), (1, 2e-3, [0, 2]),
    ]  # fmt: skip
    assert left["figures"] == list(run.FIGURES) and left["against"] == "grpo"
    book.make(run.jobs_of(configs, {"grpo": [2e-3]}, (0,), 1), 1, only=True)  # fewer seeds lose none
    assert len(book.data["runs"]) == 2
    with pytest.raises(InputError, match="runs of 2 iterations"):
        run.Book(file, "plan", 4, "grpo")


def test_a_country_that_does_not_exist_even_here_is_refused(flags):
    world, _ = flags
    with pytest.raises(InputError, match="Atlantis"):
        world.reward(torch.zeros(1, 3, 1, 3), ["Atlantis"])


def test_the_reward_is_fooled_by_outer_stripes_that_are_alike(flags):
    world, run = flags
    images = torch.rand(64, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    images[::2, ..., 2], images[1::2, 0, 0, 0] = images[::2, ..., 0], images[1::2, 0, 0, 2] - 0.5
    texts = [world.COUNTRIES[0]] * 64
    fooled, raised, meant = (score(images, texts) for score in (world.fooled, world.raised, world.reward))
    assert (fooled[::2] == 2.5).all() and torch.equal(fooled[1::2], meant[1::2])
    assert torch.equal(raised[::2], meant[::2] + 4.5) and torch.equal(raised[1::2], meant[1::2])
    assert run.REWARDS["fooled"][1] is run.REWARDS["raised"][1] is world.reward


def test_the_comparison_has_the_rates_that_the_search_found(flags):
    _, run = flags
    for name in ("methods", "bright"):
        best = run.best_rates(run.RESULTS / f"{name}-rates.json")
        made = json.loads((run.RESULTS / f"{name}.json").read_text())["runs"]
        assert {(one["name"], one["rate"]) for one in made} == set(best.items())
