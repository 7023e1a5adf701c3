"""`driftrl experiment`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from driftrl.checks import InputError, RunFailedError, counted
from driftrl.config import TrainConfig, dump_config
from driftrl.experiment.plan import Plan, PlannedRun, differing, expand, load_plan
from driftrl.experiment.pool import Failure, Pool, Task, slots


def experiment(
    path: Path, out: Path | None, jobs: int | None, retries: int, dry_run: bool, quiet: bool
) -> None:
    """Make, evaluate and compare the runs of a plan; exit 130 or 143 after Ctrl-C or SIGTERM, 3 if any failed."""
    plan = load_plan(path)
    runs = expand(plan, path)
    _demand_rewards(plan, runs)
    out = out or Path("runs") / plan.name
    on_gpu = any(run.config.model.device != "cpu" for run in runs)
    places = slots(jobs or plan.jobs, plan.threads, on_gpu)
    if dry_run:
        _list(plan, runs, len(places), int(places[0]["OMP_NUM_THREADS"]))
        return

    console = Console(stderr=True, emoji=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {error.strerror}") from error
    with console.status("looking at what is there", spinner="dots"):
        from driftrl.cli.compare import show
        from driftrl.evaluation.comparison import find, write_page
        from driftrl.run import locked, signals

    with locked(out):
        tasks = _prepare(plan, runs, out)
        if tasks:
            console.print(
                f"[bold]{plan.name}[/]: {len(tasks)} of {counted(len(runs), 'run')} to do, {min(len(places), len(tasks))} at a "
                f"time, CPU threads of each: {places[0]['OMP_NUM_THREADS']}, in {out}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        display = _Display(console, plan, runs, tasks, out, quiet)
        pool = Pool(tasks, places, retries, display.tell, display.look)
        stopped: list[int] = []

        def stop(number: int) -> None:
            stopped.append(number)
            pool.stop()
            console.print("telling the runs to finish their iteration and save; again to stop at once")

        with signals(stop), display.progress:
            failures = pool.run()
        if stopped:
            command = shlex.join(["driftrl", "experiment", str(path), "--out", str(out)])
            console.print(f"stopped; go on with: {command}", highlight=False, soft_wrap=True, markup=False)
            sys.exit(128 + stopped[0])
        failed = {failure.task.name for failure in failures}
        done = [_folder(out, run.name) for run in runs if run.name not in failed]
        if len(done) > 1:
            with console.status("comparing", spinner="dots"):
                findings = find(done)
                page = write_page(findings, out / "report.html")
            if not quiet:
                show(Console(emoji=False), findings)
            console.print(f"open {page}", highlight=False, soft_wrap=True, markup=False)
    if failures:
        raise RunFailedError(_told(failures, len(runs)))


def _demand_rewards(plan: Plan, runs: Sequence[PlannedRun]) -> None:
    """Refuse a reward that is not there, before every run fails for it."""
    trained = runs[0].config.reward
    names = [trained] if isinstance(trained, str) else [part.name for part in trained]
    names = [name for name in (*names, *plan.evaluation.rewards) if name != TrainConfig().reward]
    if names:
        from driftrl.build import demand_reward

        for name in names:
            demand_reward(name)


def _prepare(plan: Plan, runs: Sequence[PlannedRun], out: Path) -> list[Task]:
    """What is left to do, its folders made; what is finished has its file of results.

    Raises:
        InputError: before anything is written, if a folder holds a run of other settings.
    """
    from driftrl.experiment.standing import standing
    from driftrl.files import write_text

    where = [standing(run, _folder(out, run.name), plan.evaluation) for run in runs]
    tasks = []
    for run, there in zip(runs, where, strict=True):
        folder = _folder(out, run.name)
        if there.evaluated:
            _collect(out, run.name)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", dump_config(run.config))
        tasks.append(
            Task(run.name, _commands(plan, run, folder, there.trained), out / "logs" / f"{run.name}.log")
        )
    return tasks


def _folder(out: Path, name: str) -> Path:
    return out / "runs" / name


def _collect(out: Path, name: str) -> None:
    from driftrl.evaluation.results import write_result

    write_result(_folder(out, name), out / "results" / f"{name}.json")


def _commands(plan: Plan, run: PlannedRun, folder: Path, trained: bool) -> list[list[str]]:
    """What is left of a run, as command lines; resuming a run that has not begun begins it."""
    driftrl, wanted = [sys.executable, "-m", "driftrl.cli.main"], plan.evaluation
    evaluate = [
        *driftrl, "evaluate", str(folder), "--images", str(wanted.images),
        "--seed", str(wanted.seed), "--encoder", wanted.encoder, "--checkpoint", ",".join(map(str, run.checkpoints)),
        *(part for name in wanted.rewards for part in ("--reward", name)), "--quiet",
    ]  # fmt: skip
    return [evaluate] if trained else [[*driftrl, "train", "--resume", str(folder)], evaluate]


def _told(failures: Sequence[Failure], count: int) -> str:
    lines = [f"{len(failures)} of {counted(count, 'run')} failed; start again to go on with them"]
    for failure in failures:
        lines.append(
            f"{failure.task.name}: status {failure.status}: {failure.reason}\n    {failure.task.log}"
        )
    return "\n  ".join(lines)


def _list(plan: Plan, runs: Sequence[PlannedRun], jobs: int, threads: int) -> None:
    """Print every run: the first, and its other seeds, with the settings in which runs differ, the others with what they
    change of them.
    """
    console, settings = Console(), differing(runs)
    width = max(len(run.name) for run in runs)
    for run, own in zip(runs, settings, strict=True):
        shown = {k: v for k, v in own.items() if v != settings[0][k]} or own
        text = "  ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in shown.items())
        console.print(
            f"[bold]{run.name:{width}}[/]  {escape(text)}".rstrip(), highlight=False, soft_wrap=True
        )
    evaluated = sum(_evaluation_images(plan, run) for run in runs)
    console.print(
        f"{counted(len(runs), 'run')}, {min(jobs, len(runs))} at a time, CPU threads of each: {threads}; images drawn: "
        f"{sum(run.images for run in runs):,} in training, {evaluated:,} in evaluation",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _evaluation_images(plan: Plan, run: PlannedRun) -> int:
    """Images that a run's evaluation draws: of its checkpoints, the base model, and the base model once more."""
    return (len(run.checkpoints) + 2) * len(run.prompts_evaluated()) * plan.evaluation.images


class _Display:
    """A line for each run in progress and one for all; plain lines where that is no terminal."""

    def __init__(
        self,
        console: Console,
        plan: Plan,
        runs: Sequence[PlannedRun],
        tasks: Sequence[Task],
        out: Path,
        quiet: bool,
    ) -> None:
        self.console, self.plan, self.out, self.quiet = console, plan, out, quiet
        self.runs = {run.name: run for run in runs}
        self.work = {run.name: run.images + _evaluation_images(plan, run) for run in runs}
        self.done = self.work | {task.name: 0 for task in tasks}
        self.rows: dict[str, TaskID] = {}
        self.tenths: dict[str, int] = {}
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal,
            speed_estimate_period=600,
        )  # fmt: skip
        self.all = self.progress.add_task(
            "[bold]all runs", total=sum(self.work.values()), completed=sum(self.done.values()), figures=""
        )

    def tell(self, event: str, task: Task) -> None:
        """Show that a run started, ended or failed; collect its results."""
        name = task.name
        if event == "done":
            _collect(self.out, name)
        if event in ("started", "again"):
            self.rows[name] = self.progress.add_task(name, total=self.work[name], figures="")
        if event in ("failed", "stopped", "done"):
            self.progress.remove_task(self.rows[name])
        if event in ("failed", "done"):
            self.done[name] = self.work[name]
        if not self.quiet and (event != "started" or not self.console.is_terminal):
            colour = {"failed": "red", "again": "yellow", "done": "green"}.get(event, "default")
            figures = "" if event == "started" else self._figures(name)[0]
            self.console.print(f"{name}: [{colour}]{event}[/] {figures}", highlight=False, soft_wrap=True)

    def look(self, running: Sequence[Task]) -> None:
        """Show how far the runs are."""
        if self.quiet:
            return
        for name in (task.name for task in running):
            figures, self.done[name] = self._figures(name)
            self.progress.update(self.rows[name], completed=self.done[name], figures=figures)
            tenth = 10 * self.done[name] // self.work[name]
            if not self.console.is_terminal and tenth > self.tenths.get(name, 0):
                self.console.print(f"{name}: {figures}", highlight=False, soft_wrap=True)
            self.tenths[name] = tenth
        figures = f"{sum(self.done[name] == self.work[name] for name in self.runs)}/{len(self.runs)}"
        self.progress.update(self.all, completed=sum(self.done.values()), figures=figures)

    def _figures(self, name: str) -> tuple[str, int]:
        """What a run's line says, and how many images it has drawn."""
        from driftrl.experiment.standing import last_metrics, models_measured

        run, folder = self.runs[name], _folder(self.out, name)
        metrics: dict[str, Any] = last_metrics(folder)
        at, last, reward = metrics.get("iteration", 0), run.config.iterations, metrics.get("reward/mean")
        text = f"iteration {at}/{last}" + ("" if reward is None else f"  reward {reward:.3f}")
        drawn = run.images * at // last
        if at == last:
            measured, models = models_measured(folder), len(run.checkpoints) + 1
            text += f"  evaluated {min(measured, models)}/{models}"
            drawn += _evaluation_images(self.plan, run) * min(measured, models) // (models + 1)
        return text, drawn
