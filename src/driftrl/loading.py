"""What transformers and diffusers load, whole or not at all: what they would make up where a file lacks it is refused."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from driftrl.checks import InputError


def load_whole(
    kind: Any, name: Path | str, parts: tuple[str, ...] = ("",), dtype: torch.dtype = torch.float32
) -> Any:
    """A model, from safetensors only.

    Args:
        kind: a class of transformers, such as ``CLIPModel``.
        name: folder or hub name.
        parts: of what begins so nothing may be missing; other weights may be, and are then random.
        dtype: of its weights.

    Raises:
        InputError: if weights are missing, which transformers would draw at random.
        OSError: if there is no such model, or none in safetensors.
    """
    from safetensors import SafetensorError

    try:
        model, report = kind.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise InputError(f"{name}: its weights are no safetensors file, or a part of one: {error}") from error
    missing = sorted(key for key in report["missing_keys"] if key.startswith(parts))
    if missing:
        raise InputError(
            f"{name}: expected the weights of a {type(model).__name__}; {len(missing)} are missing, such as {missing[0]}"
        )
    return model


def demand_words(tokenizer: Any, name: Path | str) -> Any:
    """``tokenizer``, if it knows words: without its files transformers makes one that knows none.

    Raises:
        InputError: if all words are the same to it.
    """
    if tokenizer("a cat").input_ids == tokenizer("a dog").input_ids:
        raise InputError(f"{name}: its tokenizer has no vocabulary: are files missing there?")
    return tokenizer


def closed(error: BaseException) -> str | None:
    """What to do about a repository of the hub that is not open to everyone, which lies under what the libraries raise."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    seen: set[int] = set()
    below: BaseException | None = error
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        if isinstance(below, GatedRepoError):
            return "it is gated: accept its terms on its page at https://huggingface.co, then log in here: hf auth login"
        if isinstance(below, RepositoryNotFoundError):
            return "the hub has no such repository, or a private one: is the name right? If so, log in: hf auth login"
        below = below.__cause__ or below.__context__
    return None


def reason(error: Exception) -> str:
    """An error's first line, without the asides of the hub's library."""
    if "processing_pixtral" in str(error) and find_spec("torchvision") is None:
        return "its tokenizer is a PixtralProcessor, which reads images too and needs torchvision: pip install torchvision"
    if (locked := closed(error)) is not None:
        return locked
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, KeyError):
        return f"there is no {line}"
    if "file named model.safetensors" in line:
        line += ": only safetensors are read, and docs/rewards.md (Weights) says how to make one"
    if "meta tensor" in line:  # where weights go that a file does not have
        return "weights are missing"
    asides = (
        r" \((?:[^()]|\([^()]*\))*\)| Please check out the root cause.*| If you want to instead overwrite.*"
    )
    return re.sub(asides, "", line).rstrip(" .")
