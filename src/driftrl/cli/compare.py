"""`driftrl compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from driftrl.checks import InputError


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
        from driftrl.evaluation.comparison import write_comparison, write_comparison_picture
        from driftrl.evaluation.page import check_out

        page = write_comparison(runs, check_out(out), against)
        picture = write_comparison_picture(runs, out.with_suffix(".png"), against)
    also = "" if picture is None else f"; the same in one picture: {picture}"
    console.print(f"open {page}{also}", highlight=False, soft_wrap=True, markup=False)


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
