"""What each figure of an evaluation is called, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from driftrl.checks import counted
from driftrl.evaluation.evaluate import Settings
from driftrl.prompts import prompt_sets


@dataclass(frozen=True)
class Metric:
    """What a figure is called and what it means."""

    title: str
    meaning: str
    headline: bool = False
    variety: bool = False
    """Whether it measures variety: plotted against the reward."""
    digits: int = 3


METRICS = {
    "reward": Metric("reward", "What training raised.", headline=True),
    "similarity": Metric("prompt-image similarity", "How well images match their prompts, by a CLIP model."),
    "diversity": Metric(
        "diversity",
        "Mean distance between two images of a prompt, by the image encoder.",
        headline=True,
        variety=True,
    ),
    "diversity/clip": Metric(
        "CLIP diversity",
        "1 minus the mean cosine between two images of a prompt, by a CLIP model: not the encoder of shaping.",
        headline=True,
        variety=True,
    ),
    "diversity/latents": Metric(
        "latent diversity",
        "The same by the model's own autoencoder: neither a reward nor, unless told to, shaping uses it.",
        variety=True,
    ),
    "recall": Metric(
        "recall",
        "Share of the base model's images that lie within what the tuned model draws. The base model's own "
        "figure is that of a second draw: what a perfect copy would reach.",
        headline=True,
        variety=True,
    ),
    "vendi": Metric(
        "Vendi score",
        "Effective number of different images per prompt.",
        headline=True,
        variety=True,
        digits=2,
    ),
    "vendi/2": Metric("Vendi score, order 2", "The same, counting common kinds for more.", digits=2),
    "precision": Metric("precision", "Share of the images that lie within what the base model draws."),
    "density": Metric("density", "How densely the base model's images surround them; may exceed 1."),
    "coverage": Metric("coverage", "Share of the base model's images with one of them nearby.", variety=True),
}
VARIETY = tuple(name for name, metric in METRICS.items() if metric.variety)
FEW = 5
"""Prompts below which an interval over prompts says little: of two it is no more than their range."""


def describe(name: str, settings: Settings) -> Metric:
    """What the figure ``name`` is called and means under these settings."""
    if name == "reward":
        known = METRICS[name]
        return Metric(f"reward: {settings.rewards[0]}", known.meaning, known.headline)
    if name.startswith("reward/"):
        title = f"reward: {name.removeprefix('reward/')}"
        if name in trained(settings):
            return Metric(title, "Part of what training raised, as it is: neither normalised nor weighed.")
        return Metric(title, "Not trained on; scored beside the one that was.")
    return METRICS.get(name) or Metric(name, "")


def too_few(settings: Settings) -> str:
    """What is said of figures over fewer than `FEW` prompts, in place of intervals; nothing of enough prompts."""
    prompts = len(settings.prompts)
    return f"On {counted(prompts, 'prompt')}, too few to tell much of any other" if prompts < FEW else ""


def unsuited(settings: Settings) -> list[str]:
    """What was measured with tools that were made for the embedded model's drawings, or not at all, of another model."""
    if settings.model == "tiny-animals":
        return []
    found = []
    if "tiny-animals" in (*settings.rewards, *(part.name for part in settings.mixture)):
        found.append(("the reward is", "--reward pickscore"))
    if settings.encoder == "tiny-animals":
        found.append(("diversity is by", "--encoder dreamsim"))
    if settings.clip == "tiny-animals":
        found.append(("CLIP diversity is by", "--clip openai/clip-vit-large-patch14"))
    told = [
        f"{what} the embedded model's own, made for drawings of 64 x 64 pixels; name another: {how}"
        for what, how in found
    ]
    if settings.clip is None:
        told.append(
            "CLIP diversity and prompt-image similarity are left out; to have them name a CLIP model: "
            "--clip openai/clip-vit-large-patch14"
        )
    return told


def trained(settings: Settings) -> list[str]:
    """The figures of the rewards that training raised together, if they were several."""
    return [f"reward/{part.name}" for part in settings.mixture if part.weight]


def asked(settings: Settings) -> str:
    """The prompt set in words; a user's file by its name only, for a report travels."""
    return settings.prompt_set if settings.prompt_set in prompt_sets() else Path(settings.prompt_set).name
