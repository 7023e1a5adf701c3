"""Training by advantage weighted matching: what is learned from, what it is compared with, and that it learns."""

import pytest
import torch

from driftrl import Trainer, noise
from driftrl.build import build_loop, build_policy
from driftrl.checkpoint import MEMORY
from driftrl.checks import InputError
from driftrl.memory import Memory
from driftrl.objectives.advantage_weighted import AdvantageWeighted, advantage_weighted
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.update import Objective, update
from test_methods import assert_same, shift
from test_methods import metrics as lines
from test_nft import assert_batch_sizes_only_round, tensors
from test_training import assert_brighter

AWM = {"objective__loss": "awm", "objective__timestep_choice": "random", "optimizer__learning_rate": 0.01}
SPEC = PromptNoise(0.3)


def test_the_loss_is_that_of_drawn_images_noised_anew(config):
    """Written out pair by pair."""
    policy = build_policy(config())
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, [(0, 3, 0), (0, 3, 1)], 3, 4, SPEC)
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    settings, steps, total = AdvantageWeighted(0.5, 3.0, 0.2), len(policy.timesteps), 0.0
    for sample in range(6):
        p, g = divmod(sample, 3)
        for step in range(steps):
            clean = drawn.latents[p, g, -1][None]
            eps = torch.randn(clean.shape, generator=noise.generator(4, 9, sample, step, "forward"))
            alpha = float(policy.tables.alpha[step])
            asked = (
                policy,
                alpha**0.5 * clean + (1 - alpha) ** 0.5 * eps,
                torch.tensor([step]),
                conditioning.rows(torch.tensor([p])),
                drawn.prompt_noise[p, g][None],
                SPEC,
            )
            with torch.no_grad():
                x0 = score_step(*asked).x0
            sigma = torch.tensor([(1 - alpha) ** 0.5])
            total += float(
                advantage_weighted(x0, x0, clean, sigma, advantages[p, g][None], 0.5, 3.0, 0.2).loss
            )
    stats = update(
        policy, torch.optim.SGD(policy.parameters(), lr=0.0), drawn.path(), advantages, conditioning,
        Objective(denoising=settings, batch_size=5), (4, 9), SPEC,
    )  # fmt: skip
    assert stats.pairs == 6 * steps > 6 * int(policy.scored.sum())
    assert stats.loss == stats.surrogate == pytest.approx(total / stats.pairs, rel=1e-4, abs=1e-6)
    assert stats.approx_kl == stats.ratio_deviation == stats.clip_fraction == 0


def test_later_steps_are_compared_with_the_policy_that_drew(config):
    """Which the first optimiser step need not ask: it still is that policy."""
    policy = build_policy(config())
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, [(0, 3, 0), (0, 3, 1)], 3, 4, SPEC)
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    memory = Memory(behavior=tuple(p.detach().clone() for p in policy.parameters()))
    asked = []

    def behavior():
        asked.append(1)
        return memory.drawing(policy)

    def learn(rate, updates):
        del asked[:]
        return update(
            policy, torch.optim.SGD(policy.parameters(), lr=rate), drawn.path(), advantages, conditioning,
            Objective(denoising=AdvantageWeighted(), batch_size=100, updates=updates), (4, 9), SPEC,
            behavior=behavior,
        )  # fmt: skip

    assert learn(0.0, 1).approx_kl == 0 and len(asked) == 0
    assert learn(0.1, 3).approx_kl > 0 and len(asked) == 2


def test_an_average_holds_every_step_and_is_carried_on(config, tmp_path):
    """The proximal term's gradient is 0 at the policy that drew, and not at an average that lags behind; the ratio's is as ever."""
    policy = build_policy(config())
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, [(0, 3, 0), (0, 3, 1)], 3, 4, SPEC)
    memory = Memory(anchor=tuple(p.detach() + 0.1 for p in policy.parameters()))

    def learn(**settings):
        return update(
            policy, torch.optim.SGD(policy.parameters(), lr=0.0), drawn.path(), torch.zeros(2, 3), conditioning,
            Objective(denoising=AdvantageWeighted(**settings), max_grad_norm=1e9), (4, 9), SPEC,
            anchor=lambda: memory.anchoring(policy),
        )  # fmt: skip

    assert learn().grad_norm == 0 == learn().loss
    held = learn(decay=0.3)
    assert held.grad_norm > 0 and held.loss > 0 and held.approx_kl == 0
    assert learn(decay=0.3, proximal=10.0).loss == pytest.approx(2 * held.loss)

    settings = AWM | {"objective__awm_decay": 0.25}
    whole = Trainer(config(**settings, iterations=3), tmp_path / "whole").run()
    for stop in (1, 3):
        parts = Trainer(config(**settings, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    assert_same(*(tensors(run, 3, MEMORY) for run in (whole, parts)))
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    names = [key.removesuffix("/value") for key in tensors(whole, 0) if key.endswith("/value")]
    order = [name for name, _ in build_policy(config()).named_parameters()]
    assert sorted(names) == sorted(order)
    for n, name in enumerate(order):
        expected = tensors(whole, 0)[f"{name}/value"]
        for i in (1, 2, 3):
            expected = 0.25 * expected + 0.75 * tensors(whole, i)[f"{name}/value"]
        torch.testing.assert_close(tensors(whole, 3, MEMORY)[f"anchor/{n:05d}"], expected)
    with pytest.raises(
        InputError, match=r"an average that its loss is held to, and objective\.awm_decay asks for none"
    ):
        Memory(behavior=memory.anchor).restored(tensors(whole, 3, MEMORY), policy)


def test_batch_sizes_change_nothing_but_rounding(config, tmp_path):
    """Of a loss that is near 0, for advantages are around 0."""
    settings = AWM | {"iterations": 2, "optimizer__epochs": 2}
    assert_batch_sizes_only_round(config, tmp_path, settings, rel=1e-3, abs=1e-5)


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = Trainer(config(**AWM, iterations=3), tmp_path / "whole").run()
    for stop in (1, 3):
        parts = Trainer(config(**AWM, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    for name in ("training.safetensors", MEMORY):
        assert_same(*(tensors(run, 3, name) for run in (whole, parts)))
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_samples_are_drawn_by_the_trained_policy(config, tmp_path):
    loop = build_loop(config(**AWM), tmp_path)
    loop.iterate()
    for drawn, trained in zip(loop.memory.behavior, loop.policy.parameters(), strict=True):
        assert torch.equal(drawn, trained.detach())
    shift(loop.policy, 0)
    assert not torch.equal(loop.memory.behavior[0], next(iter(loop.policy.parameters())).detach())


def test_the_proximal_term_holds_an_iterations_later_steps(config, tmp_path):
    drift = {}
    for weight in (0.0, 1e3):
        settings = AWM | {"iterations": 2, "objective__awm_proximal": weight, "optimizer__updates": 4}
        drift[weight] = lines(Trainer(config(**settings), tmp_path / str(weight)).run())[-1][
            "policy/approx_kl"
        ]
    assert 0 < drift[1e3] < 0.7 * drift[0.0]


@pytest.mark.filterwarnings("ignore::driftrl.trainer.RewardWarning")  # JPEG sizes are whole numbers
def test_it_needs_no_density(config, tmp_path):
    """A sampler without noise draws; with a KL there must be some."""
    run = Trainer(config(**AWM, iterations=1, sampling__eta=0.0), tmp_path / "run").run()
    assert lines(run)[0]["policy/grad_norm"] > 0
    with pytest.raises(InputError, match=r"sampling\.eta: expected more than 0"):
        config(**AWM, sampling__eta=0.0, objective__kl_weight=0.1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter__shard": True, "adapter__kind": "full"}, r"adapter\.shard: does not go with objective\.loss 'awm'"),
        ({"shaping__potential": "stepwise"}, r"stepwise' is of the steps that were drawn, and objective\.loss 'awm'"),
        ({"objective__trust_region": "normalized"}, r"objective\.loss 'awm' is held by objective\.awm_proximal"),
        ({"objective__awm_power": 2.0}, r"objective\.awm_power"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(config, settings, says):
    with pytest.raises(InputError, match=says):
        config(**AWM, **settings)


@pytest.mark.slow  # that NFT's learns, of which this is a variant, is tried at every change
@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
def test_learning_happens(config, tmp_path):
    settings = config(
        **(AWM | {"optimizer__learning_rate": 0.03}), iterations=25, adapter__rank=4,
        sampling__candidates=8, selection__keep=8, selection__strategy="all", sampling__guidance_scale=1.0,
        logging__checkpoint_every=100,
    )  # fmt: skip
    assert_brighter(settings, tmp_path)
