"""Models that are one safetensors file, as A1111, ComfyUI and Civitai have them: what is in it, and what it was made from.

A file has weights. Tokenizers, scheduler and the settings of its networks are those of the pipeline that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.config import ModelConfig

OTHERS = (".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Ends of names of files that are not read: pickles, which may run anything, and weights of a few bits."""
ENDS = (".safetensors", *OTHERS)
KINDS = (
    "v1", "v2", "xl_base", "sd3", "sd35_medium", "sd35_large", "flux-dev", "flux-schnell", "sana", "z-image-turbo",
)  # fmt: skip
"""What diffusers calls the families that a policy is built for, where it knows them by their weights."""
TEXT_ENCODERS = {
    "StableDiffusionPipeline": {"text_encoder": "cond_stage_model."},
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    "StableDiffusion3Pipeline": {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    "FluxPipeline": {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."},
}
"""How the names of text encoders' weights begin, of pipelines that diffusers reads from a file; of others it reads the network."""
NETWORK = "model.diffusion_model."
AUTOENCODER = ("first_stage_model.", "vae.")
ALONE = (*AUTOENCODER, "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""How all names of an autoencoder's file begin."""
LORA = re.compile(r"(^|[._])(lora|lokr|loha|hada|oft)[._]")
QUANTISED = re.compile(r"scale_weight$|weight_scale$|scaled_fp8$|absmax$|quant_map$|comfy_quant$")
"""Of numbers beside weights of few bits, without which these are wrong."""


def named(path: str) -> bool:
    """Whether a model's path is that of one file, which need not be there.

    Example:
        >>> from driftrl.single_file import named
        >>> named("models/animals.safetensors"), named("owner/model"), named("tiny-animals")
        (True, False, False)
    """
    place = Path(path)
    return not place.is_dir() and (place.suffix.lower() in ENDS or place.is_file())


def contents(file: Path) -> dict[str, Tensor]:
    """The tensors of a model's file by name, on the meta device: their shapes, and no weights.

    Raises:
        InputError: if there is no such file, it is no safetensors file or not all of one, or what it holds is no model, or
            none whose weights can be read.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(f"model.path: {file}: there is no such file")
    if file.suffix.lower() in OTHERS:
        raise InputError(
            f"model.path: expected a safetensors file, or a pipeline folder; {file} is none, and other formats are not read: a "
            "pickle (.ckpt, .pt, .bin) may run anything; convert it to safetensors, or take its safetensors version"
        )
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
            whole = all(
                part.get_dtype() not in ("I8", "U8")
                for name, part in slices.items()
                if name.endswith("weight")
            )
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"model.path: {file} is no safetensors file, or a part of one ({error}): copy or download it again"
        ) from error
    _demand_model(file, found, whole)
    return found


def _demand_model(file: Path, found: dict[str, Tensor], whole: bool) -> None:
    if any(LORA.search(name) for name in found):
        raise InputError(
            f"model.path: {file} is a LoRA: expected the model that it is for; the LoRA goes on it by adapter.start, or --lora of "
            "driftrl sample and evaluate"
        )
    if found and all(name.startswith(ALONE) for name in found):
        raise InputError(f"model.path: {file} is an autoencoder (VAE) alone; expected a model that draws")
    if not whole or any(QUANTISED.search(name) for name in found):
        raise InputError(
            f"model.path: {file} has quantised weights, which are not read; take its version in float16, bfloat16 or float32"
        )


def base_of(model: ModelConfig) -> str:
    """The pipeline, a folder or hub name, that has what a file lacks: ``model.config``, or the one that diffusers takes its
    weights for.

    Raises:
        InputError: as `contents`; or if ``model.config`` is not given, and diffusers does not know the weights.
    """
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
    )

    found = contents(Path(model.path))
    if model.config is not None:
        return model.config
    try:
        kind = infer_diffusers_model_type(found)
    except Exception:  # whatever comes of looking for one model's weights in another's
        kind = ""
    # Also what it makes of anything that it does not know.
    if kind not in KINDS or (kind == "v1" and not any(name.startswith(NETWORK) for name in found)):
        taken = f"diffusers takes it for {kind}" if kind not in ("", "v1") else "diffusers does not know it"
        raise InputError(
            f"model.path: {model.path}, of {len(found)} tensors such as {min(found, default='none')}: expected the weights of one "
            f"of {', '.join(KINDS)}; {taken}; if it was made from another model that driftrl trains, name that one, a pipeline folder or "
            "hub name: --set model.config=FOLDER"
        )
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def held(found: Iterable[str], pipeline: str, network: str) -> list[str]:
    """Which parts of a ``pipeline``, a class of diffusers, are in a file with tensors of these names: ``network``, and others
    that diffusers reads from there.
    """
    texts = TEXT_ENCODERS.get(pipeline)
    if texts is None:
        return [network]
    starts: dict[str, Any] = {**texts, "vae": AUTOENCODER}
    return [network, *(part for part, start in starts.items() if any(n.startswith(start) for n in found))]


def lacking(held: Sequence[str], index: dict[str, Any], text_encoders: Sequence[str]) -> list[str]:
    """Which parts of a pipeline, as its ``model_index.json`` has them, are not in a file that has the parts ``held``."""
    named = [part for part in (*text_encoders, "vae") if index.get(part, [None])[0] is not None]
    return [part for part in named if part not in held]
