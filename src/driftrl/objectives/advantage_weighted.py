"""Advantage weighted matching (AWM): the pretraining loss of drawn images, weighed by how good they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, same_shape
from driftrl.objectives.clipped_surrogate import ClippedSurrogate, clipped_surrogate

SMALLEST = 1e-10
"""Added to a squared error, the gradient of whose power is infinite at 0."""


@dataclass(frozen=True)
class AdvantageWeighted:
    """Settings of the loss."""

    power: float = 0.25
    """Of the squared error."""
    proximal: float = 5.0
    """Weight of the velocity's squared distance from what the policy that drew predicts."""
    clip_range: float = 1.0
    """Of the ratio."""
    decay: float = 0.0
    """The proximal term is taken to an average of the policy that keeps so much of itself after each iteration; 0: to the policy that
    drew."""

    own_behavior = True
    """Whether samples are drawn by the trained policy itself."""
    of_network = False
    """Whether errors are those of what the network predicts."""
    in_groups = False
    """Whether a prompt's samples go together."""

    def kept(self, iteration: int) -> float:
        """What the copy of the policy that drew keeps of itself after ``iteration``: nothing."""
        return 0.0

    @property
    def anchor_kept(self) -> float:
        """What the average that the proximal term is taken to keeps of itself after an iteration; 0 where there is none."""
        return self.decay

    def __call__(
        self,
        x0_hat: Tensor,
        x0_old: Tensor,
        x0: Tensor,
        sigma: Tensor,
        advantages: Tensor,
        x0_anchor: Tensor | None = None,
    ) -> ClippedSurrogate:
        """`advantage_weighted` by these settings."""
        return advantage_weighted(
            x0_hat, x0_old, x0, sigma, advantages, self.power, self.proximal, self.clip_range, x0_anchor
        )


def matching_score(x0_hat: Tensor, x0: Tensor, sigma: Tensor, power: float = 0.25) -> Tensor:
    """What stands for a log-probability: ``-sigma e**power / power``, with e the mean squared error of the predicted velocity.

    At a given noised latent the velocity is ``(x_t - x0) / sigma`` in a flow, and affine in x0 with the same factor where
    variance is preserved, so ``e = mean |x0_hat - x0|^2 / sigma^2``: the loss of pretraining. A power of 1 is that loss as it is;
    a smaller one makes large errors count less. To e is added 1e-10 (``SMALLEST``): a power below 1 has an infinite gradient at 0.

    Args:
        x0_hat: [N, ...], predicted clean latents.
        x0: [N, ...], those that were drawn.
        sigma: [N], the noise's share of the noised latents, in (0, 1].
        power: in (0, 1].

    Returns:
        [N]; float32, or float64 if a prediction is.

    Raises:
        InputError: if shapes do not agree, or power is outside (0, 1].

    Source: AWM, arXiv 2509.25050; the power and the factor sigma are those of its published code.

    Example:
        >>> import torch
        >>> from driftrl.objectives.advantage_weighted import matching_score
        >>> matching_score(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0.5]), power=1.0)
        tensor([-2.])
    """
    if not 0 < power <= 1:
        raise InputError(f"power: expected more than 0 and at most 1; got {power}")
    error = velocity_error(x0_hat, x0, sigma)
    return -sigma.to(error.dtype) * (error + SMALLEST) ** power / power


def advantage_weighted(
    x0_hat: Tensor,
    x0_old: Tensor,
    x0: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    power: float = 0.25,
    proximal: float = 5.0,
    clip_range: float = 1.0,
    x0_anchor: Tensor | None = None,
) -> ClippedSurrogate:
    """The clipped surrogate of `matching_score`, and ``proximal`` times the mean squared distance of the two policies' velocities.

    No density is asked for, so any sampler may draw. Where the policy is the one that drew, the gradient is that of ``A w e``: e the
    pretraining loss of a drawn image, weighed by its advantage A and by ``w = sigma e**(power - 1)``, through which no gradient
    flows (e there with the 1e-10 of `matching_score`). With a power of 1 that is sigma, whatever the error; with a smaller one
    images that are predicted badly have less of the gradient. (With 1 a bad image pushes the harder the worse it is predicted
    already, and only the proximal term holds that back: errors can run away.)

    Args:
        x0_hat: [N, ...], predicted by the policy that is trained, with gradient.
        x0_old: [N, ...], by the policy that drew; no gradient flows into it.
        x0: [N, ...], the clean latents that were drawn.
        sigma: [N], the noise's share of the noised latents, in (0, 1].
        advantages: [N].
        power: of the squared error, in (0, 1].
        proximal: not below 0.
        clip_range: of the ratio, above 0; 1 hardly ever clips.
        x0_anchor: [N, ...], predicted by the policy that the proximal term is taken to; by default ``x0_old``.

    Returns:
        Loss per pair and diagnostics, of the ratio.

    Raises:
        InputError: if shapes do not agree, or a number is out of its range.

    Source: AWM, arXiv 2509.25050. Its code has advantages from -1 to 1 and a proximal term of weight 1, taken to a moving average of
    the policy; ours go from -5 to 5, so the weight is 5.

    Example:
        >>> import torch
        >>> from driftrl.objectives.advantage_weighted import advantage_weighted
        >>> old, drawn = torch.zeros(2, 1), torch.ones(2, 1)
        >>> advantage_weighted(old, old, drawn, torch.ones(2), torch.tensor([1.0, -2.0])).loss
        tensor([-1.,  2.])
    """
    if not proximal >= 0:
        raise InputError(f"proximal: expected at least 0; got {proximal}")
    old = x0_old.detach()
    found = clipped_surrogate(
        matching_score(x0_hat, x0.detach(), sigma, power),
        matching_score(old, x0.detach(), sigma, power),
        advantages,
        clip_range,
    )
    anchor = old if x0_anchor is None else x0_anchor.detach()
    return found._replace(loss=found.loss + proximal * velocity_error(x0_hat, anchor, sigma))


def velocity_error(x0_hat: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared distance of the velocities that two clean latents stand for: ``mean |x0_hat - x0|^2 / sigma^2``.

    Where variance is preserved, with a signal's share of alpha, ``sigma / alpha`` in place of sigma gives that of the noises.

    Args:
        x0_hat: [N, ...].
        x0: [N, ...].
        sigma: [N], the noise's share of the noised latents that both are of, above 0.

    Returns:
        [N]; float32, or float64 if an input of clean latents is.

    Raises:
        InputError: if shapes do not agree.

    Example:
        >>> import torch
        >>> from driftrl.objectives.advantage_weighted import velocity_error
        >>> velocity_error(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0.5]))
        tensor([4.])
    """
    same_shape("x0", x0, "x0_hat", x0_hat)
    has_shape("sigma", sigma, "[N]")
    if sigma.shape != x0_hat.shape[:1]:
        raise InputError(f"sigma: expected one per sample, [{x0_hat.shape[0]}]; got {list(sigma.shape)}")
    dtype = torch.promote_types(torch.promote_types(x0_hat.dtype, x0.dtype), torch.float32)
    error = x0_hat.to(dtype) - x0.to(dtype)
    error = error.flatten(1) if error.dim() > 1 else error[:, None]
    return error.square().mean(1) / sigma.to(dtype).square()
