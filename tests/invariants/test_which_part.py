"""What docs/figures/which_part.py says of DRIFT's parts, in fewer iterations than the figure has."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "which_part.py"


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("which_part_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def _curves(toy, place, strategy, ratio=0.0, iterations=60):
    return toy.train(place, toy.Rule("", strategy, ratio), 1.0, iterations, 4)


def test_the_step_is_the_policy_gradient(toy):
    """One iteration moves the logits by the gradient of the advantages' mean log-probability."""
    place, rate = toy.world("two humps"), 0.5
    draw = torch.Generator().manual_seed(1)
    drawn = place.logits.softmax(1).multinomial(16, replacement=True, generator=draw)
    rewards = place.trained.gather(1, drawn) + 0.3 * torch.randn(drawn.shape, generator=draw)
    chosen = toy.select(rewards, 8, "contrast", draw)
    advantages = toy.group_relative(rewards.gather(1, chosen))
    logits = place.logits.clone().requires_grad_()
    picked = logits.log_softmax(1).gather(1, drawn.gather(1, chosen))
    (advantages * picked).mean(1).sum().backward()
    after = place.logits + rate * logits.grad
    chance = after.softmax(1)
    expected = (chance * place.true).sum(1).unflatten(0, (toy.SEEDS, toy.PROMPTS)).mean(1)
    rule = toy.Rule("", "contrast")
    torch.testing.assert_close(toy.train(place, rule, rate, 1, 1)[:, 1, 0], expected)


def test_grpo_learns_and_collapses(toy):
    curves = _curves(toy, toy.world("two humps"), "random")
    assert (curves[:, -1, 0] > curves[:, 0, 0] + 1.0).all()
    assert (curves[:, -1, 1] < 0.6 * curves[:, 0, 1]).all()


@pytest.mark.filterwarnings("ignore::driftrl.shaping.DiversityWarning")  # groups of one picture are the point
@pytest.mark.parametrize("kind", ["two humps", "odd failures", "wild rewards"])
def test_shaping_keeps_variety_at_equal_reward(toy, kind):
    place = toy.world(kind)
    against = _curves(toy, place, "random")
    for strategy in ("random", "contrast"):
        assert toy.gained(_curves(toy, place, strategy, 1.0), against).low > 0


def test_selection_alone_keeps_no_variety_at_equal_reward(toy):
    place = toy.world("two humps")
    against = _curves(toy, place, "random")
    for strategy in ("concentrated", "nearest_neighbor"):
        assert toy.gained(_curves(toy, place, strategy), against).high < 0


def test_a_window_narrows_the_good_and_leaves_the_failures(toy):
    """At equal reward: what is never in the window is never pushed down."""
    place = toy.world("two humps")
    at = {}
    for strategy in ("random", "concentrated"):
        failing, good = toy.composition(_curves(toy, place, strategy, iterations=120), 0.3).split("% | ")
        at[strategy] = float(failing), float(good)
    assert at["concentrated"][0] > at["random"][0]
    assert at["concentrated"][1] < at["random"][1]


def test_selection_filters_pictures_that_fool_the_reward(toy):
    """GRPO ends below the true reward it started from; a concentrated selection ends above."""
    place = toy.world("hacked")
    fooled, filtered = _curves(toy, place, "random"), _curves(toy, place, "concentrated")
    assert (fooled[:, -1, 0] < fooled[:, 0, 0]).all()
    assert (filtered[:, -1, 0] > filtered[:, 0, 0]).all()
