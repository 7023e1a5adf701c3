"""Advantages: how much better each image is than the others of the same prompt, in its group or in the past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from driftrl.checks import (
    InputError,
    at_least,
    floating,
    has_shape,
    is_finite,
    one_of,
    only_rounding,
    safe_unit,
    whole_number,
)

SCALES: tuple[str, ...] = ("selected", "candidates", "global", "none")

CENTERS: tuple[str, ...] = ("selected", "candidates")

BASELINES: tuple[str, ...] = ("group", "running")


class History(NamedTuple):
    """The last rewards of each prompt of a set of S, as DDPO's running statistics want them."""

    values: Tensor
    """float32 [S, K]: the newest last; 0 where there is none yet."""
    filled: Tensor
    """int64 [S]: how many of a row's last values are rewards, at most K."""

    def rows(self, which: Sequence[int]) -> History:
        """The history of some prompts, in the order of the indices ``which``.

        Raises:
            InputError: if one of them is not in the set.
        """
        index = torch.tensor(_places(which, len(self.filled)), dtype=torch.long, device=self.filled.device)
        return History(self.values[index], self.filled[index])


@dataclass(frozen=True)
class AdvantageRule:
    """How rewards become advantages."""

    scale: str = "selected"
    """What divides, one of ``SCALES``; with baseline ``running`` the standard deviation of the history does."""
    clip: float = 5.0
    """Bound on the magnitude."""
    baseline: str = "group"
    """What an image is compared with, one of ``BASELINES``: its group, or the prompt's last rewards."""
    history: int = 64
    """Of ``running``: how many of a prompt's last rewards count."""
    min_history: int = 16
    """Of ``running``: with fewer rewards than this, the whole batch stands in for the prompt."""
    center: str = "selected"
    """What is subtracted, one of ``CENTERS``: the mean of the kept, or of all candidates of the prompt (DanceGRPO)."""


def advantages_of(
    rewards: Tensor, rule: AdvantageRule, candidates: Tensor, history: History | None = None
) -> Tensor:
    """Advantages [P, G] of the kept ``rewards`` [P, G] as ``rule`` says.

    Args:
        rewards: [P, G], of the kept candidates.
        rule: baseline, scale and clip, which is at least 0.
        candidates: [P, N], of all candidates.
        history: the P prompts' rows, ``candidates`` included; needed by baseline ``running``.

    Raises:
        InputError: as `group_relative` and `running_relative` do, or for ``running`` without a history.
    """
    at_least("clip", rule.clip, 0.0)
    if one_of("baseline", rule.baseline, BASELINES) == "running":
        if history is None:
            raise InputError("history: baseline 'running' needs each prompt's last rewards; got None")
        relative = running_relative(rewards, history, candidates, rule.min_history)
    else:
        relative = group_relative(rewards, rule.scale, candidates=candidates, center=rule.center)
    return relative.clamp(-rule.clip, rule.clip)


def group_relative(
    rewards: Tensor,
    scale: str = "selected",
    candidates: Tensor | None = None,
    *,
    eps: float = 0.0,
    correction: int = 0,
    center: str = "selected",
) -> Tensor:
    """Advantages ``(R - mean R) / (std + eps)``, the mean taken over each prompt's group.

    What divides is a choice, because a selected window can have so small a spread that dividing by it
    enlarges noise as much as signal:

    - ``selected``: the group's own standard deviation (the default, as in GRPO).
    - ``candidates``: the standard deviation of all the prompt's candidates, before selection.
    - ``global``: one standard deviation over the whole batch, prompts included (as Flow-GRPO's option):
      of ``candidates`` if given, else of ``rewards``.
    - ``none``: nothing divides; the advantage keeps the reward's unit.

    Where the standard deviation vanishes, that is where it is at most 4 rounding errors of the largest
    magnitude in what it is taken over (1 in half precision, where numbers are rounded once), advantages are exactly
    zero: a group of equal rewards teaches nothing, and float32 noise on large equal rewards is not enlarged to unit
    size. Rounding is that of the coarser of ``rewards`` and what the standard deviation is taken over. Arithmetic is
    in float64, in a unit in which no square over- or underflows.

    Args:
        rewards: [P, G], the selected group of each prompt.
        scale: one of ``SCALES``.
        candidates: [P, N] rewards before selection (for ``global`` any [Q, N], such as those gathered from
            all processes).
        eps: added to the standard deviation; 0 gives advantages that are exactly unchanged when the rewards
            are shifted or rescaled (Flow-GRPO has 1e-4, DanceGRPO 1e-8).
        correction: 0 for the population standard deviation (as DDPO and Flow-GRPO, through NumPy), 1 for the
            sample one (as DanceGRPO, through torch). For G = 8 the two differ by 7%.
        center: whose mean is subtracted, ``selected`` or ``candidates``. DanceGRPO compares with all candidates, mean and standard
            deviation, and picks the best and the worst then: ``center`` and ``scale`` are both ``candidates``.

    Returns:
        [P, G], the dtype of ``rewards`` (the default float dtype for integers).

    Raises:
        InputError: for wrong shapes, values that are not finite, an unknown scale or center, ``candidates`` as one of these
            without candidates, ``eps`` below 0, or another correction than 0 and 1.

    Source: GRPO (arXiv 2402.03300, section 4.1.2); applied to images by arXiv 2505.05470 and 2505.07818.

    Example:
        >>> import torch
        >>> from driftrl.advantages import group_relative
        >>> group_relative(torch.tensor([[1.0, 3.0], [7.0, 7.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    one_of("scale", scale, SCALES)
    one_of("center", center, CENTERS)
    at_least("eps", eps, 0.0)
    if whole_number("correction", correction) not in (0, 1):
        raise InputError(f"correction: expected 0 or 1; got {correction}")
    is_finite("rewards", has_shape("rewards", rewards, "[P, G]"))
    if candidates is not None:
        is_finite("candidates", has_shape("candidates", candidates, "[P, N]"))
    dtype = floating(rewards).dtype
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64  # MPS has no float64
    for name, choice in (("center", center), ("scale", scale)):
        if choice == "candidates" and candidates is None:
            raise InputError(
                f"candidates: {name} 'candidates' needs the rewards before selection [P, N]; got None"
            )
        if choice == "candidates" and candidates is not None and len(candidates) != len(rewards):
            raise InputError(
                f"candidates: expected one row per prompt, {len(rewards)}; got {list(candidates.shape)}"
            )
    compared = rewards if center == "selected" or candidates is None else candidates
    spread_of = rewards if scale == "selected" or candidates is None else candidates
    if rewards.numel() == 0:
        return torch.zeros_like(rewards, dtype=dtype)
    # Rounding is what the given numbers carry; of both, if a float64 reward is one of float32 candidates, say.
    given = [values.dtype for values in (rewards, spread_of) if values.is_floating_point()]
    precision = max((torch.finfo(each).eps for each in given), default=torch.finfo(wide).eps)
    if scale == "global":
        spread_of = spread_of.reshape(1, -1)
    own, compared, spread_of = (values.to(wide) for values in (rewards, compared, spread_of))
    magnitude = torch.maximum(torch.maximum(_largest(own), _largest(compared)), _largest(spread_of))
    unit = safe_unit(magnitude.amax(dim=0, keepdim=True) if scale == "global" else magnitude)
    own, compared, spread_of = own / unit, compared / unit, spread_of / unit
    centred = own - compared.mean(dim=1, keepdim=True)
    if scale == "none":
        return (centred * unit).to(dtype)
    if spread_of.numel() == 0 or spread_of.shape[1] <= correction:
        return torch.zeros_like(centred, dtype=dtype)
    std, vanishes = _spread(spread_of, precision, correction)
    return torch.where(vanishes, 0.0, centred / torch.where(vanishes, 1.0, std + eps / unit)).to(dtype)


def constant_rewards(rewards: Tensor) -> Tensor:
    """Which groups' rewards differ by no more than rounding, so that `group_relative` gives them no advantage: bool [P].

    Raises:
        InputError: if ``rewards`` is not [P, G].

    Example:
        >>> import torch
        >>> from driftrl.advantages import constant_rewards
        >>> constant_rewards(torch.tensor([[1e-9, 2e-9], [1000.0, 1000.0001]]))
        tensor([False,  True])
    """
    has_shape("rewards", rewards, "[P, G]")
    if rewards.numel() == 0:
        return torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    precision = torch.finfo(rewards.dtype if rewards.is_floating_point() else wide).eps
    values = rewards.to(wide)
    return _spread(values / safe_unit(_largest(values)), precision, 0)[1][:, 0]


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude [P, 1] of each row [P, K]; 0 of an empty one."""
    return torch.nn.functional.pad(values.detach().abs(), (0, 1)).amax(dim=1, keepdim=True)


def _spread(values: Tensor, precision: float, correction: int) -> tuple[Tensor, Tensor]:
    """Standard deviations [P, 1] of the rows, and whether they are but rounding of numbers of this precision."""
    std = values.std(dim=1, keepdim=True, correction=correction)
    return std, only_rounding(std, _largest(values), precision)


def _places(which: Sequence[int], prompts: int) -> list[int]:
    """Indices into a set of so many prompts, checked: a negative one would be another prompt's."""
    places = [whole_number("which", place) for place in which]
    for place in places:
        if not 0 <= place < prompts:
            raise InputError(f"which: expected 0 to {prompts - 1}, the prompts of the set; got {place}")
    return places


def no_history(prompts: int, length: int, device: torch.device | str = "cpu") -> History:
    """A history without rewards, for a set of ``prompts`` and the last ``length`` rewards of each.

    Raises:
        InputError: for less than no prompt, a length below 1, or what is no whole number.
    """
    at_least("prompts", whole_number("prompts", prompts), 0)
    at_least("length", whole_number("length", length), 1)
    return History(
        torch.zeros(prompts, length, device=device), torch.zeros(prompts, dtype=torch.long, device=device)
    )


def remember(history: History, which: Sequence[int], rewards: Tensor) -> History:
    """A new history that ends in ``rewards``; the oldest ones fall out.

    Args:
        history: of a set of S prompts.
        which: P indices into the set; a prompt may come more than once, then in this order.
        rewards: [P, N], what each of them earned.

    Raises:
        InputError: if ``rewards`` is not [P, N] or, as the history keeps them, not finite; or if an index is not of the set.

    Example:
        >>> import torch
        >>> from driftrl.advantages import no_history, remember
        >>> remember(no_history(2, 3), [1], torch.tensor([[5.0, 6.0]])).values
        tensor([[0., 0., 0.],
                [0., 5., 6.]])
    """
    if has_shape("rewards", rewards, "[P, N]").shape[0] != len(which):
        raise InputError(f"rewards: expected {len(which)} rows; got {list(rewards.shape)}")
    values, filled = history.values.clone(), history.filled.clone()
    length = values.shape[1]
    kept = is_finite(f"rewards as {values.dtype}", is_finite("rewards", rewards).to(values))
    for row, earned in zip(_places(which, len(filled)), kept, strict=True):
        values[row] = torch.cat([values[row], earned])[-length:]
        filled[row] = (filled[row] + len(earned)).clamp(max=length)
    return History(values, filled)


def running_relative(
    rewards: Tensor, history: History, candidates: Tensor, min_history: int = 16, *, eps: float = 1e-6
) -> Tensor:
    """Advantages ``(R - mean) / (std + eps)`` with mean and standard deviation over the prompt's last rewards.

    The statistics outlive the iteration, so no group is needed to know what a prompt usually earns; in return
    they lag behind the policy. Where a prompt has fewer than ``min_history`` rewards yet, mean and standard
    deviation are those of all ``candidates`` of the batch. Where the standard deviation vanishes (as
    `group_relative` has it, by the rounding of the coarsest of rewards, candidates and history), advantages are exactly
    zero. The standard deviation is the population one.

    Args:
        rewards: [P, G].
        history: P rows, these rewards included.
        candidates: [P, N], every reward of this iteration.
        min_history: least number of rewards for statistics of a prompt's own.
        eps: added to the standard deviation.

    Returns:
        [P, G], the dtype of ``rewards`` (the default float dtype for integers).

    Raises:
        InputError: for wrong shapes or values that are not finite, those of the history included.

    Source: DDPO (arXiv 2305.13301), for running statistics per prompt; docs/methods.md has what we chose.

    Example:
        >>> import torch
        >>> from driftrl.advantages import no_history, remember, running_relative
        >>> now = torch.tensor([[2.0, 4.0]])
        >>> past = remember(no_history(1, 4), [0], torch.tensor([[0.0, 2.0]]))
        >>> running_relative(now, remember(past, [0], now), now, min_history=2).round(decimals=4)
        tensor([[0.0000, 1.4142]])
    """
    at_least("eps", eps, 0.0)
    is_finite("rewards", has_shape("rewards", rewards, "[P, G]"))
    is_finite("candidates", has_shape("candidates", candidates, "[P, N]"))
    if len(history.values) != len(rewards):
        raise InputError(
            f"history: expected a row for each of {len(rewards)} prompts; got {len(history.values)}"
        )
    is_finite("history", history.values)
    dtype = floating(rewards).dtype
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    length = history.values.shape[1]
    place = torch.arange(length, device=rewards.device)
    weight = (place >= length - history.filled[:, None]).to(wide)
    own = (history.filled >= min_history)[:, None]
    mean, std, magnitude = _moments(history.values.to(wide), weight)
    everything = candidates.to(wide).reshape(1, -1)
    mean_all, std_all, magnitude_all = _moments(everything, torch.ones_like(everything))
    mean, std = torch.where(own, mean, mean_all), torch.where(own, std, std_all)
    magnitude = torch.where(own, magnitude, magnitude_all)
    given = (rewards, candidates, history.values)
    precision = max(torch.finfo(values.dtype).eps for values in given if values.is_floating_point())
    vanishes = only_rounding(std, magnitude, precision)
    relative = (rewards.to(wide) - mean) / torch.where(vanishes, 1.0, std + eps)
    return torch.where(vanishes, 0.0, relative).to(dtype)


def _moments(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population standard deviation and largest magnitude [P, 1] of the values [P, K] of weight 1."""
    magnitude = _largest(values * weight)
    unit = safe_unit(magnitude)
    values = values / unit
    count = weight.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (values * weight).sum(dim=1, keepdim=True) / count
    variance = ((values - mean).square() * weight).sum(dim=1, keepdim=True) / count
    return mean * unit, variance.sqrt() * unit, magnitude
