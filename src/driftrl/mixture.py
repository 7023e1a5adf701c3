"""Several rewards at once: each is brought to a scale of its own choosing, weighed, and added to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, floating, has_shape, is_tensor, one_of, only_rounding, safe_unit

NORMALIZATIONS: tuple[str, ...] = ("none", "prompt", "batch", "fixed")


@dataclass(frozen=True)
class Part:
    """One reward of several."""

    name: str
    weight: float = 1.0
    """What it is multiplied by once it is normalised; below 0 it is lowered, at 0 it is only logged."""
    normalize: str = "none"
    """How, one of ``NORMALIZATIONS``."""
    mean: float = 0.0
    """Of ``fixed``: what is subtracted."""
    std: float = 1.0
    """Of ``fixed``: what divides."""


def mixed(scores: Tensor, parts: Sequence[Part], among: Tensor | None = None) -> Tensor:
    """The weighted sum of normalised rewards, ``sum_k w_k n_k(r_k)``: [P, N].

    ``n_k`` is by the part's ``normalize``:

    - ``none``: the reward as it is.
    - ``prompt``: ``(r - mean) / std`` over the prompt's candidates. What is added up is then, up to a factor, what
      each reward's own advantage would be: a reward with a large spread does not drown one with a small spread.
    - ``batch``: the same over all candidates of all prompts.
    - ``fixed``: ``(r - mean) / std`` with the part's numbers.

    Where a standard deviation (the population one) vanishes, that is where it is at most 4 rounding errors of the
    largest magnitude in what it is taken over (1 in half precision, where numbers are rounded once), the part adds 0.
    Rounding is that of the coarser of ``scores`` and ``among``. Arithmetic is in float64, in a unit in which no square
    over- or underflows.

    Args:
        scores: [P, N, R], a column for each part; [P, N], of a single reward, is returned as it is.
        parts: R of them.
        among: [P, M, R], what means and standard deviations are taken over instead of ``scores``: the base model's
            rewards, say, to compare models on one scale; M >= 1.

    Returns:
        [P, N], the dtype of ``scores``.

    Raises:
        InputError: for another number of columns, an unknown normalisation, or ``among`` of another shape.

    Source: ``prompt`` is the decoupled normalisation of GDPO (arXiv 2601.05242); docs/rewards.md has the rest.

    Example:
        >>> import torch
        >>> from driftrl.mixture import Part, mixed
        >>> scores = torch.tensor([[[1.0, 300.0], [3.0, 100.0], [2.0, 200.0]]])
        >>> mixed(scores, [Part("a"), Part("b", weight=0.01)])
        tensor([[4., 4., 4.]])
        >>> mixed(scores, [Part("a", 2.0, "prompt"), Part("b", 1.0, "prompt")]).round(decimals=4)
        tensor([[-1.2247,  1.2247,  0.0000]])
    """
    if is_tensor("scores", scores).dim() == 2:
        return scores
    if has_shape("scores", scores, "[P, N, R]").shape[-1] != len(parts):
        raise InputError(f"scores: expected {len(parts)} columns, one per reward; got {list(scores.shape)}")
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    if among is None:
        among = scores
    else:
        prompts, candidates, rewards = scores.shape
        shape = has_shape("among", among, "[P, M, R]").shape
        if (shape[0], shape[2]) != (prompts, rewards) or (shape[1] == 0 and candidates > 0):
            raise InputError(f"among: expected [{prompts}, M, {rewards}], M >= 1; got {list(shape)}")
    precision = max(torch.finfo(floating(given).dtype).eps for given in (scores, among))
    among = among.to(wide)
    total = torch.zeros(scores.shape[:2], dtype=wide, device=scores.device)
    for k, (part, values) in enumerate(zip(parts, scores.to(wide).unbind(-1), strict=True)):
        total += part.weight * _normalised(values, part, among[..., k], precision)
    return total.to(floating(scores).dtype)


def columns(scores: Tensor, parts: Sequence[Part]) -> dict[str, Tensor]:
    """The rewards [P, N] in ``scores`` [P, N, R] by the names of their parts; none in [P, N], of a single reward."""
    names = [part.name for part in parts] if scores.dim() == 3 else []
    return {name: scores[..., k] for k, name in enumerate(names)}


def _normalised(values: Tensor, part: Part, among: Tensor, precision: float) -> Tensor:
    """Values [P, N] on the scale that the part asks for, by statistics over ``among`` [P, M]."""
    if one_of("normalize", part.normalize, NORMALIZATIONS) == "none":
        return values
    if part.normalize == "fixed":
        return (values - part.mean) / part.std
    if values.numel() == 0:  # nothing has no statistics, and needs none
        return values
    among = among if part.normalize == "prompt" else among.reshape(1, -1)
    magnitude = among.abs().amax(1, keepdim=True)
    unit = safe_unit(magnitude)
    values, among, magnitude = values / unit, among / unit, magnitude / unit
    mean, std = among.mean(1, keepdim=True), among.std(1, keepdim=True, correction=0)
    vanishes = only_rounding(std, magnitude, precision)
    return torch.where(vanishes, 0.0, (values - mean) / torch.where(vanishes, 1.0, std))
