"""Precision, recall, density and coverage of one set of features against another, by nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, whole_number
from driftrl.diversity.functional._features import as_float64

BLOCK = 1024  # rows per side of a block of distances: 8 MiB in float64
SPARE = 8  # neighbours kept beyond the k-th, so that rounding seldom drops the true one
PAIRS = 2**20  # coordinates gathered at a time when single pairs are recomputed: 8 MiB per operand
TIE = 1e-12  # squared distances closer than this, relatively, count as equal


@dataclass(frozen=True, slots=True)
class Manifold:
    """How the generated set lies to the reference set; scalars in float64.

    Attributes:
        precision: share of generated items within the reference manifold (Kynkaanniemi et al. 2019, eq. 2).
        recall: share of reference items within the generated manifold (same, eq. 3).
        density: mean number of reference balls around a generated item, over k; may exceed 1
            (Naeem et al. 2020, eq. 4).
        coverage: share of reference items with a generated item in their ball (same, eq. 5).
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


@torch.no_grad()
def manifold(reference: Tensor, generated: Tensor, k: int = 5) -> Manifold:
    """Improved precision and recall, density and coverage in Euclidean feature space.

    Sources: Kynkaanniemi et al. 2019 (arXiv 1904.06991) and Naeem et al. 2020 (arXiv 2002.09797). The
    manifold of a set is the union of balls around its items, each reaching to the item's k-th nearest
    neighbour in the set, itself excluded. As in Naeem et al.'s package ``prdc``, a point at exactly the
    radius is outside (d < r; the papers write <=, which differs on ties only). A point at distance 0 is
    always inside: that matters only where an item has k or more exact copies, so that its radius is 0, and
    keeps the recall of any set against itself 1 (``prdc`` gives 0 there).

    Distances are formed block by block from matrix products, in float64, after shifting the origin to the
    reference set's median. Wherever rounding could decide a comparison, the pair is computed again as
    sum (x - y)^2, and what agrees to 1e-12 counts as a tie: neither the order of the items nor the blocks
    change the result. Beyond the features, memory is a few float64 copies of them and 100 MiB of blocks
    (for 100,000 x 512 twice: 1.5 GiB together); time is O((M + N)^2 D).

    Args:
        reference: [M, D] features of the set that should be covered (here, the base model's images).
        generated: [N, D] features of the set under test. Any real dtype, on the same device.
        k: neighbour whose distance is the radius; 1 <= k < M and k < N.

    Returns:
        The four measures; not differentiable, being counts.

    Raises:
        InputError: for shapes that do not fit, fewer than two items, values that are not finite, or k out
            of range.

    Example:
        >>> line = torch.arange(10.0)[:, None]
        >>> manifold(line, line[:5], k=1).recall
        tensor(0.5000, dtype=torch.float64)
    """
    x, y = as_float64("reference", reference), as_float64("generated", generated)
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"generated: expected as many features per item as reference, {x.shape[1]}; got {y.shape[1]}"
        )
    if x.device != y.device:
        raise InputError(f"generated: expected on the device of reference, {x.device}; got {y.device}")
    k = _checked_k(k, len(x), len(y))

    centre = x.median(dim=0).values
    x, y = x - centre, y - centre
    scale = torch.maximum(x.abs().amax(), y.abs().amax())
    if scale > 0:  # keeps squares from overflow and underflow
        x, y = x.div_(scale), y.div_(scale)

    x_radii, y_radii = _squared_radii(x, k), _squared_radii(y, k)
    x_squares, y_squares = _squares(x), _squares(y)
    precise = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    recalled = covered.clone()
    inside = 0
    for rows in _blocks(len(x)):
        for columns in _blocks(len(y)):
            a, b = x[rows], y[columns]
            a_squares, b_squares = x_squares[rows], y_squares[columns]
            distance = _squared_distances(a, b, a_squares, b_squares)
            doubt = _rounding(a.shape[1], float(a_squares.amax() + b_squares.amax()))
            in_reference = _within(distance, x_radii[rows, None], doubt, a, b)
            in_generated = _within(distance, y_radii[None, columns], doubt, a, b)
            precise[columns] |= in_reference.any(dim=0)
            covered[rows] |= in_reference.any(dim=1)
            recalled[rows] |= in_generated.any(dim=1)
            inside += int(in_reference.count_nonzero())
    return Manifold(
        precision=precise.double().mean(),
        recall=recalled.double().mean(),
        density=torch.tensor(inside / (k * len(y)), dtype=torch.float64, device=x.device),
        coverage=covered.double().mean(),
    )


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Return [N]: the least squared distance that is outside each item's ball.

    It is that to the k-th nearest neighbour, the item itself excluded, less what still counts as a tie.
    Each block of the symmetric distance matrix is formed once and read both ways. The neighbours kept are
    measured again exactly, and where one that was dropped might be nearer, the whole row is.
    """
    n, d = x.shape
    kept = min(k + SPARE, n - 1)
    nearest = torch.full((n, kept), torch.inf, dtype=x.dtype, device=x.device)
    index = torch.zeros((n, kept), dtype=torch.long, device=x.device)

    def merge(rows: slice, columns: slice, distance: Tensor) -> None:
        found = distance.topk(min(kept, distance.shape[1]), dim=1, largest=False, sorted=False)
        values = torch.cat([nearest[rows], found.values], dim=1)
        indices = torch.cat([index[rows], found.indices + columns.start], dim=1)
        best = values.topk(kept, dim=1, largest=False, sorted=False)
        nearest[rows], index[rows] = best.values, indices.gather(1, best.indices)

    squares = _squares(x)
    for rows in _blocks(n):
        for columns in _blocks(n, start=rows.start):
            distance = _squared_distances(x[rows], x[columns], squares[rows], squares[columns])
            if rows == columns:
                distance.fill_diagonal_(torch.inf)
                merge(rows, columns, distance)
            else:
                merge(rows, columns, distance)
                merge(columns, rows, distance.mT.contiguous())

    items = torch.arange(n, device=x.device).repeat_interleave(kept)
    exact = _paired_squared_distances(x, x, items, index.flatten()).view(n, kept)
    radii = exact.kthvalue(k, dim=1).values
    doubt = _rounding(d, float(2.0 * squares.amax()))
    unsure = (nearest.amax(dim=1) - doubt < radii) & (radii > 0) & (kept < n - 1)
    for item in unsure.nonzero().flatten():
        row = _paired_squared_distances(x, x, item.expand(n), torch.arange(n, device=x.device))
        row[item] = torch.inf
        radii[item] = row.kthvalue(k).values
    return (radii * (1.0 - TIE)).clamp(min=torch.finfo(x.dtype).tiny)  # distance 0 is inside even of radius 0


def _within(distance: Tensor, radii: Tensor, doubt: float, x: Tensor, y: Tensor) -> Tensor:
    """Return distance < radii elementwise, with the pairs that rounding leaves in doubt computed again."""
    inside = distance < radii
    doubtful = (distance - radii).abs_() <= doubt
    if bool(doubtful.any()):
        i, j = doubtful.nonzero(as_tuple=True)
        inside[i, j] = _paired_squared_distances(x, y, i, j) < radii.expand_as(distance)[i, j]
    return inside


def _squared_distances(x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor) -> Tensor:
    """Return [N, M]: |x|^2 + |y|^2 - 2 x . y, fast and accurate to `_rounding`."""
    return torch.addmm(y_squares[None, :], x, y.mT, alpha=-2.0).add_(x_squares[:, None])


def _paired_squared_distances(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return [P]: |x_i - y_j|^2 for P pairs, accurate to a few units in the last place."""
    step = max(1, PAIRS // x.shape[1])
    # One tensor for all: small ones kept in a list would lie between the freed blocks, and the heap would
    # grow by a block for each of them (5 GiB for 100,000 x 512).
    out = x.new_empty(len(i))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        out[part] = (x[i[part]] - y[j[part]]).square_().sum(dim=1)
    return out


def _squares(x: Tensor) -> Tensor:
    out = x.new_empty(len(x))
    for rows in _blocks(len(x)):
        out[rows] = x[rows].square().sum(dim=1)
    return out


def _rounding(d: int, squares: float) -> float:
    """Return a bound on the error of `_squared_distances` where |x|^2 + |y|^2 <= squares.

    Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.5, doubled.
    """
    return (d + 8) * torch.finfo(torch.float64).eps * squares


def _blocks(n: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, n, BLOCK):
        yield slice(first, min(first + BLOCK, n))


def recall(reference: Tensor, generated: Tensor, k: int = 5) -> Tensor:
    """Share of the reference items within the generated manifold, as `manifold` has it: a float64 scalar.

    Example:
        >>> line = torch.arange(10.0)[:, None]
        >>> recall(line, line[:5], k=1)
        tensor(0.5000, dtype=torch.float64)
    """
    return manifold(reference, generated, k).recall


def _checked_k(k: int, m: int, n: int) -> int:
    k = whole_number("k", k)
    if k < 1:
        raise InputError(f"k: expected a whole number of at least 1; got {k}")
    for name, size in (("reference", m), ("generated", n)):
        if k >= size:
            raise InputError(
                f"k: expected fewer than the items of {name}, which are {size}, since an item is not its own "
                f"neighbour; got {k}; take a smaller k or more images"
            )
    return k
