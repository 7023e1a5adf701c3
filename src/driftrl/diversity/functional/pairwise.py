"""Cosine distances within a group of images: all pairs, or only their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import has_shape
from driftrl.diversity.functional._features import unit_rows


def pairwise_distances(features: Tensor) -> Tensor:
    """Distance D(x_i, x_j) = 1 - cos(x_i, x_j) between all items of each group.

    The distance of DreamSim (Fu et al. 2023, arXiv 2306.09344, section 4.1) and, on CLIP embeddings, of CLIP
    diversity. Exactly symmetric, with an exact zero diagonal; never negative. Differentiable.

    Args:
        features: [..., G, D], any number of groups of G embeddings; any real dtype.

    Returns:
        [..., G, G] on the device of ``features``; float64 for float64 features, else float32. The arithmetic
        is float64 in either case.

    Raises:
        InputError: for fewer than two items, values that are not finite, or a row of zeros.

    Example:
        >>> pairwise_distances(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    z = unit_rows("features", features)
    distance = (1.0 - z @ z.mT).clamp(min=0.0)
    off_diagonal = 1.0 - torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    distance = 0.5 * (distance + distance.mT) * off_diagonal
    return distance.to(features.device, torch.float64 if features.dtype == torch.float64 else torch.float32)


def mean_pairwise_distance(features: Tensor) -> Tensor:
    """Mean of 1 - cos(x_i, x_j) over all pairs i != j, without forming the pairs.

    With unit vectors z_i and their mean m, sum_{i != j} (1 - z_i . z_j) = N sum_i |z_i - m|^2, so the mean
    over the N (N - 1) ordered pairs is sum_i |z_i - m|^2 / (N - 1): O(N D) work. The centred form has no
    cancellation, so nearly identical images keep their leading digits, where N^2 - |sum_i z_i|^2 would not.

    Args:
        features: [N, D] embeddings; any real dtype.

    Returns:
        Scalar, float64: 0 for identical directions, 1 for orthogonal ones. Differentiable.

    Raises:
        InputError: for fewer than two items, values that are not finite, or a row of zeros.

    Example:
        >>> mean_pairwise_distance(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
        tensor(0.6667, dtype=torch.float64)
    """
    z = unit_rows("features", has_shape("features", features, "[N, D]"))
    return (z - z.mean(dim=0)).square().sum() / (len(z) - 1)
