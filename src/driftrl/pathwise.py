"""Gradients of what is wanted of the pictures: taken in the clean latents, and carried back along the paths that were drawn.

`gradient_of_images` is where rewards and shaping enter, `carried_back` where the policy does, and `Pathwise` what an update then
asks of each (sample, step) pair. The losses are in `driftrl.objectives.pathwise`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from driftrl.advantages import AdvantageRule, History, advantages_of
from driftrl.batches import BatchSize, in_batches
from driftrl.diversity.functional import pairwise_distances
from driftrl.mixture import Part, mixed
from driftrl.objectives.pathwise import PathwiseLoss, slope
from driftrl.shaping import DiversityWarning, Shaping, diversity_bonus, intrinsic_advantage
from driftrl.terms import Drawn, Replay, Term
from driftrl.transitions import gaussian
from driftrl.types import Encoder, Policy, Reward


class Worth(NamedTuple):
    """What a unit is worth in advantage, means and standard deviations being held and nothing clipped."""

    reward: Tensor
    """[P, G, R]: of each of R rewards, by kept candidate."""
    bonus: Tensor
    """[P]: of the bonus for diversity; 0 without one."""


def worth(
    scores: Tensor, rewards: Tensor, chosen: Tensor, bonus: Tensor, rule: AdvantageRule, shaping: Shaping,
    parts: Sequence[Part] = (), history: History | None = None, ratio: Tensor | None = None,
) -> Worth:  # fmt: skip
    """What rewards and bonus weigh in the gradient that a pathwise loss follows.

    The advantage of an image is ``(r - mean) / std + lambda (d - mean d) / std d``, and with these statistics held an affine function
    of its reward and its diversity, whose slopes are these. The clips, which bound what a single image may weigh, have no part in
    it: beyond them there would be no gradient, for images that are too alike as for those that differ enough.

    Args:
        scores: [P, N] of one reward, or [P, N, R].
        rewards: [P, N], what they became together (`driftrl.mixture`).
        chosen: [P, G], the candidates that are kept.
        bonus: [P, G], of `driftrl.shaping.diversity_bonus`.
        rule: how rewards become advantages.
        shaping: at level ``advantage`` or ``reward``.
        parts: of several rewards, how they are mixed.
        history: as `advantages_of` has it.
        ratio: [P], each group's own lambda; by default all have that of ``shaping``.
    """
    unbounded, kept = replace(rule, clip=math.inf), rewards.gather(1, chosen)
    by_reward = shaping.on and shaping.level == "reward"
    if by_reward:
        kept = kept + shaping.ratio * bonus
    # Where it is not the kept rewards' own spread that divides, a unit is worth as much where they are all equal.
    divided_by_own = rule.baseline == "group" and rule.scale == "selected"
    probe = (
        kept if divided_by_own else torch.arange(kept.shape[1], device=kept.device).to(kept).expand_as(kept)
    )
    of_reward = slope(probe, advantages_of(probe, unbounded, kept if by_reward else rewards, history))
    if by_reward:
        of_bonus = shaping.ratio * of_reward
    elif shaping.on:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DiversityWarning)  # said where advantages are shaped
            own = slope(bonus, intrinsic_advantage(bonus, math.inf))
        of_bonus = (shaping.ratio if ratio is None else ratio.to(own)) * own
    else:
        of_bonus = torch.zeros_like(of_reward)
    each = torch.ones_like(scores)[..., None]
    if scores.dim() == 3:
        with torch.enable_grad():
            free = scores.detach().clone().requires_grad_()
            (each,) = torch.autograd.grad(mixed(free, parts, scores.detach()).sum(), free)
    each = each.gather(1, chosen[..., None].expand(-1, -1, each.shape[2]))
    return Worth(each * of_reward.to(each)[:, None, None], of_bonus.to(each))


def gradient_of_images(
    clean: Tensor,
    images: Tensor,
    prompts: Sequence[str],
    policy: Policy,
    reward: Reward,
    encoder: Encoder,
    shaping: Shaping,
    weigh: Worth,
    batch: BatchSize,
) -> Tensor:
    """The gradient, in the clean latents, of the sum of rewards and bonuses as they are weighed.

    Of the bonus, which is of a group together, the gradient in the features comes first; so that images go through autoencoder,
    reward and encoder one by one, or as many at once as memory suffices for.

    Args:
        clean: [p, G, C, H, W], x_0 of the kept candidates.
        images: [p, G, 3, height, width], what they were decoded to.
        prompts: p of them.
        policy: whose `decode` is differentiable.
        reward: differentiable in the images.
        encoder: the same, where there is a bonus.
        shaping: the bonus.
        weigh: of these p prompts.
        batch: images at once.

    Returns:
        float32 [p, G, C, H, W].
    """
    group, flat = clean.shape[1], clean.flatten(0, 1)
    names = [text for text in prompts for _ in range(group)]
    weights = weigh.reward.flatten(0, 1)
    pull: Tensor | None = None
    if shaping.on and bool((weigh.bonus != 0).any()):
        drawn = images.flatten(0, 1)
        features = in_batches(batch, len(drawn), lambda rows: encoder(drawn[rows]))
        pull = _pull_of_features(features.unflatten(0, (-1, group)), weigh.bonus, shaping).flatten(0, 1)

    # An encoder that is the base model's own network is asked within a context, in which its gradient has to be taken as well.
    within: Callable[[], AbstractContextManager[None]] = getattr(encoder, "reference", nullcontext)

    def work(rows: slice) -> Tensor:
        def wanted(decoded: Tensor) -> Tensor:
            scores = reward(decoded, names[rows])
            total = (weights[rows].to(scores) * scores.reshape(len(scores), -1)).sum()
            return total if pull is None else total + (pull[rows].to(decoded) * encoder(decoded)).sum()

        with nullcontext() if pull is None else within():
            return _through_decoder(policy, flat[rows], wanted)[1]

    return in_batches(batch, len(flat), work).unflatten(0, (-1, group))


def _through_decoder(
    policy: Policy, clean: Tensor, wanted: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Images [n, 3, H, W] of clean latents [n, C, h, w], and in these the gradient of what is ``wanted`` of the images, float32."""
    with torch.enable_grad():
        x0 = clean.detach().requires_grad_()
        decoded = policy.decode(x0)
        free = decoded.detach().requires_grad_()
        total, of_images = wanted(free), None
        if total.requires_grad:
            (of_images,) = torch.autograd.grad(total, free, allow_unused=True)
        if of_images is None:  # a reward may give these images a number that does not change with them
            return free.detach(), torch.zeros_like(clean, dtype=torch.float32)
        return free.detach(), _scaled_back(decoded, x0, of_images)


def _scaled_back(output: Tensor, given: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` in ``output`` [n, ...], carried to ``given`` [n, ...]: float32. In a unit of each row's own, so that half precision neither
    overflows nor loses it.
    """
    unit = gradient.flatten(1).abs().amax(1).view(-1, *(1,) * (gradient.dim() - 1))
    unit = torch.where(unit > 0, unit, 1.0)
    (found,) = torch.autograd.grad(output, given, gradient / unit)
    return unit * found.float()


class Followed:
    """Rewards of candidates and their gradients in the clean latents, had while the candidates are decoded: so that they are decoded once,
    and scored once, where `gradient_of_images` does both again.

    Of a single reward alone: what a bonus for diversity weighs is known when a group is complete.
    """

    def __init__(self, policy: Policy, reward: Reward, prompts: Sequence[str], batch: BatchSize) -> None:
        """For N candidates of ``prompts`` [N], as many at once as ``batch`` says."""
        self._policy, self._reward, self._prompts, self._batch = policy, reward, list(prompts), batch
        count = len(self._prompts)
        self.scores = torch.full((count,), math.nan, device=policy.device)
        """float32 [N]; not a number where latents are not finite, or nothing was decoded yet."""
        self.gradients = torch.zeros(count, *policy.latent_shape, device=policy.device)
        """float32 [N, C, H, W]."""

    def decode(self, latents: Tensor, first: int) -> Tensor:
        """Images [n, 3, height, width] of clean latents [n, C, H, W], of which ``first`` is the number of the first one."""
        if not bool(torch.isfinite(latents).all()):
            return self._policy.decode(latents)  # which ends the iteration; a reward might end the run

        def work(rows: slice) -> Tensor:
            place = slice(first + rows.start, first + rows.stop)

            def wanted(images: Tensor) -> Tensor:
                scores = self._reward(images, self._prompts[place])
                self.scores[place] = scores.detach().float()
                return scores.sum()

            images, self.gradients[place] = _through_decoder(self._policy, latents[rows], wanted)
            return images

        return in_batches(self._batch, len(latents), work)

    def weighed(self, chosen: Tensor, weigh: Worth) -> Tensor:
        """What `gradient_of_images` finds of the candidates ``chosen`` [p, G], of N / p each: float32 [p, G, C, H, W]."""
        each = self.gradients.unflatten(0, (len(chosen), -1))
        kept = each[torch.arange(len(chosen), device=chosen.device)[:, None], chosen]
        return kept * weigh.reward.to(kept)[..., None, None]


def _pull_of_features(features: Tensor, weights: Tensor, shaping: Shaping) -> Tensor:
    """The gradient of ``sum_p w_p sum_i bonus_i`` in the features [p, G, D]."""
    with torch.enable_grad():
        free = features.detach().requires_grad_()
        bonus = diversity_bonus(pairwise_distances(free), shaping)
        (found,) = torch.autograd.grad((weights.to(bonus)[:, None] * bonus).sum(), free)
    return found


@dataclass(frozen=True)
class Carried:
    """Adjoints of S samples at the denoising steps that are learned from."""

    place: Tensor
    """int64 [T]: where a step is in the next two; -1 where it is not."""
    adjoints: Tensor
    """float32 [S, K, C, H, W]: gradients in what the step ends in."""
    means: Tensor | None
    """float32 [S, K, C, H, W]: of the transitions that carried them; None where they are not wanted."""


def carried_back(
    replay: Replay,
    path: Tensor,
    gradient: Tensor,
    wanted: Tensor,
    batch: BatchSize,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
    with_means: bool = True,
) -> Carried:
    """Carry a gradient in x_0 back to every step that is wanted: ``a_t = J_t^T a_{t-1}``, J_t the Jacobian of the mean at x_t.

    Args:
        replay: the policy at the latents of samples and steps.
        path: [S, T + 1, C, H, W], from x_T to x_0.
        gradient: [S, C, H, W], in x_0.
        wanted: bool [T].
        batch: samples at once; each takes as much memory as a pair of an update.
        within: a context within which the policy is the one whose Jacobians are meant.
        with_means: whether its means are wanted too; without them the first of the steps needs no pass.
    """
    steps = wanted.nonzero()[:, 0].tolist()
    place = torch.full((len(wanted),), -1, dtype=torch.long, device=path.device)
    place[steps] = torch.arange(len(steps), device=path.device)
    number = {step: k for k, step in enumerate(steps)}

    def work(rows: slice) -> Tensor:
        sample = torch.arange(len(path), device=path.device)[rows]
        adjoint = gradient[rows].float()
        found = adjoint.new_empty(len(sample), 1 + with_means, len(steps), *adjoint.shape[1:])
        for step in range(len(wanted) - 1, steps[0] - 1, -1):
            last, at = step == steps[0], torch.full_like(sample, step)
            if step in number:
                found[:, 0, number[step]] = adjoint
            if last and not with_means:
                break
            with torch.set_grad_enabled(not last):
                latents = path[rows, step].detach().requires_grad_(not last)
                mean = replay(latents, sample, at).mean
            if with_means and step in number:
                found[:, 1, number[step]] = mean.detach()
            if not last:
                adjoint = _scaled_back(mean, latents, adjoint)
        return found

    with within():
        found = in_batches(batch, len(path), work)
    return Carried(place, found[:, 0], found[:, 1] if with_means else None)


class Pathwise:
    """Terms of a pathwise loss: the policy at the latents of the path, and the adjoints there."""

    def __init__(self, replay: Replay, path: Tensor, carried: Carried, loss: PathwiseLoss) -> None:
        """Of the path [S, T + 1, C, H, W]."""
        self._replay, self._path, self._carried, self._loss = replay, path, carried, loss

    def begin(self, sample: Tensor, step: Tensor, epoch: int, moved: bool, size: int) -> None:
        """Nothing to do."""

    def latents(self, sample: Tensor, step: Tensor) -> Tensor:
        """Those that the rollout stored."""
        return self._path[sample, step]

    def __call__(self, latents: Tensor, sample: Tensor, step: Tensor, before: Drawn) -> Term:
        """The policy there, and how far it is from the one that drew, where there is noise to tell."""
        move = self._replay(latents, sample, step)
        at, means, drawn = self._carried.place[step], self._carried.means, self._path[sample, step + 1]
        other = drawn if means is None else means[sample, at]
        loss = self._loss(move.mean, other, move.std, self._carried.adjoints[sample, at])
        with torch.no_grad():
            noisy = move.std > 0
            log_prob = gaussian.log_prob(drawn, move.mean, torch.where(noisy, move.std, 1.0))
            log_ratio = torch.where(noisy.flatten(), log_prob - before.log_probs[sample, step], 0.0)
            deviation, approx_kl = (log_ratio.exp() - 1).abs().max(), 0.5 * log_ratio.square().mean()
        return Term(loss, move, approx_kl, torch.zeros_like(approx_kl), deviation)
