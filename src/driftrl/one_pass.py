"""Rollout and update in one pass over the network, where the policy takes a single step on what it has drawn.

Until that step the policy is the one that drew the samples: the ratio r is 1, where the clipped surrogate (design 2.5) has the
gradient of -A r, and r that of log p. So the step's gradient is

    -1/|B| sum over samples of A_i g_i,    g_i = sum over the trained steps of grad log p(x_{t-1} | x_t),

and g_i does not depend on rewards: it can be taken while sample i is drawn, from the forward pass that draws it. The update
then needs no pass at all; replay needs one forward and one backward pass for every pair, and in half precision another
forward pass. What it costs: gradients of candidates that are dropped afterwards, and memory for each sample's g_i.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftrl.checks import NotFiniteError
from driftrl.distributed import ALONE, Team
from driftrl.rollout import ScoreGradients
from driftrl.types import Policy, Rollout, UpdateStats
from driftrl.update import Objective, noisiest_steps, where

LARGEST = 2**30
"""Bytes of gradients that `pays` allows: those of 300 candidates with Stable Diffusion 1.5 and a LoRA of rank 4 on attention."""


def refusal(objective: Objective, potential: str) -> str | None:
    """Why the step cannot be taken so, or None.

    Args:
        objective: of the update.
        potential: `Shaping.potential`: stepwise advantages belong to single steps, whose gradients are summed up here.
    """
    elsewhere = objective.timesteps < 1 and objective.timestep_choice != "noisiest"
    reasons = {
        "optimizer.updates and optimizer.epochs must be 1: later steps are taken by another policy": (
            objective.updates > 1 or objective.epochs > 1
        ),
        "objective.loss must be clipped_surrogate: the others learn from other latents than those that are drawn": (
            objective.denoising is not None
        ),
        "objective.loss must be clipped_surrogate: the others follow the gradient of the reward": (
            objective.pathwise is not None
        ),
        "objective.trust_region must be ratio: the others ask for the means of what was drawn": (
            objective.asks_for_means
        ),
        "objective.kl_weight must be 0: the divergence asks the reference too": objective.kl_weight > 0,
        "objective.timestep_choice must be noisiest: all samples are trained on the same steps": elsewhere,
        "shaping.potential must be terminal": potential != "terminal",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def pays(candidates: int, keep: int, rescored: bool, held: int = 0) -> bool:
    """Whether it takes fewer passes than replay: backward for every candidate, against forward (twice where samples
    would be scored again) and backward for the kept ones; and not more than `LARGEST` bytes of memory. A backward pass
    counts as much as a forward pass: it has the gradients of activations to compute, and none of frozen weights.

    Args:
        candidates: N of each prompt.
        keep: G of them.
        rescored: whether replay scores samples again before the update.
        held: numbers in the gradients of all candidates of a process.

    Example:
        >>> from driftrl.one_pass import pays
        >>> pays(8, 8, rescored=False), pays(16, 8, rescored=False), pays(16, 8, rescored=True)
        (True, False, True)
    """
    return candidates < keep * (3 if rescored else 2) and 4 * held <= LARGEST


def score_gradients(scored: Tensor, objective: Objective, samples: int) -> ScoreGradients:
    """What a rollout is to take gradients of, of which ``samples`` in all are kept."""
    steps = noisiest_steps(scored, objective.timesteps).tolist()
    return ScoreGradients(tuple(steps), objective.loss_scale / (samples * sum(steps)))


def update_from(
    rollout: Rollout,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    advantages: Tensor,
    objective: Objective,
    names: list[str] | None = None,
    team: Team = ALONE,
) -> UpdateStats:
    """Take the optimiser step of `driftrl.update.update` from the gradients that a rollout took on its way.

    Args:
        rollout: P x G kept candidates; with a team, those of this process's prompts.
        policy: what is trained, unchanged since the rollout.
        optimizer: over ``policy.parameters()``.
        advantages: [P, G], of all prompts.
        objective: as for `score_gradients`.
        names: of the P prompts, for messages.
        team: the processes that share the prompts out.

    Raises:
        NotFiniteError: before the optimiser steps, if the gradient is not finite; it names the prompt and the denoising
            step where it can.
    """
    assert rollout.gradients is not None, "the rollout took no gradients"
    parameters, group, steps = policy.parameters(), *rollout.log_probs.shape[1:]
    mine = team.share(len(advantages))
    weights = -advantages[mine].flatten() / objective.loss_scale  # a power of two: exact
    parts = (weights @ rollout.gradients.flatten(0, 1)).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    team.add([p.grad for p in parameters if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(parameters, objective.max_grad_norm)
    if not bool(torch.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        wrong = (~torch.isfinite(rollout.log_probs)).flatten().nonzero()
        first = mine.start * group * steps
        bad = torch.tensor(first + int(wrong[0]) if len(wrong) else -1, device=norm.device)
        raise NotFiniteError(where(int(team.largest(bad)), steps, group, names))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    count = int(noisiest_steps(policy.scored, objective.timesteps).sum())
    loss = float(-advantages.mean())
    return UpdateStats(loss, loss, 0.0, 0.0, 0.0, 0.0, 0.0, float(norm), advantages.numel() * count)
