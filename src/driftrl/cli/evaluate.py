"""`driftrl evaluate`."""

from __future__ import annotations

import json
import shlex
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from driftrl.checks import InputError, counted
from driftrl.cli.interrupt import on_interrupt
from driftrl.cli.train import WIDE
from driftrl.distributed import leads

if TYPE_CHECKING:
    from driftrl.evaluation.evaluate import Change, Evaluation, Figure, Point

EVERY = 30.0
"""Seconds between two lines where there is no terminal to show a bar on."""


def evaluate(source: str | Path, *, quiet: bool = False, as_json: bool = False, **settings: Any) -> Path:
    """Measure ``source`` as `driftrl.evaluation.evaluate.evaluate` does, write the report, show the figures.

    The figures go to stdout, as a table or, if ``as_json``, as one JSON object; everything else goes to stderr.

    Returns:
        The folder with ``evaluation.json``, ``report.html`` and ``report.png``.
    """
    console = Console(stderr=True, quiet=not leads(), emoji=False)
    with console.status("loading the model", spinner="dots"):
        from transformers.utils import logging

        from driftrl.evaluation.evaluate import in_words, load_evaluation
        from driftrl.evaluation.report import evaluate as work

    logging.disable_progress_bar()  # its bars for loading weights would come between ours
    progress = _progress(console, quiet)
    task = progress.add_task("", total=None)
    lines = Lines(EVERY)

    def watch(label: str, done: int, total: int) -> None:
        progress.update(task, description=in_words(label), completed=done, total=total)
        if quiet or console.is_terminal:
            return
        line = lines.due(in_words(label), done, total, time.perf_counter())
        if line:
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        console.print(f"[yellow]{category.__name__}:[/] {escape(str(message))}", highlight=False)

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        again = f"driftrl evaluate {shlex.quote(str(source))}" + (" and the same options" if settings else "")
        kept = f"models that were measured are kept; go on with: {again}"
        with on_interrupt(console, kept), progress:
            folder = work(source, progress=watch, **settings)
    if not leads():
        return folder
    results, evaluation = Console(emoji=False), load_evaluation(folder)
    if as_json:
        results.print(_json(evaluation, folder), highlight=False, soft_wrap=True, markup=False)
    if quiet:
        console.print(folder / "report.html", highlight=False, soft_wrap=True, markup=False)
        return folder
    from driftrl.evaluation.measures import too_few, unsuited

    for message in unsuited(evaluation.settings):
        console.print(f"[yellow]note:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if not as_json:
        last = _shown(evaluation, source, str(settings.get("checkpoints", "last")))
        each = f"{counted(len(evaluation.settings.prompts), 'prompt')} x {evaluation.settings.images} images"
        results.print(  # not as the table's title, which breaks where the table is narrow
            f"{evaluation.name}, {each}, mean over prompts",
            highlight=False, soft_wrap=True, markup=False, style="italic",
        )  # fmt: skip
        results.print(_table(evaluation, last))
        if few := too_few(evaluation.settings):
            results.print(f"{few}: no interval is given.", highlight=False, soft_wrap=True)
    console.print(
        f"measured in {time.perf_counter() - start:.0f} s; open {folder / 'report.html'}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    return folder


def _progress(console: Console, quiet: bool) -> Progress:
    """A bar; on a narrow terminal figures alone, none of them cut short."""

    def whole() -> Column:
        return Column(no_wrap=True, min_width=8)

    columns: list[ProgressColumn] = [
        TextColumn("[bold]evaluating[/] {task.description}"),
        MofNCompleteColumn(table_column=whole()),
        TextColumn("images, left"),
        TimeRemainingColumn(table_column=whole()),
    ]
    if console.width >= WIDE:
        columns[1:1] = [BarColumn(None), TimeElapsedColumn()]
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal)


class Lines:
    """How far it is, in a line now and then, where there is no terminal to show a bar on.

    Example:
        >>> from driftrl.cli.evaluate import Lines
        >>> lines = Lines(every=30)
        >>> [lines.due("base model", done, 32, now) for done, now in ((8, 100), (16, 110), (24, 140), (32, 150))]
        ['evaluating base model  8/32 images', '', 'evaluating base model  24/32 images  20.0 s left', 'evaluating base model  32/32 images']
    """

    def __init__(self, every: float) -> None:
        """A line for the first batch and the last, and between them after each ``every`` seconds."""
        self.every = every
        self.first: tuple[int, float] | None = None
        """Images done and the time when the first batch was: its own time is that of warming up, too."""
        self.said = 0.0

    def due(self, what: str, done: int, total: int, now: float) -> str:
        """The line that is due ``now``, in seconds, or nothing."""
        from driftrl.cli.estimate import duration

        if self.first is not None and done < total and now - self.said < self.every:
            return ""
        begun, start = self.first = self.first or (done, now)
        self.said = now
        left = (total - done) * (now - start) / (done - begun) if begun < done < total else 0.0
        return f"evaluating {what}  {done}/{total} images" + (f"  {duration(left)} left" if left else "")


def _json(evaluation: Evaluation, folder: Path) -> str:
    """Every figure of every model that was measured, without the single prompts', which evaluation.json has."""
    from driftrl.evaluation.measures import too_few

    few = bool(too_few(evaluation.settings))

    def figure(found: Figure | Change) -> dict[str, Any]:
        return {"mean": found.mean, "interval": None if few else [found.low, found.high]}

    points = [
        {
            "label": point.label,
            "iteration": point.iteration,
            "lora_scale": point.lora_scale,
            "figures": {
                name: figure(found) | {"change": None if found.change is None else figure(found.change)}
                for name, found in point.figures.items()
            },
        }
        for point in evaluation.points
    ]
    return json.dumps(
        {
            "name": evaluation.name,
            "prompts": len(evaluation.settings.prompts),
            "images": evaluation.settings.images,
            "level": evaluation.level,
            "report": str(folder / "report.html"),
            "points": points,
        },
        indent=1,
    )


def _table(evaluation: Evaluation, last: Point | None) -> Table:
    """The base model's figures, and beside them those of its adapter at every scale, or of one checkpoint."""
    from driftrl.evaluation.measures import METRICS, describe, too_few

    few = too_few(evaluation.settings)
    table = Table(header_style="bold")
    table.add_column("measure")
    table.add_column("base", justify="right")
    if evaluation.settings.scaled:
        for point in evaluation.tuned:
            table.add_column(f"scale {point.lora_scale:g}", justify="right")
    elif last is not None:
        table.add_column(f"iteration {last.iteration}", justify="right")
        table.add_column("change" if few else f"change ({evaluation.level:.0%} interval)", justify="right")
    for name, figure in evaluation.base.figures.items():
        row = [describe(name, evaluation.settings).title, f"{figure.mean:.3f}"]
        if evaluation.settings.scaled:
            row += [f"{point.figures[name].mean:.3f}" for point in evaluation.tuned]
        elif last is not None:
            now = last.figures[name]
            row.append(f"{now.mean:.3f}")
            assert now.change is not None  # evaluations are checked when they are read
            ends = f" ({now.change.low:+.3f} to {now.change.high:+.3f})"
            row.append(f"{now.change.mean:+.3f}" + ("" if few else ends))
        style = "bold" if name in METRICS and METRICS[name].headline else None
        table.add_row(*row, style=style)
    return table


def _shown(evaluation: Evaluation, source: str | Path, which: str) -> Point | None:
    """The last of the checkpoints that were asked for; the folder may hold later ones, measured before."""
    place = Path(source)
    asked = [place.name] if place.parent.name == "checkpoints" else which.split(",")
    numbers = {int(part) for part in asked if part.strip().isdecimal()}
    points = [point for point in evaluation.tuned if point.iteration in numbers] or evaluation.tuned
    return points[-1] if points else None


def scales(text: str | None) -> tuple[float, ...]:
    """LoRA scales with commas between them."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise InputError(
            f"--lora-scale: expected numbers of at least 0, such as 0.4 or 0.4,0.8; got {text!r}"
        ) from None
