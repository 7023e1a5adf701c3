"""Group preference (DGPO): a prompt's good images against its bad ones, as DPO sets one image against another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, same_shape
from driftrl.objectives.advantage_weighted import velocity_error
from driftrl.objectives.clipped_surrogate import ClippedSurrogate, ratio_of


@dataclass(frozen=True)
class GroupPreference:
    """Settings of the loss."""

    beta: float = 100.0
    """How sharply a group that is preferred already counts less."""
    clip_range: float = 0.01
    """Of the ratio beyond which an image is no longer learned from."""

    own_behavior = True
    """Whether samples are drawn by the trained policy itself."""
    of_network = True
    """Whether errors are those of what the network predicts, velocity or noise."""
    in_groups = True
    """Whether a prompt's samples go together: at the same steps, with the same noise, weighed by what all of them say."""
    anchor_kept = 0.0
    """There is no average that it is held to."""

    def kept(self, iteration: int) -> float:
        """What the copy of the policy that drew keeps of itself after ``iteration``: nothing."""
        return 0.0

    def weights(self, error: Tensor, reference: Tensor, advantages: Tensor) -> Tensor:
        """`group_weights` by these settings."""
        return group_weights(error, reference, advantages, self.beta)

    def __call__(
        self,
        x0_hat: Tensor,
        x0_old: Tensor,
        x0: Tensor,
        sigma: Tensor,
        advantages: Tensor,
        x0_anchor: Tensor | None = None,
    ) -> ClippedSurrogate:
        """`group_preference` by these settings, of advantages that the group's weight is in."""
        return group_preference(x0_hat, x0_old, x0, sigma, advantages, self.clip_range)


def group_weights(error: Tensor, reference: Tensor, advantages: Tensor, beta: float = 100.0) -> Tensor:
    """How much is left to learn from each group: ``sigmoid(beta mean_g A (e - e_ref))``.

    The loss of a group is DPO's, of all its images at once: ``-log sigmoid(-s)`` with ``s = beta mean_g A (e - e_ref)``, whose gradient
    is ``beta sigmoid(s) mean_g A grad e``. Good images that are predicted better than by the reference, and bad ones worse, make s
    negative: the group is preferred as it should be, and counts less. At the reference itself every group has 1/2.

    Args:
        error: [P, G], e: the mean squared error of what is predicted of each image (`velocity_error`), of the policy.
        reference: [P, G], of the reference, at the same noise. No gradient flows through either.
        advantages: [P, G], A.
        beta: above 0.

    Returns:
        [P], from 0 to 1; float32, or float64 if an input is.

    Raises:
        InputError: if shapes do not agree, or beta is not above 0 and finite.

    Source: DGPO, arXiv 2510.08425, as its published code has it: the mean over the group, and the reward's advantages as weights. With two
    images of a prompt, one of advantage 1 and one of -1, it is Diffusion-DPO (arXiv 2311.12908) of pairs that the policy drew.

    Example:
        >>> import torch
        >>> from driftrl.objectives.group_preference import group_weights
        >>> advantages = torch.tensor([[1.0, -1.0]])
        >>> group_weights(torch.tensor([[0.1, 0.3]]), torch.tensor([[0.2, 0.2]]), advantages, beta=10.0)
        tensor([0.2689])
    """
    if not 0 < beta < math.inf:
        raise InputError(f"beta: expected more than 0, and a finite number; got {beta}")
    has_shape("error", error, "[P, G]")
    same_shape("reference", reference, "error", error)
    same_shape("advantages", advantages, "error", error)
    dtype = torch.promote_types(torch.promote_types(error.dtype, reference.dtype), advantages.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    gained = error.detach().to(dtype) - reference.detach().to(dtype)
    return (beta * (advantages.detach().to(dtype) * gained).mean(1)).sigmoid()


def group_preference(
    x0_hat: Tensor,
    x0_old: Tensor,
    x0: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    clip_range: float = 0.01,
) -> ClippedSurrogate:
    """The pretraining loss of drawn images, ``A e``, weighed by advantages that have their group's weight (`group_weights`) in them.

    An image whose error has fallen, or risen where it is bad, so far that the ratio ``exp(e_old - e)`` leaves ``clip_range``, gives
    no gradient: the published code's clip, after PPO's. Its loss is still counted.

    Args:
        x0_hat: [N, ...], predicted by the policy that is trained, with gradient.
        x0_old: [N, ...], by the policy that drew; no gradient flows into it.
        x0: [N, ...], the clean latents that were drawn.
        sigma: [N], the noise's share of the noised latents; of a network that predicts the noise, that over the signal's
            (`velocity_error`).
        advantages: [N], each times the weight of its group.
        clip_range: above 0.

    Returns:
        Loss per pair and diagnostics, of the ratio.

    Raises:
        InputError: if shapes do not agree, or clip_range is not above 0.

    Source: DGPO, arXiv 2510.08425; the clip is that of its published code.

    Example:
        >>> import torch
        >>> from driftrl.objectives.group_preference import group_preference
        >>> old, drawn = torch.zeros(2, 1), torch.ones(2, 1)
        >>> group_preference(old, old, drawn, torch.ones(2), torch.tensor([0.5, -1.0])).loss
        tensor([ 0.5000, -1.0000])
    """
    if not clip_range > 0:
        raise InputError(f"clip_range: expected more than 0; got {clip_range}")
    error = velocity_error(x0_hat, x0.detach(), sigma)
    has_shape("advantages", advantages, "[N]")
    same_shape("advantages", advantages, "sigma", sigma)
    weight = advantages.detach().to(error.dtype)
    with torch.no_grad():
        log_ratio = velocity_error(x0_old, x0, sigma).to(error.dtype) - error
        ratio = ratio_of(log_ratio)
        above, below = ratio > 1 + clip_range, ratio < 1 - clip_range
        outside = (above | below).to(error.dtype).mean()
        gone = torch.where(weight > 0, above, below)
    loss = weight * torch.where(gone, error.detach(), error)
    return ClippedSurrogate(loss, ratio.mean(), outside, 0.5 * log_ratio.square().mean())
