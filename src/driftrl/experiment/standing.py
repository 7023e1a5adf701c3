"""Where a planned run stands, by what its folder holds; and whether the folder is that run's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driftrl import checkpoint
from driftrl.checks import InputError
from driftrl.config import flat, load_config
from driftrl.evaluation.evaluate import FILE, load_evaluation
from driftrl.experiment.plan import PlanEvaluation, PlannedRun
from driftrl.files import sha256
from driftrl.run import RESUMABLE

TAIL = 2**14
"""Bytes from the end of metrics.jsonl, which hold its last line."""


@dataclass(frozen=True)
class Standing:
    """How far a run is."""

    iteration: int
    """Of its newest checkpoint."""
    measured: int
    """How many of the checkpoints to be evaluated are."""
    trained: bool
    evaluated: bool


def standing(run: PlannedRun, folder: Path, wanted: PlanEvaluation) -> Standing:
    """Where ``run`` stands in ``folder``, which need not be there.

    Raises:
        InputError: if the folder holds a run of other settings, or a damaged file.
    """
    if not (folder / "config.yaml").is_file():
        return Standing(0, 0, False, False)
    newest = checkpoint.newest(folder / "checkpoints")
    iteration = 0 if newest is None else int(newest.name)
    if newest is not None:  # else nothing is lost if it begins again
        _refuse_another(run, folder, iteration)
    measured = _measured(run, folder, wanted)
    trained = iteration == run.config.iterations
    return Standing(iteration, measured, trained, trained and measured == len(run.checkpoints))


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics.jsonl, cheaply; {} where there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().split(b"\n")
        return dict(
            json.loads(lines[-2])
        )  # after the last newline there is nothing, or a line that is being written
    except (OSError, IndexError, ValueError):
        return {}


def models_measured(folder: Path) -> int:
    """How many models a run's evaluation.json holds, the base model among them; 0 where there is none."""
    try:
        return len(json.loads((folder / FILE).read_text("utf-8"))["points"])
    except (OSError, KeyError, TypeError, ValueError):
        return 0


def _refuse_another(run: PlannedRun, folder: Path, iteration: int) -> None:
    before, now = flat(load_config(folder / "config.yaml")), flat(run.config)
    keys = [k for k in now if now[k] != before.get(k) and k.split(".")[0] not in RESUMABLE]
    if not keys and iteration > run.config.iterations:
        keys = ["iterations"]
    if not keys and not all(
        (folder / f"checkpoints/{k:06d}").is_dir() for k in run.checkpoints if k <= iteration
    ):
        keys = [k for k in ("iterations", "logging.checkpoint_every") if now[k] != before.get(k)]
    if keys:
        changes = "; ".join(f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in keys)
        raise InputError(
            f"{folder} holds a run of other settings than the plan now says: {changes}; take them back, remove that "
            "folder, or choose another --out"
        )


def _measured(run: PlannedRun, folder: Path, wanted: PlanEvaluation) -> int:
    if not (folder / FILE).is_file():
        return 0
    evaluation = load_evaluation(folder)
    there, scored = evaluation.settings, evaluation.base.figures
    asked = (list(run.prompts_evaluated(folder)), wanted.images, wanted.seed, wanted.encoder)
    if (there.prompts, there.images, there.seed, there.encoder) != asked:
        return 0
    if not all(f"reward/{name}" in scored or name in there.rewards for name in wanted.rewards):
        return 0
    known = {point.iteration: point.identity for point in evaluation.tuned}
    manifests = {k: folder / f"checkpoints/{k:06d}/manifest.json" for k in run.checkpoints}
    return sum(k in known and path.is_file() and known[k] == sha256(path) for k, path in manifests.items())
