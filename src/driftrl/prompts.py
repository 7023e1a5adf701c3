"""Prompt sets: those of the package, and a user's own TXT or JSONL."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from driftrl import noise
from driftrl.checks import InputError, counted, nearest
from driftrl.files import read_json
from driftrl.types import Prompt

_OTHER = {".json", ".csv", ".tsv", ".yaml", ".yml"}
"""Files whose lines are no prompts, though they could be read as if they were."""
FILE = "prompts.json"
"""In a run folder: the prompts that the run draws from, as they were when it began."""
USUAL, EVALUATED = "eval40", 40
"""What a model is measured on, where nothing else was asked for; how many of a user's own prompts are."""
_FOLDER = resources.files("driftrl") / "assets" / "prompts"


class PromptWarning(UserWarning):
    """Prompts say what may not be meant."""


def prompt_sets() -> tuple[str, ...]:
    """Names of the prompt sets in the package."""
    return tuple(sorted(f.name.removesuffix(".txt") for f in _FOLDER.iterdir() if f.name.endswith(".txt")))


def called(prompts: str | Sequence[str]) -> str:
    """A prompt set in messages and records: its name or file, or how many prompts a list has."""
    return prompts if isinstance(prompts, str) else f"a list of {counted(len(prompts), 'prompt')}"


def load_prompts(name: str | Sequence[str]) -> tuple[str, ...]:
    """Read a prompt set: a name of the package, a TXT file (one prompt a line, # for comments) or a JSONL
    file (strings, or objects with a "prompt"; those that have more are a `Prompt` with the object as its metadata, for rewards).
    A list of prompts is one already.

    Raises:
        InputError: if there is no such set or file, or it holds no prompts.
    """
    if not isinstance(name, str):
        for prompt in name:
            if not isinstance(prompt, str) or not prompt.strip() or is_broken(prompt):
                raise InputError(f"prompts: expected text in UTF-8; got {prompt!r}")
        prompts = [prompt if isinstance(prompt, Prompt) else prompt.strip() for prompt in name]
    elif name in prompt_sets():
        prompts = _lines((_FOLDER / f"{name}.txt").read_text("utf-8"))
    else:
        path = Path(name)
        if not path.is_file():
            what = f"expected a prompt set ({', '.join(prompt_sets())}) or a TXT or JSONL file; got {name!r}"
            where = f"; there is no {path.absolute()}" if path.suffix or len(path.parts) > 1 else ""
            if " " in name and not where:
                where = f"; prompts themselves are a list in a configuration: --set 'prompts.set=[{name}]'"
            where = ", which is a folder" if path.is_dir() else where
            raise InputError(f"prompts: {what}{where}{nearest(name, prompt_sets())}")
        try:
            text = path.read_text("utf-8-sig")  # Windows' editors put a mark before the first prompt
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompts: {path} cannot be read as UTF-8 text: {error}") from error
        if path.suffix in _OTHER:
            raise InputError(f"prompts: expected a TXT file, one prompt a line, or JSONL; got {path}")
        prompts = _objects(path, text) if path.suffix in {".jsonl", ".ndjson"} else _lines(text)
    if not prompts:
        raise InputError(f"prompts: {called(name)} holds no prompts; expected one a line")
    return tuple(prompts)


def trained(name: str | Sequence[str], run: Path) -> tuple[str, ...]:
    """What a run draws from: its prompt set, or its folder's copy where a resumed run's file is not there any more, or not
    by this name in this folder.

    Raises:
        InputError: as `load_prompts`.
    """
    copy = run / FILE
    begun = (run / "config.yaml").is_file() and copy.is_file()
    gone = isinstance(name, str) and name not in prompt_sets() and not Path(name).exists()
    return _copied(copy) if begun and gone else load_prompts(name)


def evaluated(
    asked: str | Sequence[str] | None, trained: str | Sequence[str], run: Path | None = None
) -> tuple[str, tuple[str, ...]]:
    """What a run is measured on: what its prompt set is `called`, and the prompts.

    Args:
        asked: a prompt set, or prompts; None for eval40 after training on one of the package's, and for the
            user's own after training on those: 40 of them at most, evenly spread, so that a large set is no surprise.
        trained: the prompt set that was trained on.
        run: a run folder; its copy of the prompts will do where the user's file is not there any more.

    Raises:
        InputError: as `load_prompts`.
    """
    if asked is not None:
        return called(asked), load_prompts(asked)
    if isinstance(trained, str) and trained in prompt_sets():
        return USUAL, load_prompts(USUAL)
    copy = None if run is None else run / FILE
    own = _copied(copy) if copy is not None and copy.is_file() else load_prompts(trained)
    count = min(EVALUATED, len(own))
    return called(trained), tuple(own[k * len(own) // count] for k in range(count))


def warn_of_doubles(prompts: Sequence[str], name: str) -> None:
    """Warn of prompts that are in a set, called ``name``, more than once; of those with metadata, with the same."""
    counts = Counter(json.dumps(each, sort_keys=True, ensure_ascii=False) for each in as_json(prompts))
    twice = [text for text, count in counts.items() if count > 1]
    if twice:
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        warnings.warn(
            f"prompts.set: {name} has {', '.join(twice[:3])}{more} more than once; every line is a prompt of its own, so what is "
            "there twice is drawn and counts twice",
            PromptWarning,
            stacklevel=2,
        )


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


def as_json(prompts: Sequence[str]) -> list[Any]:
    """Prompts as `FILE` has them: strings, and objects of those that have metadata."""
    return [
        {**each.metadata, "prompt": each} if isinstance(each, Prompt) and each.metadata else each
        for each in prompts
    ]


def _copied(file: Path) -> tuple[str, ...]:
    found = read_json(file)
    prompts = [_prompt(each) for each in found] if isinstance(found, list) else []
    if not prompts or None in prompts:
        raise InputError(f"{file} is damaged: expected a list of prompts; name some by --prompts FILE")
    return tuple(each for each in prompts if each is not None)


def _prompt(item: Any) -> str | None:
    """A string, or an object with a "prompt" and whatever else; None if it is neither."""
    if not isinstance(item, dict):
        return item.strip() or None if isinstance(item, str) else None
    text = item.get("prompt")
    if not isinstance(text, str) or not text.strip():
        return None
    return text.strip() if len(item) == 1 else Prompt(text.strip(), item)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def is_broken(prompt: str) -> bool:
    """Whether it has half of a surrogate pair, which is no letter: of JSON's escapes, or of bytes that are no UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in prompt)


def _objects(path: Path, text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # JSON may hold what str.splitlines takes for a line's end
        if not line.strip():
            continue
        try:
            item = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise InputError(f"prompts: {path} line {number}: no JSON") from error
        prompt = _prompt(item)
        if prompt is None:
            raise InputError(f'prompts: {path} line {number}: expected a string or an object with a "prompt"')
        if is_broken(prompt):
            raise InputError(f"prompts: {path} line {number}: half of a surrogate pair, which is no letter")
        prompts.append(prompt)
    return prompts
