"""A folder for others: the adapter of a checkpoint and a model card, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from driftrl import __version__, checkpoint, hub, single_file
from driftrl.checks import InputError, counted
from driftrl.config import ModelConfig, TrainConfig, flat, load_config
from driftrl.evaluation.evaluate import FILE, Evaluation, Point, formula, load_evaluation
from driftrl.evaluation.generate import run_of
from driftrl.evaluation.measures import describe, too_few
from driftrl.evaluation.page import minus
from driftrl.files import new_folder, read_json, write_text
from driftrl.hub import of_hub
from driftrl.pipelines import PIPELINES
from driftrl.policies.kohya import write_kohya

LORA = "pytorch_lora_weights.safetensors"
COMFYUI = "comfyui.safetensors"
PICTURE = "comparison.png"
STATE = {"manifest.json", "state.json", "training.safetensors", checkpoint.MEMORY}
"""What a checkpoint has for going on with the run, and nobody else needs."""
OWN = {"name", "seed", "logging", "guards", "evaluation"}
"""Settings that say nothing of the method."""


def export(source: Path | str, out: Path | str, comfyui: bool = False) -> Path:
    """Write the adapter and a card into ``out``, and return it.

    Args:
        source: a run folder, whose newest checkpoint is taken, or a checkpoint.
        out: a new or empty folder.
        comfyui: write the LoRA under the names that ComfyUI reads too.

    Raises:
        InputError: if ``source`` is no run with a whole checkpoint, ``out`` holds something, or a full network should be
            written for ComfyUI.
    """
    source, out = Path(source), Path(out)
    run, path = run_of(source) or (source, None)
    if path is None:
        raise InputError(f"{source}: expected a run folder with a checkpoint, or a checkpoint")
    problem = checkpoint.damage(path)
    if problem:
        raise InputError(f"{path}: {problem}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: expected a new or empty folder; got {out}, which is taken")
    config = load_config(run / "config.yaml")
    if comfyui and config.adapter.kind != "lora":
        raise InputError("--comfyui: expected a LoRA; this run trained the whole network")
    evaluation = load_evaluation(run) if (run / FILE).is_file() else None
    point = next((p for p in evaluation.tuned if p.label == path.name), None) if evaluation else None
    picture = run / "report.png"
    shown = (
        point is not None and evaluation is not None and point is evaluation.tuned[-1] and picture.is_file()
    )
    with new_folder(out) as place:
        for file in sorted(path.iterdir()):
            if file.name not in STATE:
                shutil.copyfile(file, place / file.name)
        if shown:
            shutil.copyfile(picture, place / PICTURE)
        if comfyui:
            write_kohya(path / LORA, place / COMFYUI)
        card = _card(config, int(path.name), _network(path), evaluation, point, shown, comfyui)
        write_text(place / "README.md", card)
    return out


def _card(
    config: TrainConfig,
    iteration: int,
    network: str,
    evaluation: Evaluation | None,
    point: Point | None,
    shown: bool,
    comfyui: bool,
) -> str:
    from huggingface_hub import ModelCardData

    lora, base = config.adapter.kind == "lora", config.model.path
    tags = [*(["lora"] if lora else []), "text-to-image", "diffusers", "reinforcement-learning", "driftrl"]
    data = ModelCardData(
        base_model=base if of_hub(base) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {config.name}",
        f"{'A LoRA for' if lora else 'The network of'} `{_bare(base)}`, fine-tuned by reinforcement learning towards "
        f"`{_bare(formula(config.reward))}`: {counted(iteration, 'iteration')} with driftrl {__version__}.",
    ]
    if shown:
        parts.append(f"![Base model and tuned model from the same noise]({PICTURE})")
    parts += ["## Use", _use(config, network)]
    if comfyui:
        parts.append(
            f"`{COMFYUI}` is the same LoRA under the names that ComfyUI reads: into `models/loras`, clip strength 0."
        )
    parts += ["## What it changes", _measured(evaluation, point)]
    parts += ["## How it was trained", "What differs from driftrl's defaults:", _settings(config)]
    return "\n\n".join(parts) + "\n"


def _bare(value: Any) -> Any:
    """A setting without the folders of this machine, for a card travels."""
    if isinstance(value, list):
        return [_bare(each) for each in value]
    if isinstance(value, dict):
        return {key: _bare(each) for key, each in value.items()}
    return (
        re.sub(r"(?<![^\s@])[/~][^\s@]*/", "", value)
        if isinstance(value, str) and "://" not in value
        else value
    )


def _network(path: Path) -> str:
    """Which class a checkpoint is of: of a LoRA the pipeline's part, of a whole network its own."""
    if (path / "config.json").is_file():
        return str(read_json(path / "config.json").get("_class_name", ""))
    with safe_open(path / LORA, "pt") as file:
        return next(iter(file.keys())).partition(".")[0]


def _json_of(model: ModelConfig, file: str) -> dict[str, Any]:
    """What a JSON file of a model says, if the model is on this machine."""
    base = _base(model)
    folder = Path(base) / file
    found = folder if folder.is_file() else hub.cached(base, file, model.revision)
    return {} if found is None else read_json(found)


def _base(model: ModelConfig) -> str:
    """The pipeline that a model is, or, of one file, was made from; "" if that is not known without the file."""
    if not single_file.named(model.path):
        return model.path
    with suppress(InputError):
        return single_file.base_of(model)
    return model.config or ""


def _empty_prompt(model: ModelConfig) -> str | None:
    """What must stand for no negative prompt where the pipeline calls guidance of two branches ``true_cfg_scale``, and has it only
    beside one: Qwen-Image's, and FLUX.1's where the network is not distilled for a guidance scale. Elsewhere None.
    """
    pipeline = _json_of(model, "model_index.json").get("_class_name")
    if pipeline == "QwenImagePipeline":
        return " "
    distilled = _json_of(model, "transformer/config.json").get("guidance_embeds", True)
    return "" if pipeline == "FluxPipeline" and not distilled else None


def _use(config: TrainConfig, network: str) -> str:
    """Python that draws with it."""
    base, lora, sampling = config.model.path, config.adapter.kind == "lora", config.sampling
    flow = "ransformer" in network
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline" + (f", {network}" if not lora else ""),
        "",
    ]
    half = config.model.dtype if config.model.dtype != "float32" else "bfloat16" if flow else "float16"
    load = f'DiffusionPipeline.from_pretrained("{_bare(base)}", torch_dtype=torch.{half})'
    if base == "tiny-animals":
        lines = ["from driftrl import TrainConfig", "from driftrl.pipelines import load_pipeline", ""]
        lines += [f"from diffusers import {network}"] * (not lora)
        load = "load_pipeline(TrainConfig().model)"
    if single_file.named(base):
        lines, load = _from_file(config.model, half)
        lines += [f"from diffusers import {network}"] * (not lora)
    lines.append(f"pipe = {load}")
    if lora:
        lines.append(f'pipe.load_lora_weights("FOLDER_OR_REPOSITORY", weight_name="{LORA}")')
    else:
        lines.append(
            f'pipe.{"transformer" if flow else "unet"} = {network}.from_pretrained("FOLDER_OR_REPOSITORY")'
        )
    arguments = [f"num_inference_steps={sampling.steps}"]
    empty = _empty_prompt(config.model) if sampling.guidance_scale > 1 else None
    if sampling.negative_prompt or empty is not None:
        negative = json.dumps(sampling.negative_prompt or empty, ensure_ascii=False)
        klein = _json_of(config.model, "model_index.json").get("_class_name") == "Flux2KleinPipeline"
        read = f"pipe.encode_prompt({negative})[0]"  # its pipeline takes no words here
        arguments.append(f"negative_prompt_embeds={read}" if klein else f"negative_prompt={negative}")
    if empty is not None:
        arguments.append(f"true_cfg_scale={sampling.guidance_scale}")
    else:
        # With 1.0 diffusers' DDIMScheduler may draw NaN where a schedule begins at pure noise (use-the-adapter.md).
        noise = [f"eta={min(sampling.eta, 0.999)}"] * (not flow)
        arguments += [f"guidance_scale={sampling.guidance_scale}", *noise]
    lines.append(f'image = pipe(prompt="a cat", {", ".join(arguments)}).images[0]')
    return "\n".join(["```python", *lines, "```"])


def _from_file(model: ModelConfig, half: str) -> tuple[list[str], str]:
    """Imports, and Python that loads a model of one file: all of it, its network, or, of what is between, by our own loader."""
    index, file, base, held = _json_of(model, "model_index.json"), _bare(model.path), _bare(_base(model)), []
    kind, dtype = str(index.get("_class_name")), f"torch_dtype=torch.{half}"
    policy = PIPELINES.get(kind)
    if policy is not None:
        with suppress(InputError):
            held = single_file.held(single_file.contents(Path(model.path)), kind, policy.component)
    if policy is not None and held == [policy.component]:
        network = index[policy.component][1]
        part = (
            f'{network}.from_single_file("{file}", config="{base}", subfolder="{policy.component}", {dtype})'
        )
        load = f'{kind}.from_pretrained("{base}", {policy.component}={part}, {dtype})'
        return ["import torch", f"from diffusers import {kind}, {network}", ""], load
    if policy is not None and held and not single_file.lacking(held, index, policy.text_encoders):
        named = "" if model.config is None else f'config="{base}", '
        load = f'{kind}.from_single_file("{file}", {named}{dtype})'
        return ["import torch", f"from diffusers import {kind}", ""], load
    named = "" if model.config is None else f', config="{base}"'
    lines = [
        "import torch",
        "from driftrl.pipelines import load_pipeline",
        "from driftrl.config import ModelConfig",
        "",
    ]
    return lines, f'load_pipeline(ModelConfig(path="{file}"{named}, dtype="{half}"))'


def _measured(evaluation: Evaluation | None, point: Point | None) -> str:
    if evaluation is None or point is None:
        return "Not measured: `driftrl evaluate` was not run on this checkpoint."
    settings = evaluation.settings
    few = too_few(settings)
    rows = [
        f"| | base model | this one | {'change' if few else f'change ({evaluation.level:.0%} interval)'} |",
        "| --- | --- | --- | --- |",
    ]
    for name, figure in point.figures.items():
        change = figure.change
        assert change is not None  # evaluations are checked when they are read
        ends = f" ({minus(change.low, sign=True)} to {minus(change.high, sign=True)})"
        told = minus(change.mean, sign=True) + ("" if few else ends)
        rows.append(
            f"| {describe(name, settings).title} | {minus(evaluation.base.figures[name].mean)} | {minus(figure.mean)} | {told} |"
        )
    each = f"{counted(settings.images, 'image')} of each of {counted(len(settings.prompts), 'prompt')}"
    sure = f". {few}: no interval is given." if few else "; intervals bootstrapped over prompts."
    return "\n".join(rows) + f"\n\nMeans over prompts, of {each}, the same seeds for both{sure}"


def _settings(config: TrainConfig) -> str:
    usual, lines = flat(TrainConfig()), []
    for key, value in flat(config).items():
        if value != usual.get(key) and key.split(".")[0] not in OWN:
            lines.append(f"{key}: {_bare(formula(config.reward) if key == 'reward' else value)}")
    return "```yaml\n" + "\n".join(lines or ["# nothing"]) + "\n```"
