"""Tables and figures of docs/flags.md and the pages below it, for `results.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from driftrl.checks import InputError
from driftrl.evaluation.pareto import bootstrap_interval, gain_at_equal, hypervolume
from driftrl.evaluation.picture import COLOURS, INK, MUTED, RULE

Curves = dict[Any, list[list[list[float]]]]
"""Of each method the points of each seed: iteration, reward, and five measures of variety."""
SEEN = {
    "diversity": 2,
    "diversity, unseen features": 3,
    "recall": 4,
    "Vendi score": 5,
    "coverage": 6,
}
"""What was measured on the flags, and where it stands in a point."""


SHOWN = ("grpo", "drift", "drift-no-selection", "diversegrpo", "nft", "nft-shaped")
"""In the figure, which has colours for six."""
LITTLE = 0.2
"""Reward gained by a rival of which a share means nothing."""


def curves_of(runs: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> Curves:
    """The points of all runs, by what ``key`` calls them."""
    curves: Curves = {}
    for run in runs:
        curves.setdefault(key(run), []).append(run["points"])
    return curves


def volumes(runs: list[list[list[float]]], place: int) -> list[float]:
    """Hypervolume of each seed, above the base model's reward and no variety."""
    return [hypervolume([(p[1], p[place]) for p in run], (run[0][1], 0.0)) for run in runs]


def gains(
    runs: list[list[list[float]]], rivals: list[list[list[float]]], place: int, axis: str
) -> list[float]:
    """Of each seed what it has more than the rival's same seed at equal ``axis``, in percent of what the rival has: of
    variety at equal reward, or of reward gained over the base model at equal diversity.
    """
    found = []
    for run, rival in zip(runs, rivals, strict=False):
        try:
            gain = gain_at_equal(
                *([(p[1] - each[0][1], p[place]) for p in each] for each in (run, rival)), axis
            )
        except InputError:  # no level that both reach
            continue
        of = (
            gain.absolute / gain.relative if gain.relative else None
        )  # the rival's mean over the levels that both reach
        if axis == "reward" or (of is not None and of > LITTLE):
            found.append(100 * (gain.relative or 0.0))
    return found


def about(values: list[float], digits: int = 2, sign: bool = False, unit: str = "") -> str:
    """Mean and half of the 90% interval over seeds."""
    if not values:
        return ""
    interval = bootstrap_interval(values, 0.9)
    plus = "+" if sign else ""
    return f"{interval.mean:{plus}.{digits}f}{unit} ± {(interval.high - interval.low) / 2:.{digits}f}"


def method_table(data: dict[str, Any], against: str) -> str:
    """Of each method where it ends, hypervolumes, and variety at equal reward beside ``against``."""
    curves = curves_of(data["runs"], lambda run: run["name"])
    rates = {run["name"]: run["rate"] for run in data["runs"]}
    names = sorted(curves, key=lambda name: -sum(volumes(curves[name], 2)) / len(curves[name]))
    rivals = {
        title: bootstrap_interval(volumes(curves[against], place), 0.9) for title, place in SEEN.items()
    }
    lines = [
        f"| Method | Rate | Seeds | Best reward | Diversity at the end | Variety at equal reward | by unseen features | Reward gained at equal diversity | Hypervolume: {' | '.join(SEEN)} |",
        "| --- " * (8 + len(SEEN)) + "|",
    ]
    for name in names:
        runs, cells = curves[name], []
        for title, place in SEEN.items():
            found, rival = volumes(runs, place), rivals[title]
            interval = bootstrap_interval(found, 0.9)
            above = "**" if interval.low > rival.high else ""
            cells.append(f"{above}{about(found)}{above}")
        best = about([max(point[1] for point in run) for run in runs])
        more = ["", "", ""] if name == against else [
            about(gains(runs, curves[against], place, axis), 0, True, "%")
            for place, axis in ((2, "reward"), (3, "reward"), (2, "diversity"))
        ]  # fmt: skip
        lines.append(
            f"| {name} | {rates[name]:g} | {len(runs)} | {best} | {about([run[-1][2] for run in runs])} | {' | '.join((*more, *cells))} |"
        )
    return "\n".join(lines)


def scale_table(data: dict[str, Any]) -> str:
    """Of each method what its last adapter has, turned down, beside what its checkpoints have had, and beside ``against``'s,
    turned down likewise.
    """
    path = curves_of(data["runs"], lambda run: run["name"])
    scaled = curves_of(
        [run | {"points": [run["points"][0], *run["scaled"], run["points"][-1]]} for run in data["runs"]],
        lambda run: run["name"],
    )
    rival = scaled[data["against"]]
    names = sorted(scaled, key=lambda name: -sum(volumes(scaled[name], 2)) / len(scaled[name]))
    few = [title for title in SEEN if title != "Vendi score"]
    lines = [
        "| Method | Seeds | "
        + " | ".join(f"{title}, beside its checkpoints" for title in few)
        + f" | diversity, beside {data['against']}'s adapter, turned down too | Hypervolume: its checkpoints | its adapter, turned down |",
        "| --- " * (5 + len(few)) + "|",
    ]
    for name in names:
        own = [about(gains(scaled[name], path[name], SEEN[title], "reward"), 0, True, "%") for title in few]
        beside = (
            "" if name == data["against"] else about(gains(scaled[name], rival, 2, "reward"), 0, True, "%")
        )
        both = [about(volumes(runs, 2)) for runs in (path[name], scaled[name])]
        lines.append(f"| {name} | {len(path[name])} | {' | '.join((*own, beside, *both))} |")
    return "\n".join(lines)


def settings_in(name: str) -> dict[str, str]:
    """The values that a run's name gives of the settings that its plan crosses."""
    return dict(re.findall(r"([a-z_]+)=([\d.]+)", name))


def effect_table(data: dict[str, Any]) -> str:
    """Of each value of each setting of a grid the means over all values of the others, seed by seed."""
    lines = [
        f"| Setting | Value | Best reward | Diversity at the end | Hypervolume: {' | '.join(SEEN)} |",
        "| --- " * (4 + len(SEEN)) + "|",
    ]
    seeds = sorted({run["seed"] for run in data["runs"]})
    for setting in settings_in(data["against"]):
        values = {settings_in(run["name"])[setting] for run in data["runs"]}
        for value in sorted(values, key=float):
            of = [run for run in data["runs"] if settings_in(run["name"])[setting] == value]
            by_seed = [[run["points"] for run in of if run["seed"] == seed] for seed in seeds]
            best = [sum(max(p[1] for p in run) for run in runs) / len(runs) for runs in by_seed]
            last = [sum(run[-1][2] for run in runs) / len(runs) for runs in by_seed]
            cells = [about([sum(found) / len(found) for found in (volumes(runs, place) for runs in by_seed)])
                     for place in SEEN.values()]  # fmt: skip
            lines.append(f"| {setting} | {value} | {about(best)} | {about(last)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table(data: dict[str, Any]) -> str:
    """Hypervolume of diversity of each method at each rate of the search; the rate that was taken is bold."""
    rates = sorted({run["rate"] for run in data["runs"]})
    lines = [
        "| Method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "| --- " * (1 + len(rates)) + "|",
    ]
    for name in sorted({run["name"] for run in data["runs"]}):
        curves = curves_of([run for run in data["runs"] if run["name"] == name], lambda run: run["rate"])
        found = {rate: volumes(curves[rate], 2) for rate in rates}
        best = max(rates, key=lambda rate: (len(found[rate]), sum(found[rate]) / len(found[rate])))
        cells = []
        for rate in rates:
            mark = "**" if rate == best else ""
            more = f" ({len(found[rate])})" if len(found[rate]) > min(map(len, found.values())) else ""
            cells.append(f"{mark}{sum(found[rate]) / len(found[rate]):.2f}{mark}{more}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(runs: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Point by point the mean over seeds."""
    return [[sum(part) / len(part) for part in zip(*at, strict=True)] for at in zip(*runs, strict=True)]


ASKED = {
    "drift-no-selection": "as it is",
    "drift-no-selection+keep-0.9": "90%",
    "drift-no-selection+keep-0.7": "70%",
    "drift-no-selection+keep-0.5": "50%",
    "drift-no-selection+keep-0.3": "30%",
}
"""Runs of the figure of a share to keep, and what was asked of them."""


def target_figure(data: dict[str, Any], path: Path) -> None:
    """Over the iterations how much diversity is left, beside what was asked for, and the reward gained: seeds faint, means bold."""
    curves = curves_of(data["runs"], lambda run: run["name"])
    canvas = Figure(figsize=(8.4, 3.0), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    left, gained = canvas.subplots(1, 2)
    for (name, asked), colour in zip(ASKED.items(), (MUTED, *COLOURS), strict=False):
        every = [
            [(at, reward - run[0][1], diversity / run[0][2]) for at, reward, diversity, *_ in run]
            for run in curves[name]
        ]
        mean = mean_of(every)
        for axes, place in ((left, 2), (gained, 1)):
            for run in every:
                axes.plot(
                    [p[0] for p in run], [p[place] for p in run], color=colour, alpha=0.25, linewidth=0.7
                )
            axes.plot(
                [p[0] for p in mean], [p[place] for p in mean], color=colour, linewidth=1.8, label=asked
            )
        if asked.endswith("%"):
            left.axhline(float(asked[:-1]) / 100, color=colour, linewidth=0.9, linestyle=":")
    for axes, title in ((left, "share of the diversity left"), (gained, "reward gained")):
        dressed(axes, title)
        axes.set_xlabel("iteration", fontsize=8, color=MUTED)
    left.set_ylim(0.0, 1.1)
    handles, labels = left.get_legend_handles_labels()
    canvas.legend(
        handles,
        labels,
        fontsize=9,
        frameon=False,
        loc="outside lower center",
        ncols=5,
        title="lambda, or what is to be left",
    )
    canvas.savefig(path, metadata={"Software": None})


def figure(data: dict[str, Any], path: Path, shown: tuple[str, ...]) -> None:
    """Variety over reward, a panel for each measure: seeds faint, means over seeds bold."""
    curves = curves_of(data["runs"], lambda run: run["name"])
    canvas = Figure(figsize=(2.9 * len(SEEN), 2.9), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (title, place) in zip(
        canvas.subplots(1, len(SEEN), squeeze=False)[0], SEEN.items(), strict=True
    ):
        for name, colour in zip(shown, COLOURS, strict=False):
            for run in curves[name]:
                axes.plot(
                    [p[1] for p in run], [p[place] for p in run], color=colour, alpha=0.2, linewidth=0.7
                )
            means = mean_of(curves[name])
            axes.plot(
                [p[1] for p in means], [p[place] for p in means], color=colour, linewidth=1.8, label=name
            )
        dressed(axes, title)
    canvas.axes[0].legend(fontsize=8, frameon=False)
    canvas.savefig(path, metadata={"Software": None})


def dressed(axes: Any, title: str) -> None:
    """A panel's title, label, ticks and grid."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("reward", fontsize=8, color=MUTED)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines[:].set_visible(False)
