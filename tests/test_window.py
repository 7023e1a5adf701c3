"""Noise in a window of denoising steps: what is in it, what is outside, and how it moves."""

import functools

import families
import pytest
import torch
from safetensors.torch import load_file

from driftrl import Trainer
from driftrl.build import build_loop, build_policy
from driftrl.checks import InputError
from driftrl.evaluation.generate import open_policy
from driftrl.rollout import NO_NOISE, Window, rollout, score_step
from test_methods import assert_same

KEYS = [(0, 3, 0), (0, 3, 1)]


@pytest.fixture
def made(config, epsilon_folder, tmp_path):
    """A policy of a family."""
    folders = {
        "sd": lambda: epsilon_folder,
        "sd3": functools.cache(lambda: families.make_sd3(tmp_path / "sd3")),
    }

    def policy(family, **changes):
        size = {"sampling__height": 16, "sampling__width": 16, "sampling__steps": 5}
        return build_policy(config(model__path=str(folders[family]()), **(size | changes)))

    return policy


NFT = {"objective__loss": "nft", "objective__timesteps": 1.0}
STILL = {"sd": {"sampling__eta": 0.0}, "sd3": {"sampling__noise_level": 0.0}}


@pytest.mark.parametrize("family", ["sd", "sd3"])
@torch.no_grad()
def test_outside_it_steps_are_deterministic_and_inside_as_ever(made, family):
    policy, noisy = made(family), made(family)
    still = made(family, **(NFT | STILL[family]))
    policy.add_noise_in(range(1, 3))
    conditioning = policy.encode(["a cat", "a dog"])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    for step in range(5):
        found, as_ever, plain = (
            score_step(p, latents, torch.full((2,), step), conditioning, None, NO_NOISE)
            for p in (policy, noisy, still)
        )
        for part, wanted in zip(found, as_ever if step in (1, 2) else plain, strict=True):
            assert torch.equal(part, wanted)
        assert bool((found.std > 0).all()) == (step in (1, 2))
    assert policy.scored.tolist() == [False, True, True, False, False]
    # Rows of a batch may be at different steps.
    steps = torch.tensor([0, 1])
    mixed = score_step(policy, latents, steps, conditioning, None, NO_NOISE)
    assert (mixed.std.flatten() > 0).tolist() == [False, True]


def test_what_comes_after_it_is_decided(made):
    """From where the window ends, the deterministic sampler draws the same image."""
    policy, still = made("sd"), made("sd", **(NFT | STILL["sd"]))
    policy.add_noise_in(range(2))
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, KEYS, 3, 4)
    x, rows = drawn.latents[:, :, 2].flatten(0, 1), conditioning.rows(torch.tensor([0, 0, 0, 1, 1, 1]))
    with torch.no_grad():
        for step in range(2, 5):
            x = still.transition(x, torch.full((6,), step), rows).mean
    torch.testing.assert_close(drawn.latents[:, :, -1].flatten(0, 1), x)
    assert (drawn.log_probs != 0).sum(-1).unique().tolist() == [2]


def test_it_moves_on_and_comes_back():
    moving = Window(2, every=3)
    starts = [moving.at(i, 5).start for i in range(15)]
    assert starts == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3
    assert {Window(3).at(i, 5) for i in range(9)} == {range(3)}
    assert Window(4, every=1).at(7, 4) == range(4)


def test_it_may_be_anywhere():
    """All places alike, within the first steps where that is asked for; by seed and iteration alone."""
    window = Window(2, anywhere=True, within=4)
    starts = [window.at(i, 7, seed=3).start for i in range(300)]
    assert {starts.count(place) // 20 for place in (0, 1, 2)} <= {4, 5}
    assert set(starts) == {0, 1, 2}
    assert starts == [window.at(i, 7, seed=3).start for i in range(300)]
    assert starts != [window.at(i, 7, seed=4).start for i in range(300)]
    assert {Window(2, anywhere=True).at(i, 4).stop for i in range(99)} == {2, 3, 4}
    assert {Window(2, anywhere=True, within=9).at(i, 3).stop for i in range(99)} == {2, 3}
    assert [Window(2, every=1, within=3).at(i, 7).start for i in range(4)] == [0, 1, 0, 1]


def test_a_run_draws_its_place_and_resumes_where_it_is(config, tmp_path):
    changes = {"sampling__window": 1, "sampling__window_choice": "random", "objective__timesteps": 1.0}
    whole = Trainer(config(**changes, iterations=3), tmp_path / "whole").run()
    for stop in (1, 3):
        parts = Trainer(config(**changes, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_a_run_moves_it_and_resumes_where_it_is(config, tmp_path):
    """Also where all of a run's iterations but the last were in another process."""
    changes = {"sampling__window": 1, "sampling__window_every": 1, "objective__timesteps": 1.0}
    loop = build_loop(config(**changes), tmp_path / "loop")
    seen = []
    for _ in range(4):
        loop.iterate()
        seen.append(loop.policy.scored.nonzero().flatten().tolist())
    assert seen == [[0], [1], [2], [0]]
    whole = Trainer(config(**changes, iterations=4), tmp_path / "whole").run()
    for stop in (1, 3, 4):
        parts = Trainer(config(**changes, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    a, b = (load_file(run / "checkpoints/000004/training.safetensors") for run in (whole, parts))
    assert_same(a, b)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_what_is_drawn_after_training_has_noise_in_all_steps(config, tmp_path):
    changes = {"sampling__window": 1, "objective__timesteps": 1.0, "iterations": 1}
    loop = build_loop(config(**changes), tmp_path / "loop")
    assert int(loop.policy.scored.sum()) == 1
    policy, _ = open_policy(Trainer(config(**changes), tmp_path / "run").run())
    assert int(policy.scored.sum()) == 3
    loop.policy.add_noise_in(None)
    assert torch.equal(loop.policy.scored, policy.scored)


@pytest.mark.parametrize(
    "changes",
    [{"objective__timestep_choice": "random"}, {"objective__kl_weight": 0.1}, {"optimizer__updates": 1, "optimizer__one_pass": True}],
    ids=["random", "kl", "one pass"],
)  # fmt: skip
def test_only_its_steps_are_learned_from(config, tmp_path, changes):
    loop = build_loop(config(sampling__window=2, objective__timesteps=1.0, **changes), tmp_path)
    metrics = loop.iterate().metrics
    assert metrics["policy/pairs"] == 2 * loop.prompts_per_iteration * loop.method.keep
    assert metrics["policy/ratio_deviation"] <= 1e-6


def test_a_window_that_cannot_be(config, tmp_path):
    with pytest.raises(InputError, match="without noise leave it out"):
        build_loop(config(**NFT, sampling__eta=0.0, sampling__window=1), tmp_path)
    with pytest.raises(
        InputError, match=r"sampling\.window: expected at most 3, the denoising steps with noise; got 4"
    ):
        build_loop(config(sampling__window=4), tmp_path)
    with pytest.raises(InputError, match=r"sampling\.window_every: there is no window to move"):
        config(sampling__window_every=4)
    for alone in ({"sampling__window_choice": "random"}, {"sampling__window_within": 2}):
        with pytest.raises(
            InputError, match=r"sampling\.window_\w+: there is no window; give sampling\.window"
        ):
            config(**alone)
    with pytest.raises(InputError, match=r"sampling\.window_every: .* leave it out"):
        config(sampling__window=1, sampling__window_every=2, sampling__window_choice="random")
    with pytest.raises(InputError, match=r"window_within: expected at least sampling\.window \(2\); got 1"):
        config(sampling__window=2, sampling__window_within=1)
