"""`driftrl export`."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console


def export(source: Path, out: Path, comfyui: bool) -> None:
    """Write the adapter and its card, and say how they are published."""
    console = Console(stderr=True, emoji=False)
    with console.status("writing", spinner="dots"):
        from driftrl.evaluation.card import export as work

        folder = work(source, out, comfyui)
    for line in (
        f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}",
        f"to publish it: hf upload YOUR_NAME/{shlex.quote(folder.resolve().name)} {shlex.quote(str(folder))}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
