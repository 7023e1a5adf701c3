"""`driftrl compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def compare(runs: Sequence[Path], out: Path, against: str | None) -> None:
    """Write the comparison page and say what it found."""
    console = Console(stderr=True)
    with console.status("comparing", spinner="dots"):
        from driftrl.evaluation.report import check_out, write_comparison

        page = write_comparison(runs, check_out(out), against)
    console.print(f"open {page}", highlight=False, soft_wrap=True)
