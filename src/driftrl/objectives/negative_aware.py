"""Negative-aware fine-tuning (DiffusionNFT): good and bad images pull predictions on noised images two ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, same_shape
from driftrl.objectives.clipped_surrogate import ClippedSurrogate

SMALLEST = 1e-5
"""Of the error that a loss is divided by."""


@dataclass(frozen=True)
class NegativeAware:
    """Settings of the loss, and of the policy that draws."""

    beta: float = 1.0
    """How far the implicit policies stand from the one that drew: 1 makes the positive one the policy itself."""
    bound: float = 5.0
    """The advantage that is wholly good; its negative is wholly bad."""
    decay: float = 1.0
    """The policy that draws keeps ``min(decay * iteration, decay_max)`` of what it was after each update."""
    decay_max: float = 0.9

    @property
    def own_behavior(self) -> bool:
        """Whether samples are drawn by the trained policy itself."""
        return self.decay * self.decay_max == 0

    def kept(self, iteration: int) -> float:
        """What the policy that draws keeps of itself after ``iteration``, counted from 0 (eta_i in the paper)."""
        return min(self.decay * iteration, self.decay_max)

    of_network = False
    """Whether errors are those of what the network predicts: it has clean latents' alone."""
    in_groups = False
    """Whether a prompt's samples go together."""
    anchor_kept = 0.0
    """There is no average that it is held to."""

    def __call__(
        self,
        x0_hat: Tensor,
        x0_old: Tensor,
        x0: Tensor,
        sigma: Tensor,
        advantages: Tensor,
        x0_anchor: Tensor | None = None,
    ) -> ClippedSurrogate:
        """`negative_aware` by these settings, which has no ratio; as its drift half the mean squared distance of the predictions."""
        loss = negative_aware(x0_hat, x0_old, x0, advantages, self.beta, self.bound)
        with torch.no_grad():
            drift = 0.5 * (x0_hat - x0_old).square().mean()
        return ClippedSurrogate(loss, torch.ones_like(drift), torch.zeros_like(drift), drift)


def negative_aware(
    x0_hat: Tensor, x0_old: Tensor, x0: Tensor, advantages: Tensor, beta: float = 1.0, bound: float = 5.0
) -> Tensor:
    """Loss of predictions of the clean latents ``x0`` from noised ones, where ``advantages`` say how good x0 is.

    With ``r = 1/2 + clip(A / bound, -1, 1) / 2``, the probability that the image is a good one, and the two implicit
    policies ``x0+ = (1 - beta) x0_old + beta x0_hat`` and ``x0- = (1 + beta) x0_old - beta x0_hat``:

    ``loss = bound / beta (r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-)``,

    means over latent dimensions, with ``w = mean |x0+- - x0|``, through which no gradient flows. Where the policy is the
    one that drew, the gradient is that of ``A |x0_hat - x0|^2 / w``. Off the line from there through x0, and on it beyond x0 (for
    beta = 1), the loss holds the policy back, also for A = 0; on the line before, the pull is the same everywhere.
    Velocities and noises are affine in x0 at a given noised latent, so mixing them is mixing x0.

    Args:
        x0_hat: [N, ...], predicted by the policy that is trained, with gradient.
        x0_old: [N, ...], by the policy that drew; no gradient flows into it.
        x0: [N, ...], the clean latents that were drawn.
        advantages: [N].
        beta: above 0.
        bound: above 0.

    Returns:
        [N]; float32, or float64 if a prediction is.

    Raises:
        InputError: if shapes do not agree, or beta or bound is not above 0 and finite.

    Source: DiffusionNFT, arXiv 2509.16117, with its adaptive weights; bound, the two factors in front and the least
    ``w`` are those of its published code.

    Example:
        >>> import torch
        >>> from driftrl.objectives.negative_aware import negative_aware
        >>> old, drawn = torch.zeros(2, 1), torch.ones(2, 1)
        >>> negative_aware(torch.full((2, 1), 0.5), old, drawn, torch.tensor([5.0, -5.0]))
        tensor([2.5000, 7.5000])
    """
    for name, number in (("beta", beta), ("bound", bound)):
        if not 0 < number < math.inf:
            raise InputError(f"{name}: expected more than 0, and a finite number; got {number}")
    for name, other in (("x0_old", x0_old), ("x0", x0)):
        same_shape(name, other, "x0_hat", x0_hat)
    has_shape("advantages", advantages, "[N]")
    if advantages.shape != x0_hat.shape[:1]:
        raise InputError(
            f"advantages: expected one per sample, [{x0_hat.shape[0]}]; got {list(advantages.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(x0_hat.dtype, x0_old.dtype), torch.float32)
    new, old, drawn = x0_hat.to(dtype), x0_old.detach().to(dtype), x0.detach().to(dtype)
    good = 0.5 + 0.5 * (advantages.detach().to(dtype) / bound).clamp(-1.0, 1.0)
    positive = _weighted_error((1.0 - beta) * old + beta * new, drawn)
    negative = _weighted_error((1.0 + beta) * old - beta * new, drawn)
    return bound / beta * (good * positive + (1.0 - good) * negative)


def _weighted_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample [N] over its mean absolute error."""
    error = prediction - target
    error = error.flatten(1) if error.dim() > 1 else error[:, None]
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=SMALLEST)
