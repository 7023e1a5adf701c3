"""Compare methods in the reward-diversity plane: runs grouped by name, each seed a curve over checkpoints."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftrl.checks import InputError, nearest
from driftrl.config import TrainConfig, flat, load_config
from driftrl.evaluation.evaluate import FILE, Evaluation, Point, load_evaluation
from driftrl.evaluation.pareto import (
    Array,
    Interval,
    bootstrap_interval,
    gain_at_equal,
    hypervolume,
    upper_envelope,
)
from driftrl.evaluation.results import load_result, sources

LEVEL = 0.95
ALIKE = (
    "model",
    "config",
    "prompts",
    "images",
    "seed",
    "steps",
    "guidance_scale",
    "negative_prompt",
    "eta",
    "flow_sampler",
    "noise_level",
    "size",
    "encoder",
    "clip",
    "neighbours",
)
"""Settings of an evaluation that must agree; noise on the prompt at test time is part of a method."""
OWN = {"seed", "iterations", "logging", "evaluation"}
"""Settings of training that may differ between runs of one method."""


@dataclass(frozen=True)
class Run:
    """One evaluated run."""

    folder: Path
    """Or its file of results."""
    evaluation: Evaluation
    config: TrainConfig | None

    @property
    def seed(self) -> int:
        """Seed of training."""
        return self.evaluation.training_seed or 0

    def at(self, place: float) -> Point:
        """The point at an iteration, or a LoRA scale."""
        return next(p for p in self.evaluation.points if self.evaluation.place(p) == place)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(reward, metric) of the base model and of each checkpoint, in order."""
        points = self.evaluation.points
        return [(point.figures["reward"].mean, point.figures[metric].mean) for point in points]


@dataclass(frozen=True)
class Method:
    """Runs of one name."""

    name: str
    runs: tuple[Run, ...]

    @property
    def scaled(self) -> bool:
        """Whether its points are an adapter at several scales, in place of checkpoints."""
        return self.runs[0].evaluation.settings.scaled

    def shared(self) -> list[float]:
        """Iterations, or LoRA scales, at which every run was measured; 0 is the base model."""
        each = [{run.evaluation.place(point) for point in run.evaluation.points} for run in self.runs]
        return sorted(set.intersection(*each))

    def told(self, place: float) -> str:
        """One of `shared`, in words."""
        return f"scale {place:g}" if self.scaled else f"iteration {place:g}"

    def over_time(self, metric: str) -> list[Interval]:
        """Mean and interval over seeds at each shared iteration."""
        return [
            bootstrap_interval(
                [run.at(at).figures[metric].mean for run in self.runs],
                LEVEL,
            )
            for at in self.shared()
        ]

    def mean_curve(self, metric: str) -> list[tuple[float, float]]:
        """(reward, metric), means over seeds, at each shared iteration."""
        rewards, values = self.over_time("reward"), self.over_time(metric)
        return [(r.mean, v.mean) for r, v in zip(rewards, values, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """One method against another on one diversity metric."""

    metric: str
    method: str
    against: str
    diversity_gain: Interval | None
    """At equal reward; None where no pair of seeds shares a reward."""
    diversity_share: Interval | None
    """The same as a share of what ``against`` has there."""
    reward_gain: Interval | None
    """At equal diversity; None where no pair of seeds shares a diversity."""
    reward_share: Interval | None
    """The same as a share of what ``against`` has gained there over the base model; None too where that is nothing."""
    pairs: int = 1
    """Pairs of seeds that were compared."""
    share_reward: int = 1
    """So many of them have a reward in common; those that have none, one lying wholly beyond the other, are left out."""
    share_diversity: int = 1
    """So many have a diversity in common."""
    apart: str = ""
    """Why there is nothing to compare, where it is not that the fronts reach different levels."""
    straight: tuple[float, float] = (0.0, 0.0)
    """The longest piece of ``method``'s front and of ``against``'s between two measured points, as a share of the rewards that both
    reach; mean over pairs of seeds."""


def load_methods(paths: Sequence[Path | str]) -> list[Method]:
    """Read evaluated runs and group them by name, in the order of the names' first runs.

    Args:
        paths: run folders, files of results, or folders of such files.

    Raises:
        InputError: for fewer than two runs, runs that were not measured alike, that have no checkpoint
            measured, or that share a name but neither a seed's difference nor a configuration.
    """
    folders = sources(paths)
    if len(folders) < 2:
        raise InputError(f"compare: expected at least two runs; got {len(folders)}")
    runs = load_runs(folders)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.evaluation.name, []).append(run)
    for name, group in groups.items():
        _check_group(name, group)
    return [Method(name, tuple(sorted(group, key=lambda run: run.seed))) for name, group in groups.items()]


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read evaluated runs, or files of results.

    Raises:
        InputError: for runs that were not measured alike, or that have no checkpoint measured.
    """
    bare = [path for path in folders if (path / "config.yaml").is_file() and not (path / FILE).is_file()]
    runs = [_load(folder) for folder in folders if folder not in bare]
    bare += [run.folder for run in runs if not run.evaluation.tuned]
    if bare:
        named = [str(folder) for folder in folders if folder in bare]
        each = shlex.quote(named[0]) if len(named) == 1 else "RUN"
        raise InputError(
            f"{', '.join(named)}: expected runs with a checkpoint measured; {'this has' if len(named) == 1 else 'these have'} none; "
            f"measure {'it' if len(named) == 1 else 'each'}: driftrl evaluate {each} --checkpoint all; or leave "
            f"{'it' if len(named) == 1 else 'them'} out"
        )
    for other in runs[1:]:
        _check_alike(runs[0], other)
    return runs


def diversity_metrics(methods: Sequence[Method], wanted: Sequence[str]) -> list[str]:
    """Those of ``wanted`` that every run has."""
    figures = [run.evaluation.base.figures.keys() for method in methods for run in method.runs]
    return [name for name in wanted if all(name in each for each in figures)]


def compare(
    methods: Sequence[Method], metrics: Sequence[str], against: str | None = None
) -> list[Comparison]:
    """Each method against one of them, on each metric.

    Every seed of the one is compared with every seed of the other; the interval resamples the seeds of both.

    Args:
        methods: two or more; with one there is nothing to compare, and the result is empty.
        metrics: diversity metrics.
        against: name of the method to compare with; by default the first.

    Raises:
        InputError: if there is no method of that name.
    """
    names = [method.name for method in methods]
    if against is not None and against not in names:
        raise InputError(
            f"--against: expected one of {', '.join(names)}; got {against!r}{nearest(against, names)}"
        )
    rival = methods[names.index(against)] if against is not None else methods[0]
    return [
        Comparison(
            metric,
            method.name,
            rival.name,
            _gain(method, rival, metric, "reward"),
            _gain(method, rival, metric, "reward", relative=True),
            _gain(method, rival, metric, "diversity"),
            _gain(method, rival, metric, "diversity", relative=True),
            len(method.runs) * len(rival.runs),
            _sharing(method, rival, metric, "reward"),
            _sharing(method, rival, metric, "diversity"),
            _apart(method, rival, metric),
            straight_pieces(method, rival, metric),
        )
        for metric in metrics
        for method in methods
        if method is not rival
    ]


def hypervolumes(
    methods: Sequence[Method], metric: str, area: Callable[..., float] = hypervolume
) -> dict[str, Interval]:
    """Area under each method's points above (the base model's reward, no diversity), over seeds, by name; with `front_area` as ``area``
    under the straight lines between them.

    Its unit is that of reward times that of the metric; the base model alone has none.
    """
    bases = [run.evaluation.base.figures["reward"].mean for method in methods for run in method.runs]
    corner = (min(bases), 0.0)
    return {
        method.name: bootstrap_interval([area(run.curve(metric), corner) for run in method.runs], LEVEL)
        for method in methods
    }


def differing_settings(methods: Sequence[Method]) -> dict[str, list[Any]]:
    """Training settings in which the methods differ: key to one value for each method."""
    configs = [method.runs[0].config for method in methods]
    tables = [{} if c is None else flat(c) for c in configs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {
        key: [table.get(key) for table in tables] for key in keys if key.split(".")[0] not in OWN | {"name"}
    }
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _gain(
    method: Method, rival: Method, metric: str, axis: str, relative: bool = False, resamples: int = 10_000
) -> Interval | None:
    """Mean over all pairs of seeds, with an interval that resamples the seeds of both methods. As a share of the rival's
    rewards these count from the base model's, for their zero means nothing.
    """
    gains = _gains(method, rival, metric, axis, relative)
    if np.isnan(gains).all():
        return None
    draw = np.random.default_rng(0)
    rows = draw.integers(gains.shape[0], size=(resamples, gains.shape[0], 1))
    columns = draw.integers(gains.shape[1], size=(resamples, 1, gains.shape[1]))
    drawn = gains[rows, columns].reshape(resamples, -1)
    drawn = drawn[~np.isnan(drawn).all(axis=1)]
    low, high = np.quantile(np.nanmean(drawn, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.nanmean(gains)), float(low), float(high), LEVEL, min(gains.shape))


def straight_pieces(method: Method, rival: Method, metric: str) -> tuple[float, float]:
    """Of both methods' fronts the longest piece between two measured points, as a share of the rewards that both reach: mean over
    pairs of seeds, 0 where none share a reward.

    There a front is taken to be straight. Real ones bulge, so a front with long pieces lies too low, and gains over it come out too large.
    """
    found = []
    for a, b in itertools.product(method.runs, rival.runs):
        fronts = [np.asarray(upper_envelope(run.curve(metric)))[:, 0] for run in (a, b)]
        low, high = max(front[0] for front in fronts), min(front[-1] for front in fronts)
        if high > low:
            found.append([float(np.diff(front.clip(low, high)).max()) / (high - low) for front in fronts])
    ours, theirs = np.mean(found, axis=0) if found else (0.0, 0.0)
    return float(ours), float(theirs)


def _sharing(method: Method, rival: Method, metric: str, axis: str) -> int:
    """So many pairs of seeds share a level."""
    return int(np.isfinite(_gains(method, rival, metric, axis)).sum())


def _apart(method: Method, rival: Method, metric: str) -> str:
    """Why two methods may share no level though both cover it: a front of one point spans none."""
    curves = [run.curve(metric) for each in (method, rival) for run in each.runs]
    if any(len({value for _, value in curve}) == 1 for curve in curves):
        return "flat: nothing to compare"
    if any(len(upper_envelope(curve)) == 1 for curve in curves):
        return "a front of one point: nothing to compare"
    return ""


def _gains(method: Method, rival: Method, metric: str, axis: str, relative: bool = False) -> Array:
    """[seeds of the one, seeds of the other]: NaN where these two share no level."""
    zero = rival.runs[0].curve(metric)[0][0] if relative and axis == "diversity" else 0.0
    gains: Array = np.full((len(method.runs), len(rival.runs)), np.nan)
    for i, a in enumerate(method.runs):
        for j, b in enumerate(rival.runs):
            try:
                ours, theirs = ([(x - zero, y) for x, y in run.curve(metric)] for run in (a, b))
                gain = gain_at_equal(ours, theirs, axis)
                found = gain.relative if relative else gain.absolute
                gains[i, j] = np.nan if found is None else found
            except InputError:
                continue
    return gains


def _load(path: Path) -> Run:
    if path.is_file():
        result = load_result(path)
        return Run(path, result.evaluation, result.config)
    config = path / "config.yaml"
    return Run(path, load_evaluation(path), load_config(config) if config.is_file() else None)


def _check_alike(a: Run, b: Run) -> None:
    one, two = a.evaluation.settings, b.evaluation.settings
    differing = []
    for key in ALIKE:
        x, y = getattr(one, key), getattr(two, key)
        if x != y:
            shown = (x, y) if key != "prompts" else (one.prompt_set, two.prompt_set)
            if shown[0] == shown[1]:  # of lists, how many prompts they have
                shown = next(
                    (pair for pair in zip(x, y, strict=False) if pair[0] != pair[1]), (len(x), len(y))
                )
            differing.append(f"{key} ({shown[0]!r} and {shown[1]!r})")
    if one.rewards[0] != two.rewards[0]:
        differing.append(f"reward ({one.rewards[0]!r} and {two.rewards[0]!r})")
    if differing:
        raise InputError(
            f"{a.folder} and {b.folder} were not measured alike, so their figures cannot be compared; they differ in "
            f"{', '.join(differing)}; evaluate them again under the same settings"
        )
    for name in ("reward", "diversity"):
        first, second = a.evaluation.base.figures[name], b.evaluation.base.figures[name]
        # Rounding on another machine moves a figure a little; another model under the same name, a lot.
        if abs(first.mean - second.mean) > 0.5 * max(first.high - first.low, second.high - second.low) + 1e-9:
            raise InputError(
                f"{a.folder} and {b.folder}: their base models differ, {name} {first.mean:.4g} and {second.mean:.4g}, "
                f"though both are called {one.model!r}; evaluate both with the same model"
            )


def _check_group(name: str, group: Sequence[Run]) -> None:
    seeds: dict[int, Run] = {}
    first = group[0]
    for run in group:
        if run.seed in seeds:
            raise InputError(
                f"{seeds[run.seed].folder} and {run.folder} are both '{name}' with seed {run.seed}, so they are no two "
                "seeds of a method; leave one out, or, if they are different methods, give one another name: name: in "
                'its config.yaml and "name" in its evaluation.json'
            )
        seeds[run.seed] = run
        if run.config is None or first.config is None:
            continue
        a, b = flat(first.config), flat(run.config)
        keys = [key for key in a if a[key] != b.get(key) and key.split(".")[0] not in OWN]
        if keys:
            raise InputError(
                f"{first.folder} and {run.folder} are both called '{name}' but differ in {', '.join(keys)}; "
                "give methods different names (name: in config.yaml and evaluation.json)"
            )
