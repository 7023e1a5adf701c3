"""`driftrl doctor`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def doctor() -> None:
    """Print what this machine has, try the embedded model once, and exit 1 if something is wrong."""
    import torch
    from transformers.utils import logging

    from driftrl.checkpoint import versions
    from driftrl.evaluation.generate import generate, open_policy
    from driftrl.run import free_space

    logging.disable_progress_bar()  # its bars for loading weights would come between the lines
    console, healthy = Console(), True
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, number in versions().items():
        table.add_row(name, number)
    table.add_row("threads", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        table.add_row("GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        table.add_row("GPU", "none: the embedded model trains on the CPU")
    space = free_space(Path.cwd())
    healthy &= space > 2**30
    table.add_row(
        "free space here", f"{space / 2**30:.1f} GiB" + ("" if space > 2**30 else "  [red]too little[/]")
    )
    start = time.perf_counter()
    try:
        policy, _ = open_policy("tiny-animals")
        loaded = time.perf_counter()
        images = generate(policy, ["a cat"], 4)
        healthy &= bool(torch.isfinite(images).all())
        seconds = f"loaded in {loaded - start:.1f} s, 4 images in {time.perf_counter() - loaded:.1f} s"
        table.add_row("embedded model", seconds)
    except Exception as error:
        healthy = False
        table.add_row("embedded model", f"[red]{type(error).__name__}: {error}[/]")
    console.print(table)
    console.print("[green]all is well[/]" if healthy else "[red]something is wrong: see above[/]")
    sys.exit(0 if healthy else 1)
