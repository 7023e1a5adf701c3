"""`driftrl judge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def judge(folder: Path, answers: Sequence[Path]) -> None:
    """Analyse the answers and show what they say."""
    console = Console(stderr=True)
    with console.status("counting", spinner="dots"):
        from driftrl.evaluation.judge import FILE, PICTURE
        from driftrl.evaluation.judge import judge as work

        analysis = work(folder, answers)
    raters = len(analysis.raters)
    table = Table(
        title=f"{analysis.prompts} prompts, {raters} rater{'s' if raters > 1 else ''}, {analysis.level:.0%} intervals",
        title_justify="left",
        header_style="bold",
    )
    for name in ("question", "method"):
        table.add_column(name)
    for name in ("win rate (over prompts)", "prompts ahead", "of those decided (exact)", "sign test p"):
        table.add_column(name, justify="right")
    for finding in analysis.findings:
        for number, standing in enumerate(finding.standings):
            win, ahead = standing.win_rate, standing.prompt_rate
            table.add_row(
                "" if number else finding.question,
                escape(standing.method),
                f"{win.mean:.0%} ({win.low:.0%} to {win.high:.0%})",
                str(standing.prompts),
                "" if ahead is None else f"{ahead.mean:.0%} ({ahead.low:.0%} to {ahead.high:.0%})",
                "" if number else f"{finding.p_value:.3g}",
            )
    console.print(table)
    for finding in analysis.findings:
        told = f"{finding.question}: about the same {finding.same} of {analysis.prompts * raters} times"
        told += f", left {finding.left}, right {finding.right}"
        if finding.agreement is not None:
            kappa = finding.agreement.kappa
            value = "undefined, all answers are the same" if kappa is None else f"{kappa:.2f}"
            told += (
                f"; raters agree in {finding.agreement.share:.0%}, {finding.agreement.kind}'s kappa {value}"
            )
        console.print(told, highlight=False)
    console.print(
        f"wrote {folder / FILE} and {folder / PICTURE}", highlight=False, soft_wrap=True, markup=False
    )
