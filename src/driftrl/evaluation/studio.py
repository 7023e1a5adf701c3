"""Images drawn and read, a batch at a time: rewards and features, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.batches import BatchSize, in_batches, out_of_memory
from driftrl.checks import InputError, RunFailedError, is_finite
from driftrl.distributed import Team
from driftrl.diversity.functional import manifold, mean_pairwise_distance, vendi_score
from driftrl.embeddings import Embeddings
from driftrl.evaluation.generate import EVALUATION
from driftrl.evaluation.sheets import save_sheet
from driftrl.pictures import image_folder, save_png, to_pil
from driftrl.rewards.calling import ask, scores_of
from driftrl.rewards.guarded import untouched, where_raised
from driftrl.rollout import NO_NOISE, PromptNoise, rollout
from driftrl.types import Encoder, Policy, Reward

NEIGHBOURS = 5
"""k of recall, precision, density and coverage, where there are more than k images per prompt."""
Progress = Callable[[str, int, int], Any]
"""Called with (what is being drawn, images done, images in all)."""


@dataclass(frozen=True)
class Readings:
    """What the instruments read off N images of each of P prompts."""

    rewards: dict[str, Tensor]
    """By the name of the figure: [P, N]."""
    features: Tensor
    """[P, N, D] by the encoder."""
    clip: Tensor | None
    """[P, N, E] image embeddings, or None."""
    latents: Tensor | None = None
    """[P, N, F] by the model's autoencoder, or None."""


def _asked(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """What a reward gives, in float64 on the CPU."""
    try:
        answer = untouched(name, images, partial(ask, reward, images, prompts))
        return scores_of(answer, len(prompts), name).double().cpu()
    except (InputError, RunFailedError):
        raise
    except Exception as error:  # of a user's function
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise RunFailedError(
            f"{name} failed: {type(error).__name__}: {error}{where_raised(error)}"
        ) from error


@dataclass(frozen=True)
class Instruments:
    """What images are measured with."""

    rewards: Mapping[str, Reward]
    encoder: Encoder
    clip: Encoder | None
    latents: Encoder | None = None

    def read(self, images: Tensor, prompts: Sequence[str], size: BatchSize | None = None) -> Readings:
        """Read images [P, N, 3, H, W] of P prompts, so many of them at once, or all.

        Raises:
            InputError: if a reward gives another number of values or changes the images, or anything is not finite.
            RunFailedError: if a reward raises an error, or memory does not suffice for a single image.
        """
        shape, flat = images.shape[:2], images.flatten(0, 1)
        texts = [prompt for prompt in prompts for _ in range(shape[1])]
        at_once = size or BatchSize(len(flat), "images read at once:")

        def scores(name: str, reward: Reward) -> Tensor:
            return in_batches(
                at_once, len(flat), lambda rows: _asked(name, reward, flat[rows], texts[rows])
            ).view(shape)

        def features(name: str, encoder: Encoder) -> Tensor:
            found = in_batches(at_once, len(flat), lambda rows: _features(name, encoder, flat[rows]))
            return found.unflatten(0, shape)

        rewards = {name: is_finite(name, scores(name, reward)) for name, reward in self.rewards.items()}

        return Readings(
            rewards,
            features("encoder's features", self.encoder),
            None if self.clip is None else features("CLIP embeddings", self.clip),
            None if self.latents is None else features("latents", self.latents),
        )


def variety(readings: Readings) -> dict[str, list[float]]:
    """Figures per prompt that need no other images, by name: rewards, distances within a prompt, Vendi score."""
    figures = {name: values.mean(1).tolist() for name, values in readings.rewards.items()}
    for name, features in (
        ("diversity", readings.features),
        ("diversity/clip", readings.clip),
        ("diversity/latents", readings.latents),
    ):
        if features is not None:
            figures[name] = [float(mean_pairwise_distance(f)) for f in features]
    figures["vendi"] = [float(vendi_score(f)) for f in readings.features]
    return figures


def measure(readings: Readings, reference: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, list[float]]:
    """Figures per prompt (design section 3), by name: lists of P numbers.

    Args:
        readings: of N >= 2 images of each of P prompts.
        reference: [P, M, D] features of the base model's images of the same prompts, M >= 2.
        neighbours: k of the nearest-neighbour measures; at most N - 1 and M - 1 are used.

    Raises:
        InputError: for fewer than two images or features that are not finite.
    """
    count = min(readings.features.shape[1], reference.shape[1])
    if count < 2:
        raise InputError(
            f"images: expected at least 2 per prompt, for variety is between images; got {count}"
        )
    figures = variety(readings)
    figures["vendi/2"] = [float(vendi_score(f, q=2.0)) for f in readings.features]
    scores = [
        manifold(r, f, min(neighbours, count - 1)) for r, f in zip(reference, readings.features, strict=True)
    ]
    for name in ("recall", "precision", "density", "coverage"):
        figures[name] = [float(getattr(score, name)) for score in scores]
    return figures


def _features(name: str, encoder: Encoder, images: Tensor) -> Tensor:
    features = encoder(images).detach().float().cpu()
    if features.dim() != 2 or len(features) != len(images):
        raise InputError(f"{name}: expected shape [{len(images)}, D]; got {list(features.shape)}")
    return is_finite(name, features)


class Studio:
    """Draws and reads all prompts with one model after the other, a batch of images at a time."""

    def __init__(
        self,
        policy: Policy,
        bench: Instruments,
        prompts: Sequence[str],
        images: int,
        *,
        batch: int,
        progress: Progress | None,
        models: int,
        team: Team,
    ) -> None:
        """For ``images`` images of each of ``prompts``, of which this process of ``team`` draws its share, ``batch`` images at
        once; ``models`` are to be drawn with, for the progress.
        """
        self.policy, self.bench, self.prompts, self.images = policy, bench, list(prompts), images
        self.batch, self.progress, self.team, self.done = batch, progress, team, 0
        self.size = BatchSize(batch, "the number of images drawn at once,")
        self.reading = BatchSize(max(batch, images), "the number of images measured at once,")
        self.mine = range(len(self.prompts))[team.share(len(self.prompts))]
        self.total = models * images * len(self.mine)
        self.conditioning = Embeddings(policy, self.prompts)

    def shoot(
        self,
        label: str,
        seed: int,
        noise: PromptNoise = NO_NOISE,
        folder: Path | None = None,
        keep_images: bool = False,
        seen: Callable[[int, Tensor], Any] | None = None,
    ) -> Readings:
        """Readings of all prompts; with a folder, sheets for reports go into its ``label``, and images if asked.

        ``seen`` is called with the place and the images [n, 3, H, W] of each prompt that this process draws.
        """
        with self.team.together():
            parts = list(self._read(label, seed, noise, folder, keep_images, seen))

        def everyone(own: list[Tensor]) -> Tensor:
            return self.team.gather(torch.cat(own)[: len(self.mine)])

        clip = [part.clip for part in parts if part.clip is not None]
        latents = [part.latents for part in parts if part.latents is not None]
        return Readings(
            {name: everyone([part.rewards[name] for part in parts]) for name in self.bench.rewards},
            everyone([part.features for part in parts]),
            everyone(clip) if clip else None,
            everyone(latents) if latents else None,
        )

    def _read(
        self,
        label: str,
        seed: int,
        noise: PromptNoise,
        folder: Path | None,
        keep_images: bool,
        seen: Callable[[int, Tensor], Any] | None,
    ) -> Iterator[Readings]:
        """Readings of this process's prompts. With more processes than prompts some have none; they read the first one,
        for the shapes alone.
        """
        prompts, count = self.prompts, self.images
        together = max(1, self.batch // count)
        own = self.mine or range(1)
        for start in range(0, len(own), together):
            places = own[start : start + together]
            rows = self.conditioning.rows(places)
            # The keys of `generate`, which gives the same images: a prompt's place, not that in its batch.
            keys = [(seed, EVALUATION, place) for place in places]
            drawn = rollout(
                self.policy,
                rows,
                keys,
                count,
                self.size,
                noise,
                lambda n: self._tell(label, n),
                keep_path=False,
            ).images
            yield self.bench.read(drawn, [prompts[place] for place in places], self.reading)
            if seen is not None and self.mine:
                for place, images in zip(places, drawn, strict=True):
                    seen(place, images)
            if folder is not None and self.mine:
                root = folder / label
                for place, images in zip(places, drawn, strict=True):
                    save_sheet(images, root / f"{place:03d}.webp")
                    if keep_images:
                        for k, image in enumerate(images):
                            save_png(
                                to_pil(image), root / image_folder(place, prompts[place]) / f"{k:03d}.png"
                            )

    def _tell(self, label: str, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(label, self.done, self.total)
