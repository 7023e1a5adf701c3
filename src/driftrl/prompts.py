"""Prompt sets: those of the package, and a user's own TXT or JSONL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch

from driftrl import noise
from driftrl.checks import InputError, nearest

_OTHER = {".json", ".csv", ".tsv", ".yaml", ".yml"}
"""Files whose lines are no prompts, though they could be read as if they were."""
_FOLDER = resources.files("driftrl") / "assets" / "prompts"


def prompt_sets() -> tuple[str, ...]:
    """Names of the prompt sets in the package."""
    return tuple(sorted(f.name.removesuffix(".txt") for f in _FOLDER.iterdir() if f.name.endswith(".txt")))


def load_prompts(name: str) -> tuple[str, ...]:
    """Read a prompt set: a name of the package, a TXT file (one prompt a line, # for comments) or a JSONL
    file (strings, or objects with a "prompt").

    Raises:
        InputError: if there is no such set or file, or it holds no prompts.
    """
    if name in prompt_sets():
        prompts = _lines((_FOLDER / f"{name}.txt").read_text("utf-8"))
    else:
        path = Path(name)
        if not path.is_file():
            what = f"expected a prompt set ({', '.join(prompt_sets())}) or a TXT or JSONL file; got {name!r}"
            where = f"; there is no {path.absolute()}" if path.suffix or len(path.parts) > 1 else ""
            raise InputError(f"prompts: {what}{where}{nearest(name, prompt_sets())}")
        try:
            text = path.read_text("utf-8-sig")  # Windows' editors put a mark before the first prompt
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompts: {path} cannot be read as UTF-8 text: {error}") from error
        if path.suffix in _OTHER:
            raise InputError(f"prompts: expected a TXT file, one prompt a line, or JSONL; got {path}")
        prompts = _objects(path, text) if path.suffix in {".jsonl", ".ndjson"} else _lines(text)
    if not prompts:
        raise InputError(f"prompts: {name} holds no prompts; expected one a line")
    return tuple(prompts)


def draw(prompts: int, count: int, seed: int, iteration: int) -> list[int]:
    """The prompts of one iteration, as indices: each pass over the set is a new shuffle, keyed by the seed.

    A prompt comes again within one iteration where that spans two passes, or ``count`` exceeds ``prompts``.
    """
    chosen = []
    for position in range(iteration * count, (iteration + 1) * count):
        turn, place = divmod(position, prompts)
        order = torch.randperm(prompts, generator=noise.generator(seed, turn, 0, 0, "prompts"))
        chosen.append(int(order[place]))
    return chosen


def earlier(which: Sequence[int]) -> list[int]:
    """How often each prompt of an iteration came before in it: its images are drawn after those.

    Example:
        >>> from driftrl.prompts import earlier
        >>> earlier([4, 2, 4, 4])
        [0, 0, 1, 2]
    """
    return [list(which[:place]).count(prompt) for place, prompt in enumerate(which)]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _objects(path: Path, text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # JSON may hold what str.splitlines takes for a line's end
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"prompts: {path} line {number}: no JSON") from error
        prompt = item.get("prompt") if isinstance(item, dict) else item
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f'prompts: {path} line {number}: expected a string or an object with a "prompt"')
        prompts.append(prompt.strip())
    return prompts
