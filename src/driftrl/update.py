"""Learn from a rollout: replay its transitions, score them, follow the clipped surrogate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from driftrl import noise
from driftrl.checks import NotFiniteError
from driftrl.distributed import ALONE, Team
from driftrl.objectives.clipped_surrogate import clipped_surrogate
from driftrl.objectives.kl import divergence, step_weights
from driftrl.rollout import NO_NOISE, PromptNoise, score_step
from driftrl.transitions import gaussian
from driftrl.types import Conditioning, Policy, Rollout, Transition, UpdateStats


@dataclass(frozen=True)
class Objective:
    """What one update minimises and in how many steps (design 2.5)."""

    clip_range: float = 1e-4
    kl_weight: float = 0.0
    timesteps: float = 1.0
    timestep_choice: str = "random"
    updates: int = 1
    epochs: int = 1
    batch_size: int = 96
    max_grad_norm: float = 1.0
    rescore: bool = False
    """Score the samples again in the update's own batches before the policy moves: in half precision what a
    network computes depends on its batch, by more than the clip range allows."""
    loss_scale: float = 1.0
    """Power of two that keeps half-precision gradients from vanishing; divided out before they are used."""
    divergence: str = "kl"
    """Its kind, and what it weighs at each step: `driftrl.objectives.kl`."""
    kl_schedule: str = "uniform"


@dataclass(frozen=True)
class Pairs:
    """Every (sample, timestep) pair of a rollout that may be trained on, flattened to [B]."""

    sample: Tensor
    """int64 [B]: p * G + g."""
    step: Tensor
    """int64 [B]."""


def training_pairs(
    scored: Tensor, samples: int, share: float, seed: int, iteration: int, choice: str = "random"
) -> Pairs:
    """Choose the pairs to train on: of each sample the same number of scored steps, in a shuffled order.

    Args:
        scored: bool [T].
        samples: how many samples there are, P * G.
        share: of the scored steps, in (0, 1]; at least one step is taken.
        seed: of the run.
        iteration: with the seed, the key of the choice.
        choice: "noisiest" takes the first scored steps, "random" others for each sample.
    """
    steps = scored.nonzero()[:, 0].cpu()
    count = max(1, round(share * len(steps)))
    draw = noise.generator(seed, iteration, 0, 0, "pairs")
    if choice == "noisiest":
        chosen = steps[:count].repeat(samples, 1)
    else:
        chosen = torch.stack(
            [steps[torch.randperm(len(steps), generator=draw)[:count]] for _ in range(samples)]
        )
    order = torch.randperm(samples * count, generator=draw)
    sample = torch.arange(samples).repeat_interleave(count)
    return Pairs(sample[order].to(scored.device), chosen.flatten()[order].to(scored.device))


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Tensor,
    conditioning: Conditioning,
    objective: Objective,
    key: tuple[int, int],
    prompt_noise: PromptNoise = NO_NOISE,
    names: Sequence[str] | None = None,
    gate: Tensor | None = None,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    team: Team = ALONE,
) -> UpdateStats:
    """Take `objective.updates` optimiser steps on a rollout.

    The loss of a step is the mean over its pairs of the clipped surrogate plus ``kl_weight`` times the
    closed-form divergence from the reference, weighed by the gate and the schedule. It is summed up over
    micro-batches, so their size changes nothing but rounding, and over processes: each replays the pairs of its own
    prompts, then the gradients are added up, once an optimiser step.

    Args:
        policy: what is trained.
        optimizer: over ``policy.parameters()``.
        rollout: P x G kept candidates; with a team, those of this process's prompts.
        advantages: [P, G], or [P, G, T] with one for each denoising step; those of all prompts, as are names and gate.
        conditioning: P rows, clean, as in ``rollout``.
        objective: the loss and its settings.
        key: (seed, iteration).
        prompt_noise: as it was in the rollout.
        names: of the P prompts, for messages.
        gate: [P, G], what the divergence weighs for each sample; None is 1.
        reference: a context within which the policy is the reference; by default ``policy.reference``.
        team: the processes that share the prompts out.

    Returns:
        Averages over all pairs.

    Raises:
        NotFiniteError: before the optimiser steps, if the loss or the gradient is not finite; it names the prompt and
            the denoising step where it can.
    """
    prompts, group = rollout.log_probs.shape[:2]
    mine = team.share(len(advantages))
    first = mine.start * group  # of the samples in ``rollout``, which are numbered from 0 here
    own = advantages[mine]
    per_step = (own.unsqueeze(-1).expand_as(rollout.log_probs) if own.dim() == 2 else own).flatten(0, 1)
    latents, old = rollout.latents.flatten(0, 1), rollout.log_probs.flatten(0, 1)
    eps = None if rollout.prompt_noise is None else rollout.prompt_noise.flatten(0, 1)
    prompt_of = torch.arange(prompts, device=old.device).repeat_interleave(group)
    parameters, device = policy.parameters(), old.device
    reference = reference or policy.reference
    held = _held(step_weights(policy.scored, objective.kl_schedule), old, gate, mine)
    # Sums over pairs: loss, surrogate, kl and its weight, approx_kl, clip_fraction; on the device until the end.
    sums, norms = torch.zeros(6, device=device), []
    deviation = torch.zeros((), device=device)
    bad = torch.full((), -1, device=device)  # first pair whose loss is not finite: sample * steps + step

    def replay(sample: Tensor, step: Tensor) -> tuple[Transition, Tensor]:
        own = None if eps is None else eps[sample]
        move = score_step(
            policy, latents[sample, step], step, conditioning.rows(prompt_of[sample]), own, prompt_noise
        )
        return move, gaussian.log_prob(latents[sample, step + 1], move.mean, move.std)

    passes = _passes(policy.scored, len(advantages) * group, objective, key, range(first, first + len(old)))
    before = [old] * len(passes)
    if objective.rescore:
        before = [_rescored(old, replay, parts, per_step, objective) for parts in passes]
    for epoch, parts in enumerate(passes):
        for number, (pairs, count) in enumerate(parts):
            optimizer.zero_grad(set_to_none=True)
            for sample, step in _micro_batches(pairs, per_step, objective):
                if objective.kl_weight > 0:  # first, for the policy's gradient wants its own weights in place
                    with torch.no_grad(), reference():
                        anchor, _ = replay(sample, step)
                move, log_prob = replay(sample, step)
                surrogate = clipped_surrogate(
                    log_prob, before[epoch][sample, step], per_step[sample, step], objective.clip_range
                )
                weight, kl = held[sample, step], torch.zeros_like(log_prob)
                if objective.kl_weight > 0:
                    kl = weight * divergence(objective.divergence, move.mean, anchor.mean, move.std)
                loss = surrogate.loss + objective.kl_weight * kl
                bad = _first_bad(bad, loss.detach(), (first + sample) * old.shape[1] + step)
                (loss.sum() * (objective.loss_scale / count)).backward()
                with torch.no_grad():
                    share = len(sample)
                    sums += torch.stack([loss.sum(), surrogate.loss.sum(), kl.sum(), weight.sum(),
                                         share * surrogate.approx_kl, share * surrogate.clip_fraction])  # fmt: skip
                    if number == 0 and epoch == 0:
                        deviation = torch.maximum(
                            deviation, ((log_prob - before[epoch][sample, step]).exp() - 1).abs().max()
                        )
            team.add(_gradients(parameters, objective.loss_scale))
            norm = nn.utils.clip_grad_norm_(parameters, objective.max_grad_norm)
            if not bool(torch.isfinite(norm)):
                optimizer.zero_grad(set_to_none=True)
                raise NotFiniteError(_where(int(team.largest(bad)), old.shape[1], group, names))
            optimizer.step()
            norms.append(norm.detach())
    optimizer.zero_grad(set_to_none=True)
    total = sum(count for parts in passes for _, count in parts)
    moved = torch.stack([(scores - old).abs().max() for scores in before]).max()
    return _stats(sums, torch.stack([deviation, moved]), norms, total, team)


def _stats(sums: Tensor, most: Tensor, norms: list[Tensor], total: int, team: Team) -> UpdateStats:
    """Sums over this process's pairs and largest values as figures of all ``total`` pairs."""
    team.add([sums])
    deviation, rescored_by = team.largest(most).tolist()
    loss, surrogate, kl, weighed, approx_kl, clipped = (sums / max(1, total)).tolist()
    return UpdateStats(
        loss,
        surrogate,
        kl / max(weighed, 1e-12),
        approx_kl,
        clipped,
        deviation,
        rescored_by,
        float(torch.stack(norms).mean()),
        total,
    )


def _passes(
    scored: Tensor, samples: int, objective: Objective, key: tuple[int, int], mine: range
) -> list[list[tuple[Pairs, int]]]:
    """For each pass, and each optimiser step in it, the pairs of the samples ``mine``, which are numbered anew, from 0;
    and how many pairs the step has of all ``samples``. They are drawn for all, so that processes agree on the steps.
    """
    passes = []
    for epoch in range(objective.epochs):
        everything = training_pairs(
            scored, samples, objective.timesteps, key[0], key[1] + epoch * 2**32, objective.timestep_choice
        )
        chunks = everything.sample.chunk(objective.updates), everything.step.chunk(objective.updates)
        parts = []
        for sample, step in zip(*chunks, strict=True):
            own = (sample >= mine.start) & (sample < mine.stop)
            parts.append((Pairs(sample[own] - mine.start, step[own]), len(sample)))
        passes.append(parts)
    return passes


def _held(steps: Tensor, like: Tensor, gate: Tensor | None, mine: slice) -> Tensor:
    """What the divergence weighs for each sample and step [P * G, T] of the prompts ``mine``."""
    return steps.expand_as(like) if gate is None else steps * gate[mine].flatten()[:, None]


def _gradients(parameters: list[nn.Parameter], loss_scale: float) -> list[Tensor]:
    """Those of the loss itself, zero where there is none, so that the optimiser treats every step alike."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad /= loss_scale  # a power of two: exact
        gradients.append(parameter.grad)
    return gradients


def _rescored(
    old: Tensor,
    replay: Callable[[Tensor, Tensor], tuple[Transition, Tensor]],
    parts: Sequence[tuple[Pairs, int]],
    per_step: Tensor,
    objective: Objective,
) -> Tensor:
    """Log-probabilities like ``old`` [samples, T], those of one pass scored in its very micro-batches."""
    before = old.clone()
    with torch.no_grad():
        for pairs, _ in parts:
            for sample, step in _micro_batches(pairs, per_step, objective):
                before[sample, step] = replay(sample, step)[1]
    return before


def _micro_batches(pairs: Pairs, per_step: Tensor, objective: Objective) -> list[tuple[Tensor, Tensor]]:
    """Samples and steps that are replayed together, for one optimiser step."""
    used = torch.arange(len(pairs.sample), device=pairs.sample.device)
    if objective.kl_weight == 0:  # without KL a pair of zero advantage has no gradient: leave it out
        used = used[per_step[pairs.sample, pairs.step] != 0]
    if not len(used):
        return []
    return [(pairs.sample[micro], pairs.step[micro]) for micro in used.split(objective.batch_size)]


def _first_bad(bad: Tensor, loss: Tensor, pair: Tensor) -> Tensor:
    """The first pair with a loss that is not finite, or -1, without asking the device."""
    wrong = ~torch.isfinite(loss)
    return torch.where((bad < 0) & wrong.any(), pair[wrong.int().argmax()], bad)


def _where(pair: int, steps: int, group: int, names: Sequence[str] | None) -> str:
    if pair < 0:
        return "the gradient is not finite, though the loss is"
    row = pair // steps // group
    named = f"prompt {row}" if names is None else repr(names[row])
    return f"the loss is not finite for {named}, denoising step {pair % steps}"
