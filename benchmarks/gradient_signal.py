"""Where the policy gradient's signal is: by denoising step, and by rule of selection. docs/log.md has the tables.

    python benchmarks/gradient_signal.py            # 45 prompts x 16 candidates, some minutes on one core

Every candidate's gradient of log pi is taken at each step, at the untouched base model. The gradient that a rule makes
of one half of the prompts is compared, by cosine, with what all candidates of the other half say (advantage R - mean R).
What is common to both is signal: it would raise the reward of other prompts too. 0 is noise.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.advantages import group_relative
from driftrl.build import build_encoder, build_policy, build_training_reward, parts_of
from driftrl.config import TrainConfig, load_config
from driftrl.diversity.functional import pairwise_distances
from driftrl.mixture import mixed
from driftrl.prompts import load_prompts
from driftrl.rollout import NO_NOISE, rollout, score_step
from driftrl.selection import select
from driftrl.shaping import group_diversity, intrinsic_advantage
from driftrl.transitions import gaussian

RULES = [("random", "selected", 0.0), ("contrast", "selected", 0.0), ("concentrated", "selected", 0.0),
         ("concentrated", "global", 0.0), ("nearest_neighbor", "selected", 0.0), ("nearest_neighbor", "global", 0.0),
         ("concentrated", "selected", 0.5), ("nearest_neighbor", "selected", 0.5)]  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """What the comparison needs of every candidate."""

    gradients: Tensor
    """float16 [P * N, steps, D]: of log pi, times 1000."""
    rewards: Tensor
    """[P, N]."""
    features: Tensor
    """[P, N, F]."""
    steps: list[int]


def draw(config: TrainConfig, count: int) -> Samples:
    """Draw candidates of the first ``count`` animals and differentiate each of their steps."""
    policy, texts = build_policy(config), load_prompts("animals")[:count]
    prompts, candidates = len(texts), config.sampling.candidates
    with torch.no_grad():
        conditioning = policy.encode(list(texts))
    drawn = rollout(policy, conditioning, [(5, 0, p) for p in range(prompts)], candidates, 32)
    flat = drawn.images.flatten(0, 1)
    scores = build_training_reward(config)(flat, [t for t in texts for _ in range(candidates)])
    rewards = mixed(scores.unflatten(0, (prompts, candidates)), parts_of(config.reward))
    features = build_encoder(config.shaping.encoder, policy.device, policy)(flat).unflatten(0, rewards.shape)
    steps = policy.scored.nonzero()[:, 0].tolist()
    adapted = [
        p for name, p in policy.named_parameters() if "lora_B" in name
    ]  # at first only these have gradients
    gradients = torch.zeros(
        prompts * candidates, len(steps), sum(p.numel() for p in adapted), dtype=torch.float16
    )
    latents = drawn.latents.flatten(0, 1)
    for i in range(prompts * candidates):
        rows = conditioning.rows(torch.tensor([i // candidates]))
        for k, step in enumerate(steps):
            move = score_step(policy, latents[i, step][None], torch.tensor([step]), rows, None, NO_NOISE)
            log_prob = gaussian.log_prob(latents[i, step + 1][None], move.mean, move.std).sum()
            parts = torch.autograd.grad(log_prob, adapted)
            gradients[i, k] = torch.cat([g.flatten() for g in parts]).mul_(1000).half()
        if i % (8 * candidates) == 0:
            print(f"{texts[i // candidates]} ...", flush=True)
    return Samples(gradients, rewards, features, steps)


def report(config: TrainConfig, samples: Samples) -> None:
    """Print both tables."""
    gradients, rewards, features, steps = samples.gradients, samples.rewards, samples.features, samples.steps
    prompts = len(rewards)
    halves = [torch.arange(prompts) % 2 == half for half in (0, 1)]

    def total(weights: Tensor, half: int) -> Tensor:
        """The gradient [steps, D] of weights [P, N] over one half of the prompts."""
        out = torch.zeros(gradients.shape[1:])
        own = torch.where(halves[half][:, None], weights, 0.0).flatten()
        for i in own.nonzero()[:, 0].tolist():
            out += own[i] * gradients[i].float()
        return out

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))

    reference = [total(rewards - rewards.mean(1, keepdim=True), half) for half in (0, 1)]
    count = len(steps)
    print("step           ", *[f"{s:>7}" for s in steps])
    print("cosine         ", *[f"{cosine(reference[0][k], reference[1][k]):7.3f}" for k in range(count)])
    print("norm           ", *[f"{float(reference[0][k].norm()):7.0f}" for k in range(count)])
    print(
        "cosine up to it",
        *[f"{cosine(reference[0][: k + 1], reference[1][: k + 1]):7.3f}" for k in range(count)],
    )
    first = max(1, round(config.objective.timesteps * count))
    print(
        f"\nrule, scale, lambda: kept reward's std, cosine over the first {first} steps, over all (mean of both halves)"
    )
    for strategy, scale, ratio in RULES:
        chosen = select(rewards, config.selection.keep, strategy, torch.Generator().manual_seed(0))
        kept = rewards.gather(1, chosen)
        advantages = group_relative(kept, scale, candidates=rewards)
        if ratio:
            own = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1]))
            advantages = advantages + ratio * intrinsic_advantage(
                group_diversity(pairwise_distances(own)), 1.0
            )
        weights = torch.zeros_like(rewards).scatter(1, chosen, advantages)
        made = [total(weights, half) for half in (0, 1)]
        few, all_ = (
            sum(cosine(made[h][:k], reference[1 - h][:k]) for h in (0, 1)) / 2 for k in (first, count)
        )
        std = float(kept.std(1, correction=0).mean())
        print(f"{strategy:17} {scale:9} {ratio:3.1f}   {std:5.2f}  {few:6.3f}  {all_:6.3f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=45)
    parser.add_argument("--set", action="append", default=[], help="key=value, as driftrl train has it")
    args = parser.parse_args()
    config = load_config(None, args.set)
    report(config, draw(config, args.prompts))


if __name__ == "__main__":
    main()
