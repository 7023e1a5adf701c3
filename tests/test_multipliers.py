"""A lambda for each prompt that keeps a share of its diversity: the rule, where it comes to rest, and that runs carry it on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl import Trainer
from driftrl.build import build_loop
from driftrl.checkpoint import MEMORY
from driftrl.checks import InputError
from driftrl.multipliers import FIRST, LARGEST, Multipliers, begun, followed
from driftrl.shaping import group_diversity, shape_advantages
from test_methods import assert_same, metrics
from test_nft import tensors

KEEP = {
    "shaping__ratio": 0.0,
    "prompts__set": ["a cat", "a dog", "a cow"],
    "shaping__target": 1.5,
    "shaping__target_rate": 0.5,
}


def test_the_rule_written_out():
    """The first three visits measure, the next ones add up; what is used has a part in proportion besides."""
    state, added, base = begun(3, 0.5), 0.5, 0.0
    for visit, now in enumerate([0.30, 0.36, 0.24, 0.27, 0.15, 0.33]):
        state, (ratio,), (share,) = followed(state, [1], torch.tensor([now]).double(), 0.8, 0.2, 0.1)
        base = (base * visit + now) / (visit + 1) if visit < 3 else base
        assert share == pytest.approx(now / base)
        error = 0.8 - now / base if visit >= 3 else 0.0
        added = min(max(added + 0.1 * error, 0.2), 2.0)
        assert ratio == pytest.approx(min(max(added + 5.0 * error, 0.2), 2.0))
        assert state.ratio.tolist() == pytest.approx([0.5, added, 0.5])
    assert state.base[1] == pytest.approx(0.3) and state.visits.tolist() == [0, 6, 0]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 2)), min_size=1, max_size=40),
    st.floats(0.01, 2), st.floats(0, 2), st.floats(0, 10),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_visits_one_by_one_or_together_are_the_same_and_within_bounds(visits, target, least, rate):
    which, values = [place for place, _ in visits], torch.tensor([value for _, value in visits]).double()
    one = begun(4, least)
    ratios, shares = [], []
    for place, value in zip(which, values, strict=True):
        one, ratio, share = followed(one, [place], value[None], target, least, rate)
        ratios.append(ratio)
        shares.append(share)
    together, ratio, share = followed(begun(4, least), which, values, target, least, rate)
    for a, b in zip(one, together, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ratio, torch.cat(ratios)) and torch.equal(share, torch.cat(shares))
    for found in (ratio, together.ratio):
        assert bool(((found >= least) & (found <= LARGEST)).all())


@pytest.mark.parametrize("target", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("pull", [0.6, 1.2])
def test_it_rests_at_the_share_whatever_the_reward_pulls(target, pull):
    """A diversity that falls by what the reward pulls and rises by lambda, as in training: without one it goes to nothing."""
    state, diversity = begun(1, 0.0), 0.4
    for _ in range(600):
        state, ratio, share = followed(state, [0], torch.tensor([diversity]).double(), target, 0.0)
        diversity = diversity * math.exp(0.03 * (float(ratio) - pull))
    assert float(share) == pytest.approx(target, abs=0.01)
    assert float(ratio) == pytest.approx(pull, abs=0.05)


def test_each_group_has_its_own_lambda():
    advantages, intrinsic = torch.randn(3, 4), torch.randn(3, 4, 2)
    own = torch.tensor([0.0, 0.5, 2.0])
    for bonus in (intrinsic[..., 0], intrinsic):
        found = shape_advantages(advantages, bonus, own)
        for row, ratio in enumerate(own.tolist()):
            one = shape_advantages(advantages[row : row + 1], bonus[row : row + 1], ratio)
            torch.testing.assert_close(found[row : row + 1], one)
    for wrong in (own[:2], -own, own.new_full((3,), torch.nan)):
        with pytest.raises(InputError, match="ratio: expected 3 numbers of at least 0"):
            shape_advantages(advantages, intrinsic, wrong)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"diversity": torch.ones(2)}, "expected one for each of 1 prompts; got 2"),
        ({"diversity": torch.tensor([torch.nan])}, "diversity"),
        ({"which": [3]}, "which: expected 0 to 1"),
        ({"target": 0.0}, "target: expected more than 0"),
        ({"least": 2.5}, "ratio: expected 0 to 2"),
        ({"rate": -1.0}, "rate"),
    ],
)
def test_refusals(changes, says):
    asked = {"multipliers": begun(2, 0.5), "which": [0], "diversity": torch.ones(1), "target": 0.7} | changes
    with pytest.raises(InputError, match=says):
        followed(**asked)


def test_without_diversity_there_is_nothing_to_keep():
    state = Multipliers(torch.tensor([0.5]).double(), torch.zeros(1).double(), torch.tensor([FIRST]))
    state, ratio, share = followed(state, [0], torch.zeros(1), 0.5)
    assert (share.tolist(), ratio.tolist()) == ([1.0], [0.5])


def test_a_rate_of_none_is_a_lambda_that_stays(config, tmp_path):
    few = {"iterations": 5, "prompts__set": KEEP["prompts__set"], "sampling__candidates": 4}
    kept = Trainer(config(**few, shaping__target=1.5, shaping__target_rate=0.0), tmp_path / "a").run()
    plain = Trainer(config(**few), tmp_path / "b").run()
    assert_same(tensors(kept, 5), tensors(plain, 5))
    for a, b in zip(metrics(kept), metrics(plain), strict=True):
        assert a | {"shaping/ratio": 0.5} == b | {"shaping/ratio": 0.5, "shaping/left": a["shaping/left"]}


def test_the_share_is_of_all_candidates_and_the_bonus_of_those_that_are_kept(config, tmp_path):
    loop = build_loop(config(iterations=1, **KEEP), tmp_path)
    images = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[5, 0, 2], [1, 3, 4]])
    kept = torch.stack([one[rows] for one, rows in zip(images, chosen, strict=True)])
    distances, varied = loop._varieties(kept, images, ["a", "b"], chosen)
    torch.testing.assert_close(distances, loop._distances(kept, ["a", "b"]))
    torch.testing.assert_close(varied, group_diversity(loop._distances(images, ["a", "b"])).mean(1))


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = Trainer(config(iterations=6, **KEEP), tmp_path / "whole").run()
    for stop in (4, 6):
        parts = Trainer(config(iterations=stop, **KEEP), tmp_path / "parts", resume=stop > 4).run()
    for name in ("training.safetensors", MEMORY):
        assert_same(*(tensors(run, 6, name) for run in (whole, parts)))
    for name in ("shaping/ratio", "advantage/shaping_weight"):
        values = [line[name] for line in metrics(whole)]
        assert values[:3] == [0.0] * 3 and values[5] > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shaping__level": "reward"}, r"shaping\.level: with shaping\.target expected 'advantage'"),
        (
            {"shaping__ratio": 2.5},
            r"shaping\.ratio: with shaping\.target lambda goes from this to 2; got 2\.5",
        ),
        ({"shaping__target": 0.0}, r"shaping\.target: expected greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(config, changes, says):
    with pytest.raises(InputError, match=says):
        config(**{"shaping__target": 0.7} | changes)


def test_a_checkpoint_of_other_prompts_is_refused(config, tmp_path):
    settings = config(iterations=4, **KEEP)
    run = Trainer(settings, tmp_path / "run").run()
    memory = Trainer(settings, run, resume=True).loop.memory
    fewer = memory.multipliers._replace(ratio=memory.multipliers.ratio[:2])
    with pytest.raises(InputError, match="has the lambdas of 2 prompts; this run's prompt set has 3"):
        memory.restored({f"multipliers/{k}": v for k, v in fewer._asdict().items()}, None)
