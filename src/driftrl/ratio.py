"""How far the ratio of an untouched policy is from 1: what replay owes to rounding, measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from driftrl.rollout import PromptNoise, rollout
from driftrl.types import Policy
from driftrl.update import Objective, update


@dataclass(frozen=True)
class Replayed:
    """What a replay of an untouched policy gave."""

    log_ratio: float
    """The largest |log-ratio| over all candidates and scored steps, as an update compares them."""
    from_rollout: float
    """The largest change where the update scored the samples again in its own batches; 0 where it does not."""
    pairs: int
    """(sample, step) pairs that were compared."""


def replay_untouched(
    policy: Policy,
    prompts: Sequence[str] = ("a cat", "a dog"),
    candidates: int = 4,
    *,
    rescore: bool,
    eta: float = 0.05,
    draw_batch: int = 5,
    update_batch: int = 3,
) -> Replayed:
    """Draw candidates, then run an update that changes nothing over every scored step.

    Batches of the two differ in size, and the update's last one is smaller still: where a network's rounding depends on
    its batch, it shows.

    Args:
        policy: with trainable weights; they stay as they are.
        prompts: P of them.
        candidates: of each.
        rescore: as in training: whether the update scores the samples again first, which half precision needs.
        eta: strength of the prompt noise.
        draw_batch: candidates denoised at once.
        update_batch: pairs replayed at once.
    """
    noise = PromptNoise(eta)
    with torch.no_grad():
        conditioning = policy.encode(list(prompts))
    keys = [(0, 0, place) for place in range(len(prompts))]
    drawn = rollout(policy, conditioning, keys, candidates, draw_batch, noise)
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    advantages = torch.linspace(-1.0, 1.0, candidates, device=policy.device).repeat(len(prompts), 1)
    objective = Objective(batch_size=update_batch, rescore=rescore)
    stats = update(policy, still, drawn, advantages, conditioning, objective, (0, 0), noise)
    # |ratio - 1| is |log-ratio| but for its square.
    return Replayed(stats.ratio_deviation, stats.rescored_by, stats.pairs)
