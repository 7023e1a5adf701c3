"""Vendi score: the effective number of different images in a set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape
from driftrl.diversity.functional._features import unit_rows


def vendi_score(features: Tensor, q: float = 1.0) -> Tensor:
    """Effective number of distinct items under the cosine kernel, of order q.

    Friedman & Dieng 2023 (arXiv 2210.02410, definition 3.1): VS = exp(-sum_i p_i log p_i), where p are the
    eigenvalues of K / N and K_ij = cos(x_i, x_j). Orders: Pasarkar & Dieng 2024 (arXiv 2310.12952, eq. 2):
    VS_q = (sum_i p_i^q)^(1 / (1 - q)); q = 1 is the limit above, q = 0 the rank of K, q = infinity 1 / max p.
    Small q weighs rare items more, large q common ones.

    K = Z Z^T [N, N] and Z^T Z [D, D] (rows of Z: unit vectors) share their non-zero eigenvalues, so the
    smaller of the two is decomposed: O(N D min(N, D)). For q < 1 the singular values of Z replace them
    (p = s^2 / N): p^q lifts the rounding noise of a Gram matrix's zero eigenvalues (1e-17 becomes 3e-9 at
    q = 1/2), where singular values keep it at 1e-16.

    Args:
        features: [N, D] embeddings; any real dtype, computed in float64, so that rows that differ by the rounding
            of a shorter dtype are different rows: they add 1 each to the rank, and next to nothing at q >= 1.
        q: order, from 0 to ``math.inf``.

    Returns:
        Scalar, float64, from 1 (all identical) to min(N, D) (all orthogonal). Differentiable in the features.

    Raises:
        InputError: for fewer than two items, values that are not finite, a row of zeros, or q that is
            negative or no number.

    Example:
        >>> round(float(vendi_score(torch.eye(4))), 6)
        4.0
        >>> twice = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> round(float(vendi_score(twice, q=math.inf)), 6)
        2.0
    """
    order = _order(q)
    z = unit_rows("features", has_shape("features", features, "[N, D]"))
    p = _singular_spectrum(z) if order < 1 else _gram_spectrum(z)
    if math.isinf(order):
        return 1.0 / p.amax()
    if order == 0:
        return p.pow(0.0).sum()
    log_p = p.log()
    if abs(order - 1.0) < 1e-8:  # nearer than this, the quotient below loses more than the limit does
        return (-p * log_p).sum().exp()
    return (torch.logsumexp(order * log_p, dim=0) / (1.0 - order)).exp()


def _gram_spectrum(z: Tensor) -> Tensor:
    """Return the positive eigenvalues of Z Z^T / N, by way of the smaller of Z Z^T and Z^T Z."""
    n, d = z.shape
    gram = z.mT @ z if d < n else z @ z.mT
    p = torch.linalg.eigvalsh(gram) / n
    return p[p > 0]


def _singular_spectrum(z: Tensor) -> Tensor:
    """Return the same eigenvalues as s^2 / N, less those that cannot be told from rounding."""
    s = torch.linalg.svdvals(z)
    floor = max(z.shape) * torch.finfo(z.dtype).eps * s.detach().amax()  # as torch.linalg.matrix_rank
    return s[s > floor].square() / len(z)


def _order(q: float) -> float:
    try:
        order = math.nan if isinstance(q, bool | str | bytes) else float(q)
    except (TypeError, ValueError):
        order = math.nan
    if not order >= 0.0:
        raise InputError(f"q: expected a number from 0 to infinity (math.inf); got {q!r}")
    return order
