"""Losses that follow a gradient in the picture, carried back along the path that it was drawn on: adjoint matching, and DRaFT.

A picture is drawn by ``x_{t-1} = mu_t(x_t) + std_t eps_t``. With the noise as it was drawn, the gradient of what is wanted of x_0
reaches every x_t by the Jacobians of the means; what arrives there is called the adjoint. No ratio of densities is asked for, and no
comparison of pictures; but the reward must be differentiable.

Losses are sums over latent dimensions, in units of the reward or in nats, not means as elsewhere: a gradient of one reward in a mean over
65,536 dimensions would vanish beside Adam's epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, same_shape


class PathwiseLoss(Protocol):
    """How a policy follows adjoints."""

    @property
    def by_reference(self) -> bool:
        """Whether the reference's Jacobians carry the gradient back, and its means are asked for, or the policy that drew, whose are not."""
        ...

    def learned(self, scored: Tensor) -> Tensor:
        """The denoising steps, bool [T], that may be learned from, of which ``scored`` ones have noise."""
        ...

    def __call__(self, mean: Tensor, before: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
        """The loss [n] of means [n, ...] of the policy, with gradient, and adjoints of x_{t-1}; ``before`` is the reference's mean, or
        x_{t-1} as it was drawn.
        """
        ...


@dataclass(frozen=True)
class AdjointMatching:
    """`adjoint_matching` by the base model's Jacobians."""

    scale: float = 1.0
    """What the adjoint is multiplied by: with advantages in units of a standard deviation, nats for each."""

    by_reference = True

    def learned(self, scored: Tensor) -> Tensor:
        """Those with noise."""
        return scored

    def __call__(self, mean: Tensor, before: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
        """`adjoint_matching`."""
        return adjoint_matching(mean, before, std, self.scale * adjoint)


@dataclass(frozen=True)
class DirectReward:
    """DRaFT-K: the gradient of the reward through the last denoising steps."""

    steps: int = 1
    """K."""

    by_reference = False

    def learned(self, scored: Tensor) -> Tensor:
        """The last K, whether they have noise or not."""
        step = torch.arange(len(scored), device=scored.device)
        return step >= len(scored) - self.steps

    def __call__(self, mean: Tensor, before: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
        """`direct_reward`."""
        return direct_reward(mean, before, adjoint)


def adjoint_matching(mean: Tensor, mean_ref: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
    """``1/2 |(mean - mean_ref) / std - std a|^2``, the **sum** over all dimensions but the first: nats of a whole latent.

    Its minimum is ``mean = mean_ref + std^2 a``. Where a is the gradient of ``s r(x_0)`` carried back by the reference's means, that is
    the stationary point of ``s E[r] - KL(policy || reference)`` over whole paths: with noise that makes x_0 independent of x_T
    (memoryless: DDIM with an eta of 1, a flow's SDE with a noise level of sqrt 2) the base model times ``exp(s r)``.

    Args:
        mean: [n, ...], of the policy's transitions, with gradient.
        mean_ref: [n, ...], of the reference's, from the same latents.
        std: [n] or [n, 1, ..., 1], of both; positive.
        adjoint: [n, ...], of what the transitions end in. No gradient flows into it, nor into the reference.

    Returns:
        [n]; float32, or float64 if a mean is.

    Raises:
        InputError: if shapes do not agree.

    Source: "Adjoint Matching" (arXiv 2409.08861), eq. 37 to 39: the loss with lean adjoints, here of discrete transitions, for which
    ``(mean - mean_ref) / std`` is the control times the root of the step's duration.

    Example:
        >>> import torch
        >>> from driftrl.objectives.pathwise import adjoint_matching
        >>> base, a, std = torch.zeros(1, 4), torch.full((1, 4), 3.0), torch.tensor([0.5])
        >>> adjoint_matching(base, base, std, a), adjoint_matching(base + 0.75, base, std, a)
        (tensor([4.5000]), tensor([0.]))
    """
    same_shape("mean_ref", mean_ref, "mean", mean)
    same_shape("adjoint", adjoint, "mean", mean)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = std.detach().to(dtype).reshape(-1)
    if scale.shape != mean.shape[:1]:
        raise InputError(f"std: expected {len(mean)} numbers, one per transition; got {list(std.shape)}")
    scale = scale.view(-1, *(1,) * (mean.dim() - 1))
    moved = (mean.to(dtype) - mean_ref.detach().to(dtype)) / scale
    return (0.5 * (moved - scale * adjoint.detach().to(dtype)).square()).flatten(1).sum(1)


def direct_reward(mean: Tensor, drawn: Tensor, adjoint: Tensor) -> Tensor:
    """``-<mean - x, a>``, the **sum** over all dimensions but the first: to first order what is gained by this step's move.

    Where the policy is the one that drew, the gradient of its sum over the last K steps is that of the negative reward by
    backpropagation through them.

    Args:
        mean: [n, ...], of the policy's transitions, with gradient.
        drawn: [n, ...], what the transitions ended in, x_{t-1}; only the loss's value depends on it.
        adjoint: [n, ...], the gradient there, carried back by the policy that drew.

    Returns:
        [n]; float32, or float64 if a mean is.

    Raises:
        InputError: if shapes do not agree.

    Source: DRaFT-K (arXiv 2309.17400, section 4.1) and AlignProp (arXiv 2310.03739), which backpropagate through K steps at once;
    here step by step, so that memory does not grow with K.

    Example:
        >>> import torch
        >>> from driftrl.objectives.pathwise import direct_reward
        >>> direct_reward(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([[4.0, -1.0]]))
        tensor([-2.])
    """
    same_shape("drawn", drawn, "mean", mean)
    same_shape("adjoint", adjoint, "mean", mean)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    moved = mean.to(dtype) - drawn.detach().to(dtype)
    return -(moved * adjoint.detach().to(dtype)).flatten(1).sum(1)


def slope(values: Tensor, standardised: Tensor) -> Tensor:
    """What a unit of ``values`` is worth in ``standardised``, by group: the slope of the line through them.

    Of advantages over rewards it is one over whatever divides them, for an advantage is an affine function of the reward once means
    and standard deviations are held.

    Args:
        values: [P, G].
        standardised: [P, G].

    Returns:
        float64 [P] (float32 on MPS); 0 where the values are all equal.

    Raises:
        InputError: if shapes do not agree.

    Example:
        >>> import torch
        >>> from driftrl.objectives.pathwise import slope
        >>> slope(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
        tensor([1., 0.], dtype=torch.float64)
    """
    has_shape("values", values, "[P, G]")
    same_shape("standardised", standardised, "values", values)
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    x, y = (part.to(wide) - part.to(wide).mean(1, keepdim=True) for part in (values, standardised))
    spread = x.square().sum(1)
    return torch.where(spread > 0, (x * y).sum(1) / torch.where(spread > 0, spread, 1.0), 0.0)
