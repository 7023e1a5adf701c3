"""`driftrl sample`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from driftrl.checks import InputError, counted
from driftrl.cli.interrupt import on_interrupt
from driftrl.files import make_parent

GRID = "grid.png"


def sample(
    source: str,
    prompts: list[str],
    prompt_set: str | None,
    count: int,
    seed: int,
    out: Path,
    base: bool,
    steps: int | None,
    guidance_scale: float | None,
    deterministic: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    lora_scale: float = 1.0,
) -> None:
    """Draw a grid, a row for each prompt, and write it as a PNG, or into a folder beside every image."""
    console = Console(stderr=True, emoji=False)
    picture_file = out.suffix.lower() == ".png" and not out.is_dir()
    if not picture_file and out.suffix[1:].isalpha() and not out.is_dir():
        raise InputError(f"--out: expected a PNG file, such as grid.png, or a folder; got {out}")
    prompts = _prompts(prompts, prompt_set)
    grid_file = out if picture_file else out / GRID
    make_parent(grid_file)
    with on_interrupt(console, "nothing was written"), console.status("loading the model", spinner="dots"):
        from transformers.utils import logging

        from driftrl.evaluation.generate import generate, open_policy
        from driftrl.pictures import beside, grid, image_folder, save_png, to_pil

        logging.disable_progress_bar()  # its bars for loading weights would come between ours
        policy, noise = open_policy(source, steps, guidance_scale, deterministic, dtype, device, lora_scale)
    progress = Progress(
        TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("images, left"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    task = progress.add_task("", total=count * len(prompts) * (1 + base))

    def drawn(images: int) -> None:
        progress.advance(task, images)

    sets = {}
    with on_interrupt(console, "nothing was written"), progress:
        sets["tuned"] = list(generate(policy, prompts, count, seed, prompt_noise=noise, progress=drawn))
        if base:
            with policy.reference():
                sets["base"] = list(generate(policy, prompts, count, seed, progress=drawn))
    if base:
        picture = beside(sets["base"], sets["tuned"], prompts, ("base model", heading(source, lora_scale)))
    else:
        picture = grid(sets["tuned"], prompts)
    try:
        if not picture_file:
            for name, rows in sets.items():
                for place, (prompt, images) in enumerate(zip(prompts, rows, strict=True)):
                    folder = (out / name if base else out) / image_folder(place, prompt)
                    for k, image in enumerate(images):
                        save_png(to_pil(image), folder / f"{k:03d}.png")
        save_png(picture, grid_file)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    single = "" if picture_file else f"; {counted(count * len(prompts) * len(sets), 'image')} in {out}"
    console.print(
        f"{grid_file}: {picture.width} x {picture.height}{single}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def heading(source: str, lora_scale: float) -> str:
    """What a model is called over its pictures: a checkpoint by its iteration, anything else by its name."""
    path = Path(source)
    name = path.name
    if path.parent.name == "checkpoints" and name.isdecimal():
        name = f"iteration {int(name)}"
    return name if lora_scale == 1.0 else f"{name}, scale {lora_scale:g}"


def _prompts(given: list[str], prompt_set: str | None) -> list[str]:
    if not given and prompt_set is None:
        raise InputError("sample: expected --prompt TEXT or --prompts FILE, for what to draw; got neither")
    from driftrl.prompts import is_broken, load_prompts

    for prompt in filter(is_broken, given):
        raise InputError(f"--prompt: expected text in UTF-8; got {prompt!r}")
    if prompt_set is None:
        return given
    return [*given, *load_prompts(prompt_set)]
