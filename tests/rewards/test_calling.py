"""How rewards are called, and what their answers are taken for."""

import json

import numpy as np
import pytest
import torch

from driftrl import Trainer
from driftrl.build import build_reward
from driftrl.checks import InputError
from driftrl.evaluation.evaluate import evaluate, load_evaluation
from driftrl.prompts import load_prompts
from driftrl.rewards.calling import ask, asks_for_metadata, scores_of
from driftrl.rewards.guarded import GuardedReward
from driftrl.types import Prompt

CPU = torch.device("cpu")
IMAGES = torch.rand(3, 3, 4, 4)


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([[1], [2], [3]]),
        np.array([1.0, 2.0, 3.0]),
        [1, 2.0, 3],
        (1.0, 2.0, 3.0),
        [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)],
        [np.float32(1), np.float32(2), np.float32(3)],
        (np.array([1, 2, 3]), {}),
        ([1, 2, 3], {"strict": [0, 1, 0]}),
    ],
)
def test_numbers_are_taken_in_any_of_the_usual_forms(answer):
    """DDPO's and Flow-GRPO's rewards return a pair, many models a column."""
    got = GuardedReward(lambda images, prompts: answer)(IMAGES, ["a cat"] * 3)
    assert torch.equal(got, torch.tensor([1.0, 2.0, 3.0]))
    assert got.dtype == torch.float32
    assert not got.requires_grad


@pytest.mark.parametrize(
    "answer",
    [
        torch.tensor([True, False, True]), np.array([True, False, True]), [True, False, True],
        torch.tensor([[True], [False], [True]]), ([np.True_, np.False_, np.True_], {}),
    ],
)  # fmt: skip
def test_right_and_wrong_are_1_and_0(answer):
    got = GuardedReward(lambda images, prompts: answer)(IMAGES, ["a cat"] * 3)
    assert torch.equal(got, torch.tensor([1.0, 0.0, 1.0]))
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "answer",
    [
        None, 1.0, "123", ["a", "b", "c"], [1, None, 3], [[1, 2], [3], []], {"rewards": [1, 2, 3]}, torch.ones(4),
        torch.ones(1, 3), torch.ones(3, 2), torch.ones(3, dtype=torch.complex64), torch.ones(4, dtype=torch.bool),
        np.array(["a", "b", "c"]), np.array([1, None, 3]), ([1, 2, 3], [4, 5, 6]), (1.0, {}),
    ],
)  # fmt: skip
def test_anything_else_is_refused(answer):
    with pytest.raises(InputError, match="mine: expected a tensor of 3 numbers, one per image; got"):
        scores_of(answer, 3, "mine")


def test_two_numbers_are_no_pair_of_something_else():
    assert scores_of((0.25, 0.5), 2, "mine").tolist() == [0.25, 0.5]


def test_metadata_goes_to_rewards_that_ask():
    """Flow-GRPO's are called (images, prompts, metadata)."""
    prompts = [Prompt("a cat", {"prompt": "a cat", "count": 2}), "a dog", Prompt("a cat", {"count": 5})]

    def plain(images, prompts):
        assert prompts == ["a cat", "a dog", "a cat"]
        return images.mean((1, 2, 3))

    def asks(images, prompts, metadata, strict=False):
        assert not strict
        return [each.get("count", -1) for each in metadata], {}

    class Model(torch.nn.Module):
        def forward(self, images, prompts, metadata=None):
            return torch.tensor([float(len(each)) for each in metadata])

    class Callable:
        def __call__(self, images, prompts, *, metadata):
            return [len(each) for each in metadata]

    assert not asks_for_metadata(plain)
    assert torch.equal(GuardedReward(plain)(IMAGES, prompts), IMAGES.mean((1, 2, 3)))
    assert GuardedReward(asks)(IMAGES, prompts).tolist() == [2, -1, 5]
    assert GuardedReward(asks, timeout=10.0)(IMAGES, prompts).tolist() == [2, -1, 5]
    assert ask(Callable(), IMAGES, prompts) == [2, 0, 1]
    assert ask(Model(), IMAGES, ["a cat"] * 3).tolist() == [0, 0, 0]


def test_metadata_comes_from_the_file_of_prompts_to_training_and_evaluation(config, tmp_path, monkeypatch):
    """As far as the reward in both, in a resumed run and after the file is gone."""
    (tmp_path / "counting_reward.py").write_text(
        "def count(images, prompts, metadata):\n"
        "    assert all(prompt.startswith('a ') for prompt in prompts)\n"
        "    return [image.mean() + each['count'] for image, each in zip(images, metadata)]\n"
    )
    lines = [
        {"prompt": "a cat", "count": 100},
        {"prompt": "a dog", "count": 300},
        {"prompt": "a cat", "count": 500},
    ]
    file = tmp_path / "counted.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)  # where Python does not look of itself
    asked = {
        "iterations": 1,
        "reward": "counting_reward:count",
        "prompts": {"set": "counted.jsonl", "per_iteration": 3},
    }
    run = Trainer(config(**asked), tmp_path / "run").run()
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert 300 < row["reward/mean"] < 301
    file.unlink()
    Trainer(config(**asked | {"iterations": 2}), run, resume=True).run()
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert 300 < row["reward/mean"] < 301
    evaluate(run, images=2)
    evaluation = load_evaluation(run / "evaluation.json")
    rewards = evaluation.base.figures["reward"].per_prompt
    assert [int(reward) for reward in rewards] == [100, 300, 500]
    file.write_text("".join(json.dumps(line | {"count": 7}) + "\n" for line in lines))
    evaluate(run, images=2, prompts="counted.jsonl")
    assert [int(r) for r in load_evaluation(run / "evaluation.json").base.figures["reward"].per_prompt] == [
        7,
        7,
        7,
    ]
    assert load_prompts("counted.jsonl")[0].metadata == {"prompt": "a cat", "count": 7}
    with pytest.raises(InputError, match=r"the prompts of counted\.jsonl are others"):
        Trainer(config(**asked | {"iterations": 3}), run, resume=True)


def test_rewards_of_the_package_do_not_ask():
    assert not asks_for_metadata(build_reward("tiny-animals", CPU))
    assert not asks_for_metadata(build_reward("compressibility", CPU))


def test_metadata_in_the_third_place_as_trl_and_ddpo_pytorch_have_it():
    """Whatever it is called; an argument with another meaning and a default of its own is left alone."""
    images, prompts = torch.zeros(1, 3, 2, 2), [Prompt("a cat", {"count": 2})]
    asked = (
        lambda images, prompts, prompt_metadata: [prompt_metadata[0]["count"]],
        lambda images, prompts, meta=None: [meta[0]["count"]],
        lambda images, prompts, m, /: [m[0]["count"]],
    )
    for reward in asked:
        assert asks_for_metadata(reward)
        assert ask(reward, images, prompts) == [2]
    for reward in (lambda images, prompts, scale=3: [scale], lambda images, prompts, *, scale=3: [scale]):
        assert not asks_for_metadata(reward)
        assert ask(reward, images, prompts) == [3]
