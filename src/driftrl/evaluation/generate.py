"""Images of a model, a run or a checkpoint, keyed by seed so that base and tuned are drawn alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from driftrl import checkpoint, single_file
from driftrl.build import (
    adapter_of,
    build_policy,
    default_batch,
    demand_second_branch,
    prompt_noise_of,
)
from driftrl.checks import InputError, one_of
from driftrl.config import ModelConfig, TrainConfig, load_config
from driftrl.pipelines import load_pipeline, usual_sampling
from driftrl.policies.lora import scale_lora
from driftrl.policies.pipeline import PipelinePolicy
from driftrl.policies.start import Start
from driftrl.rollout import NO_NOISE, PromptNoise, rollout
from driftrl.types import Policy

DTYPES: tuple[str, ...] = get_args(ModelConfig.model_fields["dtype"].annotation)
LISTED = 10
"""At most so many runs are named where one is asked for that is not there."""
EVALUATION = 2**31
"""Stands for the iteration in the keys of evaluation's noise, so that it is never training's."""


def run_of(source: str | Path) -> tuple[Path, Path | None] | None:
    """(run folder, checkpoint) if ``source`` is a run folder or one of its checkpoints, else None.

    A run folder gives its newest checkpoint that is whole, or None where it has none.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        return path, checkpoint.newest(path / "checkpoints")
    if (path / "manifest.json").is_file() and (path.parent.parent / "config.yaml").is_file():
        return path.parent.parent, path
    return None


def at_iteration(source: str | Path, iteration: int | str) -> Path:
    """The checkpoint of a run after so many iterations.

    Raises:
        InputError: if ``source`` is no run, or has none of it.
    """
    found = run_of(source)
    if found is None:
        raise InputError(f"--checkpoint: expected a run folder; {source} is none")
    every = {int(path.name): path for path in checkpoint.listing(found[0] / "checkpoints")}
    place = int(iteration) if str(iteration).isdecimal() else None
    if place not in every:
        there = ", ".join(map(str, every)) or "none"
        raise InputError(f"{found[0]}: this run has no checkpoint {iteration}; there are {there}")
    return every[place]


def _demand_source(source: str) -> None:
    """Refuse a folder that holds nothing to draw with, or the name of one that is not there, by naming what is."""
    path = Path(source)
    run = path.parent.parent
    if not path.exists() and path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        at_iteration(run, path.name)  # which says what there is
    inside = path if path.is_dir() else path.parent
    runs = sorted(p.parent.name for p in inside.glob("*/config.yaml")) if inside.is_dir() else []
    if single_file.named(source) and path.suffix.lower() in single_file.ENDS:
        return
    if path.exists() and not (path / "model_index.json").is_file():
        problem = "this is none"
    elif path.exists() or not runs or "/" not in source:
        return
    else:
        problem = "there is no such folder"
    # Most alike first, of many; a guess only where the names are nearly the same.
    alike = get_close_matches(path.name, runs, n=LISTED, cutoff=0.0)
    shown = runs if len(runs) <= LISTED else sorted(alike)
    more = f" and {len(runs) - len(shown)} more" if len(runs) > len(shown) else ""
    listing = f"; in {inside} are the runs {', '.join(shown)}{more}" if runs else ""
    guess = "" if path.exists() else "".join(get_close_matches(path.name, runs, n=1, cutoff=0.7))
    raise InputError(
        f"{source}: expected a run folder (with config.yaml), one of its checkpoints, a pipeline folder (with "
        f"model_index.json), a safetensors file, a hub name or 'tiny-animals'; {problem}{listing}"
        + (f"; did you mean '{guess}'?" if guess else "")
    )


def _demand_sampling(steps: int | None, guidance_scale: float | None) -> None:
    if steps is not None and steps < 1:
        raise InputError(f"--steps: expected at least 1; got {steps}")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise InputError(f"--guidance-scale: expected a finite number; got {guidance_scale}")


def open_policy(
    source: str | Path,
    steps: int | None = None,
    guidance_scale: float | None = None,
    deterministic: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    lora_scale: float = 1.0,
    lora: str | None = None,
    negative_prompt: str | None = None,
    model_config: str | None = None,
) -> tuple[PipelinePolicy, PromptNoise]:
    """The policy of a run folder, a checkpoint, a pipeline folder, a safetensors file, a hub name or 'tiny-animals'.

    ``deterministic`` takes the noise out of the sampler: DDIM with eta = 0, or the plain Euler step of a flow,
    as stock pipelines have it. ``dtype`` and ``device`` are those of the run, or float32 and 'auto', unless given;
    ``lora`` is put on a model, whoever trained it, in any format that diffusers reads; ``lora_scale`` turns it, or a run's
    adapter, down. ``model_config`` is the pipeline that a model of one file was made from.

    Raises:
        InputError: if it is none of these, the run has no checkpoint, or there is no adapter to scale.
    """
    found = run_of(source)
    pipeline, usual = None, dict[str, float]()
    start: bool | Start = False
    place = {"dtype": dtype and one_of("--dtype", dtype, DTYPES), "device": device, "config": model_config}
    place = {key: value for key, value in place.items() if value is not None}
    if found is not None and lora is not None:
        raise InputError(
            f"--lora: expected a model to put it on; {source} is a run, which has its own adapter"
        )
    if found is not None and model_config is not None:
        raise InputError(
            f"--model-config: expected a model of one file; {source} is a run, which has its own"
        )
    if found is None:
        _demand_source(str(source))
        config, noise, path = TrainConfig(model=ModelConfig(path=str(source), **place)), NO_NOISE, None  # type: ignore[arg-type]
        pipeline = load_pipeline(config.model)
        if lora is not None:
            adapter, start = adapter_of(pipeline, lora)
            config = config.model_copy(update={"adapter": adapter})
        if config.model.path != "tiny-animals":
            usual = dict(zip(("steps", "guidance_scale"), usual_sampling(pipeline), strict=True))
    else:
        run, path = found
        if path is None:
            raise InputError(f"{run}: this run has no checkpoint yet")
        config = load_config(run / "config.yaml")
        config = config.model_copy(update={"model": config.model.model_copy(update=place)})
        noise = prompt_noise_of(config, "test")
    asked = {"steps": steps, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    _demand_sampling(steps, guidance_scale)
    changes: dict[str, Any] = usual | {k: v for k, v in asked.items() if v is not None}
    if deterministic:
        changes |= {"eta": 0.0, "noise_level": 0.0}
    sampling = config.sampling.model_copy(update=changes)
    config = config.model_copy(update={"sampling": sampling})
    try:
        policy = build_policy(config, pipeline=pipeline, start=start)
    except InputError as error:  # the device of another machine, say
        told = str(error).replace("model.device:", "--device:", 1).replace("adapter.start:", "--lora:", 1)
        raise InputError(told) from error
    demand_second_branch(policy, negative_prompt)
    if path is not None:
        checkpoint.load(path, policy)
    if lora_scale != 1.0 and path is None and lora is None:
        raise InputError(f"--lora-scale: expected a run, which has an adapter; {source} is a model")
    if lora_scale != 1.0:
        scale_lora(dict(policy.named_parameters()), lora_scale)
    return policy, noise


def generate(
    policy: Policy,
    prompts: Sequence[str] | str,
    images: int,
    seed: int = 0,
    batch_size: int | None = None,
    prompt_noise: PromptNoise = NO_NOISE,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw ``images`` images for each prompt: float32 [P, images, 3, height, width] in 0..1.

    Image k of a prompt depends on (seed, prompt's place, k) alone. A single prompt is one of them.

    Raises:
        InputError: if there is no prompt, or no image to draw.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or images < 1:
        raise InputError(
            f"generate: expected at least one prompt, and one image of each; got {len(prompts)} and {images}"
        )
    keys = [(seed, EVALUATION, place) for place in range(len(prompts))]
    batch = batch_size or default_batch(policy.device)
    with torch.no_grad():
        conditioning = policy.encode(prompts)
    return rollout(policy, conditioning, keys, images, batch, prompt_noise, progress, keep_path=False).images
