"""`driftrl compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from driftrl.checks import InputError

if TYPE_CHECKING:
    from driftrl.evaluation.comparison import Findings


def compare(
    runs: Sequence[Path], out: Path, against: str | None, blind: Path | None = None, seed: int | None = None
) -> None:
    """Write the comparison page, or with ``blind`` the page for raters."""
    console = Console(stderr=True, emoji=False)
    if blind is not None:
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
    show(console, findings)
    also = "" if picture is None else f"; the same in one picture: {picture}"
    console.print(f"open {page}{also}", highlight=False, soft_wrap=True, markup=False)


def show(console: Console, findings: Findings) -> None:
    """What a comparison found, in a table and in words."""
    console.print(_table(findings))
    for sentence in findings.verdict():
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)


def _table(findings: Findings) -> Table:
    """Each method where it ended, and what variety it has at equal reward."""
    from driftrl.evaluation.measures import METRICS
    from driftrl.evaluation.page import minus, percent

    names = ["reward", *findings.metrics]
    shown = [name for name in names if name == "reward" or METRICS[name].headline]
    first = findings.metrics[0]
    shares = {p.method: p.diversity_share for p in findings.pairs if p.metric == first}
    table = Table(
        title=f"last checkpoints, mean over seeds; at the right: {METRICS[first].title} at equal reward",
        title_justify="left",
        header_style="bold",
        box=None,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", overflow="fold")
    titles = ("seeds", *(METRICS[name].title for name in shown), f"beside {escape(findings.rival)}")
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
