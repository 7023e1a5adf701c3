"""Tables and figures of docs/results.md and docs/flags.md, of the pages beside their files, and the README's table.

    python docs/figures/results.py            # rewrites the parts of these pages between their markers
    python docs/figures/results.py --check    # exit status 1 if that would change anything

A folder docs/results/NAME holds what `driftrl experiment` collected into OUT/results; its tables stand between
`<!-- NAME -->` and `<!-- end -->` on one of the pages docs/results/*.md, its figure is docs/images/results-NAME.png. A file
docs/flags/NAME.json holds what `experiments/flags/run.py` made of a plan; its table stands in docs/flags.md or on a page
docs/flags/*.md, likewise. Summaries on docs/results.md and in the README are of docs/results/flat.
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import flag_tables
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from driftrl.checks import InputError
from driftrl.evaluation import compare
from driftrl.evaluation.compare import Method
from driftrl.evaluation.measures import METRICS, VARIETY
from driftrl.evaluation.pareto import Interval, difference_at_equal, front_area, upper_envelope
from driftrl.evaluation.picture import COLOURS
from driftrl.evaluation.report import narrowed

DOCS = Path(__file__).resolve().parents[1]
README = {
    "grpo": "GRPO",
    "dancegrpo": "DanceGRPO",
    "entropy": "entropy bonus",
    "grpo-kl-0.1": "GRPO and a KL of 0.1 (not tuned)",
    "diversegrpo": "DiverseGRPO",
    "drift": "DRIFT (`experiments/drift.yaml`, λ 0.2)",
    "shaped-0.75": "its shaping alone (`experiments/shaped.yaml`, λ 0.75)",
    "shaped-kl-0.02": "**and a weak KL (`experiments/shaped-kl.yaml`)**",
    "draft": "DRaFT (`experiments/methods/draft.yaml`; needs the reward's gradient)",
    "draft-shaped": "**and DRIFT's shaping by its gradient (`experiments/methods/draft-shaped.yaml`)**",
}
"""The methods of the README's table, and what they are called there."""
LEVELS, AT = (13.5, 13.85, 14.0), ("diversity", "recall", "coverage")
"""Rewards and measures of the table of adapters turned down."""
EDGES = (13.0, 14.0)
"""Rewards of the base model that part the 45 animals into those that it draws badly, better and well."""
RIVALS = {"sampling": "contrast", "dance": "dancegrpo"}
"""What a folder's methods are compared with, where that is not GRPO."""
PICTURED = {"flat": 2}
"""Seeds that a method must have to be in a folder's figure, where all would be too many lines."""
ALSO = {
    "rates": sorted((DOCS / "results/methods").glob("grpo-seed*.json")),
    "dance": [
        file
        for name in ("grpo", "drift", "shaped-0.75", "shaped-kl-0.02", "diversegrpo")
        for file in sorted((DOCS / "results/flat").glob(f"{name}-seed*.json"))
    ],
}
"""Runs of other folders that a table has too."""


def shown(interval: Interval | None, digits: int = 3, sign: bool = False) -> str:
    """Mean and interval."""
    if interval is None:
        return "no common level"
    plus = "+" if sign else ""
    mean, low, high = (f"{v:{plus}.{digits}f}" for v in (interval.mean, interval.low, interval.high))
    return mean if interval.count == 1 else f"{mean} ({low} to {high})"


def scale_table(folder: Path) -> str:
    """At some rewards, on straight lines between what was measured, what each adapter turned down has, and its checkpoints."""
    flat = DOCS / "results/flat"
    own = [flat / "grpo-kl-0.1-seed2.json", flat / "diversegrpo-seed1.json"]  # of the others flat's seeds
    paths = [
        folder,
        *own,
        *flat.glob("drift-seed*.json"),
        *flat.glob("shaped-0.75-seed*.json"),
    ]
    methods = {method.name: method for method in compare.load_methods(paths)}
    names = [f"{title} at {reward:g}" for reward in LEVELS for title in (METRICS[name].title for name in AT)]
    lines = [
        "| Turned down; its checkpoints | " + " | ".join(names) + " |",
        "| --- " * (1 + len(names)) + "|",
    ]
    for name in sorted(name.removesuffix("-scaled") for name in methods if name.endswith("-scaled")):
        cells = [
            "; ".join(_at(methods[which], metric, reward) for which in (f"{name}-scaled", name))
            for reward in LEVELS
            for metric in AT
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(method: Method, metric: str, reward: float) -> str:
    rewards, values = upper_envelope(method.mean_curve(metric)).T
    return (
        f"{np.interp(reward, rewards, values):.3f}" if rewards[0] <= reward <= rewards[-1] else "not reached"
    )


def named(method: str) -> str:
    """As it is written in a title."""
    return method.upper() if method == "grpo" else method


def tables(methods: list[Method]) -> str:
    """Where each method ends, and who has more than the first at equal level, as shares, in Markdown."""
    against = methods[0].name
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
            f"| {method.name} | {len(method.runs)} | {method.told(method.shared()[-1]).removeprefix('iteration ')} | "
            + " | ".join(last)
            + " |"
        )
    pairs = {(p.metric, p.method): p for p in compare.compare(methods, metrics, against)}
    others = [method.name for method in methods if method.name != against]
    lines += ["", *_matrix(f"Variety gained over {against} at equal reward", titles)]
    for name in others:
        lines.append(f"| {name} | {' | '.join(_gained(pairs[metric, name]) for metric in metrics)} |")
    lines += ["", *_matrix(f"Reward gained over {against} at equal variety", titles)]
    for name in others:
        lines.append(f"| {name} | {' | '.join(_gained(pairs[metric, name], False) for metric in metrics)} |")
    lines += ["", *_matrix("Area under the front", titles)]
    volumes = {metric: compare.hypervolumes(methods, metric, front_area) for metric in metrics}
    for method in methods:
        cells = [shown(volumes[metric][method.name], 2) for metric in metrics]
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _matrix(title: str, columns: list[str]) -> list[str]:
    """The head of a table with a column for each measure."""
    return [f"| {title} | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]


def _gained(pair: Any, variety: bool = True) -> str:
    """A share with its interval over seeds, and how many pairs of seeds it is of where not all have a level in common."""
    share, shared = (
        (pair.diversity_share, pair.share_reward) if variety else (pair.reward_share, pair.share_diversity)
    )
    if share is None:
        return "no common level"
    mean, low, high = (f"{round(100 * v):+d}" for v in (share.mean, share.low, share.high))
    ends = "" if share.low == share.high else f" ({int(low)} to {int(high)})"
    some = f", {shared} of {pair.pairs}" if 0 < shared < pair.pairs else ""
    return f"{'0' if int(mean) == 0 else mean}%{ends}{some}"


def summary_table(methods: list[Method]) -> str:
    """Where each method ends, and how much more variety than the first it has at equal reward; who has most diversity comes first."""
    first, *others = methods
    metrics = compare.diversity_metrics(methods, VARIETY)
    gains = [METRICS[name].title for name in metrics]
    titles = ["Reward at the end", "Diversity left", f"Gained at equal reward: {gains[0]}", *gains[1:]]
    pairs = {(p.metric, p.method): p for p in compare.compare(methods, metrics, first.name)}
    base = first.runs[0].evaluation.base.figures["diversity"].mean
    others.sort(key=lambda method: -pairs["diversity", method.name].diversity_share.mean)
    lines = _matrix("Method (seeds)", titles)
    for method in (first, *others):
        reward, diversity = (method.over_time(metric)[-1].mean for metric in ("reward", "diversity"))
        gains = [_gained(pairs[metric, method.name]) if method is not first else "" for metric in metrics]
        cells = [f"{reward:.2f}", f"{diversity / base:.0%}", *gains]
        lines.append(f"| {method.name} ({len(method.runs)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(methods: list[Method]) -> str:
    """Where the README's methods end, and how much more diversity than GRPO they have at equal reward."""
    gained = ("diversity", "diversity/clip", "diversity/latents")
    pairs = {(p.metric, p.method): p for p in compare.compare(methods, list(gained), "grpo")}
    base = methods[0].runs[0].evaluation.base.figures
    lines = [
        "| Method | Seeds | Reward at the end | Diversity at the end | Gained over GRPO at equal reward: diversity | CLIP diversity | latent diversity |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| base model | | {base['reward'].mean:.2f} | {base['diversity'].mean:.3f} | | | |",
    ]
    by_name = {method.name: method for method in methods}
    for name, title in README.items():
        method = by_name[name]
        reward, diversity = (method.over_time(metric)[-1].mean for metric in ("reward", "diversity"))
        gains = [_gained(pairs[metric, name]) if name != "grpo" else "" for metric in gained]
        seeds = len(method.runs)
        lines.append(f"| {title} | {seeds} | {reward:.2f} | {diversity:.3f} | {' | '.join(gains)} |")
    return "\n".join(lines)


def figure(methods: list[Method], path: Path) -> None:
    """For each measure variety over reward (means over seeds bold, seeds faint), and below it how much more of it there is
    than the first one's at the same reward.
    """
    metrics = compare.diversity_metrics(methods, VARIETY)
    canvas = Figure(figsize=(2.9 * len(metrics), 5.8), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(2, len(metrics), squeeze=False, sharex="col")
    rival, *others = methods
    looks = {rival.name: {"color": flag_tables.INK, "linestyle": "-"}} | {
        method.name: {"color": COLOURS[k % len(COLOURS)], "linestyle": ("-", "--", ":")[k // len(COLOURS)]}
        for k, method in enumerate(others)
    }
    for above, below, name in zip(*panels, metrics, strict=True):
        for method in methods:
            look = looks[method.name]
            if len(method.runs) > 1:
                for run in method.runs:
                    above.plot(*zip(*run.curve(name), strict=True), **look, alpha=0.25, linewidth=0.8)
            mean = method.mean_curve(name)
            above.plot(*zip(*mean, strict=True), **look, marker="o", markersize=3, label=method.name)
            if method is rival:
                below.axhline(0, **look, linewidth=1.2)
                continue
            try:
                along = difference_at_equal(mean, rival.mean_curve(name), "reward")
            except InputError:
                continue  # these two share no reward
            below.plot(along[:, 0], along[:, 1], **look)
        flag_tables.dressed(above, METRICS[name].title)
        above.set_xlabel("")
        flag_tables.dressed(below, f"beside {named(rival.name)}'s")
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(
        handles, labels, fontsize=9, frameon=False, loc="outside lower center", ncols=min(8, len(labels))
    )
    canvas.savefig(path, metadata={"Software": None})


def _by_prompt(method: Method, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Per prompt a figure of the base model, and of the end of training; means over seeds."""
    ends = [run.evaluation.points[-1].figures[metric].per_prompt for run in method.runs]
    return np.array(method.runs[0].evaluation.base.figures[metric].per_prompt), np.mean(ends, axis=0)


def prompt_table(methods: list[Method]) -> str:
    """What training gains, and leaves, of prompts that the base model draws badly, better and well."""
    before, _ = _by_prompt(methods[0], "reward")
    edges = [-np.inf, *EDGES, np.inf]
    groups = [(before >= low) & (before < high) for low, high in pairwise(edges)]
    names = [f"below {EDGES[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(EDGES)), f"above {EDGES[-1]:g}"]
    titles = [f"{name} ({int(rows.sum())} prompts)" for name, rows in zip(names, groups, strict=True)]
    titles.append("narrowed for next to nothing")
    lines = _matrix("At the end: reward gained; diversity left. Prompts by the base model's reward", titles)
    for method in methods:
        (first, last), (varied, left) = (_by_prompt(method, metric) for metric in ("reward", "diversity"))
        cells = [
            f"{(last - first)[rows].mean():+.2f}; {left[rows].mean() / varied[rows].mean():.0%}"
            for rows in groups
        ]
        cells.append(
            ", ".join(str(narrowed(run.evaluation, run.evaluation.points[-1])) for run in method.runs)
        )
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prompt_figure(methods: list[Method], path: Path) -> None:
    """The same, each prompt a point."""
    canvas = Figure(figsize=(9.0, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    gained, kept = canvas.subplots(1, 2)
    for k, method in enumerate(methods):
        look = {
            "color": COLOURS[k - 1] if k else flag_tables.INK,
            "s": 18,
            "alpha": 0.75,
            "zorder": 3,
            "label": method.name,
        }
        (before, after), (varied, left) = (_by_prompt(method, metric) for metric in ("reward", "diversity"))
        gained.scatter(before, after - before, **look)
        kept.scatter(before, left / varied, **look)
    for panel, title, level in ((gained, "reward gained", 0.0), (kept, "share of the diversity left", 1.0)):
        panel.axhline(level, color=flag_tables.INK, linewidth=0.6)
        flag_tables.dressed(panel, title)
        panel.set_xlabel("base model's reward of the prompt", fontsize=8)
    handles, labels = gained.get_legend_handles_labels()
    canvas.legend(handles, labels, fontsize=9, frameon=False, loc="outside lower center", ncols=len(labels))
    canvas.savefig(path, metadata={"Software": None})


def main() -> int:
    """Rewrite, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = False
    pages = {
        (DOCS.parent / "README.md",): {"results": short_table(compare.load_methods([DOCS / "results/flat"]))},
        (DOCS / "results.md", *sorted((DOCS / "results").glob("*.md"))): result_blocks(check),
        (DOCS / "flags.md", *sorted((DOCS / "flags").glob("*.md"))): flag_blocks(check),
    }
    for paths, blocks in pages.items():
        old = {path: path.read_text("utf-8") for path in paths}
        new = rewritten(old, blocks)
        for path, text in new.items():
            if not check:
                path.write_text(text, "utf-8")
            how = "as it was" if text == old[path] else "differs" if check else "written"
            print(path.relative_to(DOCS.parent), how)
        changed |= new != old
    return int(check and changed)


def result_blocks(check: bool) -> dict[str, str]:
    """Tables of the folders in docs/results, by name; draws their figures unless it is only to ``check``."""
    blocks = {}
    for folder in sorted(path for path in (DOCS / "results").iterdir() if path.is_dir()):
        rival = RIVALS.get(folder.name, "grpo")
        methods = sorted(
            compare.load_methods([folder, *ALSO.get(folder.name, ())]),
            key=lambda method: method.name != rival,
        )
        blocks[folder.name] = tables(methods)
        if folder.name == "flat":
            blocks["summary"] = summary_table(methods)
        if folder.name == "animals":
            blocks["animals-prompts"] = prompt_table(methods)
            if not check:
                prompt_figure(methods, DOCS / "images/results-animals-prompts.png")
        if any(method.scaled for method in methods):
            blocks[f"{folder.name}-levels"] = scale_table(folder)
        if not check:
            pictured = [method for method in methods if len(method.runs) >= PICTURED.get(folder.name, 1)]
            figure(pictured, DOCS / "images" / f"results-{folder.name}.png")
    return blocks


def flag_blocks(check: bool) -> dict[str, str]:
    """The same of the files in docs/flags."""
    blocks = {}
    for file in sorted((DOCS / "flags").glob("*.json")):
        data = json.loads(file.read_text("utf-8"))
        if file.stem.endswith("-rates"):
            blocks[file.stem] = flag_tables.rate_table(data)
        elif file.stem.endswith("-scaled"):
            blocks[file.stem] = flag_tables.scale_table(data)
        elif len(flag_tables.settings_in(data["against"])) > 2:  # too many combinations to look at each
            blocks[file.stem] = flag_tables.effect_table(data)
        else:
            blocks[file.stem] = flag_tables.method_table(data, data["against"])
        if file.stem == "target-rest" and not check:
            flag_tables.target_figure(data, DOCS / "images/flags-target.png")
        if file.stem == "methods" and not check:
            flag_tables.figure(data, DOCS / "images/flags-methods.png", flag_tables.SHOWN)
    return blocks


def rewritten(pages: dict[Path, str], blocks: dict[str, str]) -> dict[Path, str]:
    """The pages' texts with each of ``blocks`` between the markers of its name, which stand in one place."""
    pages = dict(pages)
    for name, table in blocks.items():
        block, places = f"<!-- {name} -->\n{table}\n<!-- end -->", 0
        for path, text in pages.items():
            pages[path], count = re.subn(
                f"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL
            )
            places += count
        if places != 1:
            among = ", ".join(str(path.relative_to(DOCS.parent)) for path in pages)
            raise SystemExit(
                f"expected one place for {name}, between <!-- {name} --> and <!-- end -->; got {places} in {among}"
            )
    return pages


if __name__ == "__main__":
    raise SystemExit(main())
