"""Closed-form KL divergence to the reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError


def kl_equal_variance(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """``KL(N(mean, std^2 I) || N(mean_ref, std^2 I))``, as the **mean** over all dimensions but the first.

    It is ``(mean - mean_ref)^2 / (2 std^2)`` averaged over latent dimensions: the same convention as the
    log-probabilities, so that reward and penalty are weighed alike whatever the size of the latent. Gradient
    flows through ``mean`` only. Leave out transitions with ``std = 0``.

    Args:
        mean: [N, ...], of the policy being trained.
        mean_ref: [N, ...], of the reference (the adapter switched off).
        std: [N], or a shape that broadcasts to ``mean`` such as [N, 1, ..., 1] or []; positive.

    Returns:
        [N], in nats per dimension, at least 0; float32, or float64 if an argument is.

    Raises:
        InputError: if the shapes do not agree.

    Source: the divergence of two Gaussians of equal covariance; used so by Flow-GRPO (arXiv 2505.05470).

    Example:
        >>> import torch
        >>> from driftrl.objectives.kl import kl_equal_variance
        >>> kl_equal_variance(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0.5]))
        tensor([2.])
    """
    if mean.dim() < 1 or mean_ref.shape != mean.shape:
        raise InputError(
            f"mean_ref: expected the shape of mean, {list(mean.shape)}; got {list(mean_ref.shape)}"
        )
    dtype = torch.float32
    for tensor in (mean, mean_ref, std):
        dtype = torch.promote_types(dtype, tensor.dtype)
    scale = std.detach().to(device=mean.device, dtype=dtype)
    if scale.dim() == 1 and scale.shape[0] in (1, mean.shape[0]):
        scale = scale.view(-1, *[1] * (mean.dim() - 1))
    elif scale.dim() not in (0, mean.dim()):
        raise InputError(
            f"std: expected [{mean.shape[0]}] or a shape that broadcasts to {list(mean.shape)}; "
            f"got {list(scale.shape)}"
        )
    divergence = 0.5 * ((mean.to(dtype) - mean_ref.detach().to(dtype)) / scale).square()
    return divergence.flatten(1).mean(dim=1) if divergence.dim() > 1 else divergence
