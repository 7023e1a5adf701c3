"""`driftrl train`."""

from __future__ import annotations

import gc
import math
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from driftrl.checks import InputError, RunFailedError, counted
from driftrl.cli.interrupt import on_interrupt
from driftrl.config import TrainConfig, load_config
from driftrl.distributed import leads

WIDE = 100
"""Columns of a terminal from which on the progress has a bar."""


def train(
    config: Path | None, settings: list[str], out: Path | None, resume: Path | None, quiet: bool
) -> None:
    """Train, showing progress; exit 130 or 143 after Ctrl-C or SIGTERM."""
    config = _config_of(config, out, resume)
    parsed = load_config(config, settings)
    console = Console(stderr=True, quiet=not leads())
    if parsed.evaluation.at_end:
        from driftrl.prompts import evaluated

        # A prompt set that is not there should not wait for the end.
        evaluated(parsed.evaluation.prompts, parsed.prompts.set, resume)
    folder = _trained(parsed, out, resume, console, quiet)
    if parsed.evaluation.at_end:
        import torch

        from driftrl.cli.evaluate import evaluate

        # It builds its own model, and two may not have room beside each other.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        evaluate(folder, quiet=quiet)


def _resuming(folder: Path) -> str:
    return f"driftrl train --resume {shlex.quote(str(folder))}"


def _trained(
    parsed: TrainConfig, out: Path | None, resume: Path | None, console: Console, quiet: bool
) -> Path:
    """Train, and return the run's folder; nothing else is kept."""
    with (
        on_interrupt(console, "nothing was trained yet" if resume is None else "the run is as it was"),
        console.status("loading model, reward and encoder", spinner="dots"),
    ):
        from transformers.utils import logging

        from driftrl.cli.estimate import duration
        from driftrl.run import Trainer
        from driftrl.trainer import Iteration

        logging.disable_progress_bar()  # its bars for loading weights would come between ours
        with _one_line_warnings(console, every=True):
            trainer = Trainer(parsed, resume if resume is not None else out, resume is not None)
    if out is None and resume is None:
        _say_if_new(trainer, console)
    trainer.on_stop = lambda: console.print("finishing this iteration, then saving; again to stop at once")
    start = trainer.loop.position.iteration
    if start >= parsed.iterations and (trainer.folder / "evaluation.json").is_file():
        console.print(
            f"{trainer.folder} is finished: {counted(start, 'iteration')}, measured too; to go farther: "
            f"driftrl train --resume {trainer.folder} --set iterations={2 * start}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        return trainer.folder
    place = f" from iteration {start}" if start else ""
    console.print(
        f"[bold]{escape(parsed.name)}[/] on {escape(parsed.model.path)}, {counted(parsed.iterations, 'iteration')}{place}: "
        f"{escape(str(trainer.folder))}",
        soft_wrap=True,
    )
    if not quiet and (more := _to_be_measured(parsed, trainer.folder)):
        console.print(more, highlight=False, soft_wrap=True, markup=False)
    progress = _progress(console, quiet)
    task = progress.add_task("train", total=parsed.iterations, completed=start, figures="")
    # Of several rewards each: their sum may be 0 throughout, being normalised.
    several = (
        {} if isinstance(parsed.reward, str) else {p.name: f"reward/{p.name}/mean" for p in parsed.reward}
    )
    whole = -(-len(trainer.loop.prompt_set) // parsed.prompts.per_iteration)
    passes = max(1, min(whole, parsed.iterations // 2))
    gains = {title: Gain(key, passes) for title, key in (several or {"reward": "reward/mean"}).items()}
    if start:  # gains are told from the run's beginning, not from where it goes on
        from driftrl.evaluation.results import read_metrics

        done = [line for line in read_metrics(trainer.folder / "metrics.jsonl") if line["iteration"] <= start]
        for gain in gains.values():
            for line in done:
                gain.told(line)

    def wait(number: int) -> str:
        each = (time.perf_counter() - began) / (number - start)
        return f"  {duration(each * (parsed.iterations - number))} left" if number < parsed.iterations else ""

    skipped = 0

    def watch(iteration: Iteration) -> None:
        nonlocal skipped
        m = iteration.metrics
        skipped += m.get("warning/skipped") == 1
        told = [f"{title} {gain.told(m)}" for title, gain in gains.items()]
        figures = "  ".join([*told, f"diversity {m['diversity/kept_mean']:.3f}"])
        if "shaping/left" in m:
            figures += f" ({m['shaping/left']:.0%} left, lambda {m['shaping/ratio']:.2f})"
        progress.update(task, completed=iteration.number, figures=figures)
        if not quiet and (line := _meanwhile(m)):
            console.print(f"iteration {iteration.number}: {line}", highlight=False, markup=False)
        if not quiet and not console.is_terminal:
            console.print(
                f"iteration {iteration.number}/{parsed.iterations}  {figures}{wait(iteration.number)}",
                highlight=False,
            )

    began = time.perf_counter()
    at_once = f"from its last checkpoint it goes on with: {_resuming(trainer.folder)}"
    with on_interrupt(console, at_once), _one_line_warnings(console), progress:
        trainer.run(watch)
    return _ended(trainer, console, start, skipped)


def _to_be_measured(config: TrainConfig, folder: Path) -> str:
    """What comes after training: of a short one it takes longer."""
    from driftrl.cli.estimate import images_at_the_end
    from driftrl.prompts import evaluated

    if not config.evaluation.at_end:
        return ""
    prompts = len(evaluated(config.evaluation.prompts, config.prompts.set, folder)[1])
    return (
        f"then {images_at_the_end(config, prompts):,} images are drawn to measure it, beside the base model (evaluation.images: {config.evaluation.images}; "
        "evaluation.at_end: false leaves it out)"
    )


def _say_if_new(trainer: Any, console: Console) -> None:
    """That the usual folder was taken, for somebody may have meant to go on with that run."""
    usual = trainer.folder.with_name(f"{trainer.config.name}-seed{trainer.config.seed}")
    if trainer.folder != usual:
        console.print(
            f"{usual} is there already: to go on with it, {_resuming(usual)}; this is a new run",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip


def _ended(trainer: Any, console: Console, start: int, skipped: int) -> Path:
    """Say how a run has ended, and what to do with it; return its folder."""
    if trainer.stopped_by is not None:
        console.print(
            f"stopped at iteration {trainer.loop.position.iteration}; go on with: {_resuming(trainer.folder)}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        trainer.team.wait()  # none of them ends before the first one has said so
        sys.exit(128 + trainer.stopped_by)
    folder: Path = trainer.folder
    last = folder / "checkpoints" / f"{trainer.loop.position.iteration:06d}"
    policy = trainer.loop.policy
    load = (
        f"adapter for diffusers: pipe.load_lora_weights({str(last)!r})"
        if trainer.config.adapter.kind == "lora"
        else f"network for diffusers: pipe.{policy.component} = {type(policy.network).__name__.removeprefix('FSDP')}.from_pretrained({str(last)!r})"
    )
    made = trainer.loop.position.iteration - start
    if skipped:
        console.print(
            f"{skipped} of {counted(made, 'iteration')} skipped, for something was not finite (warning/skipped in metrics.jsonl)",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    if skipped == made > 0:
        raise RunFailedError(
            f"nothing was learned: something was not finite in every iteration, as the warning says; the run is in {folder}"
        )
    console.print(f"done: {folder}\n{load}", highlight=False, soft_wrap=True, markup=False)
    return folder


def _meanwhile(metrics: Mapping[str, float | None]) -> str:
    """What was measured on the evaluation prompts, next to the base model; nothing in other iterations."""
    told = []
    for key, now in metrics.items():
        base = metrics.get(f"{key}/base")
        if (
            key.startswith(("evaluation/reward", "evaluation/diversity"))
            and base is not None
            and now is not None
        ):
            told.append(f"{key.removeprefix('evaluation/')} {now:.3f} ({now - base:+.3f})")
    return f"evaluated, next to the base: {', '.join(told)}" if told else ""


class Gain:
    """How far a reward has risen: the last pass over the prompts beside the first, for prompts differ in what they give.

    Example:
        >>> from driftrl.cli.train import Gain
        >>> gain = Gain("reward/mean", passes=2)
        >>> [gain.told({"reward/mean": x}) for x in (1.0, 3.0, 1.5, 3.5)]
        ['1.000', '3.000', '1.500 (+0.250)', '3.500 (+0.500)']
    """

    def __init__(self, key: str, passes: int) -> None:
        """Of the metric ``key``; a pass over the prompts takes ``passes`` iterations."""
        self.key, self.passes = key, passes
        self.seen: list[float] = []

    def told(self, metrics: Mapping[str, float | None]) -> str:
        """One more iteration's value and, after the first pass, the gain."""
        now = metrics.get(self.key)
        if now is None or math.isnan(now):
            return "nan"
        self.seen.append(now)
        if len(self.seen) <= self.passes:
            return f"{now:.3f}"
        gain = (sum(self.seen[-self.passes :]) - sum(self.seen[: self.passes])) / self.passes
        return f"{now:.3f} ({gain:+.3f})"


class _Figures(ProgressColumn):
    """The only column that gives way where a terminal is too narrow for all."""

    def render(self, task: Task) -> Text:
        """Reward and diversity, in one line whatever its width."""
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


def _progress(console: Console, quiet: bool) -> Progress:
    """A line with all of it on a wide terminal; on a narrow one without bar and elapsed time."""

    def whole() -> Column:
        return Column(no_wrap=True)

    columns: list[ProgressColumn] = [
        TextColumn("[bold]iteration"),
        MofNCompleteColumn(table_column=whole()),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False, table_column=whole()),
        _Figures(),
    ]
    if console.width >= WIDE:
        columns[2:2] = [BarColumn(20), TimeElapsedColumn(table_column=whole())]
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal)


def _config_of(config: Path | None, out: Path | None, resume: Path | None) -> Path | None:
    """The file to read: CONFIG, or that of the run to go on with."""
    if resume is not None:
        if out is not None or config is not None:
            raise InputError("--resume: the run folder says everything; leave out CONFIG and --out")
        if not (resume / "config.yaml").is_file():
            run = resume.parent.parent
            hint = (
                f"; name the run of this checkpoint: --resume {run}"
                if (run / "config.yaml").is_file()
                else ""
            )
            raise InputError(f"--resume {resume}: no run folder, for it has no config.yaml{hint}")
        return resume / "config.yaml"
    if config is not None and (config / "config.yaml").is_file():
        raise InputError(
            f"{config}: expected a YAML file; got a run folder; go on with it by --resume {config}, or start anew as "
            f"it was: driftrl train {config / 'config.yaml'}"
        )
    return config


@contextmanager
def _one_line_warnings(console: Console, every: bool = False) -> Iterator[None]:
    """Show each kind of warning once, in one line: metrics.jsonl counts them. Or ``every`` warning."""
    shown: set[type[Warning]] = set()

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        if every or category not in shown:
            shown.add(category)
            console.print(f"[yellow]{category.__name__}:[/] {escape(str(message))}", highlight=False)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
