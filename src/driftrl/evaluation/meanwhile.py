"""The policy measured while it is trained, on prompts and noise of its own: how reward and variety go, before the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from PIL import Image
from torch import Tensor

from driftrl.distributed import Team
from driftrl.evaluation.evaluate import LATENT_SIDE
from driftrl.evaluation.studio import Instruments, Readings, Studio, variety
from driftrl.pictures import beside, pixels
from driftrl.rollout import NO_NOISE, PromptNoise
from driftrl.types import Encoder, Reward

PREFIX = "evaluation/"
SHOWN = 8
"""Prompts in the picture, and images of each, at most."""


class Meanwhile:
    """Draws the same images of the same prompts again and again, with whatever the policy has become."""

    def __init__(
        self,
        policy: Any,
        rewards: Mapping[str, Reward],
        encoder: Encoder,
        prompts: Sequence[str],
        images: int,
        *,
        batch: int,
        team: Team,
        noise: PromptNoise = NO_NOISE,
        steps: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """Measure ``policy``, which is one of a diffusers pipeline.

        Args:
            policy: what is trained.
            rewards: by the name of the figure.
            encoder: what training measures diversity with; the policy's own autoencoder measures it too.
            prompts: P prompts, of which each process of ``team`` draws its share.
            images: of each, at least 2.
            batch: images drawn at once; changes no figure beyond rounding.
            team: the processes; all must ask.
            noise: on the tuned policy's prompts, never on the base model's.
            steps: denoising steps; by default those of training.
            deterministic: whether images are drawn without noise on the way.
        """
        from driftrl.diversity.encoders import LatentEncoder

        self.policy, self.noise = policy, noise
        self.steps, self.window = steps or policy.sampler.steps, range(0) if deterministic else None
        bench = Instruments(rewards, encoder, None, LatentEncoder(policy.pipeline.vae, side=LATENT_SIDE))
        self.studio = Studio(policy, bench, prompts, images, batch=batch, progress=None, models=1, team=team)
        self._base: dict[str, float] | None = None
        self._rows: dict[str, dict[int, Tensor]] = {"base": {}, "tuned": {}}

    def figures(self) -> dict[str, float]:
        """Means over all prompts: ``evaluation/NAME``, and of the base model, drawn once, ``evaluation/NAME/base``.

        Raises:
            InputError: if something is not finite.
            RunFailedError: if a reward fails.
        """
        training = self.policy.sampler.steps
        self.policy.take_steps(self.steps)
        self.policy.add_noise_in(self.window)  # in training other steps may have some
        try:
            if self._base is None:
                with self.policy.reference():
                    self._base = self._shot("base", NO_NOISE)
            now = self._shot("tuned", self.noise)
        finally:
            self.policy.take_steps(training)
        found = {f"{PREFIX}{name}": value for name, value in now.items()}
        return found | {f"{PREFIX}{name}/base": value for name, value in self._base.items()}

    def picture(self, title: str) -> Image.Image | None:
        """What was drawn last, beside the base model's, of the first of this process's prompts; None where it has none."""
        base, tuned = self._rows["base"], self._rows["tuned"]
        if not tuned:
            return None
        texts = [self.studio.prompts[place] for place in tuned]
        return beside(list(base.values()), list(tuned.values()), texts, ("base model", title))

    def _shot(self, label: str, noise: PromptNoise) -> dict[str, float]:
        rows = self._rows[label]
        rows.clear()

        def seen(place: int, images: Tensor) -> None:
            if len(rows) < SHOWN:
                rows[place] = pixels(images[:SHOWN]).cpu()

        return _means(self.studio.shoot(label, 0, noise, seen=seen))


def _means(readings: Readings) -> dict[str, float]:
    return {name: fmean(values) for name, values in variety(readings).items()}
