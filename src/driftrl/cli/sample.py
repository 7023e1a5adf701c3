"""`driftrl sample`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from driftrl.checks import InputError
from driftrl.files import make_parent


def sample(
    source: str,
    prompts: list[str],
    count: int,
    seed: int,
    out: Path,
    base: bool,
    steps: int | None,
    guidance_scale: float | None,
    deterministic: bool = False,
) -> None:
    """Draw a grid, a row for each prompt, and write it as a PNG."""
    console = Console(stderr=True, emoji=False)
    if out.is_dir() or out.suffix.lower() != ".png":
        raise InputError(f"--out: expected a PNG file, such as grid.png; got {out}")
    make_parent(out)
    with console.status("loading the model", spinner="dots"):
        from transformers.utils import logging

        from driftrl.evaluation.generate import generate, open_policy
        from driftrl.pictures import beside, grid, save_png

        logging.disable_progress_bar()  # its bars for loading weights would come between ours
        policy, noise = open_policy(source, steps, guidance_scale, deterministic)
    with console.status(f"drawing {count} images for each of {len(prompts)} prompts", spinner="dots"):
        tuned = generate(policy, prompts, count, seed, prompt_noise=noise)
        if base:
            with policy.reference():
                before = generate(policy, prompts, count, seed)
            picture = beside(list(before), list(tuned), prompts, ("base model", Path(source).name))
        else:
            picture = grid(list(tuned), prompts)
    try:
        save_png(picture, out)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    console.print(f"{out}: {picture.width} x {picture.height}", highlight=False, soft_wrap=True, markup=False)
