"""Whether the noise on the prompt is too strong (design 2.6): some candidates drawn again without it, and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from driftrl.batches import BatchSize
from driftrl.conditioning import NoiseCost
from driftrl.rollout import rollout
from driftrl.types import Conditioning, Policy, Reward

CHECKED_EVERY, PROBES = 10, 8
"""Iterations between looks, the first one included, and the images drawn again: at least so many."""


class PromptNoiseWarning(UserWarning):
    """The noise on the prompt is so strong that images no longer match the prompt."""


def matches(
    policy: Policy,
    similarity: Reward,
    images: Tensor,
    conditioning: Conditioning,
    keys: Sequence[tuple[int, int, int]],
    prompt_set: Sequence[str],
    candidates: int,
    batch: BatchSize,
    first: Sequence[int],
    same_latent: bool = False,
) -> Tensor:
    """How well some candidates match their prompts with the noise on the prompt, without it, and how well they match
    another prompt then.

    Args:
        policy: what they were drawn from.
        similarity: of images and prompts.
        images: [p, N, 3, H, W], drawn with the noise.
        conditioning: p rows, clean.
        keys: p triples (seed, iteration, place in the prompt set), as in the rollout.
        prompt_set: all prompts.
        candidates: of each prompt, at most, that are drawn again.
        batch: candidates denoised at once.
        first: p numbers of the first candidate, as in the rollout.
        same_latent: likewise.

    Returns:
        float32 [n, 3], for `driftrl.conditioning.noise_cost`.
    """
    count, total = min(images.shape[1], candidates), len(prompt_set)
    again = rollout(
        policy, conditioning, keys, count, batch, first=first, keep_path=False, same_latent=same_latent
    )
    clean = again.images.flatten(0, 1)
    noised = images[:, :count].flatten(0, 1)
    places = [place for _, _, place in keys for _ in range(count)]
    own = [prompt_set[place] for place in places]
    other = [prompt_set[(place + total // 2) % total] for place in places]
    scores = [similarity(*asked) for asked in ((noised, own), (clean, own), (clean, other))]
    return torch.stack(scores, 1).float().to(policy.device)


def candidates_each(prompts: int) -> int:
    """Candidates of each of ``prompts`` prompts that are drawn again."""
    return math.ceil(PROBES / prompts)


def metrics(cost: NoiseCost | None) -> dict[str, float]:
    """What goes to metrics.jsonl; nothing in an iteration without a look."""
    if cost is None:
        return {}
    return {
        "prompt_noise/similarity": cost.similarity,
        "prompt_noise/similarity_without": cost.without,
        "prompt_noise/lost": cost.lost,
        "warning/prompt_noise": int(cost.falls),
    }
