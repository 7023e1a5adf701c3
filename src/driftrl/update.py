"""Learn from a rollout: replay its transitions, score them, follow the clipped surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from driftrl import noise
from driftrl.batches import BatchSize
from driftrl.checks import NotFiniteError
from driftrl.distributed import ALONE, Team, in_parts, whole
from driftrl.objectives.kl import divergence, step_weights
from driftrl.objectives.pathwise import PathwiseLoss
from driftrl.objectives.trust_region import time_weights
from driftrl.pathwise import Pathwise, carried_back
from driftrl.rollout import NO_NOISE, PromptNoise
from driftrl.terms import Denoising, DenoisingLoss, Drawn, Others, Replay, Surrogate, Term, Terms
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
    """Score the samples again in the update's own batches, and as the update does, before the policy moves: in half
    precision what a network computes depends on its batch, by more than the clip range allows; compiled, also on
    whether there are gradients."""
    loss_scale: float = 1.0
    """Power of two that keeps half-precision gradients from vanishing; divided out before they are used."""
    divergence: str = "kl"
    """Its kind, and what it weighs at each step: `driftrl.objectives.kl`."""
    kl_schedule: str = "uniform"
    denoising: DenoisingLoss | None = None
    """A loss of drawn images noised anew, in place of the clipped surrogate."""
    pathwise: PathwiseLoss | None = None
    """One that follows the gradient of the reward along the path that was drawn, in its place."""
    trust_region: str = "ratio"
    """What keeps a step near the policy that drew: the clipped ratio, or, of `driftrl.objectives.trust_region`, the ``normalized``
    one or the ``divergence``."""
    max_kl: float = 1e-5
    """Of ``divergence``: how far it may go."""

    @property
    def asks_for_means(self) -> bool:
        """Whether the means of what drew are wanted beside its log-probabilities."""
        return self.trust_region != "ratio" and self.denoising is None and self.pathwise is None

    def trainable(self, scored: Tensor) -> Tensor:
        """Which of the denoising steps [T] pairs are of: those with a density, where one is asked for."""
        if self.pathwise is not None:
            return self.pathwise.learned(scored)
        return scored if self.denoising is None or self.kl_weight > 0 else torch.ones_like(scored)

    def kept(self, iteration: int) -> float:
        """The share of itself that what draws keeps after ``iteration``, where it is no longer the policy itself."""
        return 0.0 if self.denoising is None else self.denoising.kept(iteration)

    def followed(self, scored: Tensor) -> Tensor:
        """Which of the denoising steps [T] a pathwise loss may be asked at: what adjoints are kept for."""
        learned = self.trainable(scored)
        return noisiest_steps(learned, self.timesteps) if self.timestep_choice == "noisiest" else learned

    @property
    def in_groups(self) -> bool:
        """Whether the kept samples of a prompt are learned from together, at the same steps."""
        return self.denoising is not None and self.denoising.in_groups

    @property
    def anchor_kept(self) -> float:
        """The share of itself that an average which the loss is held to keeps; 0 where there is none."""
        return 0.0 if self.denoising is None else self.denoising.anchor_kept


@dataclass(frozen=True)
class Pairs:
    """Every (sample, timestep) pair of a rollout that may be trained on, flattened to [B]."""

    sample: Tensor
    """int64 [B]: p * G + g."""
    step: Tensor
    """int64 [B]."""


def noisiest_steps(scored: Tensor, share: float) -> Tensor:
    """The noisiest of the denoising steps [T] with a density: so large a share of them, at least one."""
    steps = scored.nonzero()[:, 0]
    chosen = torch.zeros_like(scored)
    chosen[steps[: max(1, round(share * len(steps)))]] = True
    return chosen


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
    steps, noisiest = (which.nonzero()[:, 0].cpu() for which in (scored, noisiest_steps(scored, share)))
    count = len(noisiest)
    draw = noise.generator(seed, iteration, 0, 0, "pairs")
    if choice == "noisiest":
        chosen = noisiest.repeat(samples, 1)
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
    batch: BatchSize | None = None,
    behavior: Callable[[], AbstractContextManager[None]] = nullcontext,
    anchor: Callable[[], AbstractContextManager[None]] = nullcontext,
    gradient: Tensor | None = None,
) -> UpdateStats:
    """Take `objective.updates` optimiser steps on a rollout.

    The loss of a step is the mean over its pairs of the clipped surrogate, or of what the objective has in its place, plus
    ``kl_weight`` times the closed-form divergence from the reference, weighed by the gate and the schedule. It is summed up over
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
        batch: pairs replayed at once, fewer where memory does not suffice; by default ``objective.batch_size``.
        behavior: a context within which the policy is the one that drew the samples, for an objective that asks it; by default
            the policy as it is.
        anchor: a context within which the policy is the average that the objective is held to, if it is to one.
        gradient: [p, G, C, H, W], of what is wanted of the pictures, in this process's clean latents (`driftrl.pathwise`), for an objective
            that follows it.

    Returns:
        Averages over all pairs.

    Raises:
        NotFiniteError: before the optimiser steps, if the loss or the gradient is not finite; it names the prompt and
            the denoising step where it can.
        RunFailedError: if memory does not suffice for a single pair.
    """
    group, steps = rollout.log_probs.shape[1:]
    mine = team.share(len(advantages))
    first = mine.start * group  # of the samples in ``rollout``, which are numbered from 0 here
    per_step = _per_step(advantages[mine], rollout.log_probs)
    old = rollout.log_probs.flatten(0, 1)
    drawn = Drawn(old, None if rollout.means is None else rollout.means.flatten(0, 1))
    parameters = policy.parameters()
    reference = reference or policy.reference
    held = _held(_step_weights(policy, objective), old, gate, mine)
    passes = [
        [(_used(pairs, per_step, objective), count) for pairs, count in parts]
        for parts in _passes(
            objective.trainable(policy.scored),
            len(advantages) * group,
            objective,
            key,
            range(first, first + len(old)),
            group if objective.in_groups else 1,
        )
    ]
    batch = batch or BatchSize(objective.batch_size, "optimizer.batch_size")
    turns = _Turns(team, policy.scored, any(map(in_parts, parameters)))
    replay = Replay(policy, rollout, conditioning, prompt_noise)
    surrogate = Surrogate(
        replay, rollout, per_step, objective.clip_range, objective.trust_region, objective.max_kl,
        _weights(policy, objective),
    )  # fmt: skip
    terms = _terms(
        surrogate,
        replay,
        rollout,
        per_step,
        policy,
        objective,
        Others(reference, behavior, anchor),
        (key, first),
        gradient,
        batch,
        team,
    )
    scale = objective.loss_scale if gradient is None else _scale_of(gradient, objective.loss_scale)
    scores = _Scores(
        surrogate, drawn, passes, turns, objective.rescore, bool(getattr(policy, "compiled", False))
    )

    def learn(pairs: Pairs, count: int, epoch: int, moved: bool, size: int) -> _Sums:
        """The gradient of one optimiser step, ``size`` pairs at a time."""
        optimizer.zero_grad(set_to_none=True)
        before = scores.before(epoch, size, moved)
        sums = _Sums.none(old.device)
        terms.begin(pairs.sample, pairs.step, epoch, moved, size)
        for sample, step, counts in turns(pairs, size):
            latents = terms.latents(sample, step)
            if objective.kl_weight > 0:  # first, for the policy's gradient wants its own weights in place
                with torch.no_grad(), reference():
                    anchor = replay(latents, sample, step)
            term = terms(latents, sample, step, before)
            weight, kl = held[sample, step], torch.zeros_like(term.loss)
            if objective.kl_weight > 0:
                kl = weight * _divergence(objective, term.move, anchor.mean)
            loss = term.loss + _beta(objective, latents) * kl
            (loss.sum() * (counts * scale / count)).backward()
            sums = sums.plus(loss, term, kl, weight, counts, (first + sample) * steps + step)
        return sums

    totals, norms, deviation = torch.zeros(6, device=old.device), [], torch.zeros((), device=old.device)
    every = [(epoch, *part) for epoch, parts in enumerate(passes) for part in parts]
    for number, (epoch, pairs, count) in enumerate(every):
        with team.together():
            sums = batch.attempt(partial(learn, pairs, count, epoch, number > 0))
        totals += sums.totals
        deviation = sums.deviation if number == 0 else deviation
        team.add(_gradients(parameters, scale, team))
        norm = whole(nn.utils.clip_grad_norm_(parameters, objective.max_grad_norm))
        if not bool(torch.isfinite(norm)):
            optimizer.zero_grad(set_to_none=True)
            raise NotFiniteError(where(int(team.largest(sums.bad)), steps, group, names))
        optimizer.step()
        norms.append(norm.detach())
    optimizer.zero_grad(set_to_none=True)
    total = sum(count for _, _, count in every)
    return _stats(totals, torch.stack([deviation, scores.rescored_by()]), norms, total, team)


def _terms(
    surrogate: Surrogate,
    replay: Replay,
    rollout: Rollout,
    advantages: Tensor,
    policy: Policy,
    objective: Objective,
    others: Others,
    place: tuple[tuple[int, int], int],
    gradient: Tensor | None,
    batch: BatchSize,
    team: Team,
) -> Terms:
    """What pairs are asked for: the surrogate, or what the objective has in its place. Adjoints are carried back here, once."""
    if objective.denoising is not None:
        return Denoising(replay, rollout, advantages, objective.denoising, policy, others, *place)
    loss = objective.pathwise
    if loss is None:
        return surrogate
    assert gradient is not None, "a pathwise loss wants the gradient of what it follows"
    path, wanted = rollout.latents.flatten(0, 1), objective.followed(policy.scored)
    by = others.reference if loss.by_reference else nullcontext
    with team.together():
        carried = carried_back(
            replay, path, gradient.flatten(0, 1), wanted, batch, by, with_means=loss.by_reference
        )
    return Pathwise(replay, path, carried, loss)


def _weights(policy: Policy, objective: Objective) -> Tensor | None:
    """What the surrogate weighs at each step [T], where that is not the same."""
    if objective.trust_region != "normalized":
        return None
    trained = policy.scored
    if objective.timestep_choice == "noisiest":
        trained = noisiest_steps(trained, objective.timesteps)
    return time_weights(policy.durations, trained)


def _per_step(advantages: Tensor, like: Tensor) -> Tensor:
    """[P * G, T], of advantages [P, G] or [P, G, T]."""
    return (advantages.unsqueeze(-1).expand_as(like) if advantages.dim() == 2 else advantages).flatten(0, 1)


def _used(pairs: Pairs, advantages: Tensor, objective: Objective) -> Pairs:
    """The pairs to replay: without KL one of zero advantage has no gradient of the surrogate, and is left out."""
    if objective.kl_weight > 0 or objective.denoising is not None or objective.pathwise is not None:
        return pairs
    used = advantages[pairs.sample, pairs.step].nonzero()[:, 0]
    return Pairs(pairs.sample[used], pairs.step[used])


class _Turns:
    """Pairs in micro-batches; equally many in all processes where each holds a part of the weights, for then they put
    them together for every pass.
    """

    def __init__(self, team: Team, scored: Tensor, equally: bool) -> None:
        self._team, self._equally = team, equally
        self._spare = torch.zeros(1, dtype=torch.long, device=scored.device), scored.int().argmax()[None]

    def __call__(self, pairs: Pairs, size: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(sample, step, 1) for each micro-batch; (a pair, 0) in a turn that only the others need."""
        sample, step = pairs.sample, pairs.step
        rounds = -(-len(sample) // size)
        more = self._team.most(rounds) - rounds if self._equally else 0  # asked before anybody begins
        if rounds:
            yield from ((a, b, 1) for a, b in zip(sample.split(size), step.split(size), strict=True))
        for _ in range(more):
            yield (*self._spare, 0)


class _Scores:
    """What ratios and divergences are taken to: the rollout's figures, or those of the update's own micro-batches."""

    def __init__(
        self,
        replay: Surrogate,
        old: Drawn,
        passes: Sequence[Sequence[tuple[Pairs, int]]],
        turns: _Turns,
        rescore: bool,
        compiled: bool,
    ) -> None:
        self._replay, self._old, self._passes, self._turns = replay, old, passes, turns
        self._rescore, self._compiled = rescore, compiled
        self._before, self._size = [old] * len(passes), 0

    def before(self, epoch: int, size: int, moved: bool) -> Drawn:
        """Those for one pass, scored again ``size`` at a time if that is asked for and the policy has not
        ``moved`` yet.
        """
        if self._rescore and not moved and size != self._size:
            self._before = [self._rescored(parts, size) for parts in self._passes]
            self._size = size
        return self._before[epoch]

    def rescored_by(self) -> Tensor:
        """The largest change."""
        return torch.stack([(own.log_probs - self._old.log_probs).abs().max() for own in self._before]).max()

    def _rescored(self, parts: Sequence[tuple[Pairs, int]], size: int) -> Drawn:
        """All samples' figures, those of one pass computed in its very micro-batches."""
        means = None if self._old.means is None else self._old.means.clone()
        before = Drawn(self._old.log_probs.clone(), means)
        for pairs, _ in parts:
            for sample, step, counts in self._turns(pairs, size):
                with torch.set_grad_enabled(self._compiled):
                    latents = self._replay.latents(sample, step)
                    move, score = self._replay.log_prob(latents, sample, step)
                if counts:
                    before.log_probs[sample, step] = score.detach()
                    if means is not None:
                        means[sample, step] = move.mean.detach()
        return before


class _Sums(NamedTuple):
    """What an optimiser step adds up over its pairs; on the device until the end."""

    totals: Tensor
    """[6]: loss, surrogate, kl and its weight, approx_kl, clip_fraction."""
    deviation: Tensor
    """Largest |ratio - 1|."""
    bad: Tensor
    """The first pair whose loss is not finite, as sample * steps + step; or -1."""

    @staticmethod
    def none(device: torch.device) -> _Sums:
        """Of no pair."""
        zeros = torch.zeros(7, device=device)
        return _Sums(zeros[:6], zeros[6], torch.full((), -1, device=device))

    @torch.no_grad()
    def plus(self, loss: Tensor, term: Term, kl: Tensor, weight: Tensor, counts: int, pair: Tensor) -> _Sums:
        """With a micro-batch of the numbered pairs [n]; ``counts`` is 0 where it is to be left out."""
        share = len(loss)
        found = torch.stack([loss.sum(), term.loss.sum(), kl.sum(), weight.sum(),
                             share * term.approx_kl, share * term.clip_fraction])  # fmt: skip
        most = torch.maximum(self.deviation, term.deviation)
        return _Sums(self.totals + counts * found, most, _first_bad(self.bad, loss, pair))


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
    scored: Tensor, samples: int, objective: Objective, key: tuple[int, int], mine: range, together: int = 1
) -> list[list[tuple[Pairs, int]]]:
    """For each pass, and each optimiser step in it, the pairs of the samples ``mine``, which are numbered anew, from 0;
    and how many pairs the step has of all ``samples``. They are drawn for all, so that processes agree on the steps; ``together``
    samples have the same steps.
    """
    members = torch.arange(together, device=scored.device)
    passes = []
    for epoch in range(objective.epochs):
        everything = training_pairs(
            scored,
            samples // together,
            objective.timesteps,
            key[0],
            key[1] + epoch * 2**32,
            objective.timestep_choice,
        )
        several = min(objective.updates, len(everything.sample))
        shares = everything.sample.tensor_split(several), everything.step.tensor_split(several)
        parts = []
        for drawn, at in zip(*shares, strict=True):
            sample, step = (drawn[:, None] * together + members).flatten(), at.repeat_interleave(together)
            own = (sample >= mine.start) & (sample < mine.stop)
            parts.append((Pairs(sample[own] - mine.start, step[own]), len(sample)))
        passes.append(parts)
    return passes


def _step_weights(policy: Policy, objective: Objective) -> Tensor:
    """What the divergence weighs at each step [T]."""
    weights = step_weights(policy.scored, objective.kl_schedule, policy.durations)
    # A pathwise loss may be of steps without noise, where there is no divergence.
    return weights if objective.pathwise is None else weights * policy.scored


def _beta(objective: Objective, latents: Tensor) -> float:
    """What a divergence that is a mean over latent dimensions weighs: with a pathwise loss, which is a sum over them, as many times more."""
    return objective.kl_weight * (1 if objective.pathwise is None else latents[0].numel())


def _divergence(objective: Objective, move: Transition, mean_ref: Tensor) -> Tensor:
    """Of transitions [n]; where they have no noise, and no weight, it is finite."""
    std = torch.where(move.std > 0, move.std, 1.0)
    return divergence(objective.divergence, move.mean, mean_ref, std)


def _held(steps: Tensor, like: Tensor, gate: Tensor | None, mine: slice) -> Tensor:
    """What the divergence weighs for each sample and step [P * G, T] of the prompts ``mine``."""
    return steps.expand_as(like) if gate is None else steps * gate[mine].flatten()[:, None]


def _scale_of(gradient: Tensor, loss_scale: float) -> float:
    """What a pathwise loss, which has the unit of the reward, is multiplied by in float16: as if the gradient that it follows were about 1."""
    largest = float(gradient.abs().max()) if loss_scale != 1 and gradient.numel() else 0.0
    return loss_scale / 2.0 ** math.ceil(math.log2(largest)) if 0 < largest < math.inf else loss_scale


def _gradients(parameters: list[nn.Parameter], loss_scale: float, team: Team) -> list[Tensor]:
    """Those of the loss itself, zero where there is none, so that the optimiser treats every step alike; returned are
    those that are still to be added up over processes.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad /= loss_scale  # a power of two: exact
        if in_parts(parameter):
            parameter.grad *= team.size  # added up already, and divided by that
        else:
            gradients.append(parameter.grad)
    return gradients


def _first_bad(bad: Tensor, loss: Tensor, pair: Tensor) -> Tensor:
    """The first pair with a loss that is not finite, or -1, without asking the device."""
    wrong = ~torch.isfinite(loss)
    return torch.where((bad < 0) & wrong.any(), pair[wrong.int().argmax()[None]][0], bad)


def where(pair: int, steps: int, group: int, names: Sequence[str] | None) -> str:
    """What is not finite: the loss of ``pair`` (sample * steps + step), or, if that is -1, the gradient."""
    if pair < 0:
        return "the gradient is not finite, though the loss is"
    row = pair // steps // group
    named = f"prompt {row}" if names is None else repr(names[row])
    return f"the loss is not finite for {named}, denoising step {pair % steps}"
