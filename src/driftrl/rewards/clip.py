"""A CLIP model as reward: how well an image matches its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from driftrl.checks import one_of
from driftrl.gradients import on_demand
from driftrl.rewards.tower import CLIPTower

KINDS = ("pickscore", "hpsv2", "clipscore")
CLIPSCORE_WEIGHT, CLIPSCORE_PREFIX = 2.5, "A photo depicts "


class CLIPReward:
    """A `transformers.CLIPModel`'s cosine of image and prompt, as PickScore, HPSv2 or CLIPScore scale it.

    - ``pickscore``: ``exp(logit_scale) cosine`` (arXiv 2305.01569, section 4; the embedded reward is of this kind);
    - ``hpsv2``: the cosine itself (arXiv 2306.09341; its published code leaves the scale out, and pads pictures:
      give it a tower that does);
    - ``clipscore``: ``2.5 max(cosine, 0)``, the prompt behind "A photo depicts" (arXiv 2104.08718, section 3).
    """

    def __init__(self, tower: CLIPTower, kind: str = "pickscore") -> None:
        """Stand on ``tower``, which may carry other rewards too; it must have a tokenizer.

        Raises:
            InputError: for a kind that does not exist.
        """
        self.tower, self.kind = tower, one_of("kind", kind, KINDS)
        _ = tower.tokenizer  # what is missing should be said now

    @on_demand
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1 against N prompts: float32 [N]."""
        prefix = CLIPSCORE_PREFIX if self.kind == "clipscore" else ""
        text = self.tower.embed_prompts([prefix + prompt for prompt in prompts])
        cosine = (self.tower.embed_images(images) * text).sum(-1)
        if self.kind == "clipscore":
            return CLIPSCORE_WEIGHT * cosine.clamp(min=0)
        return cosine if self.kind == "hpsv2" else self.tower.scale * cosine
