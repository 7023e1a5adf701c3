"""The clipped surrogate of PPO, for pairs of a candidate and a denoising step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, same_shape

LARGEST_LOG_RATIO = 80.0
"""Beyond it the ratio is constant; a policy this far away is lost in any case."""


class ClippedSurrogate(NamedTuple):
    """Loss of each pair, and what to watch: scalar tensors without gradient, left on their device."""

    loss: Tensor
    """[B]: to be averaged and minimised."""
    ratio_mean: Tensor
    """Mean of pi_new / pi_old; 1 for an untouched policy."""
    clip_fraction: Tensor
    """Share of pairs whose ratio lies outside 1 +- clip_range."""
    approx_kl: Tensor
    """Half the mean squared log-ratio: KL(old || new) to second order, in nats per latent dimension squared
    because log-probabilities are means over dimensions; a measure of drift, not a KL of the trajectories."""


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float = 1e-4
) -> ClippedSurrogate:
    """``loss = max(-A r, -A clip(r, 1 - c, 1 + c))`` with ``r = exp(log_prob - old_log_prob)``.

    The gradient of a pair is ``-A r grad log_prob``, or zero once its ratio has left the clip range in the
    direction that the advantage asks for. Computed in float32, or float64 if a log-probability is: half precision has no
    number between 1 and 1 plus the clip range.

    Args:
        log_prob: [B], of the policy being trained, with gradient; the **mean** over latent dimensions (see
            ``driftrl.transitions.gaussian``). The clip range belongs to that convention.
        old_log_prob: [B], of the policy that drew the samples; no gradient flows into it.
        advantages: [B]; no gradient flows into them.
        clip_range: c, above 0.

    Returns:
        Loss per pair and diagnostics.

    Raises:
        InputError: if the shapes do not agree or ``clip_range`` is not above 0.

    Source: PPO (arXiv 1707.06347, eq. 7); clip range 1e-4 from DDPO (arXiv 2305.13301).

    Example:
        >>> import torch
        >>> from driftrl.objectives.clipped_surrogate import clipped_surrogate
        >>> clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -2.0])).loss
        tensor([-1.,  2.])
    """
    if not clip_range > 0:
        raise InputError(f"clip_range: expected more than 0; got {clip_range}")
    has_shape("log_prob", log_prob, "[B]")
    for name, other in (("old_log_prob", old_log_prob), ("advantages", advantages)):
        same_shape(name, other, "log_prob", log_prob)
    dtype = torch.promote_types(torch.promote_types(log_prob.dtype, old_log_prob.dtype), torch.float32)
    weights = advantages.detach().to(dtype)
    log_ratio = log_prob.to(dtype) - old_log_prob.detach().to(dtype)
    ratio = ratio_of(log_ratio)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-weights * ratio, -weights * clipped)
    with torch.no_grad():
        outside = (ratio != clipped).to(loss.dtype).mean()
        return ClippedSurrogate(loss, ratio.mean(), outside, 0.5 * log_ratio.square().mean())


def ratio_of(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, held constant beyond a log-ratio of 80: one that overflows would make 0 * inf of the gradient where the loss
    is clipped, or the advantage is 0.

    Args:
        log_ratio: of any shape; float32 or float64.

    Returns:
        The shape and dtype of ``log_ratio``.

    Example:
        >>> import torch
        >>> from driftrl.objectives.clipped_surrogate import ratio_of
        >>> ratio_of(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 2.7183])
    """
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
