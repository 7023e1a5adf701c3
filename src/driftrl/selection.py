"""Which candidates of a prompt's group the update learns from: each rule turns rewards into indices.

DRIFT (arXiv 2601.12401) draws twice as many images per prompt as it trains on and keeps those whose rewards
lie close together, so that outliers do not steer the update. The other rules are baselines under the same
interface. All are pure, vectorised over prompts and work on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, is_finite, one_of, safe_unit, whole_number

STRATEGIES: tuple[str, ...] = (
    "concentrated",
    "nearest_neighbor",
    "nearest_to_mean",
    "nearest_to_median",
    "contrast",
    "top",
    "random",
    "all",
)


def select(
    rewards: Tensor,
    keep: int,
    strategy: str = "concentrated",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose ``keep`` of the ``N`` candidates of each prompt by their rewards.

    - ``concentrated``: the ``keep`` consecutive sorted rewards with the smallest range, which is the subset
      with the least total gap between neighbours. Equal ranges: the window whose mean is nearest the group's
      median; then the one with the higher reward.
    - ``nearest_neighbor``: drops the candidates whose nearest neighbour in reward is farthest away; filters
      outliers but keeps several clusters. Equal distances: keeps the one nearer the median, then the higher.
    - ``nearest_to_mean``, ``nearest_to_median``: the rewards nearest that centre of the group; of two equally
      near, the higher. The median of an even number is the mean of the middle two.
    - ``contrast``: the best and the worst half (DanceGRPO, arXiv 2505.07818); of an odd ``keep`` the best
      half gets the extra one.
    - ``top``: the best. ``random``: uniform without replacement. ``all``: everything, ``keep`` must be ``N``.

    Two numbers count as equal where they differ by no more than the rounding of the given rewards allows, so
    that 0.1, 0.2, 0.3 in float32 are evenly spaced. Which of several candidates with identical rewards is
    kept never matters to the rules; the lowest indices are (except by ``random``), so the answer is
    deterministic, and permuting the candidates changes only which of the identical ones are named.

    Args:
        rewards: float or integer [P, N], one row per prompt. Hand in float32: half precision rounds so
            coarsely that many rewards count as equal.
        keep: how many candidates to keep per prompt, 1 <= keep <= N.
        strategy: one of ``STRATEGIES``.
        generator: source of randomness; needed by ``random``, ignored by the others.

    Returns:
        int64 [P, keep]: indices into the second dimension, ascending in each row, on the device of
        ``rewards``. ``rewards.gather(1, indices)`` are the rewards kept.

    Raises:
        InputError: if ``rewards`` is not [P, N] or has NaN or infinite values, ``keep`` is out of range, the
            strategy is unknown, ``random`` has no generator, or ``all`` is asked for with ``keep`` < N.

    Source: arXiv 2601.12401 (keeps 8 of 16 by a nearest-neighbour criterion); the two readings of that
    criterion and all tie rules are ours, see ``docs/method.md``.

    Example:
        >>> import torch
        >>> from driftrl.selection import select
        >>> select(torch.tensor([[0.0, 5.0, 5.1, 9.0, 5.3]]), keep=3)
        tensor([[1, 2, 4]])
    """
    one_of("strategy", strategy, STRATEGIES)
    has_shape("rewards", rewards, "[P, N]")
    prompts, candidates = rewards.shape
    keep = whole_number("keep", keep)
    if candidates == 0:
        raise InputError("rewards: expected at least one candidate per prompt; got none")
    if not 1 <= keep <= candidates:
        raise InputError(f"keep: expected 1 to {candidates}, the number of candidates per prompt; got {keep}")
    if strategy == "all" and keep != candidates:
        raise InputError(f"keep: strategy 'all' keeps all {candidates} candidates; got {keep}")
    if strategy == "random" and generator is None:
        raise InputError("generator: strategy 'random' needs a torch.Generator; got None")
    is_finite("rewards", rewards)

    if strategy == "random" and generator is not None:
        draws = torch.rand(prompts, candidates, generator=generator, device=generator.device)
        return draws.topk(keep, dim=1).indices.sort(dim=1).values.to(rewards.device)
    if keep == candidates:
        return torch.arange(candidates, device=rewards.device).repeat(prompts, 1)

    # A stable sort puts identical rewards in order of index; every rule below marks sorted positions.
    precision = torch.finfo(rewards.dtype if rewards.is_floating_point() else torch.float64).eps
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64  # MPS has no float64
    ordered, order = rewards.to(wide).sort(dim=1, stable=True)
    as_given = ordered
    ordered = ordered / safe_unit(ordered.abs().amax(dim=1, keepdim=True))  # whose differences are finite
    if strategy == "concentrated":
        kept = _tightest_window(ordered, keep, precision)
    elif strategy == "nearest_neighbor":
        kept = _closest_neighbours(ordered, keep, precision)
    elif strategy == "nearest_to_mean":
        kept = _nearest_to(ordered, ordered.mean(dim=1, keepdim=True), keep, precision)
    elif strategy == "nearest_to_median":
        kept = _nearest_to(ordered, _median(ordered), keep, precision)
    else:
        worst = keep // 2 if strategy == "contrast" else 0
        position = torch.arange(candidates, device=rewards.device)
        kept = ((position < worst) | (position >= candidates - (keep - worst))).repeat(prompts, 1)

    chosen = order[_first_of_identical(as_given, kept)].view(prompts, keep)
    return chosen.sort(dim=1).values


def _tightest_window(ordered: Tensor, keep: int, precision: float) -> Tensor:
    """Mark the window of ``keep`` sorted rewards with the least range; bool [P, N]."""
    windows = ordered.unfold(1, keep, 1)  # [P, N - keep + 1, keep]
    low, high = windows[..., 0], windows[..., -1]
    rounding = precision * torch.maximum(low.abs(), high.abs())
    candidates = _least(high - low, rounding, torch.ones_like(low, dtype=torch.bool))
    median = _median(ordered)
    candidates = _least(
        (windows.mean(dim=-1) - median).abs(), torch.maximum(rounding, precision * median.abs()), candidates
    )
    # Windows are sorted by their rewards, so the highest of those still tied is the last.
    start = torch.arange(low.shape[1], device=ordered.device).where(candidates, -1).amax(dim=1, keepdim=True)
    position = torch.arange(ordered.shape[1], device=ordered.device)
    return (position >= start) & (position < start + keep)


def _closest_neighbours(ordered: Tensor, keep: int, precision: float) -> Tensor:
    """Mark the ``keep`` rewards whose nearest neighbour is closest; bool [P, N]."""
    gaps = ordered.diff(dim=1)
    edge = torch.full_like(ordered[:, :1], torch.inf)
    distance = torch.minimum(torch.cat([edge, gaps], dim=1), torch.cat([gaps, edge], dim=1))
    median = _median(ordered)
    return _smallest(
        [
            (distance, precision * (ordered.abs() + distance)),
            ((ordered - median).abs(), precision * torch.maximum(ordered.abs(), median.abs())),
        ],
        keep,
    )


def _nearest_to(ordered: Tensor, centre: Tensor, keep: int, precision: float) -> Tensor:
    """Mark the ``keep`` rewards nearest ``centre`` [P, 1]; bool [P, N]."""
    distance = (ordered - centre).abs()
    return _smallest([(distance, precision * torch.maximum(ordered.abs(), centre.abs()))], keep)


def _median(ordered: Tensor) -> Tensor:
    """Median of sorted rows, [P, 1]: the mean of the middle two for an even number."""
    middle = ordered.shape[1] // 2
    return ordered[:, [(ordered.shape[1] - 1) // 2, middle]].mean(dim=1, keepdim=True)


def _least(values: Tensor, rounding: Tensor, among: Tensor) -> Tensor:
    """Mark those ``among`` whose value cannot be told from the least, given each value's rounding error."""
    bound = (values + rounding).where(among, torch.inf).amin(dim=1, keepdim=True)
    return among & (values - rounding <= bound)


def _smallest(keys: list[tuple[Tensor, Tensor]], keep: int) -> Tensor:
    """Mark the ``keep`` smallest by (value, rounding) keys in turn; then the higher reward; bool [P, N].

    The inputs follow the sorted rewards, so a later position is a higher reward.
    """
    count = keys[0][0].shape[1]
    rank = torch.zeros_like(keys[0][0], dtype=torch.long)
    for values, rounding in keys:
        rank = rank * count + _dense_rank(values, rounding)
    rank = rank * count + torch.arange(count - 1, -1, -1, device=rank.device)
    return torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.argsort(dim=1)[:, :keep], True)


def _dense_rank(values: Tensor, rounding: Tensor) -> Tensor:
    """Rank from 0 in each row, int64 [P, N]; values no further apart than their rounding share a rank."""
    ascending, order = values.sort(dim=1)
    slack = rounding.gather(1, order)
    new = (ascending.diff(dim=1) > slack[:, 1:] + slack[:, :-1]).long()
    steps = torch.cat([torch.zeros_like(order[:, :1]), new.cumsum(dim=1)], dim=1)
    return torch.zeros_like(order).scatter(1, order, steps)


def _first_of_identical(ordered: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the kept sorted positions, each run of identical rewards kept from its front."""
    new = torch.cat([torch.zeros_like(kept[:, :1]), ordered.diff(dim=1) > 0], dim=1).long()
    run = new.cumsum(dim=1)
    position = torch.arange(ordered.shape[1], device=ordered.device)
    start = (position * new).cummax(dim=1).values
    kept_in_run = torch.zeros_like(run).scatter_add(1, run, kept.long())
    rows, columns = (position - start < kept_in_run.gather(1, run)).nonzero(as_tuple=True)
    return rows, columns
