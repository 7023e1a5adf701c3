"""Diffusers' pipelines: which ones there are policies for, and how one is loaded, whole or with a clear message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from driftrl import hub, single_file
from driftrl.checks import InputError, nearest
from driftrl.config import ModelConfig
from driftrl.files import numbers_in, read_json
from driftrl.loading import closed, demand_words, reason
from driftrl.policies.flow import (
    Flux2Policy,
    FluxPolicy,
    QwenImagePolicy,
    SanaPolicy,
    StableDiffusion3Policy,
    ZImagePolicy,
)
from driftrl.policies.pipeline import PipelinePolicy
from driftrl.policies.stable_diffusion import StableDiffusionPolicy, StableDiffusionXLPolicy

TINY_ANIMALS = Path(str(resources.files("driftrl") / "assets" / "tiny-animals"))
PIPELINES: dict[str, type[PipelinePolicy]] = {
    "StableDiffusionPipeline": StableDiffusionPolicy,
    "StableDiffusionXLPipeline": StableDiffusionXLPolicy,
    "StableDiffusion3Pipeline": StableDiffusion3Policy,
    "FluxPipeline": FluxPolicy,
    "Flux2Pipeline": Flux2Policy,
    "Flux2KleinPipeline": Flux2Policy,
    "SanaPipeline": SanaPolicy,
    "QwenImagePipeline": QwenImagePolicy,
    "ZImagePipeline": ZImagePolicy,
}

NEVER_ASKED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that pipelines may name and no policy asks: a folder may do without."""

USUAL_SAMPLING = {
    "StableDiffusionPipeline": (50, 5.0),
    "StableDiffusionXLPipeline": (50, 5.0),
    "StableDiffusion3Pipeline": (28, 4.5),
    "FluxPipeline": (28, 3.5),
    "Flux2Pipeline": (50, 4.0),
    "Flux2KleinPipeline": (50, 4.0),
    "SanaPipeline": (20, 4.5),
    "QwenImagePipeline": (50, 4.0),
    "ZImagePipeline": (50, 4.0),
}
"""Steps and guidance scale of a model that no run has settings for."""
SCHNELL = (4, 1.0)
"""The same of a FLUX.1 or FLUX.2 that takes no guidance."""
TURBO = (9, 0.0)
"""And of a Z-Image that takes none, which only its name says."""


def usual_sampling(pipeline: Any) -> tuple[int, float]:
    """Steps and guidance scale that people draw with."""
    kind = type(pipeline).__name__
    if kind == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
        return SCHNELL
    if kind == "Flux2KleinPipeline" and pipeline.config.is_distilled:
        return SCHNELL
    if kind == "ZImagePipeline" and "turbo" in str(pipeline.config.get("_name_or_path")).lower():
        return TURBO
    return USUAL_SAMPLING[kind]


def load_pipeline(model: ModelConfig) -> Any:
    """Load a diffusers pipeline: the embedded one, a local folder, a hub name, or one safetensors file.

    Raises:
        InputError: if it is none of these, or a kind of pipeline that no policy is built for.
    """
    import diffusers

    if single_file.named(model.path):
        return _load_file(model)
    if model.config is not None:
        raise InputError(
            f"model.config: expected none, for {model.path} is no safetensors file and has a configuration of its own; got "
            f"{model.config!r}: leave it out"
        )
    path = str(TINY_ANIMALS / "pipeline") if model.path == "tiny-animals" else model.path
    folder = Path(path)
    _demand_parts(folder, "model.path")
    if not folder.exists() and not hub.of_hub(path):
        raise InputError(
            f"model.path: expected 'tiny-animals', a pipeline folder, a safetensors file or a hub name; {path!r} is none"
            f"{nearest(path, ['tiny-animals'])}"
        )
    if not folder.exists():
        hub.answers()
    with _loading(path, _advice(path)):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            path,
            revision=model.revision,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            variant=_variant(_files(path, model.revision), model.dtype),
            **_left_out(folder),
        )
    kind = type(pipeline).__name__
    _demand_policy("model.path", path, kind)
    _demand_whole(pipeline, folder, PIPELINES[kind])
    return pipeline


def _load_file(model: ModelConfig) -> Any:
    """The pipeline of one file: the parts that it holds, and what it lacks of the pipeline that it was made from."""
    import diffusers

    file, base = Path(model.path), single_file.base_of(model)
    folder, dtype = Path(base), getattr(torch, model.dtype)
    _demand_base(file, base, model.revision)
    with _loading(base, _advice(base), "model.config"):
        index = diffusers.DiffusionPipeline.load_config(base, revision=model.revision)
    kind, found = str(index.get("_class_name")), single_file.contents(file)
    _demand_policy("model.config", base, kind)
    policy = PIPELINES[kind]
    held = single_file.held(found, kind, policy.component)
    lacking = single_file.lacking(held, index, policy.text_encoders)
    without = [n for n in lacking if folder.exists() and not numbers_in((folder / n).glob("*.safetensors"))]
    if without:
        raise InputError(
            f"model.path: {file} has no {' and no '.join(without)}, and the folder {base}, which it was made from, has no weights of "
            "them either: add them there, in the folders of these names, or name another one as model.config"
        )
    unasked: dict[str, Any] = {name: None for name in NEVER_ASKED if name in index}
    unasked |= {"requires_safety_checker": False} if "safety_checker" in index else {}
    wrong = f"; is {base} what it was made from? If not, name that: --set model.config=FOLDER"
    with _loading(str(file), wrong, asides=False):
        if held == [policy.component]:
            network = getattr(diffusers, index[policy.component][1]).from_single_file(
                str(file),
                config=base,
                subfolder=policy.component,
                config_revision=model.revision,
                dtype=dtype,
            )
            parts = {policy.component: network}
        else:
            pipeline = getattr(diffusers, kind).from_single_file(
                str(file), config=base, revision=model.revision, dtype=dtype,
                **dict.fromkeys(lacking) | _left_out(folder) | unasked,
            )  # fmt: skip
            parts = {name: getattr(pipeline, name) for name in held}
    _demand_given(file, parts, base)
    if len(parts) == 1 or lacking:
        with _loading(base, _advice(base), "model.config"):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                base, revision=model.revision, dtype=dtype, use_safetensors=True,
                variant=_variant(_files(base, model.revision), model.dtype), **parts, **_left_out(folder) | unasked,
            )  # fmt: skip
    if "v_pred" in found and pipeline.scheduler.config.get("prediction_type") != "v_prediction":
        raise InputError(
            f"model.config: {file} is a model of v-prediction, by its key v_pred, and the scheduler of {base} is of another; name a "
            "pipeline whose scheduler has prediction_type: v_prediction"
        )
    # What a file is called tells Z-Image-Turbo, if nobody has said what it was made from.
    pipeline.register_to_config(_name_or_path=model.config or file.name)
    _demand_whole(pipeline, folder, policy, given=held)
    return pipeline


@contextmanager
def _loading(path: str, advice: str, key: str = "model.path", asides: bool = True) -> Iterator[None]:
    """Without the bars of libraries that load ``path``, and with one message of what they raise; without ``asides`` diffusers does not
    say either which weights it has no use for.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars, verbosity = diffusers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    said = diffusers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it tells everyone without torchvision so, at every start
    if not asides:
        diffusers_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # of three libraries, on whatever the files hold
        more = "" if closed(error) else advice
        raise InputError(f"{key}: {path} cannot be loaded: {reason(error)}{more}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        diffusers_logging.set_verbosity(said)
        if bars:
            diffusers_logging.enable_progress_bar()


def _demand_policy(key: str, path: str, kind: str) -> None:
    if kind not in PIPELINES:
        raise InputError(f"{key}: {path} is a {kind}; expected one of {', '.join(PIPELINES)}")


def _demand_base(file: Path, base: str, revision: str | None) -> None:
    """Refuse a pipeline to complete ``file`` with that is not there, and cannot be had."""
    _demand_parts(Path(base), "model.config")
    if Path(base).exists() or (
        hub.of_hub(base) and (hub.answers() or hub.has(base, "model_index.json", revision))
    ):
        return
    if not hub.of_hub(base):
        raise InputError(f"model.config: expected a pipeline folder or a hub name; {base!r} is none")
    raise InputError(
        f"model.path: {file} is one file, whose tokenizer and settings are those of {base}, and the hub {hub.silence()}, and this "
        f"machine's cache has no copy. Where there is a network: hf download {base} --include '*.json' --include '*.txt' --include '*.model' --local-dir FOLDER, which is "
        "small, or all of it where the file has the network alone; then --set model.config=FOLDER"
    )


def _demand_given(file: Path, parts: dict[str, Any], base: str) -> None:
    """Refuse parts that a file has not all weights of: these stay on the meta device."""
    for name, part in parts.items():
        weights = list(part.parameters())
        wanted = sum(p.numel() for p in weights)
        if (found := sum(p.numel() for p in weights if not p.is_meta)) < wanted:
            raise InputError(
                f"model.path: {file} holds {found:,} of the {wanted:,} numbers of {name}, a {type(part).__name__} as {base} has it: it "
                "is damaged, or made from another model: name that one, --set model.config=FOLDER"
            )


def _advice(path: str) -> str:
    """What to do where a hub name could not be loaded; nothing for a folder."""
    if Path(path).exists():
        return ""
    return (
        f"; it is not a folder here, nor in this machine's cache of the hub{', which HF_HUB_OFFLINE switches off' * hub.off()}. "
        f"Where there is a network: hf download {path} --local-dir FOLDER; then name that folder instead"
    )


def _demand_whole(
    pipeline: Any, folder: Path, policy: type[PipelinePolicy], given: Sequence[str] = ()
) -> None:
    """Refuse a pipeline that lacks a part, or, of a folder, some weights or the words of a tokenizer; parts that were ``given`` are
    of a file, and the folder is what it was made from.
    """
    key = "model.config" if given else "model.path"
    tokenizers = tuple(name.replace("text_encoder", "tokenizer") for name in policy.text_encoders)
    needed = (*policy.text_encoders, *tokenizers, policy.component, "vae", "scheduler")
    missing = [n for n in needed if getattr(pipeline, n, None) is None and n not in policy.dispensable]
    if missing:
        raise InputError(
            f"{key}: {folder} has no {', '.join(missing)}, which a {type(pipeline).__name__} needs"
        )
    for name in tokenizers:
        if (words := getattr(pipeline, name)) is not None:
            demand_words(getattr(words, "tokenizer", words), f"{key}: {folder / name}")
    parts = {*policy.text_encoders, policy.component, "vae"} - {*given}
    for name in sorted(parts) if folder.exists() else ():
        part, files = getattr(pipeline, name), list((folder / name).glob("*.safetensors"))
        wanted = 0 if part is None else sum(p.numel() for p in part.parameters())
        # Libraries name weights differently from release to release, but of a whole part there are as many.
        if (found := numbers_in(files)) < wanted:
            raise InputError(
                f"{key}: {folder / name} holds {found:,} of the {wanted:,} numbers of a {type(part).__name__}: "
                "it is damaged, or of another model"
            )


def _left_out(folder: Path) -> dict[str, Any]:
    """Parts that a folder was saved without, and may be, such as SD3's T5: diffusers wants to be told so."""
    index = read_json(folder / "model_index.json") if folder.exists() else {}
    policy = PIPELINES.get(index.get("_class_name", ""), PipelinePolicy)
    left: dict[str, Any] = {name: None for name in policy.dispensable if index.get(name) == [None, None]}
    left |= {name: None for name in NEVER_ASKED if name in index and not (folder / name).is_dir()}
    return left | ({"requires_safety_checker": False} if "safety_checker" in left else {})


def _files(name: str, revision: str | None) -> list[str]:
    """The names ``PART/FILE`` of the weights in a pipeline's folder, or of a hub name's, there or in this machine's cache."""
    folder = Path(name)
    if not folder.exists():
        if hub.answers():
            found = hub.files(name, revision)
            return sorted(file for file in found if re.fullmatch(r"[^/]+/[^/]+\.safetensors", file))
        index = hub.cached(name, "model_index.json", revision)
        if index is None:
            return []
        folder = index.parent
    return sorted(f"{file.parent.name}/{file.name}" for file in folder.glob("*/*.safetensors"))


def _variant(files: Sequence[str], dtype: str) -> str | None:
    """The middle of names such as ``unet/model.fp16.safetensors``, where a part has weights of no other name, or where float16 is
    asked for and all parts have such: they are half as large, and the same numbers.

    Example:
        >>> from driftrl.pipelines import _variant
        >>> both = ["unet/model.fp16.safetensors", "unet/model.safetensors"]
        >>> _variant(both, "float32"), _variant(both, "float16"), _variant(["vae/model.bf16-00001-of-00002.safetensors"], "float32")
        (None, 'fp16', 'bf16')
    """
    parts: dict[str, set[str]] = {}
    for file in files:
        part, _, name = file.partition("/")
        pieces = re.sub(r"-\d+-of-\d+", "", name).split(".")
        parts.setdefault(part, set()).add(pieces[1] if len(pieces) == 3 else "")
    for found in parts.values():
        if "" not in found:
            return sorted(found)[0]
    return (
        "fp16" if parts and dtype == "float16" and all("fp16" in found for found in parts.values()) else None
    )


def _demand_parts(folder: Path, key: str) -> None:
    """Refuse a folder, if it is there, that is no pipeline's, or lacks a part its model_index.json names."""
    if not folder.exists():
        return
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{key}: {folder} is no diffusers pipeline folder: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise InputError(f"{key}: {folder / 'model_index.json'} is no pipeline's index")
    named = [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None]
    missing = [part for part in named if not (folder / part).is_dir() and part not in NEVER_ASKED]
    if missing:
        raise InputError(
            f"{key}: {folder} lacks its {', '.join(missing)}; its model_index.json names "
            f"{', '.join(named)}: copy or download the whole pipeline"
        )
