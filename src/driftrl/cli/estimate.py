"""`driftrl estimate`."""

from __future__ import annotations

import warnings
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from driftrl.batches import out_of_memory
from driftrl.checks import RunFailedError
from driftrl.config import TrainConfig, load_config
from driftrl.estimate import (
    Calls,
    Costs,
    Phases,
    Plan,
    Standing,
    adjoint_bytes,
    calls,
    evaluation_seconds,
    peaks,
    seconds,
)

EVALUATED = 3
"""Models that are drawn at the end: the base model twice (once as the reference of recall), the last checkpoint."""


def estimate(config: Path | None, settings: list[str], probed: bool) -> None:
    """Print time and memory of the run that ``driftrl train`` would start, by phase.

    Raises:
        RunFailedError: where memory does not suffice for the probe.
    """
    parsed, console = load_config(config, settings), Console()
    with Console(stderr=True).status("loading model, reward and encoder", spinner="dots") as status:
        from transformers.utils import logging

        from driftrl import probe
        from driftrl.build import build_loop, open_sizes
        from driftrl.prompts import evaluated

        logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `train` says them
            try:
                loop = build_loop(parsed, Path(), measured=False)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise RunFailedError(
                    "out of memory while the model was loaded; try --set model.dtype=bfloat16"
                ) from None
            if probed:
                status.update("fitting batches into memory")
                probe.fit(loop, parsed.model.memory_budget, *open_sizes(parsed))
            plan, device = probe.plan_of(loop), loop.policy.device
            standing, gradients = probe.standing_of(loop), probe.gradients_of(loop)
            stored, pictures = probe.stored_of(loop, plan), probe.pictures_of(loop, plan)
            adjoints = adjoint_bytes(plan, loop.policy.latent_shape)
            costs = probe.measure(loop, lambda phase: status.update(f"trying {phase}")) if probed else None
    _, asked = evaluated(parsed.evaluation.prompts, parsed.prompts.set)
    console.print(_times(parsed, plan, costs, images_evaluated(parsed, len(asked))))
    working = Phases(0, 0, 0, 0, 0) if costs is None else costs.working
    console.print(_memory(plan, standing, stored, gradients, adjoints, working, costs is not None))
    in_use = peaks(plan, standing, stored, pictures, gradients + adjoints, working)
    phase, most = max(in_use.items(), key=lambda item: item[1])
    room = probe.room(device, parsed.model.memory_budget)
    where = f"{device} with {size(room)}" if room else str(device)
    console.print(f"most in use, during {phase}: [bold]{size(most)}[/], on {where}", highlight=False)
    if costs is None:
        console.print("not in it, for nothing was tried: what is computed meanwhile (activations)")
    if room and most > room:
        changes = probe.advice(phase, loop, plan)
        console.print(
            "[red]does not fit[/]; try --set " + " or --set ".join(changes)
            if changes
            else "[red]does not fit[/]",
            highlight=False,
        )


def images_evaluated(config: TrainConfig, prompts: int) -> int:
    """Images of ``prompts`` prompts that are drawn to be measured alone, at the end and, if asked, while training goes on.

    Example:
        >>> from driftrl import TrainConfig
        >>> from driftrl.cli.estimate import images_evaluated
        >>> changes = {"iterations": 60, "evaluation": {"every": 20, "images": 16, "images_meanwhile": 4}}
        >>> images_evaluated(TrainConfig(**changes), prompts=10)
        640
    """
    settings = config.evaluation
    times = 0 if settings.every is None else config.iterations // settings.every
    meanwhile = (times + 1) * settings.images_meanwhile if times else 0  # once more by the base model
    return prompts * meanwhile + images_at_the_end(config, prompts)


def images_at_the_end(config: TrainConfig, prompts: int) -> int:
    """Those of them that are drawn once training has ended."""
    settings = config.evaluation
    return prompts * EVALUATED * settings.images * settings.at_end


def size(count: float) -> str:
    """Bytes as people read them.

    Example:
        >>> from driftrl.cli.estimate import size
        >>> size(3 * 2**30), size(2**20)
        ('3.0 GiB', '1.0 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(count: float) -> str:
    """Seconds as people read them.

    Example:
        >>> from driftrl.cli.estimate import duration
        >>> duration(7.25), duration(600), duration(7200)
        ('7.2 s', '10.0 min', '2.0 h')
    """
    if count < 120:
        return f"{count:.1f} s" if count >= 0.1 else f"{1000 * count:.1f} ms"
    return f"{count / 60:.1f} min" if count < 7200 else f"{count / 3600:.1f} h"


def _work(plan: Plan, called: Calls) -> dict[str, str]:
    """What each phase does, in words."""
    update = f"{plan.pairs * plan.epochs} pairs: {called.update} forward and backward"
    if called.reference:
        update += f", {called.reference} forward by other policies"
    if called.rescoring:
        update += f", {called.rescoring} scored again"
    if called.carried:
        update += f", {called.carried} that carry the reward's gradient back"
    if plan.backward:
        update = "of gradients that denoising took"
    scored = f"{plan.images * (1 + plan.judges)} images"
    drawn = f"{plan.images} images, {plan.steps} steps: {called.rollout} forward"
    return {
        "denoising": f"{drawn}, {called.backward} of them backward" if plan.backward else drawn,
        "decoding": f"{plan.images} images",
        "reward": scored if not plan.judges else f"{scored}, judges included",
        "diversity": f"{plan.kept} images",
        "update": f"{update}, {called.optimizer} optimiser steps",
    }


def _times(config: TrainConfig, plan: Plan, costs: Costs | None, evaluated: int) -> Table:
    called = calls(plan)
    table = Table(
        title=f"{escape(config.name)} on {escape(config.model.path)}: one iteration, {called.forward} calls of the network",
        title_justify="left", header_style="bold",
    )  # fmt: skip
    table.add_column("phase")
    table.add_column("what")
    work = _work(plan, called)
    if costs is None:
        for phase, what in work.items():
            table.add_row(phase, what)
        return table
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right")
    times = seconds(plan, costs).items()
    whole = sum(own for _, own in times)
    for phase, own in times:
        table.add_row(phase, work[phase], duration(own), f"{own / whole:.0%}")
    table.add_section()
    training = whole * config.iterations
    table.add_row("iteration", "all of the above", duration(whole), "100%")
    table.add_row(
        "training", f"{config.iterations} iteration{'s' * (config.iterations != 1)}", duration(training)
    )
    if evaluated:
        after = evaluation_seconds(plan, costs, evaluated, config.evaluation.steps)
        table.add_row("evaluation", f"{evaluated} images", duration(after))
        table.add_row("run", "training and evaluation", duration(training + after))
    return table


def _memory(
    plan: Plan,
    standing: Standing,
    stored: int,
    gradients: int,
    adjoints: int,
    working: Phases,
    measured: bool,
) -> Table:
    table = Table(title="memory", title_justify="left", header_style="bold")
    table.add_column("kind")
    table.add_column("what")
    table.add_column("size", justify="right", no_wrap=True)
    rows: list[tuple[str, str, float]] = [
        ("stays", "model, weights that are trained included", standing.model),
        ("", "reward and encoder", standing.instruments),
        ("", "embeddings of the prompt set", standing.conditioning),
        ("", "optimiser: two moments", standing.optimizer),
        ("in turn", f"trajectories and images of {plan.images} candidates", stored),
        ("", f"the {plan.kept} kept ones, copied; the others then go", stored * plan.keep / plan.candidates),
        ("", "gradients", gradients),
    ]
    if adjoints:
        rows.append(("", "gradients in the kept images' latents, and means there", adjoints))
    if standing.program:
        rows.insert(0, ("stays", "Python and libraries", standing.program))
        rows[1] = ("", *rows[1][1:])
    for row in rows:
        table.add_row(row[0], row[1], size(row[2]))
    if measured:
        table.add_section()
        for i, (phase, value) in enumerate(working.items()):
            table.add_row("computing" if i == 0 else "", phase, size(value))
    return table
