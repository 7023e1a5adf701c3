"""The LAION aesthetic predictor, the aesthetic reward of DDPO (arXiv 2305.13301, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from driftrl.checks import InputError
from driftrl.gradients import on_demand
from driftrl.rewards.tower import CLIPTower

HEAD = "aesthetic.safetensors"
WIDTHS = (1024, 128, 64, 16, 1)


def head(width: int) -> nn.Sequential:
    """The predictor's linear layers on embeddings [N, width], numbered as in the published weights.

    ImageReward ends in the same layers. There are no activations between them; dropout does nothing when scoring.
    """
    sizes = (width, *WIDTHS)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if number < len(WIDTHS) - 2:
            layers.append(nn.Dropout())
    return nn.Sequential(*layers)


class AestheticReward:
    """How beautiful people find an image, about 1 to 10; the prompt does not matter."""

    def __init__(self, tower: CLIPTower) -> None:
        """Stand on ``tower`` (a CLIP ViT-L/14), with the linear layers of ``aesthetic.safetensors`` in its folder.

        Raises:
            InputError: if they are missing or do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = demand_head(tower.folder)
        self.tower = tower
        self.head = head(tower.width).to(tower.device).eval().requires_grad_(False)
        try:
            weights = load_file(path)
            self.head.load_state_dict({k.removeprefix("layers."): v.float() for k, v in weights.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: expected the predictor's five linear layers: {reason}") from error

    @on_demand
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1: float32 [N]."""
        scores: Tensor = self.head(self.tower.embed_images(images))
        return scores[:, 0]


def demand_head(folder: Path | str) -> Path:
    """Where a folder's linear layers are.

    Raises:
        InputError: if it has none.
    """
    path = Path(folder) / HEAD
    if not path.is_file():
        raise InputError(
            f"reward: {folder} has no {HEAD}; docs/rewards.md says how to make one of the published weights"
        )
    return path
