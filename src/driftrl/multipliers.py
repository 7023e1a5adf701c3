"""A lambda for each prompt, that follows how much of the base model's diversity the prompt has left: pure.

To keep a share tau of each prompt's diversity is a constraint, ``d_p >= tau d_p^base``, and lambda its multiplier. So what is chosen is how
much to keep, in place of a lambda whose effect depends on reward, prompts and length of training; and training comes to rest there.

Source: ours. Dual ascent on a constrained policy is that of "Reward constrained policy optimization" (arXiv 1805.11074); soft actor-critic
adapts the weight of its entropy likewise (arXiv 1812.05905). The part in proportion to the error, without which lambda comes too late and
then overshoots, is that of "Responsive safety in reinforcement learning by PID Lagrangian methods" (arXiv 2007.03964).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from driftrl.checks import InputError, at_least, has_shape, is_finite, whole_number

FIRST = 3
"""Visits of a prompt whose mean stands for the base model's diversity, from which the policy has hardly moved by then."""
LARGEST = 2.0
"""Bound on lambda: the bonus outweighs the reward there."""
PROPORTION = 50.0
"""The part of lambda in proportion to the error, in units of the rate at which the error adds up."""


class Multipliers(NamedTuple):
    """Of a set of S prompts."""

    ratio: Tensor
    """float64 [S], on the CPU: lambda, as far as it adds up."""
    base: Tensor
    """float64 [S]: mean diversity of the first visits; 0 before there was one."""
    visits: Tensor
    """int64 [S]: how often the prompt was drawn."""


def begun(prompts: int, ratio: float) -> Multipliers:
    """Before the first iteration: lambda is ``ratio`` for every prompt.

    Raises:
        InputError: for less than no prompt, or a ratio outside 0 to 2 (``LARGEST``).
    """
    at_least("prompts", whole_number("prompts", prompts), 0)
    _bounded(ratio)
    nothing = torch.zeros(prompts, dtype=torch.float64)
    return Multipliers(nothing + ratio, nothing, torch.zeros(prompts, dtype=torch.long))


def followed(
    multipliers: Multipliers,
    which: Sequence[int],
    diversity: Tensor,
    target: float,
    least: float = 0.5,
    rate: float = 0.1,
) -> tuple[Multipliers, Tensor, Tensor]:
    """One visit of P prompts: with the error ``e = target - d / d_base``, ``lambda += rate e``, and what to use now is ``lambda + 50 rate e``.

    Both are held between ``least`` and 2. In a prompt's first three visits (``FIRST``) the mean diversity becomes its d_base and lambda stays.

    Args:
        multipliers: of S prompts.
        which: P indices into them; one may come more than once, then in this order.
        diversity: [P], the mean diversity of each prompt's group now (`driftrl.shaping.group_diversity`).
        target: tau, the share of d_base to keep, above 0.
        least: what lambda does not fall below, however much is left.
        rate: how fast lambda follows, at least 0.

    Returns:
        The new multipliers; lambda for each of the P groups, and the share d / d_base that it has, both float64 [P] on the CPU. Without
        diversity to begin with there is nothing to keep: the share is 1.

    Raises:
        InputError: for another shape, values that are not finite, a prompt that is not of the set, or numbers out of range.

    Example:
        >>> import torch
        >>> from driftrl.multipliers import Multipliers, followed
        >>> known = Multipliers(*torch.tensor([[0.5], [0.4], [3.0]], dtype=torch.float64))
        >>> new, ratio, share = followed(known, [0], torch.tensor([0.25], dtype=torch.float64), target=0.75)
        >>> share.tolist(), new.ratio.tolist(), ratio.tolist()
        ([0.625], [0.5125], [1.1375])
    """
    at_least("rate", rate, 0.0)
    _bounded(least)
    if not target > 0:
        raise InputError(f"target: expected more than 0; got {target:g}")
    if is_finite("diversity", has_shape("diversity", diversity, "[P]")).shape[0] != len(which):
        raise InputError(f"diversity: expected one for each of {len(which)} prompts; got {len(diversity)}")
    ratio, base, visits = (values.clone() for values in multipliers)
    used, shares = [], []
    for place, now in zip(which, diversity.tolist(), strict=True):
        if not 0 <= place < len(ratio):
            raise InputError(f"which: expected 0 to {len(ratio) - 1}, the prompts of the set; got {place}")
        seen = int(visits[place])
        if seen < FIRST:
            base[place] = (base[place] * seen + now) / (seen + 1)
        share = now / float(base[place]) if base[place] > 0 else 1.0
        error = target - share if seen >= FIRST else 0.0
        ratio[place] = (ratio[place] + rate * error).clamp(least, LARGEST)
        used.append(min(max(float(ratio[place]) + PROPORTION * rate * error, least), LARGEST))
        shares.append(share)
        visits[place] += 1
    return Multipliers(ratio, base, visits), ratio.new_tensor(used), ratio.new_tensor(shares)


def _bounded(ratio: float) -> None:
    if not 0 <= ratio <= LARGEST:
        raise InputError(f"ratio: expected 0 to {LARGEST:g}; got {ratio:g}")
