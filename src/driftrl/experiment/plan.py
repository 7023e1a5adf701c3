"""A plan and the runs that it stands for: methods x grid x seeds. Nothing is run or written here."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from driftrl.checks import InputError
from driftrl.config import (
    REWARD,
    Place,
    Positive,
    PromptSet,
    Section,
    TrainConfig,
    flat,
    merged,
    parse,
    parse_config,
    read_config,
    read_yaml,
)
from driftrl.prompts import USUAL, called, evaluated, load_prompts, prompt_sets

NAMES = {"name", "seed"}
"""Settings that every run's name says already."""

ALIKE = (
    "model.path", "model.config", "reward", "sampling.steps", "sampling.guidance_scale", "sampling.negative_prompt",
    "sampling.eta", "sampling.height", "sampling.width",
)  # fmt: skip
"""Settings that all runs share, for figures taken under different ones cannot be compared."""

Settings = dict[str, Any]
"""Settings of a run, by dotted or nested keys."""
Grid = dict[str, Any]
"""Axis to its values: a dotted key and a list of them, or any name and {label: settings}, which vary together."""


def _axes(grid: Grid) -> Grid:
    for axis, values in grid.items():
        if not isinstance(values, list | dict) or not values:
            raise ValueError(
                f"grid: {axis}: expected a list of values, or labels with settings; got {values!r}"
            )
        if isinstance(values, dict) and not all(isinstance(change, dict) for change in values.values()):
            raise ValueError(
                f"grid: {axis}: expected settings below each label, such as '8: {{selection.keep: 8}}'"
            )
    return grid


def _different(seeds: list[int]) -> list[int]:
    if not seeds:
        raise ValueError("seeds: expected at least one; got []")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected each once; got {seeds}")
    return seeds


def _measured(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    several = isinstance(value, list) and value and all(type(each) is int and each >= 1 for each in value)
    if value != "all" and not whole and not (several and value == sorted(set(value))):
        raise ValueError(
            f"evaluation.checkpoints: expected a count of at least 1, iterations that rise, such as [4, 8, 16], or 'all'; got {value!r}"
        )
    return value


Measured = Annotated[int | str | list[int], BeforeValidator(_measured)]
"""Which checkpoints are evaluated."""


class PlanMethod(Section):
    """One method: a configuration file, changes to the base, or both."""

    label: str | None = Field(None, pattern=r"^[\w.+=-]+$")
    """Names the method in runs and reports; by default the configuration's `name`."""
    file: str | None = None
    """A configuration file, relative to the plan, in place of the plan's base."""
    set: Settings = Field({})
    """Changes, by dotted or nested keys; they win over the plan's own `set`."""
    grid: Grid | None = None
    """In place of the plan's."""
    seeds: list[int] | None = None
    """In place of the plan's."""
    checkpoints: Measured | None = None
    """In place of the plan's `evaluation.checkpoints`: a method that gains reward fast wants them closer together at first, for fronts
    are compared where both methods were measured."""

    _grid = field_validator("grid")(lambda grid: None if grid is None else _axes(grid))
    _seeds = field_validator("seeds")(lambda seeds: None if seeds is None else _different(seeds))


class PlanEvaluation(Section):
    """How every run is measured; the same for all, or nothing could be compared."""

    prompts: PromptSet | None = None
    """As prompts.set of a run; null: as evaluation.prompts of a run, which follows prompts.set."""
    images: int = Field(40, ge=2)
    """Images per prompt."""
    checkpoints: Measured = 8
    """So many checkpoints, evenly spaced and the last among them; those of these iterations; or `all`."""
    seed: int = Field(0, ge=0)
    """Of the images."""
    encoder: Place = "tiny-animals"
    """Whose features measure variety, whatever encoder a run was shaped with."""
    rewards: list[Place] = Field([])
    """Further rewards, scored beside the one that was trained on."""


class Plan(Section):
    """Runs to be made and compared."""

    name: str = Field(pattern=r"^[\w.+=-]+$")
    """Names the folder below runs/."""
    base: str | None = None
    """The configuration file that methods without a file change, relative to the plan; null is DRIFT's defaults."""
    methods: list[PlanMethod] = Field([PlanMethod()])
    """The first one is what the others are compared with. A file's path alone will do for a method."""
    grid: Grid = Field({})
    """Settings to cross: each method runs with every combination."""
    seeds: list[int] = Field([0])
    """Each method of the grid runs with each."""
    set: Settings = Field({})
    """Changes to all runs, by dotted or nested keys."""
    evaluation: PlanEvaluation = PlanEvaluation()
    jobs: Positive | None = None
    """Runs at a time; null: one for each core, or one for each GPU."""
    threads: Positive | None = None
    """CPU threads of each; null: the cores shared out."""

    _grid = field_validator("grid")(_axes)
    _seeds = field_validator("seeds")(_different)

    @field_validator("methods", mode="before")
    @classmethod
    def _files(cls, methods: Any) -> Any:
        if not isinstance(methods, list):
            return methods
        if not methods:
            raise ValueError(
                "methods: expected at least one; got []; without methods: a plan has the base alone"
            )
        return [{"file": method} if isinstance(method, str) else method for method in methods]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    config: TrainConfig
    checkpoints: tuple[int, ...]
    """Iterations whose checkpoints are evaluated."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.config.name}-seed{self.config.seed}"

    @property
    def images(self) -> int:
        """Images that its training draws."""
        config = self.config
        return config.iterations * config.prompts.per_iteration * config.sampling.candidates

    def prompts_evaluated(self, folder: Path | None = None) -> tuple[str, ...]:
        """What it is measured on; where its file of prompts is gone, by the copy in its ``folder``."""
        return evaluated(self.config.evaluation.prompts, self.config.prompts.set, folder)[1]


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: naming each bad key, what was given, what is allowed and the nearest valid name.
    """
    data = read_yaml(path)
    settings = TrainConfig.model_fields.keys() - Plan.model_fields.keys()
    if data.keys() & settings and not data.keys() & {"methods", "grid", "seeds"}:
        raise InputError(
            f"{path}: expected a plan of several runs; got the configuration of one: driftrl train {path}"
        )
    return parse(Plan, data, str(path))


def expand(plan: Plan, path: Path) -> list[PlannedRun]:
    """The runs of a plan that was read from ``path``, with different names: every method's first seed, then the second
    ones, so that what is done at any time compares all methods.

    Raises:
        InputError: for a file that cannot be read, settings that are no valid configuration, prompts that are not
            there, two runs of one name, or fewer checkpoints than are to be evaluated.
    """
    runs: dict[str, PlannedRun] = {}
    turns: dict[str, int] = {}
    for method in plan.methods:
        file = method.file or plan.base
        data, source = ({}, "the defaults") if file is None else read_config(path.parent / file)
        data = merged(merged(data, nested(plan.set)), nested(method.set))
        for place, settings in (("set", plan.set), ("a method's set", method.set)):
            if "seed" in settings:
                raise InputError(
                    f"{path}: {place}: expected no seed, for runs have those of seeds; write seeds: [{settings['seed']}]"
                )
        label = method.label or data.get("name") or TrainConfig().name
        for suffix, change in _cells(plan.grid if method.grid is None else method.grid):
            for turn, seed in enumerate(method.seeds or plan.seeds):
                own = {"name": f"{label}{suffix}", "seed": seed}
                run = _planned(
                    plan,
                    plan.evaluation.checkpoints if method.checkpoints is None else method.checkpoints,
                    path.parent,
                    merged(merged(data, change), own),
                    f"{path}: {label}{suffix}, from {source}",
                )
                if run.name in runs:
                    raise InputError(
                        f"{path}: two runs are called {run.name}; give one of the methods another label"
                    )
                runs[run.name], turns[run.name] = run, turn
    for key in ALIKE:
        values = list(dict.fromkeys(json.dumps(flat(run.config).get(key)) for run in runs.values()))
        if len(values) > 1:
            raise InputError(
                f"{path}: {key}: expected the same in all runs, or they could not be compared; got "
                f"{' and '.join(values)}; make a plan of each"
            )
    if len({run.prompts_evaluated() for run in runs.values()}) > 1:
        raise InputError(
            f"{path}: evaluation.prompts: expected the same in all runs, or they could not be compared; by default they follow "
            f"the prompts that a run is trained on, which differ: say evaluation: {{prompts: {USUAL}}}, or a file"
        )
    return sorted(runs.values(), key=lambda run: turns[run.name])


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys as nested ones: {"a.b": 1, "a": {"c": 2}} is {"a": {"b": 1, "c": 2}}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        inner = nested(value) if isinstance(value, dict) and key != REWARD else value
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        result = merged(result, inner)
    return result


def differing(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """For each run its settings, by dotted key, that are not the same in all runs; name and seed are left out."""
    tables = [flat(run.config) for run in runs]
    keys = [key for key in tables[0] if key not in NAMES and any(t[key] != tables[0][key] for t in tables)]
    return [{key: table[key] for key in keys} for table in tables]


def _planned(
    plan: Plan, count: int | str | list[int], folder: Path, data: dict[str, Any], source: str
) -> PlannedRun:
    """One run, checked as far as that goes without loading a model; ``count`` says which checkpoints are evaluated."""
    wanted: dict[str, Any] = {"images": plan.evaluation.images, "at_end": False}
    if plan.evaluation.prompts is not None:
        wanted["prompts"] = plan.evaluation.prompts
    data = _located(merged(data, {"evaluation": wanted}), folder)
    config = parse_config(data, source)
    if not isinstance(count, str) and "checkpoint_every" not in data.get("logging", {}):
        often = math.gcd(*count) if isinstance(count, list) else max(1, config.iterations // count)
        logging = config.logging.model_copy(update={"checkpoint_every": often})
        config = config.model_copy(update={"logging": logging})
    every, last, logging = config.logging.checkpoint_every, config.iterations, config.logging
    if last < 1:
        raise InputError(f"{source}: iterations: expected at least 1 in a plan; got {last}")
    there = sorted({*range(every, last + 1, every), last})
    if isinstance(count, int) and count > len(there):
        raise InputError(
            f"{source}: evaluation.checkpoints: expected at most the {len(there)} that {last} iterations with "
            f"logging.checkpoint_every {every} leave; got {count}"
        )
    if isinstance(count, list) and (lacking := sorted({*count} - {*there})):
        raise InputError(
            f"{source}: evaluation.checkpoints: expected iterations that {last} iterations with logging.checkpoint_every {every} leave "
            f"checkpoints of; got {', '.join(map(str, lacking))} among them"
        )
    if logging.keep_last <= len(there) and logging.keep_every is None:  # that of iteration 0 is one more
        raise InputError(
            f"{source}: logging.keep_last: expected more than the {len(there)} checkpoints of the run, for they are "
            f"evaluated at its end; got {logging.keep_last}"
        )
    prompts = len(load_prompts(config.prompts.set))
    if config.prompts.per_iteration > prompts:
        raise InputError(
            f"{source}: prompts.per_iteration: expected at most {prompts}, the prompts of {called(config.prompts.set)}; got "
            f"{config.prompts.per_iteration}"
        )
    if isinstance(count, list):
        return PlannedRun(config, tuple(count))
    return PlannedRun(config, tuple(there) if isinstance(count, str) else _spread(there, count))


def _located(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings with the files of prompts that lie where they say, seen from the plan's folder; others as they are named."""
    found = data
    for section, key in (("prompts", "set"), ("evaluation", "prompts")):
        part = data.get(section)
        name = part.get(key) if isinstance(part, dict) else None
        if isinstance(name, str) and name not in prompt_sets() and (folder / name).is_file():
            found = merged(found, {section: {key: str(folder / name)}})
    return found


def _spread(places: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of the places: those nearest to evenly spaced ones, the last among them."""
    if count == len(places):
        return tuple(places)
    even = [places[-1] * (k + 1) / count for k in range(count)]
    return tuple(min(places, key=lambda place: abs(place - target)) for target in even)


def _cells(grid: Grid) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination: what it adds to a method's name, and its settings."""
    leaves = [axis.rpartition(".")[2] for axis in grid]
    shown = [leaf if leaves.count(leaf) == 1 else axis for axis, leaf in zip(grid, leaves, strict=True)]
    axes = [
        [(name, label, change) for label, change in values.items()]
        if isinstance(values, dict)
        else [(name, value, {axis: value}) for value in values]
        for name, (axis, values) in zip(shown, grid.items(), strict=True)
    ]
    for cell in itertools.product(*axes):
        settings: dict[str, Any] = {}
        for _, _, change in cell:
            settings = merged(settings, nested(change))
        yield "".join(f"-{name}={_text(value)}" for name, value, _ in cell), settings


def _text(value: Any) -> str:
    """A value in a name: short, and fit for a folder."""
    if isinstance(value, list):
        return "+".join(_text(each) for each in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
