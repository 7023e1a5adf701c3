"""How the learning rate and the averaged weights go along with the iterations: pure."""

from __future__ import annotations

import math

from driftrl.checks import InputError, one_of

SCHEDULES = ("constant", "linear", "cosine")


def rate_share(iteration: int, iterations: int, warmup: int = 0, kind: str = "constant") -> float:
    """The share of its learning rate that an iteration has, in 0..1.

    It rises by 1/``warmup`` an iteration (a warm-up longer than the run is not finished), from there on is constant, or falls so that it would be 0 in the iteration
    after the last one: in a straight line, or along half a cosine.

    Args:
        iteration: from 0.
        iterations: of the whole run; a later one has the share of the last.
        warmup: iterations in which it rises.
        kind: one of `SCHEDULES`.

    Raises:
        InputError: for another kind, or numbers that are negative.

    Source: the schedules of diffusers and transformers, which begin their warm-up at 0: there the first step is none.

    Example:
        >>> from driftrl.schedule import rate_share
        >>> [rate_share(i, 6, warmup=2, kind="linear") for i in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    one_of("kind", kind, SCHEDULES)
    if min(iteration, iterations, warmup) < 0:
        raise InputError(f"expected no negative number; got {iteration}, {iterations} and {warmup}")
    iteration = min(iteration, max(iterations - 1, 0))
    if iteration < warmup:
        return (iteration + 1) / warmup
    if kind == "constant":
        return 1.0
    done = (iteration - warmup) / max(1, iterations - warmup)
    return 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2


def kept_share(iteration: int, decay: float) -> float:
    """What an exponential moving average of the weights keeps of itself after an iteration i: min(decay, (1 + i) / (10 + i)),
    and nothing after the first.

    So the average is not held to where it began, which a run of few iterations would never forget.

    Args:
        iteration: that has ended, from 0.
        decay: in [0, 1).

    Source: diffusers' ``EMAModel``.

    Example:
        >>> from driftrl.schedule import kept_share
        >>> [kept_share(i, 0.9) for i in (0, 2, 100)]
        [0.0, 0.25, 0.9]
    """
    if iteration < 0 or not 0 <= decay < 1:
        raise InputError(f"expected an iteration from 0 and a decay in [0, 1); got {iteration} and {decay}")
    return min(decay, (1 + iteration) / (10 + iteration)) if iteration else 0.0
