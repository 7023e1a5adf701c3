"""Prompts that are longer than a model reads: said once and in one line, in place of the libraries' words at each batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SHOWN = 60
"""Letters of a prompt that a message has."""


class LongPromptWarning(UserWarning):
    """The end of a prompt is not read."""


def told(
    pipeline: Any, text_encoders: Sequence[str], prompts: Sequence[str], longest: int | None = None
) -> str | None:
    """A message about prompts whose ends the model does not read, more than ``longest`` tokens or what the pipeline takes;
    None where it reads them all.

    What counts is the encoder that reads most, which comes last in every pipeline: FLUX's CLIP sees 77 tokens of a prompt
    that its T5 reads whole.
    """
    names = [name.replace("text_encoder", "tokenizer") for name in text_encoders]
    there = [t for t in (getattr(pipeline, name, None) for name in names) if t is not None]
    there = [getattr(t, "tokenizer", t) for t in there]  # of a processor, which FLUX.2 [dev] has
    if not there:
        return None
    parameter = inspect.signature(pipeline.encode_prompt).parameters.get("max_sequence_length")
    limits = [longest, there[-1].model_max_length, *([] if parameter is None else [parameter.default])]
    limit = min(limit for limit in limits if isinstance(limit, int))
    with quiet():
        lengths = [len(there[-1](prompt).input_ids) for prompt in prompts]
    longest = max(range(len(prompts)), key=lengths.__getitem__)
    count = sum(length > limit for length in lengths)
    if not count:
        return None
    prompt = prompts[longest]
    short = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN].rstrip()}\N{HORIZONTAL ELLIPSIS}"
    return (
        f"{count} of {len(prompts)} prompts {'is' if count == 1 else 'are'} longer than the {limit} tokens that the model "
        f"reads, such as {short!r} with {lengths[longest]}: what comes after is lost"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context the libraries' loggers say errors only."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    levels = [library.get_verbosity() for library in (diffusers, transformers)]
    for library in (diffusers, transformers):
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip((diffusers, transformers), levels, strict=True):
            library.set_verbosity(level)
