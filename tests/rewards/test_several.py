"""Several rewards in a configuration: read strictly, trained on, logged, guarded, evaluated, reported."""

import json

import pytest
import torch
from safetensors.torch import load_file

from driftrl import Trainer
from driftrl.build import build_loop, build_reward, build_training_reward
from driftrl.checks import InputError, RunFailedError
from driftrl.config import RewardPart, TrainConfig, dump_config, load_config, parse_config
from driftrl.evaluation.evaluate import (
    Settings,
    evaluate,
    formula,
    load_evaluation,
    with_mixture,
)
from driftrl.evaluation.measures import describe
from driftrl.evaluation.report import write_picture, write_report
from driftrl.evaluation.studio import Readings
from driftrl.mixture import Part, mixed
from driftrl.rewards.guarded import GuardedReward
from driftrl.rewards.several import SeveralRewards
from driftrl.trainer import NotFiniteWarning

TWO = [
    {"name": "incompressibility", "normalize": "prompt"},
    {"name": "several_rewards:brightness", "weight": 0.5, "normalize": "fixed", "mean": 0.4, "std": 0.1},
]


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """Rewards of a user's own."""
    (tmp_path / "several_rewards.py").write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "def broken(images, prompts):\n    return images\n"
        "def spoilt(images, prompts):\n    return images.mean((1, 2, 3)).log() * float('inf')\n"
        "def gone(images, prompts):\n    raise ConnectionError('gone')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_configuration_round_trips(tmp_path):
    config = parse_config({"reward": TWO})
    assert config.reward == [RewardPart(**part) for part in TWO]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    typed = load_config(
        None, ["reward=[{name: pickscore}, {name: aesthetic@x, weight: 0.5, normalize: prompt}]"]
    )
    assert [(part.name, part.weight, part.normalize) for part in typed.reward] == [
        ("pickscore", 1.0, "none"), ("aesthetic@x", 0.5, "prompt"),
    ]  # fmt: skip
    assert load_config(None, ["reward=pickscore"]).reward == "pickscore"
    assert load_config(tmp_path / "config.yaml", ["reward=pickscore"]).reward == "pickscore"
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("reward", "weights"),
    [
        ("[pickscore, aesthetic@x]", [("pickscore", 1.0), ("aesthetic@x", 1.0)]),
        ("{pickscore: 1, aesthetic@x: 0.5}", [("pickscore", 1.0), ("aesthetic@x", 0.5)]),
        ("[pickscore, {name: mine:score, weight: -2}]", [("pickscore", 1.0), ("mine:score", -2.0)]),
        ("{tiny-animals: 3}", [("tiny-animals", 3.0)]),
    ],
)
def test_names_and_weights_alone_will_do(tmp_path, reward, weights):
    """As Flow-GRPO writes several rewards, and as one would type them."""
    config = load_config(None, [f"reward={reward}"])
    assert config.reward == [RewardPart(name=name, weight=weight) for name, weight in weights]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_functions_and_weights_in_python():
    named = f"{__name__}:dark"
    assert TrainConfig(reward=[dark, "compressibility"]).reward == [
        RewardPart(name=named),
        RewardPart(name="compressibility"),
    ]
    assert TrainConfig(reward={dark: 0.5}).reward == [RewardPart(name=named, weight=0.5)]


def dark(images, prompts):
    return -images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tiny-animals,compressibility", "tiny-animals, compressibility"),
        ("pickscore@here, mine:score", "pickscore@here, mine:score"),
    ],
)
def test_names_with_commas_are_told_how_several_are_written(name, shown):
    with pytest.raises(InputError) as caught:
        build_reward(name, torch.device("cpu"))
    assert f"--set 'reward=[{shown}]'" in str(caught.value)
    weighed = shown.replace(",", ": 1,")
    assert f"--set 'reward={{{weighed}: 0.5}}'" in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "[{name: a, wieght: 1}]",
            r"reward\.0\.wieght: no such key; did you mean 'weight'\? Allowed here: name, ",
        ),
        ("[{name: a}, {weight: 1}]", r"reward\.1\.name: is missing"),
        ("[{name: a, weight: x}]", r"reward\.0\.weight: expected a valid number; got 'x'"),
        (
            "[{name: a, normalize: promt}]",
            r"reward\.0\.normalize: expected .*; got 'promt'; did you mean 'prompt'",
        ),
        ("[{name: a, normalize: fixed, std: 0}]", r"reward\.0\.std: expected greater than 0"),
        ("[{name: a, mean: 3}]", r"reward: mean and std go with normalize 'fixed'; a has normalize 'none'"),
        ("[{name: a}, {name: a}]", r"reward: expected each name once; a is there twice"),
        ("[{name: a, weight: 0}]", r"reward: expected at least one reward whose weight is not 0"),
        ("[]", r"reward: expected at least one reward"),
        ("[pickscore, 5]", r"reward\.1: expected keys and values; got 5"),
        (
            "5",
            r"reward: expected a name, a list of names or of \{name, weight, normalize\}, or \{name: weight\}; got 5",
        ),
        ("{name: a}", r"reward: expected a name, a list of names or of"),
        ("{name: a, weight: 2}", r"reward: expected a name, a list of names or of"),
        ("{a: b}", r"reward\.a: expected a number, the reward's weight; got 'b'"),
        ("{a: true}", r"reward\.a: expected a number, the reward's weight; got True"),
        ("{a: .inf}", r"reward\.0\.weight: expected a finite number; got inf"),
        ("{a: 0}", r"reward: expected at least one reward whose weight is not 0"),
        ("{}", r"reward: expected at least one reward"),
        ("[a, a]", r"reward: expected each name once; a is there twice"),
    ],
)
def test_a_bad_list_is_one_message(reward, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [f"reward={reward}"])


def test_statistics_of_one_iteration_do_not_go_with_a_history():
    overrides = [
        "advantage.baseline=running",
        "shaping.ratio=0",
        "reward=[{name: a}, {name: b, normalize: batch}]",
    ]
    with pytest.raises(InputError, match=r"'running' compares with earlier iterations, b with this one only"):
        load_config(None, overrides)
    assert load_config(None, [*overrides[:2], "reward=[{name: a}, {name: b}]"])


def test_training_on_two_logs_each_and_is_the_same_again(config, tmp_path):
    one = Trainer(config(reward=TWO), tmp_path / "one").run()
    two = Trainer(config(reward=TWO), tmp_path / "two").run()
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    single = Trainer(config(), tmp_path / "single").run()
    first, alone = lines(one)[0], lines(single)[0]
    assert first["reward/incompressibility/mean"] == pytest.approx(alone["reward/mean"])
    bright = first["reward/several_rewards:brightness/mean"]
    assert first["reward/mean"] == pytest.approx(0.5 * (bright - 0.4) / 0.1, abs=1e-5)
    assert lines(one)[1] != lines(single)[1]


def test_one_part_as_it_is_trains_as_the_reward_alone(config, tmp_path):
    reward = [{"name": "incompressibility"}, {"name": "compressibility", "weight": 0.0}]
    several = Trainer(config(reward=reward), tmp_path / "several").run()
    single = Trainer(config(), tmp_path / "single").run()
    a, b = (load_file(run / "checkpoints/000002/training.safetensors") for run in (several, single))
    assert all(torch.equal(a[name], b[name]) for name in b)
    for ours, theirs in zip(lines(several), lines(single), strict=True):
        assert ours.pop("reward/incompressibility/mean") == -ours.pop("reward/compressibility/mean")
        assert ours == theirs


def test_a_run_of_several_resumes_exactly(config, tmp_path):
    whole = Trainer(config(reward=TWO, iterations=2), tmp_path / "whole").run()
    Trainer(config(reward=TWO, iterations=1), tmp_path / "parts").run()
    saved = load_config(tmp_path / "parts/config.yaml", ["iterations=2"])
    parts = Trainer(saved, tmp_path / "parts", resume=True).run()
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"settings differ.*reward"):
        Trainer(config(reward="incompressibility"), tmp_path / "parts", resume=True)


def test_the_guard_names_the_part(config, tmp_path):
    images, prompts = torch.rand(2, 3, 8, 8), ["a cat"] * 2

    def reward(name):
        settings = config(reward=[{"name": "incompressibility"}, {"name": name}], guards__reward_attempts=1)
        return build_training_reward(settings)

    with pytest.raises(
        RunFailedError, match=r"the reward several_rewards:gone failed once for 'a cat'.*gone"
    ):
        reward("several_rewards:gone")(images, prompts)
    with pytest.raises(InputError, match=r"^reward several_rewards:broken: expected a tensor of 2 numbers"):
        reward("several_rewards:broken")(images, prompts)

    def refuses(images, prompts):
        raise InputError("too dark")

    with pytest.raises(InputError, match=r"^reward mine: too dark$"):
        GuardedReward(refuses, name="mine")(images, prompts)
    with pytest.raises(InputError, match=r"^too dark$"):
        GuardedReward(refuses)(images, prompts)
    trainer = Trainer(config(reward=[*TWO, {"name": "several_rewards:spoilt"}]), tmp_path / "run")
    with pytest.warns(NotFiniteWarning, match=r"a reward \(several_rewards:spoilt\) is not finite for 'a"):
        trainer.loop.attempt()


def test_only_the_part_that_failed_is_asked_again():
    calls = {"good": 0, "flaky": 0}

    def good(images, prompts):
        calls["good"] += 1
        return images.mean((1, 2, 3))

    def flaky(images, prompts):
        calls["flaky"] += 1
        if calls["flaky"] == 1:
            raise TimeoutError
        return images.amax((1, 2, 3)).double()

    images = torch.rand(3, 3, 8, 8)
    both = SeveralRewards([GuardedReward(r, pause=0, name=r.__name__) for r in (good, flaky)])
    found = both(images, ["a"] * 3)
    assert calls == {"good": 1, "flaky": 2}
    assert torch.equal(found, torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3))], -1))


def test_the_mirrored_judge_sees_the_mixture(config, tmp_path):
    settings = config(reward=TWO, objective__kl_weight=0.1, objective__kl_share=0.5)
    loop = build_loop(settings, tmp_path)
    mirrored = loop.judges[0](torch.rand(6, 3, 16, 16), ["a"] * 6)
    assert mirrored.shape == (6, 2)
    assert 0 <= loop.iterate().metrics["reference/held"] <= 0.5


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "three.txt"
    file.write_text("a cat\na dog\na fox\n")
    return str(file)


def test_evaluation_measures_parts_and_mixes_them_in_units_of_the_base_model(config, tmp_path, prompts_file):
    reward = [*TWO, {"name": "compressibility", "weight": 0.0}]
    run = Trainer(config(reward=reward, optimizer__learning_rate=0.02), tmp_path / "run").run()
    more = ["tiny-animals", "incompressibility"]  # the second is measured anyway
    evaluate(run, prompts=prompts_file, images=4, rewards=more, checkpoints="all")
    evaluation = load_evaluation(run)
    figures = evaluation.base.figures
    assert [name for name in figures if name.startswith("reward")] == [
        "reward", "reward/incompressibility", "reward/several_rewards:brightness", "reward/compressibility",
        "reward/tiny-animals",
    ]  # fmt: skip
    named = "incompressibility (prompt) + 0.5 several_rewards:brightness (fixed 0.4, 0.1) + 0 compressibility"
    assert evaluation.settings.rewards == [named, "tiny-animals"]
    fixed = "reward/several_rewards:brightness"
    rest = torch.tensor([
        [a - 0.5 * (x - 0.4) / 0.1 for a, x in zip(p.figures["reward"].per_prompt, p.figures[fixed].per_prompt, strict=True)]
        for p in evaluation.points
    ])  # fmt: skip
    sizes = torch.tensor([p.figures["reward/incompressibility"].per_prompt for p in evaluation.points])
    units = (sizes[1:] - sizes[0]) / (
        rest[1:] - rest[0]
    )  # a prompt's standard deviation: the same for every model
    assert (units > 0).all()
    torch.testing.assert_close(units[0], units[1], atol=0, rtol=1e-3)
    # Going on later gives the same figures: the scale is that of the same draw.
    first = (run / "evaluation.json").read_text()
    data = json.loads(first)
    data["points"].pop()
    (run / "evaluation.json").write_text(json.dumps(data))
    evaluate(run, prompts=prompts_file, images=4, rewards=more, checkpoints="all")
    assert json.loads((run / "evaluation.json").read_text()) == json.loads(first)

    page = write_report(run).read_text()
    assert "incompressibility of the images of training" in page
    assert "reward of the images of training" not in page
    assert write_picture(run).is_file()
    settings = evaluation.settings
    assert describe("reward", settings).title == f"reward: {named}"
    assert "Part of what training raised" in describe("reward/incompressibility", settings).meaning
    for name in ("compressibility", "tiny-animals"):
        assert "Not trained on" in describe(f"reward/{name}", settings).meaning


def test_the_scale_of_the_mixture_is_the_base_models():
    def readings(seed):
        draw = torch.Generator().manual_seed(seed)
        rewards = {f"reward/{name}": torch.rand(3, 5, generator=draw).double() for name in "abc"}
        return Readings(rewards, torch.zeros(3, 5, 2), None)

    now, base = readings(0), readings(1)
    mixture = [RewardPart(name="a", normalize="prompt"), RewardPart(name="b", weight=2.0, normalize="batch")]
    found = with_mixture(now, base, mixture).rewards
    assert list(found) == ["reward", "reward/a", "reward/b", "reward/c"]
    a, b = base.rewards["reward/a"], base.rewards["reward/b"]
    expected = (now.rewards["reward/a"] - a.mean(1, keepdim=True)) / a.std(1, keepdim=True, correction=0)
    expected = expected + 2 * (now.rewards["reward/b"] - b.mean()) / b.std(correction=0)
    torch.testing.assert_close(found["reward"], expected)
    assert with_mixture(now, base, []) is now


def test_settings_of_a_single_reward_have_the_names_they_had():
    """Pictures of earlier evaluations lie in folders called after them."""
    plain = {"model": "m", "prompt_set": "p", "prompts": ["a"], "images": 2, "seed": 0, "steps": 4, "eta": 1.0,
             "guidance_scale": 1.0, "rewards": ["r"], "encoder": "e", "clip": None, "neighbours": 1}  # fmt: skip
    assert Settings(**plain).fingerprint() == "da3684c3"  # as this was before there were several
    assert Settings(**plain, mixture=[RewardPart(name="r")]).fingerprint() != Settings(**plain).fingerprint()


def test_formulas_tell_mixtures_apart():
    base = [RewardPart(name="a"), RewardPart(name="b", weight=-0.5, normalize="batch")]
    assert formula(base) == "a + -0.5 b (batch)"
    assert formula("a") == formula([RewardPart(name="a")]) == "a"
    others = [
        {"weight": 2.0},
        {"normalize": "prompt"},
        {"normalize": "fixed"},
        {"normalize": "fixed", "std": 2.0},
    ]
    found = {formula([base[0].model_copy(update=other), base[1]]) for other in [{}, *others]}
    assert len(found) == 5


def test_columns_are_mixed_as_the_configuration_says(config, tmp_path):
    loop = build_loop(config(reward=TWO), tmp_path)
    assert loop.method.rewards == (
        Part("incompressibility", 1.0, "prompt"), Part("several_rewards:brightness", 0.5, "fixed", 0.4, 0.1),
    )  # fmt: skip
    seen = []
    inner = loop.reward
    loop.reward = lambda images, prompts: seen.append(inner(images, prompts)) or seen[-1]
    iteration = loop.iterate()
    assert torch.equal(iteration.rewards, mixed(seen[0].view(3, 6, 2), loop.method.rewards))
