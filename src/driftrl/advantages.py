"""Group-relative advantages: how much better each image is than the others of the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError, at_least, has_shape, is_finite, one_of

SCALES: tuple[str, ...] = ("selected", "candidates", "global", "none")

# A standard deviation below this many rounding errors of the largest reward is rounding, not signal.
_ROUNDING_ERRORS = 4.0


def group_relative(
    rewards: Tensor,
    scale: str = "selected",
    candidates: Tensor | None = None,
    *,
    eps: float = 0.0,
    correction: int = 0,
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
    magnitude in what it is taken over, advantages are exactly zero: a group of equal rewards teaches nothing,
    and float32 noise on large equal rewards is not enlarged to unit size. Arithmetic is in float64.

    Args:
        rewards: [P, G], the selected group of each prompt.
        scale: one of ``SCALES``.
        candidates: [P, N] rewards before selection (for ``global`` any [Q, N], such as those gathered from
            all processes).
        eps: added to the standard deviation; 0 gives advantages that are exactly unchanged when the rewards
            are shifted or rescaled (Flow-GRPO has 1e-4, DanceGRPO 1e-8).
        correction: 0 for the population standard deviation (as DDPO and Flow-GRPO, through NumPy), 1 for the
            sample one (as DanceGRPO, through torch). For G = 8 the two differ by 7%.

    Returns:
        [P, G], the dtype of ``rewards`` (the default float dtype for integers).

    Raises:
        InputError: for wrong shapes, values that are not finite, an unknown scale, ``scale='candidates'``
            without candidates, or ``eps`` below 0.

    Source: GRPO (arXiv 2402.03300, section 4.1.2); applied to images by arXiv 2505.05470 and 2505.07818.

    Example:
        >>> import torch
        >>> from driftrl.advantages import group_relative
        >>> group_relative(torch.tensor([[1.0, 3.0], [7.0, 7.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    one_of("scale", scale, SCALES)
    at_least("eps", eps, 0.0)
    is_finite("rewards", has_shape("rewards", rewards, "[P, G]"))
    if candidates is not None:
        is_finite("candidates", has_shape("candidates", candidates, "[P, N]"))
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64  # MPS has no float64
    centred = rewards.to(wide) - rewards.to(wide).mean(dim=1, keepdim=True)
    if scale == "none":
        return centred.to(dtype)

    if scale == "candidates" and candidates is None:
        raise InputError("candidates: scale 'candidates' needs the rewards before selection [P, N]; got None")
    spread_of = rewards if scale == "selected" or candidates is None else candidates
    if scale == "candidates" and spread_of.shape[0] != rewards.shape[0]:
        raise InputError(
            f"candidates: expected one row per prompt, {rewards.shape[0]}; got {list(spread_of.shape)}"
        )
    if scale == "global":
        spread_of = spread_of.reshape(1, -1)
    # Measured against the coarser of the two dtypes: rounding is what the given numbers carry.
    precision = torch.finfo(dtype).eps if spread_of.is_floating_point() else torch.finfo(wide).eps
    if spread_of.numel() == 0 or spread_of.shape[1] <= correction:
        return torch.zeros_like(centred, dtype=dtype)
    values = spread_of.to(wide)
    std = values.std(dim=1, keepdim=True, correction=correction)
    vanishes = std <= _ROUNDING_ERRORS * precision * values.abs().amax(dim=1, keepdim=True)
    return torch.where(vanishes, 0.0, centred / torch.where(vanishes, 1.0, std + eps)).to(dtype)
