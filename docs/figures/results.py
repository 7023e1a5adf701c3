"""Tables and figures of docs/results.md, from the small files in docs/results.

    python docs/figures/results.py            # rewrites the parts of docs/results.md between its markers
    python docs/figures/results.py --check    # exit status 1 if that would change anything

A folder docs/results/NAME holds what `driftrl experiment` collected into OUT/results; its tables stand between
`<!-- NAME -->` and `<!-- end -->`, its figure is docs/images/results-NAME.png. A file docs/flags/NAME.json holds what
`experiments/flags/run.py` made of a plan; its table stands between `<!-- flags/NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from driftrl.checks import InputError
from driftrl.evaluation import compare
from driftrl.evaluation.compare import Method
from driftrl.evaluation.pareto import Interval, bootstrap_interval, gain_at_equal, hypervolume
from driftrl.evaluation.picture import COLOURS, INK, MUTED, RULE
from driftrl.evaluation.report import METRICS, VARIETY

DOCS = Path(__file__).resolve().parents[1]
AGAINST = "grpo"


def shown(interval: Interval | None, digits: int = 3, sign: bool = False) -> str:
    """Mean and interval."""
    if interval is None:
        return "no common level"
    plus = "+" if sign else ""
    mean, low, high = (f"{v:{plus}.{digits}f}" for v in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def tables(methods: list[Method]) -> str:
    """Where each method ends, and who has more at equal level, in Markdown."""
    metrics = compare.diversity_metrics(methods, VARIETY)
    titles = [METRICS[name].title for name in metrics]
    lines = [
        "| Method | Seeds | Iteration | Reward | " + " | ".join(titles) + " |",
        "| --- " * (4 + len(titles)) + "|",
    ]
    base = methods[0].runs[0].evaluation.base
    start = [f"{base.figures[name].mean:.3f}" for name in ("reward", *metrics)]
    lines.append("| base model | | 0 | " + " | ".join(start) + " |")
    for method in methods:
        last = [shown(method.over_time(name)[-1]) for name in ("reward", *metrics)]
        lines.append(
            f"| {method.name} | {len(method.runs)} | {method.shared()[-1]} | " + " | ".join(last) + " |"
        )
    lines += [
        "",
        f"| Against {AGAINST} | Measure | Variety gained at equal reward, and as a share | Reward gained at equal variety | Hypervolume |",
        "| --- | --- | --- | --- | --- |",
    ]
    pairs = {(p.metric, p.method): p for p in compare.compare(methods, metrics, AGAINST)}
    for name, title in zip(metrics, titles, strict=True):
        volumes = compare.hypervolumes(methods, name)
        for method in methods:
            pair = pairs.get((name, method.name))
            gains = ["", ""]
            if pair is not None:
                gains = [shown(pair.diversity_gain, sign=True), shown(pair.reward_gain, sign=True)]
                if pair.diversity_share is not None:
                    gains[0] += f", {100 * pair.diversity_share.mean:+.0f}%"
            lines.append(
                f"| {method.name} | {title} | {gains[0]} | {gains[1]} | {shown(volumes[method.name], 2)} |"
            )
    return "\n".join(lines)


def figure(methods: list[Method], path: Path) -> None:
    """Variety over reward, a panel for each measure: means over seeds bold, seeds faint."""
    metrics = compare.diversity_metrics(methods, VARIETY)
    canvas = Figure(figsize=(2.9 * len(metrics), 2.9), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, name in zip(canvas.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for method, colour in zip(methods, COLOURS, strict=False):
            for run in method.runs:
                axes.plot(*zip(*run.curve(name), strict=True), color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(
                *zip(*method.mean_curve(name), strict=True),
                color=colour,
                marker="o",
                markersize=3,
                label=method.name,
            )
        _dressed(axes, METRICS[name].title)
    canvas.axes[0].legend(fontsize=8, frameon=False)
    canvas.savefig(path, metadata={"Software": None})


Curves = dict[str, list[list[list[float]]]]
"""Of each method the points of each seed: iteration, reward, and five measures of variety."""
SEEN = {
    "diversity": 2,
    "diversity, unseen features": 3,
    "recall": 4,
    "Vendi score": 5,
    "coverage": 6,
}
"""What was measured on the flags, and where it stands in a point."""


SHOWN = ("grpo", "drift", "drift-no-selection", "diversegrpo", "grpo-kl-0.1", "dancegrpo")
"""In the figure, which has colours for six."""


def flag_curves(runs: list[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> Curves:
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
    """Of each seed what it has more than the rival's same seed, at equal ``axis``: percent of variety, or reward."""
    found = []
    for run, rival in zip(runs, rivals, strict=False):
        try:
            gain = gain_at_equal(*([(p[1], p[place]) for p in each] for each in (run, rival)), axis)
        except InputError:  # no level that both reach
            continue
        found.append(100 * (gain.relative or 0.0) if axis == "reward" else gain.absolute)
    return found


def about(values: list[float], digits: int = 2, sign: bool = False, unit: str = "") -> str:
    """Mean and half of the 90% interval over seeds."""
    if not values:
        return ""
    interval = bootstrap_interval(values, 0.9)
    plus = "+" if sign else ""
    return f"{interval.mean:{plus}.{digits}f}{unit} ± {(interval.high - interval.low) / 2:.{digits}f}"


def flag_table(data: dict[str, Any], against: str) -> str:
    """Of each method where it ends, hypervolumes, and variety at equal reward beside ``against``."""
    curves = flag_curves(data["runs"], lambda run: run["name"])
    rates = {run["name"]: run["rate"] for run in data["runs"]}
    names = sorted(curves, key=lambda name: -sum(volumes(curves[name], 2)) / len(curves[name]))
    rivals = {
        title: bootstrap_interval(volumes(curves[against], place), 0.9) for title, place in SEEN.items()
    }
    lines = [
        f"| Method | Rate | Seeds | Best reward | Variety at equal reward | by unseen features | Hypervolume: {' | '.join(SEEN)} |",
        "| --- " * (6 + len(SEEN)) + "|",
    ]
    for name in names:
        runs, cells = curves[name], []
        for title, place in SEEN.items():
            found, rival = volumes(runs, place), rivals[title]
            interval = bootstrap_interval(found, 0.9)
            above = "**" if interval.low > rival.high else ""
            cells.append(f"{above}{about(found)}{above}")
        best = about([max(point[1] for point in run) for run in runs])
        more = ["", ""] if name == against else [
            about(gains(runs, curves[against], place, "reward"), 0, True, "%") for place in (2, 3)
        ]  # fmt: skip
        lines.append(f"| {name} | {rates[name]:g} | {len(runs)} | {best} | {' | '.join((*more, *cells))} |")
    return "\n".join(lines)


def rate_table(data: dict[str, Any]) -> str:
    """Hypervolume of diversity of each method at each rate of the search."""
    rates = sorted({run["rate"] for run in data["runs"]})
    curves = flag_curves(data["runs"], lambda run: f"{run['name']} {run['rate']}")
    lines = [
        "| Method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "| --- " * (1 + len(rates)) + "|",
    ]
    for name in sorted({run["name"] for run in data["runs"]}):
        means = [
            sum(found) / len(found) for found in (volumes(curves[f"{name} {rate}"], 2) for rate in rates)
        ]
        best = max(means)
        cells = [f"**{mean:.2f}**" if mean == best else f"{mean:.2f}" for mean in means]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flag_figure(data: dict[str, Any], path: Path, shown: tuple[str, ...]) -> None:
    """Variety over reward, a panel for each measure: seeds faint, means over seeds bold."""
    curves = flag_curves(data["runs"], lambda run: run["name"])
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
            means = [
                [sum(part) / len(part) for part in zip(*at, strict=True)]
                for at in zip(*curves[name], strict=True)
            ]
            axes.plot(
                [p[1] for p in means], [p[place] for p in means], color=colour, linewidth=1.8, label=name
            )
        _dressed(axes, title)
    canvas.axes[0].legend(fontsize=8, frameon=False)
    canvas.savefig(path, metadata={"Software": None})


def _dressed(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("reward", fontsize=8, color=MUTED)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines[:].set_visible(False)


def main() -> int:
    """Rewrite, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page = DOCS / "results.md"
    old = text = page.read_text("utf-8")
    for folder in sorted((DOCS / "results").iterdir()):
        methods = sorted(compare.load_methods([folder]), key=lambda method: method.name != AGAINST)
        text = replaced(text, folder.name, tables(methods))
        if not check:
            figure(methods, DOCS / "images" / f"results-{folder.name}.png")
    for file in sorted((DOCS / "flags").glob("*.json")):
        data = json.loads(file.read_text("utf-8"))
        searched = file.stem.endswith("-rates")
        table = rate_table(data) if searched else flag_table(data, data["against"])
        text = replaced(text, f"flags/{file.stem}", table)
        if file.stem == "methods" and not check:
            flag_figure(data, DOCS / "images/flags-methods.png", SHOWN)
    if not check:
        page.write_text(text, "utf-8")
    print("docs/results.md", "as it was" if text == old else "differs" if check else "written")
    return int(check and text != old)


def replaced(text: str, name: str, table: str) -> str:
    """The page with ``table`` between the markers of ``name``."""
    block = f"<!-- {name} -->\n{table}\n<!-- end -->"
    text, count = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(
            f"docs/results.md: expected one place for {name}, between <!-- {name} --> and <!-- end -->"
        )
    return text


if __name__ == "__main__":
    raise SystemExit(main())
