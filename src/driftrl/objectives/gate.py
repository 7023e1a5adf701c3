"""Which samples are held to the reference policy, and when that reference moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, floating, has_shape, is_finite


@dataclass(frozen=True)
class Anchor:
    """Whom the divergence holds, and to what."""

    share: float = 1.0
    """Share of the kept samples that it applies to: the most suspect ones (`gate`)."""
    threshold: float | None = None
    """The reference moves to the policy once the divergence is above this; None never."""
    every: int | None = None
    """It moves after so many iterations; None never."""

    @property
    def moves(self) -> bool:
        """Whether the reference ever moves."""
        return self.threshold is not None or self.every is not None


def win_rates(rewards: Tensor) -> Tensor:
    """Share of the other candidates of its prompt that each one beats, a draw counting half: [P, N] in 0..1, in the
    dtype of ``rewards``, or float32 for whole numbers.

    Raises:
        InputError: if ``rewards`` is not [P, N] with N >= 2, or values are not finite.
    """
    # NaN beats nothing and equals nothing, itself included.
    is_finite("rewards", has_shape("rewards", rewards, "[P, N]"))
    if rewards.shape[1] < 2:
        raise InputError(f"rewards: expected at least two candidates per prompt; got {list(rewards.shape)}")
    # Compared, not subtracted: differences of whole numbers wrap around.
    own, other = rewards[:, :, None], rewards[:, None, :]
    beaten = (own > other).sum(dim=-1) + 0.5 * ((own == other).sum(dim=-1) - 1)
    return beaten.to(floating(rewards).dtype) / (rewards.shape[1] - 1)


def reward_disagreement(rewards: Tensor, others: Sequence[Tensor]) -> Tensor:
    """How much higher the trained reward ranks each candidate than other rewards do: [P, N] in -1..1.

    The win rate by ``rewards`` less the mean win rate by ``others``. Positive is what an exploited reward looks
    like: it alone likes the picture.

    Args:
        rewards: [P, N], of the reward that is trained on.
        others: at least one [P, N], of other judges; only their order counts, so units need not agree.

    Raises:
        InputError: for no others, other shapes, or values that are not finite.

    Source: GARDO (arXiv 2512.24138) takes the disagreement with light rewards as uncertainty; ranks within the
    prompt's candidates are ours.

    Example:
        >>> import torch
        >>> from driftrl.objectives.gate import reward_disagreement
        >>> reward_disagreement(torch.tensor([[1.0, 2.0, 3.0]]), [torch.tensor([[30.0, 20.0, 10.0]])])
        tensor([[-1.,  0.,  1.]])
    """
    is_finite("rewards", has_shape("rewards", rewards, "[P, N]"))
    if len(others) == 0:
        raise InputError("others: expected at least one further reward to compare with; got none")
    for other in others:
        if has_shape("others", other, "[P, N]").shape != rewards.shape:
            raise InputError(f"others: expected shape {list(rewards.shape)}; got {list(other.shape)}")
        is_finite("others", other)
    own = win_rates(rewards)
    # Ranked before they take on the dtype of the rewards, in which neighbours may be one number.
    return own - torch.stack([win_rates(other).to(own) for other in others]).mean(dim=0)


def gate(disagreement: Tensor, share: float) -> Tensor:
    """Which samples the divergence applies to: the ``share`` of them that are the most suspect.

    Args:
        disagreement: [P, G]; only positive ones are ever suspect.
        share: of all P * G, above 0 and at most 1; at least one sample. 1 applies it to every sample, suspect or
            not.

    Returns:
        [P, G] of 0 and 1, the dtype of ``disagreement``.

    Raises:
        InputError: for another shape or a share outside (0, 1].

    Source: GARDO (arXiv 2512.24138).

    Example:
        >>> import torch
        >>> from driftrl.objectives.gate import gate
        >>> gate(torch.tensor([[0.5, -1.0], [0.2, 0.1]]), 0.5)
        tensor([[1., 0.],
                [1., 0.]])
    """
    has_shape("disagreement", disagreement, "[P, G]")
    if not 0 < share <= 1:
        raise InputError(f"share: expected more than 0 and at most 1; got {share}")
    if share == 1:
        return torch.ones_like(disagreement)
    flat = disagreement.flatten()
    # A stable sort: of equals the first, on every device.
    most = flat.sort(descending=True, stable=True).indices[: max(1, round(share * len(flat)))]
    marked = torch.zeros_like(flat).index_fill(0, most, 1.0) * (flat > 0)
    return marked.view_as(disagreement)


def reference_is_due(divergence: float, age: int, threshold: float | None, every: int | None) -> bool:
    """Whether the reference is to become the current policy: too far away from it, or too old.

    Args:
        divergence: mean divergence of the iteration that ended.
        age: iterations since the reference last moved, this one included.
        threshold: moves once the divergence is above this; None never.
        every: moves at this age; None never.

    Source: GARDO (arXiv 2512.24138).
    """
    return (threshold is not None and divergence > threshold) or (every is not None and age >= every)
