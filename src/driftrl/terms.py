"""What an update adds up over (sample, step) pairs: the loss of each, and what to watch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from driftrl import noise
from driftrl.objectives.advantage_weighted import velocity_error
from driftrl.objectives.clipped_surrogate import ClippedSurrogate, clipped_surrogate
from driftrl.objectives.trust_region import divergence_surrogate, normalized_surrogate
from driftrl.rollout import PromptNoise, score_step
from driftrl.transitions import gaussian
from driftrl.types import Conditioning, Policy, Rollout, Transition


class Term(NamedTuple):
    """Of n pairs."""

    loss: Tensor
    """[n], with gradient."""
    move: Transition
    """The policy's, with gradient: what a divergence is taken of."""
    approx_kl: Tensor
    """Scalar, as the next two: how far the policy is from the one that drew."""
    clip_fraction: Tensor
    deviation: Tensor
    """Largest |ratio - 1|."""


class Drawn(NamedTuple):
    """What the policy that drew says of its samples: in the rollout, or asked again in the update's own batches."""

    log_probs: Tensor
    """float32 [P * G, T]."""
    means: Tensor | None
    """float32 [P * G, T, C, H, W], where a trust region asks for them."""


class Replay:
    """The policy, asked at latents under the prompts, and the noise on them, that a rollout's samples were drawn with."""

    def __init__(
        self, policy: Policy, rollout: Rollout, conditioning: Conditioning, prompt_noise: PromptNoise
    ) -> None:
        prompts, group = rollout.log_probs.shape[:2]
        self._policy, self._conditioning, self._spec = policy, conditioning, prompt_noise
        self._eps = None if rollout.prompt_noise is None else rollout.prompt_noise.flatten(0, 1)
        self._prompt_of = torch.arange(prompts, device=rollout.log_probs.device).repeat_interleave(
            group, output_size=prompts * group
        )

    def __call__(self, latents: Tensor, sample: Tensor, step: Tensor) -> Transition:
        """At latents [n, C, H, W] of the samples and steps [n]."""
        eps = None if self._eps is None else self._eps[sample]
        rows = self._conditioning.rows(self._prompt_of[sample])
        return score_step(self._policy, latents, step, rows, eps, self._spec)


Context = Callable[[], AbstractContextManager[None]]


class Others(NamedTuple):
    """Contexts within which the policy is another one; in each it is by default what it is."""

    reference: Context = nullcontext
    """What the divergence is taken from, groups are weighed beside, and base gradients are carried back by."""
    behavior: Context = nullcontext
    """The one that drew."""
    anchor: Context = nullcontext
    """The average that a loss is held to."""


class Terms(Protocol):
    """How an update asks for the loss of pairs."""

    def begin(self, sample: Tensor, step: Tensor, epoch: int, moved: bool, size: int) -> None:
        """Told of all pairs of an optimiser step, which are then asked for in this order, ``size`` at a time; ``moved`` after the
        iteration's first.
        """
        ...

    def latents(self, sample: Tensor, step: Tensor) -> Tensor:
        """Where the policy is asked: [n, C, H, W]."""
        ...

    def __call__(self, latents: Tensor, sample: Tensor, step: Tensor, before: Drawn) -> Term:
        """The loss there; ``before`` is of the policy that drew."""
        ...


class Surrogate:
    """The clipped surrogate of transitions that are replayed (design 2.5)."""

    def __init__(
        self,
        replay: Replay,
        rollout: Rollout,
        advantages: Tensor,
        clip_range: float,
        trust_region: str,
        max_kl: float,
        weights: Tensor | None,
    ) -> None:
        """Of samples P x G with advantages [P * G, T]; ``weights`` [T] are those of the ``normalized`` trust region."""
        self._replay, self._advantages, self._clip_range = replay, advantages, clip_range
        self._region, self._max_kl, self._weights = trust_region, max_kl, weights
        self._path = rollout.latents.flatten(0, 1)

    def begin(self, sample: Tensor, step: Tensor, epoch: int, moved: bool, size: int) -> None:
        """Nothing to do."""

    def latents(self, sample: Tensor, step: Tensor) -> Tensor:
        """Those that the rollout stored."""
        return self._path[sample, step]

    def log_prob(self, latents: Tensor, sample: Tensor, step: Tensor) -> tuple[Transition, Tensor]:
        """The kernel of rollout, and the score [n] of what the rollout drew from it."""
        move = self._replay(latents, sample, step)
        return move, gaussian.log_prob(self._path[sample, step + 1], move.mean, move.std)

    def __call__(self, latents: Tensor, sample: Tensor, step: Tensor, before: Drawn) -> Term:
        """Replay of the pairs."""
        move, log_prob = self.log_prob(latents, sample, step)
        advantages, old = self._advantages[sample, step], before.log_probs[sample, step]
        if self._region == "ratio":
            found = clipped_surrogate(log_prob, old, advantages, self._clip_range)
        else:
            assert before.means is not None, "the rollout kept no means"
            found = self._by_means(log_prob, old, advantages, move, before.means[sample, step], step)
        with torch.no_grad():
            deviation = ((log_prob - old).exp() - 1).abs().max()
        return Term(found.loss, move, found.approx_kl, found.clip_fraction, deviation)

    def _by_means(
        self, log_prob: Tensor, old: Tensor, advantages: Tensor, move: Transition, mean: Tensor, step: Tensor
    ) -> ClippedSurrogate:
        moved = (move.mean, mean, move.std)
        if self._region == "divergence":
            return divergence_surrogate(log_prob, old, advantages, *moved, self._max_kl)
        found = normalized_surrogate(log_prob, old, advantages, *moved, self._clip_range)
        return found if self._weights is None else found._replace(loss=self._weights[step] * found.loss)


class DenoisingLoss(Protocol):
    """What images that were drawn and noised again are learned from by: a loss of predictions of them."""

    @property
    def own_behavior(self) -> bool:
        """Whether samples are drawn by the trained policy itself, not by a copy that lags behind."""
        ...

    @property
    def of_network(self) -> bool:
        """Whether errors are those of what the network predicts, velocity or noise; else of the velocity for any network."""
        ...

    @property
    def in_groups(self) -> bool:
        """Whether a prompt's samples go together: at the same steps, noised alike, weighed by `GroupLoss.weights`."""
        ...

    def kept(self, iteration: int) -> float:
        """What the copy that draws keeps of itself after ``iteration``, counted from 0."""
        ...

    @property
    def anchor_kept(self) -> float:
        """What an average of the policy that it is held to keeps of itself after an iteration; 0 where there is none."""
        ...

    def __call__(
        self,
        x0_hat: Tensor,
        x0_old: Tensor,
        x0: Tensor,
        sigma: Tensor,
        advantages: Tensor,
        x0_anchor: Tensor | None = None,
    ) -> ClippedSurrogate:
        """Of clean latents [n, C, H, W]: predicted with gradient, predicted by what drew, drawn; the noise's share, by which errors are
        divided (with `of_network` over the signal's, where noise is predicted), and advantages [n]; and predicted by the average
        that it is held to, if there is one.
        """
        ...


class GroupLoss(DenoisingLoss, Protocol):
    """One that is of a prompt's samples together."""

    def weights(self, error: Tensor, reference: Tensor, advantages: Tensor) -> Tensor:
        """What each group weighs [P], by the errors of the policy and the reference and the advantages of its samples [P, G]."""
        ...


class Denoising:
    """A loss of denoising: images that were drawn are noised again, and the policy predicts them from there."""

    def __init__(
        self,
        replay: Replay,
        rollout: Rollout,
        advantages: Tensor,
        settings: DenoisingLoss,
        policy: Policy,
        others: Others,
        key: tuple[int, int],
        first: int,
    ) -> None:
        """Of samples P x G with advantages [P * G, T]; ``key`` is (seed, iteration), and ``first`` the number, among those of all
        processes, of the first sample.
        """
        self._replay, self._advantages, self._settings = replay, advantages, settings
        self._reference, self._behavior = others.reference, others.behavior
        self._anchor = others.anchor if settings.anchor_kept > 0 else None
        self._group = rollout.log_probs.shape[1] if settings.in_groups else 1
        self._weighed = advantages
        self._noised, self._key, self._first = policy.noised, key, first
        noised = policy.noised
        self._clean = rollout.latents[:, :, -1].flatten(0, 1)
        none = self._clean.new_zeros(rollout.log_probs.shape[2], *self._clean.shape[1:])
        every = torch.arange(len(none), device=none.device)
        self._sigma = noised(none, torch.ones_like(none), every)[:, 0, 0, 0]  # the noise's share at each step
        if settings.of_network and policy.predicts_noise:
            self._sigma = self._sigma / noised(torch.ones_like(none), none, every)[:, 0, 0, 0]
        self._ahead: list[tuple[int, int, int, int]] = []
        self._same = False

    def begin(self, sample: Tensor, step: Tensor, epoch: int, moved: bool, size: int) -> None:
        """The keys of their noise, so that the host asks the device only here; and what groups weigh."""
        self._same = self._settings.own_behavior and not moved
        seed, iteration = self._key[0], self._key[1] + epoch * 2**32
        own = (self._first + sample) // self._group * self._group  # a group's noise is its first sample's
        keys = [(seed, iteration, i, t) for i, t in torch.stack([own, step], 1).tolist()]
        self._ahead = keys
        if self._settings.in_groups:
            self._weighed = self._in_groups(cast(GroupLoss, self._settings), sample, step, size)
            self._ahead = keys

    @torch.no_grad()
    def _in_groups(self, settings: GroupLoss, sample: Tensor, step: Tensor, size: int) -> Tensor:
        """Advantages [P * G, T], each times the weight of its group at its step, of all pairs of an optimiser step."""
        parts = list(zip(sample.split(size), step.split(size), strict=True)) if len(sample) else []
        noised = [self.latents(*part) for part in parts]

        def errors() -> Tensor:
            """Of the policy as it is, where pairs have one."""
            found = torch.zeros_like(self._advantages)
            for latents, (one, at) in zip(noised, parts, strict=True):
                x0 = self._replay(latents, one, at).x0
                found[one, at] = velocity_error(x0, self._clean[one], self._sigma[at])
            return found.unflatten(0, (-1, self._group)).transpose(1, 2).flatten(0, 1)

        own = errors()
        with self._reference():
            reference = errors()
        advantages = self._advantages.unflatten(0, (-1, self._group))
        steps = advantages.shape[2]
        weights = settings.weights(own, reference, advantages.transpose(1, 2).flatten(0, 1))
        return (advantages * weights.view(-1, 1, steps)).flatten(0, 1)

    def latents(self, sample: Tensor, step: Tensor) -> Tensor:
        """The clean latents, noised to the step by noise of each pair's own, or of its group's, another in each epoch."""
        keys, self._ahead = self._ahead[: len(sample)], self._ahead[len(sample) :]
        draws = [noise.generator(*key, "forward") for key in keys]
        clean = self._clean[sample]
        return self._noised(clean, noise.placed(noise.normal(draws, clean.shape[1:]), clean.device), step)

    def __call__(self, latents: Tensor, sample: Tensor, step: Tensor, before: Drawn) -> Term:
        """What the policy predicts there, and the one that drew."""
        clean, old, anchor = self._clean[sample], None, None
        # Others first, for the policy's gradient wants its own weights in place.
        if not self._same:
            with torch.no_grad(), self._behavior():
                old = self._replay(latents, sample, step).x0
        if self._anchor is not None:
            with torch.no_grad(), self._anchor():
                anchor = self._replay(latents, sample, step).x0
        move = self._replay(latents, sample, step)
        found = self._settings(
            move.x0,
            move.x0.detach() if old is None else old,
            clean,
            self._sigma[step],
            self._weighed[sample, step],
            anchor,
        )
        return Term(found.loss, move, found.approx_kl, found.clip_fraction, torch.zeros_like(found.approx_kl))
