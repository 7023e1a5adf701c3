"""Potential-based diversity shaping: a bonus for images that differ from the rest of their group.

All functions take distances or potentials, never images. Source: DRIFT (arXiv 2601.12401) for the intra-group
diversity, the clip at 1, the ratio 0.5 and the decoupled advantages; Ng, Harada and Russell (ICML 1999) for
shaping by potentials.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from driftrl.checks import InputError, at_least, has_shape


class DiversityWarning(UserWarning):
    """The diversity of a group is zero or constant, so its intrinsic reward has nothing to say."""


# Distances such as 1 - cosine are of order one and carry rounding of that order even where they are tiny.
_ROUNDING_ERRORS = 8.0


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


def intrinsic_advantage(diversity: Tensor, clip: float = 1.0) -> Tensor:
    """Intrinsic advantage ``clip((d - mean d) / std d, -clip, clip)`` over each group.

    The standard deviation is the population one. Where it vanishes (at most 8 rounding errors of
    ``max(1, max |d|)``, the distances being of order one) the advantage is zero and one ``DiversityWarning``
    covers all such groups; that check is the only moment the host waits for the device.

    Args:
        diversity: [P, G], or [P, G, T] to standardise each denoising step on its own.
        clip: bound on the magnitude, at least 0.

    Returns:
        The shape and dtype of ``diversity``.

    Raises:
        InputError: for another shape or a clip below 0.

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
    has_shape("diversity", diversity, "[P, G, T]" if diversity.dim() == 3 else "[P, G]")
    wide = torch.float32 if diversity.device.type == "mps" else torch.float64  # MPS has no float64
    values = diversity.to(wide)
    centred = values - values.mean(dim=1, keepdim=True)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    magnitude = values.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    vanishes = std <= _ROUNDING_ERRORS * torch.finfo(diversity.dtype).eps * magnitude
    if bool(vanishes.any()):
        warnings.warn(
            f"the diversity of {int(vanishes.sum())} of {vanishes.numel()} groups is constant "
            f"(mean {float(values.mean()):.3g}): their intrinsic advantage is 0. All images alike, or an "
            "encoder that cannot tell them apart?",
            DiversityWarning,
            stacklevel=2,
        )
    standardised = torch.where(vanishes, 0.0, centred / torch.where(vanishes, 1.0, std))
    return standardised.clamp(-clip, clip).to(diversity.dtype)


def shape_advantages(advantages: Tensor, intrinsic: Tensor, ratio: float = 0.5) -> Tensor:
    """Decoupled shaping, DRIFT's default: ``A + ratio * A_int``.

    Args:
        advantages: [P, G].
        intrinsic: [P, G], or [P, G, T] for one value per denoising step.
        ratio: lambda, at least 0.

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
    at_least("ratio", ratio, 0.0)
    has_shape("advantages", advantages, "[P, G]")
    if intrinsic.dim() not in (2, 3) or intrinsic.shape[:2] != advantages.shape:
        raise InputError(
            f"intrinsic: expected {list(advantages.shape)}, or that and a last dimension for steps; "
            f"got {list(intrinsic.shape)}"
        )
    return (advantages if intrinsic.dim() == 2 else advantages.unsqueeze(-1)) + ratio * intrinsic


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
    if diversity.shape != rewards.shape:
        raise InputError(f"diversity: expected shape {list(rewards.shape)}; got {list(diversity.shape)}")
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
    has_shape("potentials", potentials, "[P, G, T + 1]")
    steps = potentials.shape[-1] - 1
    if steps < 1:
        raise InputError(f"potentials: expected at least two along the last dimension; got {steps + 1}")
    if not 0.0 <= gamma <= 1.0:
        raise InputError(f"gamma: expected 0 to 1; got {gamma}")
    before, after = potentials[..., :-1], potentials[..., 1:]
    discount = gamma ** torch.arange(steps, 0, -1, device=potentials.device, dtype=potentials.dtype)
    return gamma * after - before, discount * potentials[..., -1:] - before
