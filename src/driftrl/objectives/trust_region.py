"""What keeps an update near the policy that drew the samples: PPO's clipped ratio, or rivals that look at the means."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, same_shape
from driftrl.objectives.clipped_surrogate import ClippedSurrogate, clipped_surrogate, ratio_of
from driftrl.objectives.kl import kl_equal_variance


def normalized_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor | float,
    clip_range: float = 1e-4,
) -> ClippedSurrogate:
    """The clipped surrogate of a normalised ratio: ``log r' = std (log r + |mean - old_mean|^2 / (2 std^2))``, squares averaged
    over latent dimensions.

    Of a sample ``old_mean + std eps`` the log-ratio has the mean ``-|mean - old_mean|^2 / (2 std^2)``, below 0 whatever the policy
    has become, so good samples hardly reach the upper end of the clip range; and its spread grows as std falls. What is left
    is ``(mean - old_mean) eps`` averaged over dimensions: around 0, at every step on the same scale.

    Args:
        log_prob: [B], of the policy being trained, with gradient; a mean over latent dimensions.
        old_log_prob: [B], of the policy that drew the samples.
        advantages: [B].
        mean: [B, ...], of the policy's transition, with gradient.
        old_mean: [B, ...], of the one that drew.
        std: a number, [B] or [B, 1, ..., 1], of both; above 0. One per pair, for it scales the pair's log-ratio.
        clip_range: of the normalised ratio, above 0.

    Returns:
        Loss per pair and diagnostics, of the normalised ratio; but ``approx_kl`` is of the plain one, as everywhere.

    Raises:
        InputError: if the shapes do not agree or ``clip_range`` is not above 0.

    Source: RatioNorm of GRPO-Guard (arXiv 2510.22319, eq. 8).

    Example:
        >>> import torch
        >>> from driftrl.objectives.trust_region import normalized_surrogate
        >>> zero, std = torch.zeros(1), torch.full((1, 1), 0.5)
        >>> normalized_surrogate(zero - 2, zero, zero + 1, torch.ones(1, 4), torch.zeros(1, 4), std).ratio_mean
        tensor(1.)
    """
    kl = kl_equal_variance(mean, old_mean, std)
    for name, other in (("old_log_prob", old_log_prob), ("divergence", kl)):
        same_shape(name, other, "log_prob", log_prob)
    scale = torch.as_tensor(std, dtype=kl.dtype, device=kl.device).detach()
    if scale.dim() and (scale.numel() != len(scale) or len(scale) not in (1, len(kl))):
        raise InputError(
            f"std: expected a number, [{len(kl)}] or [{len(kl)}, 1, ..., 1]; got {list(scale.shape)}"
        )
    scale = scale.flatten()
    plain = log_prob.to(kl.dtype) - old_log_prob.detach().to(kl.dtype)
    log_ratio = scale * (plain + kl)
    found = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, clip_range)
    return found._replace(approx_kl=0.5 * plain.detach().square().mean())


def divergence_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor | float,
    max_kl: float = 1e-5,
) -> ClippedSurrogate:
    """``loss = -A r``, without gradient for a pair whose policy is farther than ``max_kl`` from the one that drew, and would be led
    farther: A > 0 and r > 1, or A < 0 and r < 1.

    The divergence of two Gaussians is exact, where the ratio is of one sample.

    Args:
        log_prob: [B], of the policy being trained, with gradient; a mean over latent dimensions.
        old_log_prob: [B], of the policy that drew the samples.
        advantages: [B].
        mean: [B, ...], of the policy's transition; no gradient flows into it.
        old_mean: [B, ...], of the one that drew.
        std: a number, [B] or [B, 1, ..., 1], of both; above 0.
        max_kl: above 0, in nats per latent dimension.

    Returns:
        Loss per pair and diagnostics; ``clip_fraction`` is the share of pairs without gradient.

    Raises:
        InputError: if the shapes do not agree or ``max_kl`` is not above 0.

    Source: Flow-DPPO (arXiv 2606.11025), its asymmetric mask.

    Example:
        >>> import torch
        >>> from driftrl.objectives.trust_region import divergence_surrogate
        >>> far, old = torch.full((2, 4), 0.1), torch.zeros(2, 4)
        >>> before = torch.tensor([-0.1, 0.1])  # the first has become more likely, the second less
        >>> divergence_surrogate(torch.zeros(2), before, torch.ones(2), far, old, torch.ones(2, 1)).clip_fraction
        tensor(0.5000)
    """
    if not max_kl > 0:
        raise InputError(f"max_kl: expected more than 0; got {max_kl}")
    has_shape("log_prob", log_prob, "[B]")
    kl = kl_equal_variance(mean.detach(), old_mean, std)
    for name, other in (("old_log_prob", old_log_prob), ("advantages", advantages), ("divergence", kl)):
        same_shape(name, other, "log_prob", log_prob)
    weights = advantages.detach().to(kl.dtype)
    log_ratio = log_prob.to(kl.dtype) - old_log_prob.detach().to(kl.dtype)
    blocked = (kl > max_kl) & (weights * log_ratio.detach() > 0)
    # A constant where blocked, so that its gradient is 0 and its value the surrogate's.
    ratio = ratio_of(torch.where(blocked, log_ratio.detach(), log_ratio))
    with torch.no_grad():
        share, drift = blocked.to(kl.dtype).mean(), 0.5 * log_ratio.square().mean()
    return ClippedSurrogate(-weights * ratio, ratio.detach().mean(), share, drift)


def time_weights(durations: Tensor, trained: Tensor) -> Tensor:
    """What the normalised surrogate weighs at each step: one over the time that the step takes; the mean over trained steps is 1.

    A flow's step moves its mean by the network's output times that time, so without weights the long steps would have nearly
    all of the gradient.

    Args:
        durations: [T], of the denoising steps; positive where they are learned from.
        trained: bool [T], which of them are learned from.

    Returns:
        float32 [T]; 0 at steps that are not learned from, whatever time they take.

    Raises:
        InputError: if the shapes do not agree, or a step that is learned from takes no time.

    Source: the gradient's weights of GRPO-Guard (arXiv 2510.22319), 1/dt.

    Example:
        >>> import torch
        >>> from driftrl.objectives.trust_region import time_weights
        >>> time_weights(torch.tensor([0.3, 0.6, 0.1]), torch.tensor([True, True, False]))
        tensor([1.3333, 0.6667, 0.0000])
    """
    has_shape("trained", trained, "[T]")
    same_shape("durations", durations, "trained", trained)
    used = trained.bool()
    if not bool((durations > 0)[used].all()):
        raise InputError(
            f"durations: expected more than 0 at the steps that are learned from; got {durations[used].tolist()}"
        )
    weights = (used / durations.float()).masked_fill(~used, 0.0)
    total = weights.sum()
    return weights * used.sum() / total.masked_fill(total == 0, 1.0)
