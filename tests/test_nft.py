"""Training by the negative-aware loss (DiffusionNFT): what draws, what is learned from, and that it learns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from driftrl import Trainer, noise
from driftrl.build import build_loop, build_policy
from driftrl.checkpoint import MEMORY
from driftrl.checks import InputError
from driftrl.memory import Memory
from driftrl.objectives.gate import Anchor
from driftrl.objectives.negative_aware import NegativeAware, negative_aware
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.update import Objective, update
from test_methods import assert_same, shift
from test_methods import metrics as lines
from test_training import assert_brighter

NFT = {"objective__loss": "nft", "objective__timestep_choice": "random", "optimizer__learning_rate": 0.01}
LAGGING = NFT | {"objective__nft_decay": 0.2, "objective__nft_decay_max": 0.5}
SPEC = PromptNoise(0.3)


def tensors(run, iteration, name="training.safetensors"):
    return load_file(run / f"checkpoints/{iteration:06d}" / name)


def test_the_loss_is_that_of_drawn_images_noised_anew(config):
    """Written out pair by pair."""
    policy = build_policy(config())
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, [(0, 3, 0), (0, 3, 1)], 3, 4, SPEC)
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    past = [p.detach().clone() for p in policy.parameters()]
    memory = Memory(behavior=tuple(past))
    shift(policy, 1)
    contrast = NegativeAware(beta=0.7, bound=2.0)
    total, alphas = 0.0, policy.tables.alpha
    steps = len(policy.timesteps)
    for sample in range(6):
        p, g = divmod(sample, 3)
        for step in range(steps):
            at = torch.tensor([step])
            clean = drawn.latents[p, g, -1][None]
            eps = torch.randn(clean.shape, generator=noise.generator(4, 9, sample, step, "forward"))
            alpha = float(alphas[step])
            noised = alpha**0.5 * clean + (1 - alpha) ** 0.5 * eps
            asked = (
                policy,
                noised,
                at,
                conditioning.rows(torch.tensor([p])),
                drawn.prompt_noise[p, g][None],
                SPEC,
            )
            with torch.no_grad():
                new = score_step(*asked).x0
                with memory.drawing(policy):
                    old = score_step(*asked).x0
            total += float(negative_aware(new, old, clean, advantages[p, g][None], 0.7, 2.0))
    stats = update(
        policy, torch.optim.SGD(policy.parameters(), lr=0.0), drawn.path(), advantages, conditioning,
        Objective(denoising=contrast, batch_size=5), (4, 9), SPEC, behavior=lambda: memory.drawing(policy),
    )  # fmt: skip
    assert stats.pairs == 6 * steps > 6 * int(policy.scored.sum())
    assert stats.loss == stats.surrogate == pytest.approx(total / stats.pairs, rel=1e-4)
    assert stats.approx_kl > 0 and stats.ratio_deviation == stats.clip_fraction == 0


def assert_batch_sizes_only_round(config, tmp_path, settings, **near):
    """Of two runs, their losses as ``near`` as that."""
    big = Trainer(config(**settings), tmp_path / "big").run()
    small = Trainer(
        config(**settings, sampling__batch_size=5, optimizer__batch_size=7), tmp_path / "small"
    ).run()
    for a, b in zip(lines(big), lines(small), strict=True):
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], abs=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], **near)
        assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=1e-3)


@pytest.mark.parametrize("epochs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batch_sizes_change_nothing_but_rounding(config, tmp_path, epochs):
    settings = NFT | {"iterations": 2, "optimizer__epochs": epochs, "objective__nft_decay": 0.5}
    assert_batch_sizes_only_round(config, tmp_path, settings, rel=1e-4)


def test_noise_is_new_in_every_epoch(config, tmp_path):
    settings = NFT | {"iterations": 1, "optimizer__updates": 1, "optimizer__learning_rate": 1e-12}
    once, twice = (
        lines(Trainer(config(**settings, optimizer__epochs=n), tmp_path / str(n)).run())[0] for n in (1, 2)
    )
    assert once["loss"] != pytest.approx(twice["loss"], rel=1e-5)


def test_what_draws_lags_behind(config, tmp_path):
    """After iteration i it keeps min(decay x i, decay_max) of itself; so after the first it is the trained policy."""
    run = Trainer(config(**LAGGING, iterations=4), tmp_path / "run").run()
    kept = [min(0.2 * i, 0.5) for i in range(4)]
    names = [name for name, _ in build_policy(config()).named_parameters()]
    behaviors = [[tensors(run, i, MEMORY)[f"behavior/{n:05d}"] for n in range(len(names))] for i in range(5)]
    for n, name in enumerate(names):
        assert torch.equal(behaviors[0][n], tensors(run, 0)[f"{name}/value"])
        for i, share in enumerate(kept):
            expected = share * behaviors[i][n] + (1 - share) * tensors(run, i + 1)[f"{name}/value"]
            torch.testing.assert_close(behaviors[i + 1][n], expected)
    assert not torch.equal(behaviors[3][0], tensors(run, 3)[f"{names[0]}/value"])


def test_samples_are_drawn_by_it(config, tmp_path):
    loop = build_loop(config(**LAGGING), tmp_path)
    loop.iterate()
    one = loop.iterate()
    loop = build_loop(config(**LAGGING), tmp_path)
    loop.iterate()
    shift(loop.policy, 0)  # what is trained changes, what draws does not
    assert torch.equal(loop.iterate().images, one.images)


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = Trainer(config(**LAGGING, iterations=4), tmp_path / "whole").run()
    for stop in (1, 3, 4):
        parts = Trainer(config(**LAGGING, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    for name in ("training.safetensors", MEMORY):
        a, b = (tensors(run, 4, name) for run in (whole, parts))
        assert_same(a, b)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore::driftrl.build.UnlikelySettingWarning")
def test_a_whole_network_resumes_exactly(config, tmp_path):
    """Its copies come back in the layout that its convolutions want, on which rounding depends."""
    settings = LAGGING | {"adapter__kind": "full", "optimizer__learning_rate": 1e-3}
    whole = Trainer(config(**settings, iterations=3), tmp_path / "whole").run()
    for stop in (1, 3):
        parts = Trainer(config(**settings, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    for name in ("training.safetensors", MEMORY):
        a, b = (tensors(run, 3, name) for run in (whole, parts))
        assert_same(a, b)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"model__dtype": "float16"}, {"model__gradient_checkpointing": True}], ids=str
)
def test_in_half_precision_and_with_checkpointing(config, tmp_path, changes):
    run = Trainer(config(**LAGGING, **changes, iterations=2), tmp_path / "run").run()
    plain = Trainer(config(**LAGGING, iterations=2), tmp_path / "plain").run()
    for a, b in zip(lines(run), lines(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05) and a["policy/grad_norm"] > 0


def test_a_skipped_iteration_leaves_what_draws(config, tmp_path):
    loop = build_loop(config(**LAGGING), tmp_path)
    loop.iterate()
    before = loop.memory
    loop.reward = lambda images, prompts: torch.full((len(images),), torch.nan)
    with pytest.warns(UserWarning, match="skipped"):
        loop.attempt()
    assert loop.memory is before


def test_with_a_divergence_only_steps_with_a_density_are_learned_from(config, tmp_path):
    pairs = {}
    for weight in (0.0, 0.1):
        loop = build_loop(config(**NFT, objective__kl_weight=weight, objective__timesteps=1.0), tmp_path)
        pairs[weight] = loop.iterate().metrics["policy/pairs"]
    assert pairs[0.0] * int(loop.policy.scored.sum()) == pairs[0.1] * len(loop.policy.timesteps)


@pytest.mark.filterwarnings("ignore::driftrl.trainer.RewardWarning")  # JPEG sizes are whole numbers
def test_it_needs_no_density(config, tmp_path):
    """A sampler without noise draws; with a KL there must be some."""
    run = Trainer(config(**NFT, iterations=1, sampling__eta=0.0), tmp_path / "run").run()
    assert lines(run)[0]["policy/grad_norm"] > 0
    for changes in ({"objective__kl_weight": 0.1}, {"objective__loss": "clipped_surrogate"}):
        with pytest.raises(InputError, match=r"sampling\.eta: expected more than 0"):
            config(**(NFT | {"sampling__eta": 0.0} | changes))


@pytest.mark.filterwarnings("ignore::driftrl.trainer.RewardWarning")  # JPEG sizes are whole numbers
def test_a_divergence_holds_it(config, tmp_path):
    runs = {
        weight: Trainer(
            config(**NFT, iterations=4, objective__kl_weight=weight), tmp_path / str(weight)
        ).run()
        for weight in (1e-9, 1e4)
    }
    free, held = (lines(run) for run in runs.values())
    assert held[1]["loss/kl"] > 0 and held[-1]["loss/kl"] < 0.5 * free[-1]["loss/kl"]
    for line in held:
        assert line["loss"] == pytest.approx(line["loss/surrogate"] + 1e4 * line["loss/kl"], rel=1e-4)


def test_what_does_not_go_together_is_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"optimizer\.one_pass: objective\.loss must be clipped_surrogate"):
        build_loop(config(**NFT, optimizer__updates=1, optimizer__one_pass=True), tmp_path)
    with pytest.raises(InputError, match=r"adapter\.shard: does not go with objective\.loss 'nft'"):
        config(**NFT, adapter__shard=True, adapter__kind="full")
    with pytest.raises(InputError, match=r"shaping\.potential: 'stepwise' is of the steps that were drawn"):
        config(**NFT, shaping__potential="stepwise")
    policy = build_policy(config())
    with pytest.raises(InputError, match="behavior does not fit"):
        Memory().restored({"behavior/00000": torch.zeros(1)}, policy)
    copies = {f"behavior/{i:05d}": p.detach() for i, p in enumerate(policy.parameters())}
    with pytest.raises(InputError, match=r"has a copy that draws, and objective\.loss asks for none"):
        Memory().restored(copies, policy)
    own = Memory(behavior=tuple(copies.values()))
    with pytest.raises(InputError, match=r"has no copy that draws, and objective\.loss asks for one"):
        own.restored({}, policy)
    assert len(own.restored(copies, policy).behavior) == len(copies)
    before = {key.replace("behavior", "drawer"): value for key, value in copies.items()}  # its earlier name
    assert len(own.restored(before, policy).behavior) == len(copies)
    assert Memory().after(0.0, Anchor(), policy, 0.5) == Memory()


@pytest.mark.parametrize("eta", [pytest.param(1.0, marks=pytest.mark.slow), 0.0])
@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
def test_learning_happens(config, tmp_path: Path, eta):
    """As with the clipped surrogate, and by a sampler without noise too."""
    settings = config(
        **(NFT | {"optimizer__learning_rate": 0.03}), iterations=25, adapter__rank=4, sampling__eta=eta,
        sampling__candidates=8, selection__keep=8, selection__strategy="all", sampling__guidance_scale=1.0,
        logging__checkpoint_every=100, objective__nft_decay_max=0.3,
    )  # fmt: skip
    assert_brighter(settings, tmp_path)
