"""Training by group preference: what is learned from, what it is weighed beside, and that it learns."""

import pytest
import torch

from driftrl import Trainer, noise
from driftrl.build import build_policy
from driftrl.checkpoint import MEMORY
from driftrl.checks import InputError
from driftrl.memory import Memory
from driftrl.objectives.group_preference import GroupPreference
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.update import Objective, update
from test_methods import assert_same, shift
from test_methods import metrics as lines
from test_nft import assert_batch_sizes_only_round, tensors
from test_training import assert_brighter

DGPO = {"objective__loss": "dgpo", "objective__timestep_choice": "random", "optimizer__learning_rate": 0.01}
SPEC = PromptNoise(0.3)


@pytest.mark.parametrize("predicted", ["velocity", "noise"])
def test_the_loss_is_dpo_s_of_groups_noised_alike(config, epsilon_folder, predicted):
    """Written out group by group, of a policy that has left the base model; the gradient too. Errors are the network's."""
    policy = build_policy(config(**{"model__path": str(epsilon_folder)} if predicted == "noise" else {}))
    shift(policy, 0)
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, [(0, 3, 0), (0, 3, 1)], 3, 4, SPEC)
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    beta, steps, total, plain = 30.0, len(policy.timesteps), 0.0, 0.0
    parameters = policy.parameters()
    for p in range(2):
        for step in range(steps):
            alpha, clean = float(policy.tables.alpha[step]), drawn.latents[p, :, -1]
            share, sigma = alpha**0.5, (1 - alpha) ** 0.5
            eps = torch.randn(clean[:1].shape, generator=noise.generator(4, 9, 3 * p, step, "forward"))
            asked = (
                policy,
                share * clean + sigma * eps,
                torch.full((3,), step),
                conditioning.rows(torch.full((3,), p)),
                drawn.prompt_noise[p],
                SPEC,
            )

            def error(asked=asked, clean=clean, eps=eps, share=share, sigma=sigma):
                x0 = score_step(*asked).x0
                noise_hat = (asked[1] - share * x0) / sigma
                off = noise_hat - eps
                if predicted == "velocity":
                    off = (share * noise_hat - sigma * x0) - (share * eps - sigma * clean)
                return off.square().mean((1, 2, 3))

            with torch.no_grad(), policy.reference():
                base = error()
            own = error()
            s = beta * (advantages[p] * (own - base)).mean()
            total = total - torch.nn.functional.logsigmoid(-s) / beta
            plain += float((torch.sigmoid(s) * advantages[p] * own).detach().sum())
    (total / (2 * steps)).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    for size in (100, 4):  # which cuts through groups
        stats = update(
            policy, torch.optim.SGD(parameters, lr=0.0), drawn.path(), advantages, conditioning,
            Objective(denoising=GroupPreference(beta, 1e9), batch_size=size, max_grad_norm=1e9), (4, 9), SPEC,
        )  # fmt: skip
        assert stats.pairs == 6 * steps
        if predicted == "velocity":  # whose last step has no density
            assert stats.pairs > 6 * int(policy.scored.sum())
        assert stats.loss == pytest.approx(plain / stats.pairs, rel=1e-4, abs=1e-6)
        assert stats.grad_norm == pytest.approx(float(norm), rel=1e-3)
        assert stats.approx_kl == stats.ratio_deviation == stats.clip_fraction == 0


def test_a_group_is_in_one_optimiser_step_and_moves_with_it(config):
    """Later steps weigh groups by what the policy has become; with a small clip range they learn less."""
    policy = build_policy(config())
    shift(policy, 0)
    conditioning = policy.encode(["a cat", "a dog"])
    drawn = rollout(policy, conditioning, [(0, 3, 0), (0, 3, 1)], 3, 4, SPEC)
    advantages = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    before = tuple(p.detach().clone() for p in policy.parameters())
    memory, seen = Memory(behavior=before), []

    class Watched(GroupPreference):
        def weights(self, error, reference, given):
            found = super().weights(error, reference, given)
            seen.append((error != 0, found))
            return found

    def learn(clip_range):
        del seen[:]
        with torch.no_grad():
            for parameter, value in zip(policy.parameters(), before, strict=True):
                parameter.copy_(value)
        return update(
            policy, torch.optim.SGD(policy.parameters(), lr=0.05), drawn.path(), advantages, conditioning,
            Objective(denoising=Watched(clip_range=clip_range), batch_size=5, updates=3), (4, 9), SPEC,
            behavior=lambda: memory.drawing(policy),
        )  # fmt: skip

    free = learn(1e9)
    assert len(seen) == 3
    whole = torch.stack([own for own, _ in seen])  # [steps of the optimiser, P * T, G]
    assert torch.equal(whole.any(2), whole.all(2))
    assert torch.equal(whole.all(2).sum(0), torch.ones(whole.shape[1], dtype=torch.long))
    assert learn(1e-6).clip_fraction > free.clip_fraction == 0


def test_batch_sizes_change_nothing_but_rounding(config, tmp_path):
    settings = DGPO | {"iterations": 2, "optimizer__epochs": 2}
    assert_batch_sizes_only_round(config, tmp_path, settings, rel=1e-3, abs=1e-5)


def test_resumed_equals_uninterrupted(config, tmp_path):
    whole = Trainer(config(**DGPO, iterations=3), tmp_path / "whole").run()
    for stop in (1, 3):
        parts = Trainer(config(**DGPO, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    for name in ("training.safetensors", MEMORY):
        assert_same(*(tensors(run, 3, name) for run in (whole, parts)))
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_it_is_weighed_beside_a_reference_that_may_move(config, tmp_path):
    """At the reference every group has 1/2: with one that moves along, later iterations begin there again."""
    still, moving = (
        lines(Trainer(config(**DGPO, iterations=3, objective__reference_every=every), tmp_path / str(every)).run())
        for every in (None, 1)
    )  # fmt: skip
    assert still[0]["loss"] == moving[0]["loss"]
    assert still[2]["loss"] != moving[2]["loss"]


@pytest.mark.filterwarnings("ignore::driftrl.trainer.RewardWarning")  # JPEG sizes are whole numbers
def test_it_needs_no_density(config, tmp_path):
    run = Trainer(config(**DGPO, iterations=1, sampling__eta=0.0), tmp_path / "run").run()
    assert lines(run)[0]["policy/grad_norm"] > 0
    with pytest.raises(InputError, match=r"sampling\.eta: expected more than 0"):
        config(**DGPO, sampling__eta=0.0, objective__kl_weight=0.1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter__shard": True, "adapter__kind": "full"}, r"adapter\.shard: does not go with objective\.loss 'dgpo'"),
        ({"shaping__potential": "stepwise"}, r"stepwise' is of the steps that were drawn, and objective\.loss 'dgpo'"),
        ({"objective__trust_region": "normalized"}, r"objective\.loss 'dgpo' is held by objective\.dgpo_clip_range"),
        ({"objective__dgpo_beta": 0.0}, r"objective\.dgpo_beta"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(config, settings, says):
    with pytest.raises(InputError, match=says):
        config(**DGPO, **settings)


@pytest.mark.slow  # that NFT's learns, of which this is a variant, is tried at every change
@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
def test_learning_happens(config, tmp_path):
    settings = config(
        **(DGPO | {"optimizer__learning_rate": 0.003}), iterations=25, adapter__rank=4,
        sampling__candidates=8, selection__keep=8, selection__strategy="all", sampling__guidance_scale=1.0,
        logging__checkpoint_every=100,
    )  # fmt: skip
    assert_brighter(settings, tmp_path)
