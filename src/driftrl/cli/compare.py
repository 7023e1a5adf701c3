"""`driftrl compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table

from driftrl.checks import InputError

if TYPE_CHECKING:
    from driftrl.evaluation.comparison import Findings
    from driftrl.evaluation.pareto import Interval


def compare(
    runs: Sequence[Path],
    out: Path,
    against: str | None,
    blind: Path | None = None,
    seed: int | None = None,
    as_json: bool = False,
) -> None:
    """Write the comparison page and show what it says on stdout, or with ``blind`` write the page for raters."""
    console, results = Console(stderr=True, emoji=False), Console(emoji=False)
    if blind is not None:
        if as_json:
            raise InputError("--json: has no meaning with --blind, which finds nothing out")
        _blind(console, runs, blind, against, seed)
        return
    if seed is not None:
        raise InputError("--seed: shuffles the page of --blind, which was not asked for")
    with console.status("comparing", spinner="dots"):
        from driftrl.evaluation.comparison import find, write_comparison_picture, write_page
        from driftrl.evaluation.page import check_out

        check_out(out)
        findings = find(runs, against)
        page = write_page(findings, out)
        picture = write_comparison_picture(runs, out.with_suffix(".png"), against)
    if as_json:
        results.print(_json(findings), highlight=False, soft_wrap=True, markup=False)
    else:
        show(results, findings)
    also = "" if picture is None else f"; the same in one picture: {picture}"
    console.print(f"open {page}{also}", highlight=False, soft_wrap=True, markup=False)


def show(console: Console, findings: Findings) -> None:
    """What a comparison found, in a table and in words."""
    from driftrl.evaluation.measures import METRICS

    first = METRICS[findings.metrics[0]].title
    heading = f"last checkpoints, mean over seeds; gain: of {first} over {findings.rival} at equal reward"
    console.print(heading, highlight=False, soft_wrap=True, markup=False, style="italic")
    console.print(_table(findings, console))
    for sentence in findings.verdict():
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _json(findings: Findings) -> str:
    """What was found, every figure of it; there is no interval of a single seed or of few prompts."""

    def figure(found: Interval | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {
            "mean": found.mean,
            "interval": None if findings.few or found.low == found.high else [found.low, found.high],
        }

    base = findings.methods[0].runs[0].evaluation
    names = ["reward", *findings.metrics]
    methods = [
        {
            "name": method.name,
            "seeds": [run.seed for run in method.runs],
            "at": method.shared()[-1],
            "figures": {name: figure(method.over_time(name)[-1]) for name in names},
        }
        for method in findings.methods
    ]
    gains = [
        {
            "measure": pair.metric,
            "method": pair.method,
            "variety_at_equal_reward": figure(pair.diversity_gain),
            "variety_at_equal_reward_share": figure(pair.diversity_share),
            "reward_at_equal_variety": figure(pair.reward_gain),
            "reward_at_equal_variety_share": figure(pair.reward_share),
            "longest_straight_pieces": dict(zip((pair.method, pair.against), pair.straight, strict=True)),
        }
        for pair in findings.pairs
    ]
    return json.dumps(
        {
            "against": findings.rival,
            "prompts": len(base.settings.prompts),
            "images": base.settings.images,
            "base": {name: base.base.figures[name].mean for name in names},
            "methods": methods,
            "gains": gains,
            "verdict": findings.verdict(),
        },
        indent=1,
        ensure_ascii=False,
    )


def _table(findings: Findings, console: Console) -> Table:
    """Each method where it ended, and what variety it has at equal reward; as many measures as there is room for."""
    from driftrl.evaluation.measures import METRICS

    names = ["reward", *findings.metrics]
    shown = [name for name in names if name == "reward" or METRICS[name].headline]
    while len(shown) > 2 and _columns(findings, names, shown).__rich_measure__(
        console, _wide(console)
    ).minimum > (console.width):
        del shown[-1]
    return _columns(findings, names, shown)


def _wide(console: Console) -> ConsoleOptions:
    """Room for anything, so that a table says what it needs."""
    return console.options.update(max_width=10_000)


def _columns(findings: Findings, names: Sequence[str], shown: Sequence[str]) -> Table:
    from driftrl.evaluation.measures import METRICS
    from driftrl.evaluation.page import minus, percent

    first = findings.metrics[0]
    shares = {p.method: p.diversity_share for p in findings.pairs if p.metric == first}
    table = Table(
        header_style="bold",
        box=None,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", overflow="fold")
    titles = ("seeds", *(METRICS[name].title for name in shown), "gain")
    for title in titles:
        table.add_column(title, justify="right", min_width=max(map(len, title.split())))
    for row in findings.summary():
        share = shares.get(row["name"])
        means = dict(zip(names, row["cells"], strict=True))
        gained = "" if share is None or row["name"] == findings.rival else percent(share.mean)
        figures = [minus(means[name][0]) for name in shown]
        table.add_row(escape(row["name"]), str(row["seeds"]), *figures, gained)
    return table


def _blind(
    console: Console, runs: Sequence[Path], folder: Path, against: str | None, seed: int | None
) -> None:
    if against is not None:
        raise InputError("--against: has no meaning with --blind, where two methods stand side by side")
    with console.status("laying out the pairs", spinner="dots"):
        from driftrl.evaluation.blind import KEY, write_blind

        page = write_blind(runs, folder, seed)
    for line in (
        f"give raters {page}, which is complete in itself",
        f"keep {folder / KEY} from them: it says which set is whose",
        f"then: driftrl judge {folder} answers.json [more answers ...]",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
