"""`driftrl sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from driftrl import __version__
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
    lora: str | None = None,
    iteration: int | None = None,
    negative_prompt: str | None = None,
    model_config: str | None = None,
) -> None:
    """Draw a grid, a row for each prompt, and write it as a PNG, or into a folder beside every image."""
    console = Console(stderr=True, emoji=False)
    picture_file = out.suffix.lower() == ".png" and not out.is_dir()
    if not picture_file and out.suffix[1:].isalpha() and not out.is_dir():
        raise InputError(f"--out: expected a PNG file, such as grid.png, or a folder; got {out}")
    prompts = _prompts(prompts, prompt_set)
    grid_file = out if picture_file else out / GRID
    make_parent(grid_file)
    if not picture_file:
        _demand_no_others(out, prompts, count, base)
    with on_interrupt(console, "nothing was written"), console.status("loading the model", spinner="dots"):
        from transformers.utils import logging

        from driftrl.evaluation.generate import at_iteration, generate, open_policy
        from driftrl.pictures import beside, grid, image_folder, save_png, to_pil

        logging.disable_progress_bar()  # its bars for loading weights would come between ours
        if iteration is not None:
            source = str(at_iteration(source, iteration))
        policy, noise = open_policy(
            source,
            steps,
            guidance_scale,
            deterministic,
            dtype,
            device,
            lora_scale,
            lora,
            negative_prompt,
            model_config,
        )
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
        picture = beside(
            sets["base"], sets["tuned"], prompts, ("base model", heading(lora or source, lora_scale))
        )
    else:
        picture = grid(sets["tuned"], prompts)
    told = {
        "Software": f"driftrl {__version__}", "model": _called(source), "lora": _called(lora or ""), "lora_scale": lora_scale, "seed": seed,
        "steps": len(policy.timesteps), "guidance_scale": policy.sampler.guidance_scale,
        "deterministic": deterministic, "negative_prompt": policy.negative_prompt,
    }  # fmt: skip
    try:
        if not picture_file:
            for name, rows in sets.items():
                of = told if name == "tuned" else told | {"lora_scale": 0}
                for place, (prompt, images) in enumerate(zip(prompts, rows, strict=True)):
                    folder = (out / name if base else out) / image_folder(place, prompt)
                    for k, image in enumerate(images):
                        save_png(to_pil(image), folder / f"{k:03d}.png", of | {"prompt": prompt, "image": k})
        save_png(picture, grid_file, told | {"prompt": "\n".join(prompts)})
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    single = "" if picture_file else f"; {counted(count * len(prompts) * len(sets), 'image')} in {out}"
    console.print(
        f"{grid_file}: {picture.width} x {picture.height}{single}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def _called(source: str) -> str:
    """A name for others to read: of what lies on this machine no more than its own and, of a checkpoint, its run's."""
    path = Path(source)
    if not source or not path.exists():
        return source
    return (
        f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else path.resolve().name
    )


def _demand_no_others(out: Path, prompts: Sequence[str], count: int, base: bool) -> None:
    """Refuse a folder with pictures that this call would not write over: who counts the folder's would count those."""
    from driftrl.pictures import image_folder

    sets = ("tuned", "base") if base else ("",)
    own = {out / GRID} | {
        out / name / image_folder(place, prompt) / f"{k:03d}.png"
        for name in sets
        for place, prompt in enumerate(prompts)
        for k in range(count)
    }
    others = sorted(set(out.rglob("*.png")) - own) if out.is_dir() else []
    if others:
        raise InputError(
            f"--out: {out} has {counted(len(others), 'picture')} of something else, such as {others[0].relative_to(out)}; choose "
            "another folder, or empty it"
        )


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
