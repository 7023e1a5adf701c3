"""Measure a model: reward and variety per prompt, beside the base model on the same prompts and seeds.

What is measured is kept in ``evaluation.json`` (`Evaluation`), value by value, so that reports and
comparisons never draw an image again.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from driftrl import checkpoint, objects
from driftrl.build import (
    Towers,
    build_encoder,
    build_reward,
    default_batch,
    parts_of,
    tower_of,
)
from driftrl.checkpoint import CheckpointWarning
from driftrl.checks import InputError, at_least
from driftrl.config import RewardPart, dump_config, load_config, parse_config
from driftrl.distributed import join
from driftrl.evaluation.generate import open_policy, run_of
from driftrl.evaluation.pareto import bootstrap_interval
from driftrl.evaluation.studio import NEIGHBOURS, Instruments, Progress, Readings, Studio, measure
from driftrl.files import make_folder, read_json, sha256, write_json, write_text
from driftrl.hub import of_hub
from driftrl.mixture import mixed
from driftrl.pipelines import TINY_ANIMALS
from driftrl.policies.lora import lora_scale, scale_lora
from driftrl.policies.pipeline import PipelinePolicy
from driftrl.prompts import evaluated
from driftrl.rewards.calling import metadata_of
from driftrl.rollout import NO_NOISE
from driftrl.types import Encoder, Prompt, Reward

FORMAT = 1
FILE = "evaluation.json"
SCALED = "lora-scale"
"""Folder in a run's for the evaluation of its adapter at several scales."""
LEVEL = 0.95
"""Coverage of the bootstrap intervals over prompts."""
NEEDED = {"reward", "diversity"}
"""Figures that reports and comparisons cannot do without."""
REFERENCE = 2**30
"""Added to the seed for the reference images of recall: another draw of the base model, so that the base
model's own figure says what a perfect copy would reach, and equal seeds do not pass for coverage."""
WORDS = {"base": "base model", "reference": "base model, second draw (for recall)"}
"""What is drawn beside checkpoints, in words."""
LORA = "lora"
"""The label of a LoRA that is no checkpoint's."""
LATENT_SIDE = 8
"""Places on a side that latents are averaged down to: layout and colours, and small enough to keep."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Change(_Record):
    """Difference to the base model, prompt by prompt: mean over prompts and bootstrap interval."""

    mean: float
    low: float
    high: float


class Figure(_Record):
    """One measure of one model: mean over prompts, bootstrap interval, and the value of each prompt."""

    mean: float
    low: float
    high: float
    per_prompt: list[float]
    change: Change | None = None
    """None for the base model; for the reward this is the reward normalised so that base = 0."""


class Point(_Record):
    """What was measured of the base model or of one checkpoint."""

    label: str
    """'base', or the checkpoint's name."""
    iteration: int
    identity: str
    """Checksum of the checkpoint's manifest; empty for the base model."""
    figures: dict[str, Figure]
    lora_scale: float = 1.0
    """What the adapter was multiplied by."""

    @property
    def told(self) -> str:
        """What it is, in words."""
        if self.label == "base":
            return "base"
        checkpoint_itself = self.lora_scale == 1.0 and self.label != LORA
        return f"iteration {self.iteration}" if checkpoint_itself else f"scale {self.lora_scale:g}"


class Settings(_Record):
    """Everything that figures depend on, apart from the weights under test."""

    model: str
    prompt_set: str
    prompts: list[str]
    images: int
    seed: int
    steps: int
    guidance_scale: float
    eta: float
    rewards: list[str]
    """The first is the one that training raised; its figure is called 'reward', the others' 'reward/NAME'. Of several
    at once the first is their formula; the figures of its parts are 'reward/NAME' too."""
    encoder: str
    clip: str | None
    """None where CLIP diversity was not measured, for want of a model."""
    neighbours: int
    prompt_noise: float = 0.0
    """Strength of the noise on the tuned model's prompts; the base model never gets any."""
    noise_schedule: str = "linear"
    flow_sampler: str | None = None
    """Of flow models, with its noise level; diffusion models have eta."""
    noise_level: float | None = None
    size: tuple[int, int] | None = Field(None, strict=False)
    """Height and width in pixels, where a run asked for other than the model's own."""

    mixture: list[RewardPart] = []
    """The parts of the reward that training raised, where they were several."""
    dtype: str | None = None
    """Of the model, where that is not the run's own."""
    metadata: list[dict[str, Any]] = []
    """Of each prompt, what rewards may ask for beside it; empty where none has any."""
    scaled: bool = False
    """Whether this is one checkpoint at several LoRA scales, in place of several checkpoints."""
    negative_prompt: str = ""
    lora: str = ""
    """The LoRA that was put on the model, where it is not a run's."""
    config: str | None = None
    """The pipeline that a model of one file was made from, where that was named."""

    @property
    def still(self) -> bool:
        """Whether images were drawn without noise on the way."""
        return (self.eta if self.noise_level is None else self.noise_level) == 0

    def asked(self) -> list[str]:
        """The prompts, with their metadata."""
        return (
            [Prompt(*each) for each in zip(self.prompts, self.metadata, strict=True)]
            if self.metadata
            else self.prompts
        )

    def fingerprint(self) -> str:
        """A short name for these settings."""
        data = self.model_dump(mode="json")
        for key in ("mixture", "metadata", "dtype", "scaled", "negative_prompt", "lora", "config"):
            if not data[key]:  # as it was before there were any
                del data[key]
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class Evaluation(_Record):
    """The contents of ``evaluation.json``."""

    format: int = FORMAT
    name: str
    training_seed: int | None = None
    """None for a model that is no run."""
    level: float = LEVEL
    settings: Settings
    points: list[Point]
    """The base model first, then checkpoints by iteration, or one of them by LoRA scale."""

    @property
    def base(self) -> Point:
        """The base model."""
        return self.points[0]

    @property
    def tuned(self) -> list[Point]:
        """Checkpoints, by iteration, or one of them by LoRA scale."""
        return self.points[1:]

    def place(self, point: Point) -> float:
        """Where a point lies on the way from the base model, at 0: its iteration, or its LoRA scale."""
        if not self.settings.scaled:
            return point.iteration
        return 0.0 if point.label == "base" else point.lora_scale

    def sheet(self, folder: Path, point: Point, place: int) -> Path:
        """Where the sheet of images of one prompt lies, if it was kept."""
        return _pictures(folder, self.settings) / point.label / f"{place:03d}.webp"


def in_words(label: str) -> str:
    """What is being drawn, for those who wait for it: a label of `Point`, or the reference's."""
    if label in WORDS:
        return WORDS[label]
    name, _, scale = label.partition("x")
    what = "the LoRA" if name == LORA else f"iteration {int(name)}"
    return what + (f", scale {scale}" if scale else "")


def with_mixture(readings: Readings, reference: Readings, mixture: Sequence[RewardPart]) -> Readings:
    """With the reward that several rewards make together, if there are several, put first as 'reward'.

    What is normalised over a prompt's candidates, or a batch, in training is so here by the base model's: in units of
    its standard deviation, from its mean (``reference``, its other draw), so that models are on one scale.
    """
    if not mixture:
        return readings
    scores, among = (
        torch.stack([each.rewards[f"reward/{part.name}"] for part in mixture], dim=-1)
        for each in (readings, reference)
    )
    return replace(readings, rewards={"reward": mixed(scores, parts_of(mixture), among)} | readings.rewards)


def formula(reward: str | Sequence[RewardPart]) -> str:
    """A reward's name, or what several add up to, such as ``pickscore (prompt) + 0.5 aesthetic (fixed 5.5, 1)``."""
    if isinstance(reward, str):
        return reward
    terms = []
    for part in reward:
        weight = "" if part.weight == 1 else f"{part.weight:.12g} "
        numbers = f" {part.mean:.12g}, {part.std:.12g}" if part.normalize == "fixed" else ""
        terms.append(
            f"{weight}{part.name}" + ("" if part.normalize == "none" else f" ({part.normalize}{numbers})")
        )
    return " + ".join(terms)


class Asked(TypedDict, total=False):
    """What `evaluate` can be asked for beside its source."""

    prompts: str | Path | Sequence[str] | None
    images: int | None
    checkpoints: str | int
    rewards: Sequence[str | Reward] | str | Reward
    seed: int
    keep_images: bool
    encoder: str | Encoder | None
    clip: Path | str | None
    out: Path | str | None
    steps: int | None
    guidance_scale: float | None
    negative_prompt: str | None
    deterministic: bool | None
    batch_size: int | None
    dtype: str | None
    device: str | None
    lora_scales: Sequence[float]
    lora: str | None
    model_config: str | None


def evaluate(
    source: str | Path,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    images: int | None = None,
    checkpoints: str | int = "last",
    rewards: Sequence[str | Reward] | str | Reward = (),
    seed: int = 0,
    keep_images: bool = False,
    encoder: str | Encoder | None = None,
    clip: Path | str | None = None,
    out: Path | str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    deterministic: bool | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    lora_scales: Sequence[float] = (),
    lora: str | None = None,
    model_config: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Measure a run's checkpoints beside its base model, a LoRA beside the model that it is for, or a model alone; return the
    folder.

    ``evaluation.json`` is written after every model that was measured; what it holds already under the same
    settings is not measured again. Under other settings it is put aside as ``evaluation-<settings>.json``.

    Of several processes each draws and reads its share of the prompts, and writes the pictures of it, into the same
    folder; the first one writes the rest.

    Args:
        source: a run folder, one of its checkpoints, a pipeline folder, a safetensors file, a hub name or 'tiny-animals'.
        prompts: a prompt set of the package, a file, or a list of prompts; by default as the run's ``evaluation.prompts`` says.
        images: per prompt, at least 2; by default the run's ``evaluation.images``.
        checkpoints: 'last', 'all', an iteration, or several with commas between them.
        rewards: more rewards by name, or functions, scored beside the one that was trained on; for a model in place of the embedded one.
        seed: of the images; base and tuned share their noise.
        keep_images: write every image as a PNG too.
        encoder: whose features measure variety, a name or a function from images to features [N, D]; by default the run's ``shaping.encoder``.
        clip: the CLIP model for CLIP diversity and prompt-image similarity, a folder or a hub name; by default the run's
            ``evaluation.clip``, and for the embedded model its own. Both figures are left out where there is none.
        out: folder to write to; by default the run folder, or ``runs/evaluate-<name>`` for a model or LoRA.
        steps: denoising steps; by default the run's ``evaluation.steps``, or those that it was trained with.
        guidance_scale: by default that of the run.
        negative_prompt: likewise; of a model none.
        deterministic: whether images are drawn without noise on the way, the base model's too; by default the run's
            ``evaluation.deterministic``.
        batch_size: images drawn at once; by default those of the run, or what suits the device.
        dtype: float32, bfloat16 or float16, of the model; by default that of the run.
        device: by default that of the run.
        lora_scales: of the one checkpoint that is measured, the adapter multiplied by each of these, and as it is:
            what variety comes back, and what reward is lost, on the way to the base model. They are written to the
            run's ``lora-scale`` folder, as a method of its own, "NAME-scaled".
        lora: a LoRA for the model ``source``, whoever trained it: a safetensors file, a folder, a run or a hub name. It is
            measured as it is, and at ``lora_scales``.
        model_config: of a model that is one file the pipeline that it was made from, as ``model.config`` of a run.
        progress: told how far it is.

    Raises:
        InputError: if anything cannot be used, or ``evaluation.json`` is damaged.
    """
    prompts, out = str(prompts) if isinstance(prompts, Path) else prompts, None if out is None else Path(out)
    rewards, encoder = _by_name(rewards, encoder)
    found = run_of(source)
    config = load_config(found[0] / "config.yaml") if found else parse_config({})
    name, folder = _name_and_folder(source, found, config.name, lora, out, bool(lora_scales))
    count = config.evaluation.images if images is None else images
    _demand_enough(count, batch_size)
    paths = _checkpoints(source, found, str(checkpoints))
    wanted = _subjects(paths, lora_scales, config.adapter.kind) if lora is None else []
    model = config.model.path if found else str(source)
    clip_model = _clip_of(clip or config.evaluation.clip, model)
    asked = config.evaluation.prompts if prompts is None else prompts
    prompt_set, texts = evaluated(asked, config.prompts.set, found[0] if found else None)
    mixture = [] if isinstance(config.reward, str) else config.reward
    parts = {part.name for part in mixture}
    # Of a model nobody has said what it was trained on: what is asked for stands in place of the embedded reward.
    first = [] if found is None and rewards else [formula(config.reward)]
    named = list(dict.fromkeys([*first, *(name for name in rewards if name not in parts)]))

    policy, noise = open_policy(
        source, config.evaluation.steps if steps is None else steps, guidance_scale,
        config.evaluation.deterministic if deterministic is None else deterministic, dtype=dtype, device=device, lora=lora, negative_prompt=negative_prompt,
        model_config=model_config,
    )  # fmt: skip
    if lora is not None:
        wanted = _subjects_of_lora(policy, lora_scales)
    sampler = policy.sampler
    settings = Settings(
        model=model,
        prompt_set=prompt_set,
        prompts=list(texts),
        images=count,
        seed=seed,
        steps=len(policy.timesteps),
        guidance_scale=sampler.guidance_scale,
        eta=sampler.eta,
        rewards=named,
        encoder=encoder or config.shaping.encoder,
        clip=clip_model,
        neighbours=min(NEIGHBOURS, count - 1),
        prompt_noise=noise.eta,
        noise_schedule=noise.schedule,
        flow_sampler=sampler.flow_sampler if policy.component == "transformer" else None,
        noise_level=sampler.noise_level if policy.component == "transformer" else None,
        size=None if sampler.height is None or sampler.width is None else (sampler.height, sampler.width),
        mixture=mixture,
        dtype=None if dtype == config.model.dtype else dtype,
        metadata=metadata_of(texts) if any(metadata_of(texts)) else [],
        scaled=bool(lora_scales) or lora is not None,
        negative_prompt=policy.negative_prompt,
        lora="" if lora is None else name,
        config=config.model.config if found else model_config,
    )
    team = join()
    own = [point.model_dump(mode="json") for point in _previous(folder, settings)] if team.leads else []
    before = [Point.model_validate(point) for point in team.first(own)]
    known = _still_true(before, wanted, settings.scaled)
    bare = team.first(_without_images(folder, settings, list(known))) if keep_images else []
    todo = [subject for subject in wanted if subject.label not in known or subject.label in bare]
    if not todo:
        return folder
    with team.together():
        make_folder(folder)
        if lora_scales and team.leads and found:
            write_text(folder / "config.yaml", dump_config(config.model_copy(update={"name": name})))

    bench = _instruments(settings, policy)
    studio = Studio(
        policy,
        bench,
        settings.asked(),
        count,
        batch=batch_size or config.sampling.batch_size or default_batch(policy.device),
        progress=progress,
        models=len(todo) + 1,
        team=team,
    )
    with policy.reference():
        reference = studio.shoot("reference", seed + REFERENCE)
    for subject in todo:
        with subject.in_place(policy):
            readings = studio.shoot(
                subject.label,
                seed,
                NO_NOISE if subject.is_base else noise,
                _pictures(folder, settings),
                keep_images,
            )
        readings = with_mixture(readings, reference, mixture)
        values = measure(readings, reference.features, settings.neighbours)
        known[subject.label] = Point(
            label=subject.label,
            iteration=subject.iteration,
            identity=subject.identity,
            figures=_figures(values, None if subject.is_base else known.get("base")),
            lora_scale=subject.scale,
        )
        order = sorted(
            known.values(), key=lambda point: (point.label != "base", point.iteration, point.lora_scale)
        )
        training_seed = config.seed if found else None
        evaluation = Evaluation(name=name, training_seed=training_seed, settings=settings, points=order)
        if team.leads:
            write_json(folder / FILE, evaluation.model_dump(mode="json"))
    return folder


@dataclass(frozen=True)
class _Subject:
    """The base model, or the adapter of a checkpoint, or one that was put on the model, at a scale."""

    path: Path | None = None
    scale: float = 1.0
    weights: Mapping[str, Tensor] | None = None
    """Of a LoRA that is no checkpoint's, by the parameters' names."""
    checksum: str = ""
    """Of these weights."""

    @property
    def is_base(self) -> bool:
        """Whether it is the model without an adapter."""
        return self.path is None and self.weights is None

    @property
    def label(self) -> str:
        """By which it is known in ``evaluation.json``."""
        if self.is_base:
            return "base"
        name = self.path.name if self.path else LORA
        return name if self.scale == 1.0 else f"{name}x{self.scale:g}"

    @property
    def iteration(self) -> int:
        """0 for the base model."""
        return int(self.path.name) if self.path else 0

    @property
    def identity(self) -> str:
        """Checksum of the checkpoint's manifest, or of the LoRA's weights."""
        return sha256(self.path / "manifest.json") if self.path else self.checksum

    @contextmanager
    def in_place(self, policy: PipelinePolicy) -> Iterator[None]:
        """Within this context the policy is this one."""
        if self.is_base:
            with policy.reference():
                yield
            return
        if self.path is not None:
            checkpoint.load(self.path, policy)
        if self.weights is not None:
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    parameter.copy_(self.weights[name])
        if self.scale != 1.0:
            scale_lora(dict(policy.named_parameters()), self.scale)
        yield


def _subjects(paths: Sequence[Path], scales: Sequence[float], kind: str) -> list[_Subject]:
    """The base model and the checkpoints, or one checkpoint at each of the scales and as it is."""
    if scales and len(paths) != 1:
        raise InputError(
            f"--lora-scale: expected a run and one of its checkpoints, such as --checkpoint last; got {len(paths)}"
        )
    if scales and kind != "lora":
        raise InputError(
            "--lora-scale: expected a LoRA; this run trained the whole network (adapter.kind: full)"
        )
    return [_Subject(), *(_Subject(path, scale) for path in paths for scale in _with_whole(scales))]


def _subjects_of_lora(policy: PipelinePolicy, scales: Sequence[float]) -> list[_Subject]:
    """The model alone, and the LoRA that ``policy`` has now as it is and at each of the scales."""
    weights = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    content = b"".join(value.cpu().numpy().tobytes() for value in weights.values())
    checksum = hashlib.sha256(content).hexdigest()
    return [_Subject(), *(_Subject(None, scale, weights, checksum) for scale in _with_whole(scales))]


def _with_whole(scales: Sequence[float]) -> list[float]:
    """The scales and 1, in order; without 0, which is the base model."""
    return sorted({*map(lora_scale, scales), 1.0} - {0.0})


def _name_and_folder(
    source: str | Path, found: Any, trained: str, lora: str | None, out: Path | None, scaled: bool
) -> tuple[str, Path]:
    """What the figures are called, and where they are written."""
    if lora is not None:
        name = _lora_name(lora)
        return name, out or Path("runs") / f"evaluate-{name}"
    if found is None:
        name = re.sub(r"[^\w.-]+", "-", Path(source).name.removesuffix(".safetensors")) or "model"
        folder = out or Path("runs") / f"evaluate-{name}"
    else:
        name, folder = trained, out or found[0]
    return (f"{name}-scaled", out or folder / SCALED) if scaled else (name, folder)


def _lora_name(lora: str) -> str:
    """What a LoRA's figures are called: the name of its file, folder or repository; of a checkpoint its run's too."""
    path = Path(lora.removesuffix(".safetensors"))
    named = f"{path.parent.parent.name}-{path.name}" if path.parent.name == "checkpoints" else path.name
    return re.sub(r"[^\w.-]+", "-", named) or "lora"


def _still_true(points: Sequence[Point], wanted: Sequence[_Subject], scaled: bool) -> dict[str, Point]:
    """What was measured before, by label, less what was measured of another checkpoint of that name, or of another
    checkpoint's scales, for of these there is no telling which is which.
    """
    now = {subject.label: subject for subject in wanted}
    return {
        point.label: point
        for point in points
        if (point.label not in now or point.identity == now[point.label].identity)
        and (point.label in now or not scaled or point.iteration == wanted[-1].iteration)
    }


def _without_images(folder: Path, settings: Settings, labels: list[str]) -> list[str]:
    """Those of the models measured already whose images were not kept; drawn again they come out the same."""
    return [label for label in labels if not any((_pictures(folder, settings) / label).glob("*/*.png"))]


def load_evaluation(path: Path | str) -> Evaluation:
    """Read ``evaluation.json``, given the file or the folder that it is in.

    Raises:
        InputError: if it is missing, damaged, or of another format.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not path.exists():
        raise InputError(f"{path}: there is no such run or file")
    if path.is_dir() and not file.is_file() and not (path / "config.yaml").is_file():
        raise InputError(
            f"{path}: expected a run folder, or one that was measured; it has neither config.yaml nor {FILE}, which driftrl evaluate RUN writes"
        )
    if not file.is_file():
        raise InputError(f"{file}: not there; measure the run first: driftrl evaluate {path}")
    return parse_evaluation(read_json(file), file)


def parse_evaluation(data: Any, file: Path) -> Evaluation:
    """Check what ``file`` holds.

    Raises:
        InputError: if it is damaged, or of another format.
    """
    given = data.get("format") if isinstance(data, dict) else None
    if given != FORMAT:
        raise InputError(
            f"{file}: expected an evaluation of format {FORMAT}; got {given!r}; delete it and evaluate again"
        )
    try:
        evaluation = Evaluation.model_validate(data)
    except ValidationError as error:
        raise InputError(
            f"{file} is damaged at {first_problem(error)}; delete it and evaluate again"
        ) from None
    if not evaluation.points or evaluation.points[0].label != "base":
        raise InputError(f"{file} is damaged: it has no base model; delete it and evaluate again")
    prompts = len(evaluation.settings.prompts)
    for point in evaluation.points:
        for name, figure in point.figures.items():
            if len(figure.per_prompt) != prompts or (point.label != "base" and figure.change is None):
                raise InputError(f"{file} is damaged at {point.label}, {name}; delete it and evaluate again")
        if point.figures.keys() != evaluation.base.figures.keys() or not point.figures.keys() >= NEEDED:
            raise InputError(
                f"{file} is damaged at {point.label}: figures are missing; delete it and evaluate again"
            )
    return evaluation


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a file, as "place: what"."""
    first = error.errors()[0]
    what = {"missing": "is missing", "extra_forbidden": "no such key"}.get(first["type"])
    if what is None:
        what = f"expected {first['msg'].removeprefix('Input should be ')}; got {first['input']!r}"
    return f"{'.'.join(str(part) for part in first['loc'])}: {what}"


def _demand_enough(images: int, batch_size: int | None) -> None:
    if images < 2:
        raise InputError(
            f"images: expected at least 2 per prompt, for variety is between images; got {images}"
        )
    at_least("batch_size", 1 if batch_size is None else batch_size, 1)


def _by_name(
    rewards: Sequence[str | Reward] | str | Reward, encoder: str | Encoder | None
) -> tuple[list[str], str | None]:
    """What settings call the functions among them."""
    asked = [rewards] if isinstance(rewards, str) or callable(rewards) else rewards
    return [objects.named(reward) for reward in asked], objects.named(encoder)


def _clip_of(asked: Path | str | None, model: str) -> str | None:
    """The CLIP model to measure with. One of 64 x 64 drawings says nothing of photographs, so the embedded one is asked only
    of the embedded model, or where it is named.

    Raises:
        InputError: if it is no folder of a model, and no hub name.
    """
    if asked is None:
        return "tiny-animals" if model == "tiny-animals" else None
    if str(asked) != "tiny-animals" and not (
        (Path(asked) / "config.json").is_file() or of_hub(Path(asked).as_posix())
    ):
        raise InputError(
            f"evaluation.clip: expected the folder of a CLIP model, with its config.json, or a hub name; got {asked}"
        )
    return str(asked)


def _instruments(settings: Settings, policy: PipelinePolicy) -> Instruments:
    from driftrl.diversity.encoders import LatentEncoder

    device = policy.device
    first, *others = settings.rewards
    towers: Towers = {}
    parts = [part.name for part in settings.mixture]
    rewards = {} if parts else {"reward": build_reward(first, device, towers=towers)}
    rewards |= {f"reward/{name}": build_reward(name, device, towers=towers) for name in (*parts, *others)}
    encoder, clip = build_encoder(settings.encoder, policy.device, policy), None
    if settings.clip is not None:
        from driftrl.rewards.clip import CLIPReward

        try:
            folder = TINY_ANIMALS / "scorer" if settings.clip == "tiny-animals" else settings.clip
            tower = tower_of(folder, device, "float32", towers)
            model = CLIPReward(tower)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{settings.clip}: expected a CLIP model: {reason}") from error
        clip = tower.embed_images
        if "tiny-animals" not in (*parts, *settings.rewards):
            rewards["similarity"] = model
    return Instruments(rewards, encoder, clip, LatentEncoder(policy.pipeline.vae, side=LATENT_SIDE))


def _figures(values: dict[str, list[float]], base: Point | None) -> dict[str, Figure]:
    """Means, intervals and, where a base model is given, changes from it.

    What was not measured of a base model that an older version measured is left out.
    """
    figures = {}
    for name, numbers in values.items():
        if base is not None and name not in base.figures:
            continue
        interval, change = bootstrap_interval(numbers, LEVEL), None
        if base is not None:
            before = base.figures[name].per_prompt
            moved = bootstrap_interval([now - then for now, then in zip(numbers, before, strict=True)], LEVEL)
            change = Change(mean=moved.mean, low=moved.low, high=moved.high)
        figures[name] = Figure(
            mean=interval.mean, low=interval.low, high=interval.high, per_prompt=numbers, change=change
        )
    return figures


def _checkpoints(source: str | Path, found: tuple[Path, Path | None] | None, which: str) -> list[Path]:
    """The checkpoints that are asked for, oldest first; none for a model that is no run."""
    if found is None:
        if which not in ("last", "all"):
            raise InputError(f"--checkpoint: {source} is no run folder, so it has no checkpoint {which}")
        return []
    run, newest = found
    if newest is None:
        raise InputError(f"{run}: this run has no checkpoint to evaluate")
    if newest.resolve() == Path(source).resolve():  # a checkpoint itself was named
        _whole(newest)
        return [newest]
    if which == "last":
        return [newest]
    every = checkpoint.listing(run / "checkpoints")
    if which == "all":
        whole = []
        for path in every:
            problem = checkpoint.damage(path)
            if problem is None:
                whole.append(path)
            else:
                warnings.warn(f"{path} is passed over: {problem}", CheckpointWarning, stacklevel=3)
        # The checkpoint before any training is the base model.
        return [path for path in whole if int(path.name) > 0] or whole
    asked = [part.strip() for part in which.split(",")]
    if not all(re.fullmatch("[0-9]{1,18}", part) for part in asked):
        raise InputError(
            f"--checkpoint: expected 'last', 'all' or iterations, such as 20 or 10,20; got {which!r}"
        )
    by_iteration = {int(path.name): path for path in every}
    chosen = []
    for iteration in sorted({int(part) for part in asked}):
        if iteration not in by_iteration:
            there = ", ".join(map(str, by_iteration))
            raise InputError(f"--checkpoint: {run} has none of iteration {iteration}; there are {there}")
        _whole(by_iteration[iteration])
        chosen.append(by_iteration[iteration])
    return chosen


def _whole(path: Path) -> None:
    problem = checkpoint.damage(path)
    if problem:
        raise InputError(f"{path}: {problem}")


def _previous(folder: Path, settings: Settings) -> list[Point]:
    """What was measured under these settings before. An evaluation under others is put aside."""
    file, aside = folder / FILE, folder / f"evaluation-{settings.fingerprint()}.json"
    if file.is_file():
        evaluation = load_evaluation(file)
        if evaluation.settings == settings:
            return evaluation.points
        other = folder / f"evaluation-{evaluation.settings.fingerprint()}.json"
        write_text(other, file.read_text("utf-8"))
    if aside.is_file():
        evaluation = load_evaluation(aside)
        if evaluation.settings == settings:
            write_text(file, aside.read_text("utf-8"))
            return evaluation.points
    return []


def _pictures(folder: Path, settings: Settings) -> Path:
    return folder / "images" / f"evaluation-{settings.fingerprint()}"
