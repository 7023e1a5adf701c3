"""A run in one small file: configuration, evaluation and the course of training, for keeping in a repository.

`compare` reads such files as it reads run folders; the pictures are not in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from driftrl import checkpoint
from driftrl.checks import InputError
from driftrl.config import TrainConfig, load_config, parse_config
from driftrl.evaluation.evaluate import FILE, Evaluation, load_evaluation, parse_evaluation
from driftrl.files import read_json, write_text

FORMAT = 1
DIGITS = 6
"""Significant digits of every figure: more than any table shows."""
BINS = 64
"""At most so many points are kept of a curve of training; each is the mean over its share of the iterations."""
CURVES = ("reward/mean", "reward/std_within_prompt", "diversity/kept_mean", "policy/approx_kl")


class Training(BaseModel):
    """How training went."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    iterations: int
    seconds: float
    """In all, of those iterations whose times were written down."""
    versions: dict[str, str]
    """Of the packages that the last checkpoint was written with."""
    warnings: dict[str, int]
    """How often each fired, by its name in metrics.jsonl."""
    curves: dict[str, list[float | None]]
    """`iteration`, and the means of metrics up to it; None where there were none."""


@dataclass(frozen=True)
class Result:
    """The contents of a file of results."""

    config: TrainConfig
    evaluation: Evaluation
    training: Training


def write_result(folder: Path, path: Path) -> Path:
    """Write ``path`` from an evaluated run's folder, and return it.

    Raises:
        InputError: if the run was not evaluated, or a file of it is damaged.
    """
    log, times = read_metrics(folder / "metrics.jsonl"), read_metrics(folder / "timings.jsonl")
    newest = checkpoint.newest(folder / "checkpoints")
    training = Training(
        iterations=int(log[-1]["iteration"]) if log else 0,
        seconds=sum(sum(v for k, v in line.items() if k != "iteration") for line in times),
        versions=read_json(newest / "state.json").get("versions", {}) if newest else {},
        warnings={
            key: int(sum(line.get(key) or 0 for line in log))
            for key in sorted({key for line in log for key in line if key.startswith("warning/")})
        },
        curves=_curves(log),
    )
    data = {
        "format": FORMAT,
        "config": load_config(folder / "config.yaml").model_dump(mode="json"),
        "training": _rounded(training.model_dump(mode="json")),
        "evaluation": _rounded(load_evaluation(folder).model_dump(mode="json")),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line for each part, so that a difference between two versions can be read.
    lines = (f"{json.dumps(key)}: {json.dumps(part, separators=(',', ':'))}" for key, part in data.items())
    write_text(path, "{" + ",\n".join(lines) + "}\n")
    return path


def load_result(path: Path) -> Result:
    """Read a file of results.

    Raises:
        InputError: if it is missing, damaged, or of another format.
    """
    data = read_json(path)
    given = data.get("format") if isinstance(data, dict) else None
    if given != FORMAT or set(data) != {"format", "config", "training", "evaluation"}:
        raise InputError(
            f"{path}: expected a result of format {FORMAT}, as driftrl experiment writes it; got another file"
        )
    if not isinstance(data["config"], dict):
        raise InputError(f"{path} is damaged at config; collect it again")
    try:
        training = Training.model_validate(data["training"])
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(f"{path} is damaged at training.{place}; collect it again") from None
    evaluation = parse_evaluation(data["evaluation"], path)
    return Result(parse_config(data["config"], str(path)), evaluation, training)


def sources(paths: Sequence[Path | str]) -> list[Path]:
    """Run folders and files of results as they are, and in place of another folder what it holds: the files that
    ``driftrl experiment`` collected, or else the runs.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        results = path / "results" if (path / "results").is_dir() else path
        files = sorted(results.glob("*.json"))
        runs = sorted({run.parent for name in (FILE, "config.yaml") for run in path.glob(f"*/{name}")})
        is_run = (path / FILE).is_file() or (path / "config.yaml").is_file()
        found += [path] if is_run or not (files or runs) else files or runs
    return found


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl``; a line torn by a crash is passed over, a missing file has none."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("iteration"), int):
            lines.append(line)
    return lines


def _curves(log: Sequence[dict[str, float]]) -> dict[str, list[float | None]]:
    bins = min(BINS, len(log))
    shares = [log[k * len(log) // bins : (k + 1) * len(log) // bins] for k in range(bins)]
    curves: dict[str, list[float | None]] = {"iteration": [share[-1]["iteration"] for share in shares]}
    for name in CURVES:
        values = [[line[name] for line in share if line.get(name) is not None] for share in shares]
        curves[name] = [sum(each) / len(each) if each else None for each in values]
    return curves


def _rounded(value: Any) -> Any:
    """``value`` with `DIGITS` significant digits in every number that is not whole."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and math.fabs(short) < 10**DIGITS else short
