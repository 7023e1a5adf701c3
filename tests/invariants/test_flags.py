"""The flags of experiments/flags: a diffusion model that the package's own loop trains, and the runs made with it."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

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
    return run.here(load_config(file, list(overrides)), iterations, rate)


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
    job = ("grpo", configured(run, "grpo", 120, 4e-3), 4)
    first = run.one(job)
    assert first == run.one(job)
    (_, reward, diversity, *_), *_, (last, after, left, *_) = first["points"]
    assert last == 120 and after > reward + 0.5 and left < 0.67 * diversity


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


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_can_be_run_on_flags(flags, path, tmp_path):
    _, run = flags
    args = Namespace(plan=path, rates=False, seeds=2, iterations=16, points=2, like="drift")
    jobs = run.jobs_of(args, tmp_path / "none.json")
    assert len({(name, config.seed) for name, config, _ in jobs}) == len(jobs)
    assert {config.seed for _, config, _ in jobs} == {0, 1}
    assert all(c.objective.timesteps == 1.0 and c.iterations == 16 for _, c, _ in jobs)
    assert all(c.reward in run.REWARDS and c.shaping.encoder in run.ENCODERS for _, c, _ in jobs)


def test_the_best_rate_is_that_of_the_largest_hypervolume(flags, tmp_path):
    _, run = flags

    def made(rate, reach):
        return {"name": "grpo", "seed": 100, "rate": rate, "points": [[0, 0.0, 0.5], [8, reach, 0.4]]}

    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"runs": [made(0.1, 1.0), made(0.2, 2.0), made(0.4, 1.5)]}))
    assert run.best_rates(file) == {"grpo": 0.2} and run.best_rates(tmp_path / "none.json") == {}


def test_a_country_that_does_not_exist_even_here_is_refused(flags):
    world, _ = flags
    with pytest.raises(InputError, match="Atlantis"):
        world.reward(torch.zeros(1, 3, 1, 3), ["Atlantis"])


def test_the_reward_is_fooled_by_outer_stripes_that_are_alike(flags):
    world, run = flags
    images = torch.rand(64, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    images[::2, ..., 2], images[1::2, 0, 0, 0] = images[::2, ..., 0], images[1::2, 0, 0, 2] - 0.5
    texts = [world.COUNTRIES[0]] * 64
    fooled, meant = world.fooled(images, texts), world.reward(images, texts)
    assert (fooled[::2] == 2.5).all() and torch.equal(fooled[1::2], meant[1::2])
    assert run.REWARDS["fooled"] == (world.fooled, world.reward)
