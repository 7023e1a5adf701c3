"""How far the policy is from the reference, in closed form, and at which steps that counts."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, one_of, same_shape

DIVERGENCES: tuple[str, ...] = ("kl", "wasserstein")
SCHEDULES: tuple[str, ...] = ("uniform", "early", "durations")


def divergence(kind: str, mean: Tensor, mean_ref: Tensor, std: Tensor | float) -> Tensor:
    """The divergence [N] that is named: `kl_equal_variance`, or `wasserstein_equal_variance`.

    Raises:
        InputError: for another name, or as these do.
    """
    if one_of("divergence", kind, DIVERGENCES) == "kl":
        return kl_equal_variance(mean, mean_ref, std)
    return wasserstein_equal_variance(mean, mean_ref)


def kl_equal_variance(mean: Tensor, mean_ref: Tensor, std: Tensor | float) -> Tensor:
    """``KL(N(mean, std^2 I) || N(mean_ref, std^2 I))``, as the **mean** over all dimensions but the first.

    It is ``(mean - mean_ref)^2 / (2 std^2)`` averaged over latent dimensions: the same convention as the
    log-probabilities, so that reward and penalty are weighed alike whatever the size of the latent. Gradient
    flows through ``mean`` only. Leave out transitions with ``std = 0``.

    Args:
        mean: [N, ...], of the policy being trained.
        mean_ref: [N, ...], of the reference (the adapter switched off).
        std: a number, [N], or a shape that broadcasts to ``mean`` such as [N, 1, ..., 1]; positive.

    Returns:
        [N], in nats per dimension, at least 0; float32, or float64 if an argument is.

    Raises:
        InputError: if the shapes do not agree.

    Source: the divergence of two Gaussians of equal covariance, as in Flow-GRPO's paper (arXiv 2505.05470). Its code leaves the step's
    duration out of the variance, so that its KL is this one times the duration: see `step_weights`.

    Example:
        >>> import torch
        >>> from driftrl.objectives.kl import kl_equal_variance
        >>> kl_equal_variance(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0.5]))
        tensor([2.])
    """
    same_shape("mean_ref", mean_ref, "mean", mean)
    dtype = torch.float32
    for tensor in (mean, mean_ref, *([std] if isinstance(std, Tensor) else [])):
        dtype = torch.promote_types(dtype, tensor.dtype)
    # A Python number is rounded to that dtype, not to the default one on the way.
    scale = torch.as_tensor(std, dtype=dtype, device=mean.device).detach()
    if scale.dim() == 1 and scale.shape[0] in (1, mean.shape[0]):
        scale = scale.view(-1, *[1] * (mean.dim() - 1))
    elif not _fits(scale.shape, mean.shape):
        raise InputError(
            f"std: expected [{mean.shape[0]}] or a shape that broadcasts to {list(mean.shape)}; "
            f"got {list(scale.shape)}"
        )
    divergence = 0.5 * ((mean.to(dtype) - mean_ref.detach().to(dtype)) / scale).square()
    return divergence.flatten(1).mean(dim=1) if divergence.dim() > 1 else divergence


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether numbers of one shape, with all of its dimensions or none, broadcast to another."""
    return len(shape) in (0, len(into)) and all(a in (1, b) for a, b in zip(shape, into, strict=False))


def wasserstein_equal_variance(mean: Tensor, mean_ref: Tensor) -> Tensor:
    """``W_2^2`` of two Gaussians of equal covariance, as the **mean** over all dimensions but the first.

    It is ``(mean - mean_ref)^2``: the KL times ``2 std^2``, so that noisy, early steps weigh more than with the
    KL. Gradient flows through ``mean`` only.

    Args:
        mean: [N, ...], of the policy being trained.
        mean_ref: [N, ...], of the reference.

    Returns:
        [N], at least 0; float32, or float64 if an argument is.

    Raises:
        InputError: if the shapes do not agree.

    Example:
        >>> import torch
        >>> from driftrl.objectives.kl import wasserstein_equal_variance
        >>> wasserstein_equal_variance(torch.ones(1, 4), torch.zeros(1, 4))
        tensor([1.])
    """
    same_shape("mean_ref", mean_ref, "mean", mean)
    dtype = torch.promote_types(torch.promote_types(mean.dtype, mean_ref.dtype), torch.float32)
    squared = (mean.to(dtype) - mean_ref.detach().to(dtype)).square()
    return squared.flatten(1).mean(dim=1) if squared.dim() > 1 else squared


def step_weights(scored: Tensor, schedule: str = "uniform", durations: Tensor | None = None) -> Tensor:
    """What the divergence weighs at each denoising step.

    ``uniform``: 1 everywhere. ``early``: falling linearly from the first scored step to the last, mean 1, so that what is
    decided while the picture takes its shape is held most firmly. ``durations``: the time that the step takes, which makes the KL
    that of Flow-GRPO's and GARDO's code, whose beta then carries over.

    Args:
        scored: bool [T], from noise to image.
        schedule: one of ``SCHEDULES``.
        durations: [T], of the denoising steps, whose sum is the whole way; for the schedule of that name.

    Returns:
        float32 [T]; 0 at steps that are not scored, for ``early``.

    Raises:
        InputError: for another shape or schedule, or without the durations that it wants.

    Source: DiverseGRPO (arXiv 2512.21514) has stronger constraints at early steps; the line is ours.

    Example:
        >>> import torch
        >>> from driftrl.objectives.kl import step_weights
        >>> step_weights(torch.tensor([True, True, True, False]), "early")
        tensor([1.5000, 1.0000, 0.5000, 0.0000])
    """
    has_shape("scored", scored, "[T]")
    if one_of("schedule", schedule, SCHEDULES) == "uniform":
        return torch.ones(len(scored), device=scored.device)
    if schedule == "durations":
        if durations is None:
            raise InputError("durations: the schedule of that name needs those of the steps [T]; got None")
        return same_shape("durations", durations, "scored", scored).float()
    mask = scored.float()
    count = mask.sum()
    return mask * (count + 1 - mask.cumsum(0)) * 2 / (count + 1)
