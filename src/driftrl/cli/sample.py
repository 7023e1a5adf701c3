"""`driftrl sample`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


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
    console = Console(stderr=True)
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
    save_png(picture, out)
    console.print(f"{out}: {picture.width} x {picture.height}")
