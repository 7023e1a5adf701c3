"""`driftrl judge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from driftrl.checks import counted

if TYPE_CHECKING:
    from driftrl.evaluation.judge import Rate


def judge(folder: Path, answers: Sequence[Path]) -> None:
    """Analyse the answers and show what they say."""
    console, results = Console(stderr=True), Console()
    with console.status("counting", spinner="dots"):
        from driftrl.evaluation.judge import FILE, PICTURE
        from driftrl.evaluation.judge import judge as work

        analysis = work(folder, answers)
    raters = len(analysis.raters)
    table = Table(
        title=f"{counted(analysis.prompts, 'prompt')}, {counted(raters, 'rater')}, {analysis.level:.0%} intervals",
        title_justify="left",
        header_style="bold",
    )
    for name in ("question", "method"):
        table.add_column(name)
    for name in ("win rate", "prompts", "of decided", "p"):
        table.add_column(name, justify="right")
    for finding in analysis.findings:
        for number, standing in enumerate(finding.standings):
            table.add_row(
                "" if number else finding.question,
                escape(standing.method),
                _share(standing.win_rate),
                str(standing.prompts),
                _share(standing.prompt_rate),
                "" if number else f"{finding.p_value:.3g}",
            )
    results.print(table)
    for finding in analysis.findings:
        told = f"{finding.question}: about the same {finding.same} of {analysis.prompts * raters} times"
        told += f", left {finding.left}, right {finding.right}"
        if finding.agreement is not None:
            kappa = finding.agreement.kappa
            value = "undefined, all answers are the same" if kappa is None else f"{kappa:.2f}"
            told += (
                f"; raters agree in {finding.agreement.share:.0%}, {finding.agreement.kind}'s kappa {value}"
            )
        results.print(told, highlight=False)
    console.print(
        f"wrote {folder / FILE} and {folder / PICTURE}", highlight=False, soft_wrap=True, markup=False
    )


def _share(rate: Rate | None) -> str:
    return "" if rate is None else f"{rate.mean:.0%} ({100 * rate.low:.0f}\u2013{100 * rate.high:.0f}%)"
