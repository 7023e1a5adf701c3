"""Configurations based on others: merged key by key, resolved, strictly checked, never in a circle."""

import copy
from pathlib import Path

import numpy as np
import pytest

from driftrl.checks import InputError
from driftrl.config import SamplingConfig, TrainConfig, dump_config, load_config, parse_config
from driftrl.prompts import load_prompts

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_file_is_a_difference_from_its_base(tmp_path):
    write(
        tmp_path,
        ground="iterations: 7\nselection: {strategy: random, keep: 4}\nlogging: {trackers: [tensorboard]}\n",
    )
    write(tmp_path / "sub", middle="base: ../ground.yaml\nname: middle\nselection: {keep: 6}\n")
    write(tmp_path / "sub", top="base: middle.yaml\nname: top\nlogging: {trackers: []}\n")
    config = load_config(tmp_path / "sub/top.yaml", ["iterations=9"])
    assert config == TrainConfig(
        name="top", iterations=9, selection={"strategy": "random", "keep": 6}, logging={"trackers": []}
    )
    # What a run records is the whole of it, and stands alone.
    alone = write(tmp_path, alone=dump_config(config)) / "alone.yaml"
    assert "base" not in alone.read_text().split()
    assert load_config(alone) == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml\n", "b": "base: a.yaml\n"}, "circle"),
        ({"a": "base: ./a.yaml\n"}, "circle"),
        ({"a": "base: missing.yaml\n"}, "a.yaml: base: there is no file"),
        ({"a": "base: [b.yaml]\n"}, "expected the path of a YAML file"),
        ({"a": "base:\n"}, "expected the path of a YAML file"),
        (
            {"a": "base: b.yaml\n", "b": "selection: {stratgy: all}\n"},
            "b.yaml: selection.stratgy: no such key",
        ),
        ({"a": "base: b.yaml\nselection: top\n", "b": "selection: {keep: 4}\n"}, "selection: expected"),
        ({"a": "base: b.yaml\n", "b": "iterations: [\n"}, "b.yaml: no valid YAML"),
        ({"a": "selection: {base: b.yaml}\n"}, "selection.base: no such key"),
    ],
)
def test_a_bad_base_is_one_message(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "a.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["advantage.baseline=running", "advantage.scale=global"], "advantage.scale"),
        (["advantage.baseline=running", "advantage.history=8"], "at most advantage.history (8)"),
        (["advantage.baseline=running", "shaping.level=reward"], "shaping.level"),
        (["shaping.measure=nearest", "shaping.neighbors=8"], "less than selection.keep (8)"),
        (["shaping.measure=entropy", "shaping.level=multiply"], "not negative"),
        (["shaping.potential=stepwise", "shaping.level=reward"], "level must be 'advantage'"),
        (["shaping.measure=cluster"], "did you mean 'clusters'"),
        (["objective.kl_share=0"], "objective.kl_share"),
        (["objective.kl_judges=[]"], "objective.kl_judges"),
        (["objective.reference_every=0"], "objective.reference_every"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1: expected less than 1; got 1.0"),
        (["optimizer.betas=[-0.1, 0.9]"], "optimizer.betas.0: expected greater than or equal to 0; got -0.1"),
        (["adapter.targets=[]"], "adapter.targets: "),
        (["name=../elsewhere"], "name: expected a name without slashes"),
        (["name=.."], "name: expected a name without slashes"),
        (["advantage.history=100000000000"], "advantage.history: expected less than or equal to 1000000"),
    ],
)
def test_settings_that_contradict_each_other_are_one_message(overrides, message):
    with pytest.raises(InputError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """Of two blocks one would be lost without a word."""
    write(tmp_path, a="sampling: {candidates: 4}\niterations: 1\nsampling: {steps: 3}\n")
    with pytest.raises(
        InputError, match=r"a.yaml: no valid YAML: line 3, column 1: 'sampling' is there already, in line 1"
    ):
        load_config(tmp_path / "a.yaml", [])


def test_a_base_cannot_be_set_from_the_command_line(tmp_path):
    write(tmp_path, a="iterations: 1\n")
    with pytest.raises(InputError, match="base: no such key"):
        load_config(tmp_path / "a.yaml", ["base=a.yaml"])


CONFIGURATIONS = sorted(path for path in EXPERIMENTS.rglob("*.yaml") if path.parent.name != "plans")


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda p: p.stem)
def test_every_experiment_is_a_configuration(path):
    assert load_config(path).selection.keep <= load_config(path).sampling.candidates


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_the_papers_configurations_have_its_settings(name):
    """Stable Diffusion 1.5, 45 animals, G = 8 of 16, eta = 0.05, lambda = 0.5, sigma = 1; the rest as DDPO has it."""
    config = load_config(EXPERIMENTS / "paper" / f"sd15-{name}.yaml")
    assert config.model.path == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (config.adapter.kind, config.adapter.targets) == ("lora", ["to_q", "to_k", "to_v", "to_out.0"])
    assert len(load_prompts(config.prompts.set)) == 45
    assert (config.selection.keep, config.sampling.candidates) == (8, 16)
    assert (config.prompt_noise.eta, config.prompt_noise.where, config.prompt_noise.schedule) == (
        0.05,
        "train",
        "linear",
    )
    shaping = config.shaping
    assert (shaping.ratio, shaping.clip, shaping.encoder, shaping.level) == (
        0.5,
        1.0,
        "dreamsim",
        "advantage",
    )
    assert str(config.reward).startswith(name)
    sampling, optimizer, objective = config.sampling, config.optimizer, config.objective
    assert (sampling.steps, sampling.guidance_scale, sampling.eta) == (50, 5.0, 1.0)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.max_grad_norm) == (3e-4, 1e-4, 1.0)
    assert (optimizer.updates, objective.clip_range, objective.timesteps, config.advantage.clip) == (
        2,
        1e-4,
        1.0,
        5.0,
    )


def test_the_home_directory_is_found_where_no_shell_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        None,
        [
            "model.path=~/sd", "prompts.set=~/p.txt", "reward=hpsv2@~/hps", "shaping.encoder=~/e",
            "evaluation.prompts=~/q.txt", "prompt_noise.similarity=pickscore@~/pick",
        ],
    )  # fmt: skip
    assert (config.model.path, config.prompts.set, config.reward) == (
        "/home/me/sd", "/home/me/p.txt", "hpsv2@/home/me/hps",
    )  # fmt: skip
    assert (config.shaping.encoder, config.evaluation.prompts) == ("/home/me/e", "/home/me/q.txt")
    assert config.prompt_noise.similarity == "pickscore@/home/me/pick"
    assert load_config(None, ["model.path=a~/b"]).model.path == "a~/b"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"foo": 1}, "foo: no such key; allowed here: name, seed, "),
        ({"iterations": "x"}, "iterations: expected a valid integer; got 'x'"),
        (
            {"sampling": {"step": 3}},
            "sampling.step: no such key; did you mean 'steps'? Allowed here: steps, ",
        ),
        ({"sampling": 5}, "sampling: expected keys and values; got 5; it has settings of its own"),
        ({"reward": [{"name": "a", "wieght": 1}]}, "reward.0.wieght: no such key; did you mean 'weight'?"),
        ({"selection": {"keep": 99}}, "selection.keep: expected at most sampling.candidates (16); got 99"),
    ],
)
def test_what_is_wrong_in_python_is_told_as_on_the_command_line(settings, message):
    with pytest.raises(InputError) as caught:
        TrainConfig(**settings)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(InputError) as told:
        parse_config(settings)
    own, other = (str(error.value).partition(": ")[2] for error in (caught, told))
    assert own == other
    assert own.startswith(message)
    assert "pydantic" not in own


def test_a_section_of_its_own_is_checked_alike():
    with pytest.raises(InputError, match=r"SamplingConfig: steps: expected .*\n  step: no such key"):
        SamplingConfig(steps=0, step=3)


def test_pydantics_own_ways_to_make_a_configuration():
    config = TrainConfig(iterations=3, sampling={"steps": 4})
    assert config.model_copy(update={"iterations": 5}).sampling == SamplingConfig(steps=4)
    assert TrainConfig.model_validate(config.model_dump()) == config
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert copy.deepcopy(config) == config


def test_a_mistake_is_where_it_was_made(tmp_path):
    """A file has nothing to do with what was typed beside it."""
    path = write(tmp_path, a="iterations: 3\n") / "a.yaml"
    for override, told in [
        ("prompts.sett=a", "--set prompts.sett: no such key; did you mean 'set'? Allowed here: set"),
        ("foo.bar.baz=1", "--set foo: no such key"),
        ("iterations=many", "--set iterations: expected a valid integer; got 'many'"),
        ("selection.keep=99", "--set selection.keep: expected at most sampling.candidates (16); got 99"),
        ("reward=[{name: a, wieght: 1}]", "--set reward.0.wieght: no such key"),
    ]:
        with pytest.raises(InputError) as caught:
            load_config(path, [override])
        assert str(caught.value).startswith(told)
        assert "a.yaml" not in str(caught.value)
    write(tmp_path, a="iteration: 3\nselection: {keep: x}\n")
    with pytest.raises(InputError) as caught:
        load_config(path, ["selection.strategy=best"])
    first, *others = str(caught.value).splitlines()
    assert first.startswith("--set selection.strategy: expected")
    assert others[0].startswith(f"  {path}: ")
    assert all("--set" not in line for line in others)
    assert any("selection.keep: expected" in line for line in others)


def test_paths_and_numpys_whole_numbers_are_taken_in_python(tmp_path):
    config = TrainConfig(seed=np.int64(3), model={"path": tmp_path}, sampling={"steps": np.int32(4)})
    assert (config.seed, config.model.path, config.sampling.steps) == (3, str(tmp_path), 4)
    assert (
        type(config.seed) is int
        and load_config(str(write(tmp_path, mine=dump_config(config)) / "mine.yaml")) == config
    )
    for wrong in (True, 1.0, np.bool_(True)):
        with pytest.raises(InputError, match="seed: expected a valid integer"):
            TrainConfig(seed=wrong)


def test_validating_in_python_gives_our_messages():
    data = {"sampling": {"num_steps": 4}}
    for check in (TrainConfig.model_validate, parse_config, lambda data: TrainConfig(**data)):
        with pytest.raises(
            InputError, match=r"sampling\.num_steps: no such key; did you mean 'sampling\.steps'\?"
        ):
            check(data)
