"""Several rewards of the same images, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from driftrl.types import Reward


class SeveralRewards:
    """R rewards as one callable that gives a column for each; `driftrl.mixture` makes one number of them."""

    def __init__(self, rewards: Sequence[Reward], followed: Sequence[bool] | None = None) -> None:
        """Take over the rewards, in the order of the columns; those that are not ``followed``, by default none, get images without a gradient."""
        self.rewards = tuple(rewards)
        self._followed = (True,) * len(self.rewards) if followed is None else tuple(followed)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1 against N prompts: float32 [N, R].

        Each reward gets the very same tensor, so that those on one CLIP model embed it once.
        """
        still = images.detach() if images.requires_grad else images
        columns = [
            reward(images if followed else still, prompts).float().to(images.device)
            for reward, followed in zip(self.rewards, self._followed, strict=True)
        ]
        return torch.stack(columns, dim=-1)
