"""Potential-based diversity shaping: a bonus for images that differ from the rest of their group.

All functions take distances or potentials, never images. Source: DRIFT (arXiv 2601.12401) for the intra-group
diversity, the clip at 1, the ratio 0.5 and the decoupled advantages; Ng, Harada and Russell (ICML 1999) for
shaping by potentials. Its competitors differ in what they measure and in where the bonus enters: docs/methods.md.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import (
    InputError,
    at_least,
    floating,
    has_shape,
    is_finite,
    is_tensor,
    one_of,
    safe_unit,
    same_shape,
    whole_number,
)
from driftrl.clusters import cluster_sizes, spectral_clusters

MEASURES: tuple[str, ...] = ("pairwise", "nearest", "entropy", "clusters")
LEVELS: tuple[str, ...] = ("advantage", "reward", "multiply")
POTENTIALS: tuple[str, ...] = ("terminal", "stepwise")


class DiversityWarning(UserWarning):
    """The diversity of a group is zero or constant, so its intrinsic reward has nothing to say."""


# Distances such as 1 - cosine are of order one and carry rounding of that order even where they are tiny.
_ROUNDING_ERRORS = 8.0
# Numbers that are handed over in half precision were computed in more, and are rounded once, by their own size.
_HALF = 1e-6


@dataclass(frozen=True)
class Shaping:
    """What is measured of a group's variety, and where it enters."""

    ratio: float = 0.5
    """Lambda; 0 switches shaping off."""
    clip: float = 1.0
    """Sigma: bound on the intrinsic advantage, or on the bonus at level ``reward``."""
    level: str = "advantage"
    """One of ``LEVELS``."""
    measure: str = "pairwise"
    """One of ``MEASURES``."""
    neighbors: int = 1
    """k of the measures ``nearest`` and ``entropy``."""
    clusters: int = 3
    """Of the measure ``clusters``: how many a group is split into."""
    potential: str = "terminal"
    """One of ``POTENTIALS``."""
    gamma: float = 1.0
    """Discount of the potential ``stepwise``."""
    target: float | None = None
    """Share of the base model's diversity to keep of each prompt: lambda rises above ``ratio`` for it (`driftrl.multipliers`). None: it stays."""
    target_rate: float = 0.1
    """How fast."""

    @property
    def on(self) -> bool:
        """Whether anything is added."""
        return self.ratio > 0 or self.target is not None


def diversity_bonus(distances: Tensor, shaping: Shaping) -> Tensor:
    """What each image, or each of its steps, adds to its group's variety.

    Args:
        distances: [P, G, G] between the images of each group; for the potential ``stepwise`` [P, T + 1, G, G]
            between its predicted clean latents at x_T, ..., x_0.
        shaping: the measure, and the potential.

    Returns:
        [P, G]; for ``stepwise`` [P, G, T]: every step's return (`stepwise_intrinsic`). Zeros if the ratio is 0.

    Raises:
        InputError: for another shape, or as `novelty` does.
    """
    one_of("potential", shaping.potential, POTENTIALS)
    if shaping.potential == "terminal":
        has_shape("distances", distances, "[P, G, G]")
        return novelty(distances, shaping) if shaping.on else torch.zeros_like(distances[..., 0])
    has_shape("distances", distances, "[P, T + 1, G, G]")
    if not shaping.on:
        return torch.zeros_like(distances[:, 1:, :, 0]).mT
    potentials = novelty(distances.flatten(0, 1), shaping).unflatten(0, distances.shape[:2]).mT
    return stepwise_intrinsic(potentials, shaping.gamma)[1]


def novelty(distances: Tensor, shaping: Shaping) -> Tensor:
    """How much each image differs from the others of its group, [P, G], for distances [P, G, G].

    - ``pairwise``: the mean distance to the others (DRIFT; `group_diversity`).
    - ``nearest``: the distance to the k-th nearest other (GARDO, arXiv 2512.24138, with k = 1).
    - ``entropy``: the logarithm of that distance (`entropy_share`).
    - ``clusters``: one over the size of the image's cluster (DiverseGRPO, arXiv 2512.21514): 1 for an image
      that is alone in its way, 1/G for all of a group of one cluster.

    Raises:
        InputError: for another shape, an unknown measure, or k above G - 1.
    """
    one_of("measure", shaping.measure, MEASURES)
    if shaping.measure == "pairwise":
        return group_diversity(distances)
    if shaping.measure == "nearest":
        return nearest_distance(distances, shaping.neighbors)
    if shaping.measure == "entropy":
        return entropy_share(distances, shaping.neighbors)
    return cluster_sizes(spectral_clusters(distances, shaping.clusters)).to(distances.dtype).reciprocal()


def shape_at_reward(rewards: Tensor, bonus: Tensor, shaping: Shaping) -> Tensor:
    """The rewards [P, G], with the bonus [P, G] if it enters there; else, or with ratio 0, as they are.

    Warns:
        DiversityWarning: if some group's bonus is constant once it is clipped, so that it decides nothing. Not for the measure
            ``clusters``, whose clusters may well be of one size.
    """
    if one_of("level", shaping.level, LEVELS) != "reward" or shaping.ratio == 0:
        return rewards
    if shaping.measure != "clusters":
        at_least("clip", shaping.clip, 0.0)
        _warn_of_constant(is_tensor("bonus", bonus), clip=shaping.clip)
    return shape_rewards(rewards, bonus, shaping.ratio, shaping.clip)


def shape_at_advantage(
    advantages: Tensor,
    bonus: Tensor,
    shaping: Shaping,
    scored: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """The advantages [P, G], with the bonus [P, G] or [P, G, T] if it enters there; else, or with ratio 0, as
    they are. Of the steps only ``scored`` ones (bool [T], None for all) get a bonus: the last one is often exact,
    so that its return is 0 for everyone. ``ratio`` [P] is each group's own lambda; by default all have that of ``shaping``.

    Raises:
        InputError: if ``bonus`` has a value for each step and ``scored`` is not [T], or as the functions do that it calls.

    Warns:
        DiversityWarning: if some group's bonus is constant, so that it decides nothing. At level ``multiply`` not for the
            measure ``clusters``, whose clusters may well be of one size: then all advantages stay.
    """
    if one_of("level", shaping.level, LEVELS) == "reward" or not shaping.on:
        return advantages
    if shaping.level == "multiply":
        if shaping.measure != "clusters":
            _warn_of_constant(bonus)
        return reweight_above_average(advantages, bonus, shaping.ratio)
    own = shaping.ratio if ratio is None else ratio
    if is_tensor("bonus", bonus).dim() == 2 or scored is None:
        return shape_advantages(advantages, intrinsic_advantage(bonus, shaping.clip), own)
    has_shape("bonus", bonus, "[P, G, T]")
    if has_shape("scored", scored, "[T]").shape != bonus.shape[2:]:
        raise InputError(f"scored: expected one per step, [{bonus.shape[2]}]; got {list(scored.shape)}")
    steps = scored.nonzero()[:, 0]
    intrinsic = intrinsic_advantage(bonus[..., steps], shaping.clip)
    spread = torch.zeros_like(bonus).index_copy(2, steps, intrinsic)
    return shape_advantages(advantages, spread, own)


def shaping_weight(plain: Tensor, shaped: Tensor, scored: Tensor | None = None) -> float:
    """How much shaping weighs beside the reward: the mean magnitude of what it changes in the advantages, over theirs without it.

    Above 1 it asks for more than the reward does, so that the reward soon rests. With an own standard deviation of each group
    (`driftrl.advantages.group_relative`, ``selected``) and the level ``advantage`` it is about lambda; with one of the whole batch it is larger where
    prompts differ more from each other than the images of a prompt do.

    Args:
        plain: [P, G], the advantages of the rewards alone.
        shaped: [P, G] or, by step, [P, G, T].
        scored: bool [T], the steps that count; None for all.

    Returns:
        0 where nothing was changed; nan where something was and the rewards' own advantages are all 0.

    Example:
        >>> import torch
        >>> from driftrl.shaping import shaping_weight
        >>> shaping_weight(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]]))
        0.5
    """
    if shaped.dim() == 3:
        shaped = shaped if scored is None else shaped[..., scored]
        plain = plain.unsqueeze(-1)
    changed, own = float((shaped - plain).abs().mean()), float(plain.abs().mean())
    return changed / own if own > 0 else (math.nan if changed > 0 else 0.0)


def group_diversity(distances: Tensor) -> Tensor:
    """How far each image is from the others of its group: ``d_i = mean over j != i of D(x_i, x_j)``.

    Args:
        distances: [P, G, G], between the images of each group; the diagonal is ignored, whatever it holds.

    Returns:
        [P, G], in the unit of the distances. A group of one has diversity 0.

    Raises:
        InputError: if ``distances`` is not [P, G, G].

    Example:
        >>> import torch
        >>> from driftrl.shaping import group_diversity
        >>> group_diversity(torch.tensor([[[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]]]))
        tensor([[2.0000, 1.5000, 2.5000]])
    """
    has_shape("distances", distances, "[P, G, G]")
    group = distances.shape[-1]
    if distances.shape[-2] != group:
        raise InputError(f"distances: expected shape [P, G, G]; got {list(distances.shape)}")
    diagonal = torch.eye(group, dtype=torch.bool, device=distances.device)
    return distances.masked_fill(diagonal, 0.0).sum(dim=-1) / max(group - 1, 1)


def nearest_distance(distances: Tensor, k: int = 1) -> Tensor:
    """Distance of each image to the k-th nearest of the others.

    Args:
        distances: [P, G, G]; the diagonal is ignored.
        k: 1 to G - 1.

    Returns:
        [P, G].

    Raises:
        InputError: for another shape, distances that are not finite, or k outside 1 .. G - 1.

    Example:
        >>> import torch
        >>> from driftrl.shaping import nearest_distance
        >>> nearest_distance(torch.tensor([[[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]]]))
        tensor([[1., 1., 2.]])
    """
    has_shape("distances", distances, "[P, G, G]")
    group = distances.shape[-1]
    if distances.shape[-2] != group:
        raise InputError(f"distances: expected shape [P, G, G]; got {list(distances.shape)}")
    if group < 2:
        raise InputError(f"distances: expected groups of at least two; got {list(distances.shape)}")
    k = whole_number("k", k)
    if not 1 <= k < group:
        raise InputError(f"k: expected 1 to {group - 1}, the others of a group; got {k}")
    diagonal = torch.eye(group, dtype=torch.bool, device=distances.device)
    # NaN counts as the largest, so that the diagonal would be taken before it.
    is_finite("distances", distances.masked_fill(diagonal, 0.0))
    return floating(distances).masked_fill(diagonal, torch.inf).topk(k, dim=-1, largest=False).values[..., -1]


def entropy_share(distances: Tensor, k: int = 1, floor: float = 1e-3) -> Tensor:
    """What each image adds to the nearest-neighbour estimate of its group's entropy: ``log r_i``.

    The Kozachenko-Leonenko estimate in m dimensions is a constant plus ``m / G sum_i log r_i``, r_i the distance
    to the k-th nearest neighbour; constant and factor drop out where the bonus is standardised. ``r`` is the
    Euclidean distance of features of length 1, ``sqrt(2 D)`` for D = 1 - cosine.

    Args:
        distances: [P, G, G], each 1 - cosine.
        k: 1 to G - 1.
        floor: least r: two images alike would be worth minus infinity.

    Returns:
        [P, G], in nats per dimension.

    Raises:
        InputError: as `nearest_distance`, or for a floor of 0 or less.

    Source: Kozachenko and Leonenko, Problems of Information Transmission 23 (1987); as a bonus on features, Seo
    et al., "State entropy maximization with random encoders" (arXiv 2102.09430). The floor is ours.
    """
    if not floor > 0:
        raise InputError(f"floor: expected more than 0; got {floor}")
    # Clamped before the root, whose gradient at 0 is infinite.
    return (2.0 * nearest_distance(distances, k)).clamp(min=floor**2).sqrt().log()


def intrinsic_advantage(diversity: Tensor, clip: float = 1.0) -> Tensor:
    """Intrinsic advantage ``clip((d - mean d) / std d, -clip, clip)`` over each group.

    The standard deviation is the population one. Where it vanishes (at most 8 rounding errors of
    ``max(1, max |d|)``, the distances being of order one; in half precision one of ``max |d|``) the advantage is zero and one ``DiversityWarning``
    covers all such groups; the checks are the only moments the host waits for the device. Arithmetic is in float64, in a unit
    in which no square overflows.

    Args:
        diversity: [P, G], or [P, G, T] to standardise each denoising step on its own.
        clip: bound on the magnitude, at least 0.

    Returns:
        The shape and dtype of ``diversity``.

    Raises:
        InputError: for another shape, values that are not finite, or a clip below 0.

    Warns:
        DiversityWarning: if some group's diversity is constant (all images alike, say).

    Source: arXiv 2601.12401 (diversity reward clipped at sigma = 1.0).

    Example:
        >>> import torch
        >>> from driftrl.shaping import intrinsic_advantage
        >>> intrinsic_advantage(torch.tensor([[0.25, 0.5, 0.75, 0.5]]))
        tensor([[-1.,  0.,  1.,  0.]])
    """
    at_least("clip", clip, 0.0)
    values, std, vanishes = _spread(diversity)
    _warn_of_constant(diversity, vanishes)
    centred = values - values.mean(dim=1, keepdim=True)
    standardised = torch.where(vanishes, 0.0, centred / torch.where(vanishes, 1.0, std))
    return standardised.clamp(-clip, clip).to(floating(diversity).dtype)


def constant_diversity(diversity: Tensor) -> Tensor:
    """Which groups' values differ by no more than rounding, as `intrinsic_advantage` has it: bool [P], or [P, T].

    Args:
        diversity: [P, G], or [P, G, T].

    Raises:
        InputError: for another shape, or values that are not finite.

    Example:
        >>> import torch
        >>> from driftrl.shaping import constant_diversity
        >>> constant_diversity(torch.tensor([[0.25, 0.25, 0.25], [0.25, 0.5, 0.75]]))
        tensor([ True, False])
    """
    return _spread(diversity)[2][:, 0]


def _spread(diversity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values in a unit of their group's, population standard deviations [P, 1] or [P, 1, T] in the same unit, and whether
    they are rounding.
    """
    by_step = is_tensor("diversity", diversity).dim() == 3
    is_finite("diversity", has_shape("diversity", diversity, "[P, G, T]" if by_step else "[P, G]"))
    wide = torch.float32 if diversity.device.type == "mps" else torch.float64  # MPS has no float64
    precision = torch.finfo(diversity.dtype if diversity.is_floating_point() else wide).eps
    values = diversity.to(wide)
    if diversity.numel() == 0:
        nothing = values.sum(dim=1, keepdim=True)
        return values, nothing, nothing > 0
    magnitude = values.detach().abs().amax(dim=1, keepdim=True)
    largest = magnitude if precision > _HALF else magnitude.clamp(min=1.0)
    unit = safe_unit(largest)
    values = values / unit
    std = values.std(dim=1, keepdim=True, correction=0)
    return values, std, std <= (1.0 if precision > _HALF else _ROUNDING_ERRORS) * precision * (largest / unit)


def _warn_of_constant(diversity: Tensor, vanishes: Tensor | None = None, clip: float | None = None) -> None:
    """Warn if some group's values are constant, once they are clipped if a ``clip`` is given."""
    given = diversity
    if clip is not None:
        diversity = diversity.clamp(-clip, clip)
    vanishes = _spread(diversity)[2] if vanishes is None else vanishes
    if bool(vanishes.any()):
        steps = " and steps" if vanishes.dim() == 3 else ""
        if clip is not None and not bool(_spread(given)[2][vanishes].all()):
            why = f"Clipped to {clip:g}, what differed is the same: a larger shaping.clip would leave a difference"
        elif diversity.shape[1] == 2:
            why = "Of two images each is as far from the other: keep three or more"
        else:
            why = "All images alike, or an encoder that cannot tell them apart?"
        warnings.warn(
            f"the diversity of {int(vanishes.sum())} of {vanishes.numel()} groups{steps} is constant "
            f"(mean {float(diversity.detach().float().mean()):.3g}): it decides nothing there. {why}",
            DiversityWarning,
            stacklevel=3,
        )


def shape_advantages(advantages: Tensor, intrinsic: Tensor, ratio: float | Tensor = 0.5) -> Tensor:
    """Decoupled shaping, DRIFT's default: ``A + ratio * A_int``.

    Args:
        advantages: [P, G].
        intrinsic: [P, G], or [P, G, T] for one value per denoising step.
        ratio: lambda, at least 0; or [P], one for each group.

    Returns:
        The shape of ``intrinsic``.

    Raises:
        InputError: if the shapes do not agree or ``ratio`` is below 0.

    Example:
        >>> import torch
        >>> from driftrl.shaping import shape_advantages
        >>> shape_advantages(torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 1.0]]))
        tensor([[ 0.5000, -0.5000]])
    """
    has_shape("advantages", advantages, "[P, G]")
    if isinstance(ratio, Tensor):
        if has_shape("ratio", ratio, "[P]").shape != advantages.shape[:1] or not bool((ratio >= 0).all()):
            raise InputError(f"ratio: expected {len(advantages)} numbers of at least 0; got {ratio.tolist()}")
    else:
        at_least("ratio", ratio, 0.0)
    if is_tensor("intrinsic", intrinsic).dim() not in (2, 3) or intrinsic.shape[:2] != advantages.shape:
        raise InputError(
            f"intrinsic: expected {list(advantages.shape)}, or that and a last dimension for steps; "
            f"got {list(intrinsic.shape)}"
        )
    if isinstance(ratio, Tensor):
        ratio = ratio.to(intrinsic).view(-1, *(1,) * (intrinsic.dim() - 1))
    return (advantages if intrinsic.dim() == 2 else advantages.unsqueeze(-1)) + ratio * intrinsic


def reweight_above_average(advantages: Tensor, novelty: Tensor, ratio: float = 1.0) -> Tensor:
    """Positive advantages are multiplied by how novel the image is; the others stay: ``A * w`` where A > 0.

    ``w = 1 + ratio (n / mean n - 1)``, at least 0, with the mean over the group. So a bad image gains nothing by
    being different, and no bonus can outweigh the reward. A group that is equally novel throughout, or not at
    all, keeps its advantages.

    Args:
        advantages: [P, G].
        novelty: [P, G], at least 0.
        ratio: 1 is the published rule, 0 leaves everything as it is.

    Returns:
        [P, G].

    Raises:
        InputError: if the shapes do not agree or ``ratio`` is below 0.

    Source: GARDO (arXiv 2512.24138), with the novelty ``nearest``; the mean as the unit is that of its
    published code, ``ratio`` is ours.

    Example:
        >>> import torch
        >>> from driftrl.shaping import reweight_above_average
        >>> reweight_above_average(torch.tensor([[1.0, 1.0, -2.0]]), torch.tensor([[3.0, 1.0, 2.0]]))
        tensor([[ 1.5000,  0.5000, -2.0000]])
    """
    at_least("ratio", ratio, 0.0)
    has_shape("advantages", advantages, "[P, G]")
    same_shape("novelty", novelty, "advantages", advantages)
    advantages, novelty = floating(advantages), floating(novelty)
    mean = novelty.mean(dim=1, keepdim=True)
    precision = torch.finfo(novelty.dtype).eps
    vanishes = mean <= (0.0 if precision > _HALF else _ROUNDING_ERRORS * precision)
    relative = torch.where(vanishes, 1.0, novelty / torch.where(vanishes, 1.0, mean))
    weight = (1.0 + ratio * (relative - 1.0)).clamp(min=0.0)
    return torch.where(advantages > 0, advantages * weight.to(advantages.dtype), advantages)


def shape_rewards(rewards: Tensor, diversity: Tensor, ratio: float = 0.5, clip: float = 1.0) -> Tensor:
    """Reward-level shaping, the alternative: ``R + ratio * clip(d, -clip, clip)``, before normalising.

    The bonus is in the reward's unit, so ``ratio`` has to be set anew for every reward; the decoupled
    ``shape_advantages`` does not have this fault.

    Args:
        rewards: [P, G].
        diversity: [P, G], from ``group_diversity``.
        ratio: lambda, at least 0, in reward units per unit of distance.
        clip: bound on the diversity, at least 0.

    Returns:
        [P, G].

    Raises:
        InputError: if the shapes do not agree, or ``ratio`` or ``clip`` is below 0.

    Example:
        >>> import torch
        >>> from driftrl.shaping import shape_rewards
        >>> shape_rewards(torch.tensor([[5.0, 5.0]]), torch.tensor([[0.4, 1.6]]))
        tensor([[5.2000, 5.5000]])
    """
    at_least("ratio", ratio, 0.0)
    at_least("clip", clip, 0.0)
    has_shape("rewards", rewards, "[P, G]")
    same_shape("diversity", diversity, "rewards", rewards)
    return rewards + ratio * diversity.clamp(-clip, clip)


def stepwise_intrinsic(potentials: Tensor, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Shaping rewards of every denoising step and what they add up to from there on.

    Index k = 0 .. T runs as sampling does: potential 0 is at x_T (noise), potential T at x_0 (the image).
    The step from k to k + 1 earns ``F_k = gamma * Phi_{k+1} - Phi_k``; its return telescopes to
    ``sum_{j >= k} gamma^(j-k) F_j = gamma^(T-k) Phi_T - Phi_k``. Potentials that are zero before x_0 (the
    ``terminal`` setting) therefore give every step of an undiscounted trajectory the same return, Phi_T.

    Args:
        potentials: [P, G, T + 1], at x_T, ..., x_0.
        gamma: discount, 0 to 1.

    Returns:
        ``(step_rewards, returns)``, each [P, G, T].

    Raises:
        InputError: for another shape, no step (T = 0), or gamma outside 0 .. 1.

    Source: Ng, Harada and Russell, "Policy invariance under reward transformations", ICML 1999, eq. 2.

    Example:
        >>> import torch
        >>> from driftrl.shaping import stepwise_intrinsic
        >>> step_rewards, returns = stepwise_intrinsic(torch.tensor([[[0.0, 2.0, 3.0]]]))
        >>> step_rewards.tolist(), returns.tolist()
        ([[[2.0, 1.0]]], [[[3.0, 1.0]]])
    """
    potentials = floating(has_shape("potentials", potentials, "[P, G, T + 1]"))
    steps = potentials.shape[-1] - 1
    if steps < 1:
        raise InputError(f"potentials: expected at least two along the last dimension; got {steps + 1}")
    if not 0.0 <= gamma <= 1.0:
        raise InputError(f"gamma: expected 0 to 1; got {gamma}")
    before, after = potentials[..., :-1], potentials[..., 1:]
    # Powers in Python's own floats: in half precision gamma itself would be rounded first.
    discount = torch.tensor(
        [gamma**left for left in range(steps, 0, -1)], device=potentials.device, dtype=potentials.dtype
    )
    return gamma * after - before, discount * potentials[..., -1:] - before
