"""Groups of alike images within a prompt's group, from their distances alone."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError, at_least, has_shape, is_finite, whole_number

# Distances of order one below which two images are the same up to rounding.
_ALIKE = 1e-6


def spectral_clusters(distances: Tensor, clusters: int, rounds: int = 20) -> Tensor:
    """Split each group into ``clusters`` by spectral clustering; no randomness, all groups at once.

    Affinity ``exp(-D^2 / (2 s^2))`` with s half the group's mean distance; the leading eigenvectors of the
    symmetrically normalised affinity, rows scaled to length 1; k-means on the rows, begun at the best-connected
    image and then at whichever is farthest from the centres so far. A group whose images are all alike is one
    cluster.

    Args:
        distances: [P, G, G], symmetric; the diagonal is ignored.
        clusters: how many, at least 1; more than G are G.
        rounds: of k-means; a group of a dozen settles in a few.

    Returns:
        int64 [P, G]: labels below ``clusters``, meaningful within a group only. Some may have no image.

    Raises:
        InputError: for another shape, distances that are not finite, or ``clusters`` below 1.

    Source: Ng, Jordan and Weiss, "On spectral clustering", NeurIPS 2001. Ours: the scale, the start of k-means,
    and that an image is akin to itself (their diagonal is 0), without which one that is alone is misplaced.

    Example:
        >>> import torch
        >>> from driftrl.clusters import spectral_clusters
        >>> x = torch.tensor([0.0, 0.1, 5.0, 5.1])
        >>> labels = spectral_clusters((x[:, None] - x).abs()[None], 2)[0]
        >>> bool(labels[0] == labels[1] != labels[2]), bool(labels[2] == labels[3])
        (True, True)
    """
    has_shape("distances", distances, "[P, G, G]")
    clusters = int(at_least("clusters", whole_number("clusters", clusters), 1))
    prompts, group = distances.shape[:2]
    if distances.shape[-1] != group:
        raise InputError(f"distances: expected shape [P, G, G]; got {list(distances.shape)}")
    labels = torch.zeros(prompts, group, dtype=torch.long, device=distances.device)
    clusters = min(clusters, group)
    if clusters <= 1:  # below 1 for groups of none
        return labels
    place = "cpu" if distances.device.type == "mps" else distances.device  # MPS has no eigh and no float64
    d = distances.to(place, torch.float64)
    others = ~torch.eye(group, dtype=torch.bool, device=d.device)
    apart = is_finite("distances", d[:, others])
    scale = 0.5 * apart.mean(dim=1).clamp(min=_ALIKE)[:, None, None]
    affinity = torch.where(others, (-0.5 * (d / scale).square()).exp(), 1.0)
    degree = affinity.sum(dim=-1)
    root = degree.rsqrt()
    vectors = torch.linalg.eigh(root[:, :, None] * affinity * root[:, None, :]).eigenvectors[..., -clusters:]
    rows = torch.nn.functional.normalize(vectors, dim=-1)
    found = _k_means(rows, clusters, degree.argmax(dim=1), rounds).to(labels.device)
    alike = (apart.amax(dim=1) <= _ALIKE).to(labels.device)
    return torch.where(alike[:, None], labels, found)


def cluster_sizes(labels: Tensor) -> Tensor:
    """How many images of its group share each image's label: int64 [P, G] for labels [P, G].

    Raises:
        InputError: for another shape.
    """
    has_shape("labels", labels, "[P, G]")
    return (labels[:, :, None] == labels[:, None, :]).sum(dim=-1)


def _k_means(points: Tensor, clusters: int, first: Tensor, rounds: int) -> Tensor:
    """Labels [P, G] of points [P, G, K], begun at the points ``first`` [P] and the farthest from those."""
    batch = torch.arange(len(points), device=points.device)
    centres = points[batch, first][:, None]
    while centres.shape[1] < clusters:
        farthest = torch.cdist(points, centres).amin(dim=-1).argmax(dim=1)
        centres = torch.cat([centres, points[batch, farthest][:, None]], dim=1)
    for _ in range(rounds):
        member = torch.nn.functional.one_hot(torch.cdist(points, centres).argmin(dim=-1), clusters).to(points)
        count = member.sum(dim=1)[..., None]
        centres = torch.where(count > 0, member.mT @ points / count.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(dim=-1)
