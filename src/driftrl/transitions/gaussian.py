"""Isotropic Gaussian transitions: density, entropy and sampling.

One convention holds throughout the package: a log-probability is the **mean** over latent dimensions, not the
sum (as in DDPO, arXiv 2305.13301). The PPO clip range of 1e-4 is meant for it: with the sum, a latent of
4 x 64 x 64 values would make every log-ratio 16384 times as large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from driftrl.checks import InputError, floating, same_shape

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def log_prob(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Log-density of ``N(mean, std^2 I)`` at ``x``, as the **mean** over all dimensions but the first.

    Computed in float32, or float64 if an argument is. With ``std = 0`` there is no density: the result is not
    finite, and it is for the caller to leave such transitions out (no check here, it would make the host wait
    for the device).

    Args:
        x: [N, ...], the value that is stored, after any rounding.
        mean: [N, ...], the shape of ``x``.
        std: a number, [N], [N, 1, ..., 1], or the shape of ``x``; positive.

    Returns:
        [N], in nats per dimension.

    Raises:
        InputError: if the shapes do not agree.

    Source: DDPO, arXiv 2305.13301 (its published code averages over dimensions).

    Example:
        >>> import torch
        >>> from driftrl.transitions.gaussian import log_prob
        >>> log_prob(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)
        tensor([-0.9189, -0.9189])
    """
    same_shape("mean", mean, "x", x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    if isinstance(std, Tensor):
        dtype = torch.promote_types(dtype, std.dtype)
    scale = _per_sample(std, x, dtype)
    z = (x.to(dtype) - mean.to(dtype)) / scale
    return _mean_over_dimensions(-0.5 * z.square() - scale.log() - _HALF_LOG_TWO_PI)


def entropy(std: Tensor | float) -> Tensor:
    """Entropy of ``N(mean, std^2 I)`` per dimension, ``log std + (1 + log 2 pi) / 2``.

    It is the expectation of ``-log_prob`` under the same convention.

    Args:
        std: a number, [N], [N, 1, ..., 1] or [N, ...]; positive.

    Returns:
        [N] in nats per dimension, or a scalar tensor if ``std`` is a number or has no dimension.

    Example:
        >>> from driftrl.transitions.gaussian import entropy
        >>> entropy(1.0)
        tensor(1.4189)
    """
    scale = std if isinstance(std, Tensor) else torch.tensor(std)
    values = scale.to(torch.promote_types(scale.dtype, torch.float32)).log() + (_HALF_LOG_TWO_PI + 0.5)
    return _mean_over_dimensions(values) if values.dim() else values


def sample(mean: Tensor, std: Tensor | float, noise: Tensor) -> Tensor:
    """Draw ``mean + std * noise`` from given standard normal noise.

    Args:
        mean: [N, ...].
        std: a number, [N], [N, 1, ..., 1], or the shape of ``mean``; 0 returns ``mean`` itself.
        noise: the shape of ``mean``; drawn by the caller, who alone knows the keys of the generators.

    Returns:
        The shape and dtype of ``mean`` (the default float dtype for integers).

    Raises:
        InputError: if the shapes do not agree.

    Example:
        >>> import torch
        >>> from driftrl.transitions.gaussian import sample
        >>> sample(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), torch.ones(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """
    same_shape("noise", noise, "mean", mean)
    mean = floating(mean)
    return mean + _per_sample(std, mean, mean.dtype) * noise.to(mean.dtype)


def _per_sample(std: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``std`` as a tensor that broadcasts against ``x``: [N] belongs to the first dimension, not the last."""
    scale = torch.as_tensor(std, dtype=dtype, device=x.device)
    if scale.dim() == 1 and scale.shape[0] in (1, x.shape[0]):
        return scale.view(-1, *[1] * (x.dim() - 1))
    broadcasts = scale.dim() == x.dim() and all(
        a in (1, b) for a, b in zip(scale.shape, x.shape, strict=True)
    )
    if scale.dim() and not broadcasts:
        raise InputError(
            f"std: expected a number, [{x.shape[0]}] or a shape that broadcasts to {list(x.shape)}; "
            f"got {list(scale.shape)}"
        )
    return scale


def _mean_over_dimensions(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1) if values.dim() > 1 else values
