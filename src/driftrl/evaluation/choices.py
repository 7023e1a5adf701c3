"""What people's choices between two methods say: exact sign test and interval, agreement between raters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from driftrl.checks import InputError


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of ``wins`` against ``losses`` where both are equally likely; ties are left out.

    Conover 1999, section 3.4: twice the smaller binomial tail, at most 1; 1 where nothing was decided.

    Raises:
        InputError: for negative counts.

    Example:
        >>> sign_test(5, 0)
        0.0625
    """
    n = _counts(wins, losses)
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def binomial_interval(wins: int, losses: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share (Clopper & Pearson 1934): (low, high), (0, 1) where nothing was decided.

    Args:
        wins: successes, at least 0.
        losses: failures, at least 0.
        level: least coverage, between 0 and 1.

    Raises:
        InputError: for negative counts or a level outside (0, 1).
    """
    n = _counts(wins, losses)
    if not 0 < level < 1:
        raise InputError(f"level: expected a number between 0 and 1; got {level}")
    tail = (1 - level) / 2
    # P(X <= k) falls as the share grows; P(X >= k) = 1 - P(X <= k - 1).
    low = 0.0 if wins == 0 else _share(wins - 1, n, 1 - tail)
    high = 1.0 if losses == 0 else _share(wins, n, tail)
    return low, high


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters beyond chance (Cohen 1960), at most 1; None where both only ever say one thing.

    Args:
        first: one rater's answers, at least one.
        second: the other's, to the same questions in the same order.

    Raises:
        InputError: for no answers or unequal numbers of them.

    Example:
        >>> cohen_kappa("aabb", "aaba")
        0.5
    """
    if not first or len(first) != len(second):
        raise InputError(
            f"raters: expected answers to the same questions, at least one; got {len(first)} and {len(second)}"
        )
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(first.count(answer) * second.count(answer) for answer in set(first)) / n**2
    return _beyond_chance(agreed, chance)


def fleiss_kappa(answers: Sequence[Sequence[Hashable]]) -> float | None:
    """Agreement of two or more raters beyond chance (Fleiss 1971); None where all only ever say one thing.

    Args:
        answers: for each question, the answers of the same number of raters, two or more.

    Raises:
        InputError: for no questions, fewer than two raters, or unequal numbers of them.
    """
    raters = len(answers[0]) if answers else 0
    if raters < 2 or any(len(row) != raters for row in answers):
        raise InputError("answers: expected the same number of raters, two or more, for each question")
    agreed = sum(row.count(a) - 1 for row in answers for a in row) / (len(answers) * raters * (raters - 1))
    every = [answer for row in answers for answer in row]
    chance = sum((every.count(answer) / len(every)) ** 2 for answer in set(every))
    return _beyond_chance(agreed, chance)


def _counts(wins: int, losses: int) -> int:
    if wins < 0 or losses < 0:
        raise InputError(f"wins, losses: expected counts of at least 0; got {wins} and {losses}")
    return wins + losses


def _beyond_chance(agreed: float, chance: float) -> float | None:
    return None if chance >= 1 - 1e-12 else (agreed - chance) / (1 - chance)


def _at_most(k: int, n: int, share: float) -> float:
    """P(X <= k) of a binomial; in logarithms, for binomial coefficients outgrow floats at n = 1030."""
    top, log, other = math.lgamma(n + 1), math.log(share), math.log1p(-share)
    return sum(
        math.exp(top - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log + (n - i) * other)
        for i in range(k + 1)
    )


def _share(k: int, n: int, wanted: float) -> float:
    """The share at which P(X <= k) is ``wanted``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _at_most(k, n, middle) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
