"""`driftrl doctor`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from driftrl.checks import InputError
from driftrl.config import ObjectiveConfig

if TYPE_CHECKING:
    from driftrl.ratio import Replayed

STEPS = 5
"""Denoising steps of what is tried."""


TENTH = ObjectiveConfig().clip_range / 10
"""What rounding may do to a log-ratio."""


def doctor(model: str = "tiny-animals", model_config: str | None = None) -> None:
    """Print what this machine has, try a model once, and exit 1 if something is wrong.

    Raises:
        InputError: if there is no such model.
    """
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
        policy, _ = open_policy(model, STEPS, model_config=model_config)
        loaded = time.perf_counter()
        images = generate(policy, ["a cat"], 4)
        healthy &= bool(torch.isfinite(images).all())
        seconds = f"loaded in {loaded - start:.1f} s, 4 images in {time.perf_counter() - loaded:.1f} s"
        table.add_row("model", f"{escape(model)}: {seconds}")
        del policy
        for dtype in ("float32", "bfloat16", "float16"):
            with console.status(f"replaying in {dtype}", spinner="dots"):
                found = _replayed(model, model_config, dtype)
            fine = found.log_ratio < TENTH  # and not NaN
            healthy &= fine
            table.add_row(
                f"replay in {dtype}",
                f"max |log-ratio| {found.log_ratio:.1e} over {found.pairs} samples and steps"
                + ("" if fine else f"  [red]expected less than {TENTH:.0e}, a tenth of the clip range[/]")
                + (f" (scored again: {found.from_rollout:.1e})" if found.from_rollout else ""),
            )
    except InputError:
        raise
    except Exception as error:
        healthy = False
        table.add_row("model", f"[red]{escape(model)}: {type(error).__name__}: {escape(str(error))}[/]")
    console.print(table)
    console.print("[green]all is well[/]" if healthy else "[red]something is wrong: see above[/]")
    sys.exit(0 if healthy else 1)


def _replayed(model: str, model_config: str | None, dtype: str) -> Replayed:
    """The ratios of an untouched policy: guidance, prompt noise and gradient checkpointing on, as in a large run."""
    from driftrl.build import build_policy, rounds_by_batch
    from driftrl.config import parse_config
    from driftrl.ratio import replay_untouched

    settings = {
        "model": {"path": model, "config": model_config, "dtype": dtype, "gradient_checkpointing": True},
        "sampling": {"steps": STEPS, "guidance_scale": 5.0},
    }
    config = parse_config(settings)
    policy = build_policy(config)
    rescore = rounds_by_batch(config.model, policy.device)
    return replay_untouched(policy, ["a cat"], 3, rescore=rescore, draw_batch=3, update_batch=2)
