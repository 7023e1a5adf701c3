"""Tables and figures of docs/results.md, from the small files in docs/results.

    python docs/figures/results.py            # rewrites the parts of docs/results.md between its markers
    python docs/figures/results.py --check    # exit status 1 if that would change anything

A folder docs/results/NAME holds what `driftrl experiment` collected into OUT/results; its tables stand between
`<!-- NAME -->` and `<!-- end -->`, its figure is docs/images/results-NAME.png.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from driftrl.evaluation import compare
from driftrl.evaluation.compare import Method
from driftrl.evaluation.pareto import Interval
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
        axes.set_title(METRICS[name].title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("reward", fontsize=8, color=MUTED)
        axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
        axes.grid(color=RULE, linewidth=0.6)
        axes.spines[:].set_visible(False)
    canvas.axes[0].legend(fontsize=8, frameon=False)
    canvas.savefig(path, metadata={"Software": None})


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
        block = f"<!-- {folder.name} -->\n{tables(methods)}\n<!-- end -->"
        text, count = re.subn(
            f"<!-- {folder.name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(
                f"docs/results.md: expected one place for {folder.name}, between <!-- {folder.name} --> and <!-- end -->"
            )
        if not check:
            figure(methods, DOCS / "images" / f"results-{folder.name}.png")
    if not check:
        page.write_text(text, "utf-8")
    print("docs/results.md", "as it was" if text == old else "differs" if check else "written")
    return int(check and text != old)


if __name__ == "__main__":
    raise SystemExit(main())
