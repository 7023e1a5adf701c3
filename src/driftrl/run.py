"""A run: its folder, its logs, its end. `Trainer(config).run()` is the whole of driftrl in Python."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from driftrl import checkpoint, probe, prompts
from driftrl.build import build_loop, open_sizes, prompt_noise_of
from driftrl.checkpoint import Position
from driftrl.checks import InputError, RunFailedError
from driftrl.config import TrainConfig, dump_config, flat, load_config
from driftrl.distributed import LostProcessError, join
from driftrl.evaluation.meanwhile import PREFIX, Meanwhile
from driftrl.files import read_json, write_json, write_text
from driftrl.pictures import candidates_grid, pixels, save_png
from driftrl.rewards.several import SeveralRewards
from driftrl.trainer import Iteration, TrainingLoop

RESUMABLE = {"iterations", "logging", "guards", "evaluation"}
"""What may differ when a run is resumed; everything else would change its meaning."""
ROUNDING = {"sampling.batch_size", "optimizer.batch_size", "model.memory_budget", "model.device"}
"""What may differ too, at the price of the same bits: a run may have to go on in less memory."""
_PROMISED: WeakValueDictionary[str, Trainer] = WeakValueDictionary()
"""The folders of trainers that may not have begun to write."""
PAGE = 2048
"""Pixels of the longer side of a picture that goes to a tracker."""


class Trainer:
    """Fine-tunes a model as a configuration says, into a run folder.

    Example:
        >>> import driftrl
        >>> config = driftrl.TrainConfig(iterations=20)
        >>> folder = driftrl.Trainer(config, out="runs/first").run()  # doctest: +SKIP
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        out: str | Path | None = None,
        resume: bool | str | Path = False,
    ) -> None:
        """Check everything before anything is written.

        Args:
            config: the run; the default fine-tunes the embedded model with DRIFT, or is what is resumed.
            out: the run folder; by default ``runs/<name>-seed<seed>``, numbered if that exists.
            resume: go on with the run in ``out``; or the folder of that run, in place of ``out``.

        Raises:
            InputError: if the folder holds another run, or something in the configuration cannot be used.
        """
        if not isinstance(config, TrainConfig | None):
            raise InputError(
                f"config: expected a TrainConfig, as load_config reads it from a file; got {config!r}"
            )
        if not isinstance(resume, bool):
            out, resume = _resumed(resume, out), True
        if config is None and resume and out is not None and (Path(out) / "config.yaml").is_file():
            config = load_config(Path(out) / "config.yaml")
        self.config = config or TrainConfig()
        self.team = join()
        if len(set(self.team.texts(dump_config(self.config)))) > 1:
            raise InputError("the processes were given different configurations; start them all alike")
        usual = Path("runs") / f"{self.config.name}-seed{self.config.seed}"
        free = usual if resume else _free(usual)
        self.folder = Path(self.team.first(str(free if out is None else out)))
        _PROMISED[str(self.folder.absolute())] = self
        self.resumed_from: Path | None = None
        self.stopped_by: int | None = None
        """The signal that ended the run, in whichever process it came."""
        self._asked, self._ended = 0, False
        self._owns_folder = bool(resume)
        self._rounded_otherwise = False
        self.on_stop: Callable[[], Any] | None = None
        """Called once when a signal asks the run to end."""
        self._check_trackers()
        self._asked_meanwhile = self._prompts_meanwhile(resume)
        self._meanwhile: Meanwhile | None = None
        if resume:
            self._check_resume()
        else:
            self._refuse_what_is_there()
        _demand_writable(self.folder)
        begun = resume and self._began()
        with self.team.together():
            self.loop: TrainingLoop = build_loop(self.config, self.folder, self.team, start=not begun)
        if resume:
            self._refuse_other_prompts()
            newest = checkpoint.newest(self.folder / "checkpoints") if self.team.leads else None
            found = self.team.first(newest and str(newest))
            self.resumed_from = found and Path(found)
            if self.resumed_from is None and begun:
                there = checkpoint.listing(self.folder / "checkpoints")
                what = "none of its checkpoints is whole" if there else "its checkpoints are gone"
                raise InputError(
                    f"--resume {self.folder}: {what}; start anew as it was: driftrl train "
                    f"{self.folder / 'config.yaml'} --out another folder"
                )
            if self.resumed_from is not None:
                self._go_on_from(self.resumed_from)
        known = self.resumed_from is not None and checkpoint.batch_sizes(self.resumed_from)
        if not known or self._rounded_otherwise:
            self._fit()

    def _go_on_from(self, path: Path) -> None:
        """Take up the checkpoint in ``path``."""
        self._refuse_changes(checkpoint.configuration(path), str(path))
        asked = self.loop.sizes().tolist()
        self.loop.resume(path)
        done = self.loop.position.iteration
        if self.config.iterations < done:
            raise InputError(
                f"iterations: expected at least the {done} that {self.folder} has had; got {self.config.iterations}"
            )
        if self._rounded_otherwise:
            self.loop.restored_sizes(asked)

    def _fit(self) -> None:
        """Batch sizes that memory suffices for, in all processes the smallest of what each could have."""
        with self.team.together():
            probe.fit(self.loop, self.config.model.memory_budget, *open_sizes(self.config))
        self.loop.restored_sizes([[int(x) for x in self.loop.sizes().amin(0)]] * self.team.size)

    def run(self, watch: Callable[[Iteration], Any] | None = None) -> Path:
        """Train to the end, or until Ctrl-C, SIGTERM (then `stopped_by` is the signal) or `stop`; return the folder. Called again,
        it goes on.

        Args:
            watch: called after each iteration; by default a bar of tqdm shows how far it is.

        Raises:
            InputError: if another run was begun in the folder since this one was made.
            RunFailedError: if the reward cannot be had, a checkpoint cannot be written, or too many iterations in a row were
                not finite.
        """
        if not self._owns_folder and self.team.first((self.folder / "config.yaml").is_file()):
            self._refuse_what_is_there()
        self._owns_folder = True
        self._asked, self._ended = 0, False
        with ExitStack() as stack:
            stack.enter_context(signals(self._stop))
            watch, log = watch or stack.enter_context(self._bar()), None
            with self.team.together():
                if self.team.leads:
                    _make(self.folder)
                    stack.enter_context(locked(self.folder))
                    log = stack.enter_context(_Log(self))
                    self._describe()

            def seen(iteration: Iteration) -> None:
                iteration = self._measured(iteration)
                images = self._pictured(iteration)
                if log is not None:
                    log.write(iteration, images, self._picture_meanwhile(iteration))
                watch(iteration)

            try:
                self.loop.run(self.config.iterations, seen, self._stopped)
                self._stopped()
            except (OSError, LostProcessError) as error:
                what = "" if isinstance(error, LostProcessError) else "a checkpoint cannot be written: "
                last = checkpoint.newest(self.folder / "checkpoints")
                kept = f"{last} is whole" if last else "there is no checkpoint yet"
                raise RunFailedError(f"{what}{error}; {kept}") from error
        return self.folder

    @contextmanager
    def _bar(self) -> Iterator[Callable[[Iteration], Any]]:
        from tqdm.auto import tqdm

        done = self.loop.position.iteration
        with tqdm(
            total=self.config.iterations, initial=done, desc="training", unit="iteration", disable=not self.team.leads
        ) as bar:  # fmt: skip

            def tell(iteration: Iteration) -> None:
                m = iteration.metrics
                bar.set_postfix(
                    reward=f"{m['reward/mean']:.3f}",
                    diversity=f"{m['diversity/kept_mean']:.3f}",
                    refresh=False,
                )
                bar.update(iteration.number - bar.n)

            yield tell

    def stop(self) -> None:
        """End `run` after this iteration, with a checkpoint: from the function that watches it, or another thread."""
        self._ended = True

    def _describe(self) -> None:
        """Write what the run is: its configuration and its prompts."""
        try:
            write_text(self.folder / "config.yaml", dump_config(self.config))
            write_json(self.folder / prompts.FILE, prompts.as_json(self.loop.prompt_set))
        except OSError as error:
            raise InputError(
                f"{error.filename2 or error.filename}: cannot be written to: {error.strerror}"
            ) from error

    def _stopped(self) -> bool:
        """Whether any process was asked to end: then all do, after the same iteration."""
        found = int(self.team.largest(torch.tensor(2 * self._asked + self._ended)))
        self.stopped_by = found // 2 or None
        return found > 0

    def _pictured(self, iteration: Iteration) -> Tensor | None:
        """The candidates of all processes for a grid, uint8 [P, N, 3, height, width], if it is time for one."""
        ends = iteration.number in (1, self.config.iterations)
        wanted = ends or iteration.number % self.config.logging.images_every == 0
        return (
            self.team.gather(pixels(iteration.images).cpu()) if wanted and iteration.images.numel() else None
        )

    def _prompts_meanwhile(self, resume: bool) -> tuple[str, ...]:
        """What is measured in training; read at the start, so that what is not there is not found out later, by whatever
        measures a new run then.
        """
        if self.config.evaluation.every is None:
            asked = self.config.evaluation.prompts
            if asked is not None and not resume:
                try:
                    prompts.load_prompts(asked)
                except InputError as error:
                    raise InputError(f"evaluation.{error}") from error
            return ()
        return prompts.evaluated(self.config.evaluation.prompts, self.config.prompts.set, self.folder)[1]

    def _measured(self, iteration: Iteration) -> Iteration:
        """With figures of the evaluation prompts, if it is time for them."""
        every = self.config.evaluation.every
        if every is None or iteration.number % every:
            return iteration
        start = time.perf_counter()
        try:
            if self._meanwhile is None:
                self._meanwhile = self._made_meanwhile()
            with self.loop.memory.handed_out(self.loop.policy):
                figures = self._meanwhile.figures()
        except (InputError, RunFailedError) as error:
            warnings.warn(
                f"iteration {iteration.number} was not measured: {error}", RuntimeWarning, stacklevel=2
            )
            return iteration
        seconds = iteration.seconds | {"evaluation": time.perf_counter() - start}
        return replace(iteration, metrics=iteration.metrics | figures, seconds=seconds)

    def _picture_meanwhile(self, iteration: Iteration) -> Image.Image | None:
        measured = any(name.startswith(PREFIX) for name in iteration.metrics)
        if self._meanwhile is None or not measured:
            return None
        return self._meanwhile.picture(f"iteration {iteration.number}")

    def _made_meanwhile(self) -> Meanwhile:
        loop = self.loop
        rewards = {"reward": loop.reward}
        if isinstance(loop.reward, SeveralRewards):
            parts = [] if isinstance(self.config.reward, str) else self.config.reward
            rewards = {
                f"reward/{part.name}": reward for part, reward in zip(parts, loop.reward.rewards, strict=True)
            }
        return Meanwhile(
            loop.policy,
            rewards,
            loop.encoder,
            self._asked_meanwhile,
            self.config.evaluation.images_meanwhile,
            batch=loop.rollout_batch.now,
            team=self.team,
            noise=prompt_noise_of(self.config, "test"),
            steps=self.config.evaluation.steps,
            deterministic=self.config.evaluation.deterministic,
        )

    def _began(self) -> bool:
        """Whether the folder has more than a configuration: checkpoints, or the figures of iterations."""
        logged = (self.folder / "metrics.jsonl").is_file()
        return bool(self.team.first(logged or bool(checkpoint.listing(self.folder / "checkpoints"))))

    def _refuse_what_is_there(self) -> None:
        if self._in_the_way():
            run = (self.folder / "config.yaml").is_file()
            onward = f", or go on with it by --resume {self.folder}" if run else ""
            what = "exists and is not empty" if self.folder.is_dir() else "is a file"
            raise InputError(f"{self.folder} {what}; choose another --out{onward}")

    def _in_the_way(self) -> bool:
        """Whether the folder holds something; the first process looks, before any of them writes there."""
        full = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        return bool(self.team.first(full and not _learned_nothing(self.folder)))

    def _stop(self, number: int) -> None:
        self._asked = number
        if self.on_stop is not None:
            self.on_stop()

    def _check_trackers(self) -> None:
        missing = [name for name in self.config.logging.trackers if find_spec(name) is None]
        if missing:
            raise InputError(
                f"logging.trackers: {missing[0]} is not installed: pip install {missing[0]}, or leave it out; metrics.jsonl "
                "has the same figures"
            )

    def _check_resume(self) -> None:
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise InputError(f"--resume {self.folder}: no run folder, for it has no config.yaml")
        self._refuse_changes(load_config(path).model_dump(mode="json"), str(self.folder))

    def _refuse_other_prompts(self) -> None:
        """A file of prompts may have other ones by now."""
        path = self.folder / prompts.FILE
        if path.is_dir():
            raise InputError(f"{path}: expected a file, which a run writes there; got a folder: move it away")
        if path.is_file() and read_json(path) != prompts.as_json(self.loop.prompt_set):
            raise InputError(
                f"--resume {self.folder}: the prompts of {prompts.called(self.config.prompts.set)} are others than it began with, which are in "
                f"{path}; put them back, or start a new run"
            )

    def _refuse_changes(self, before: dict[str, Any] | None, place: str) -> None:
        differing = sorted(_differing(before or {}, self.config.model_dump(mode="json")), key=lambda d: d[0])
        told = {k: f"{k}: {a!r} -> {b!r}" for k, a, b in differing if k.split(".")[0] not in RESUMABLE}
        refused = [text for key, text in told.items() if key not in ROUNDING]
        if refused:
            raise InputError(
                f"--resume {place}: these settings differ and would change the run: {'; '.join(refused)}; "
                f"only {', '.join(sorted(RESUMABLE))} may, and {', '.join(sorted(ROUNDING))}"
            )
        if told and not self._rounded_otherwise:
            self._rounded_otherwise = True
            warnings.warn(
                f"{'; '.join(told.values())}: this rounds otherwise, so the run will not have the bits that it would have had",
                RuntimeWarning,
                stacklevel=4,
            )


class _Log:
    """metrics.jsonl, timings.jsonl, trackers and pictures; none of them may harm training."""

    def __init__(self, trainer: Trainer) -> None:
        self.folder, self.config = trainer.folder, trainer.config
        self.done = trainer.loop.position.iteration
        self.tracker: Any = None

    def __enter__(self) -> _Log:
        # Lines past the checkpoint that is resumed from belong to iterations that will be done again.
        for name in ("metrics.jsonl", "timings.jsonl"):
            path = self.folder / name
            if path.is_file():
                lines = [
                    line
                    for line in path.read_text("utf-8", errors="replace").splitlines()
                    if _iteration(line) <= self.done
                ]
                write_text(path, "".join(f"{line}\n" for line in lines))
        if self.config.logging.trackers:
            with _warned("trackers are off"):
                self.tracker = _trackers(self.config, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        with _warned("a tracker failed at its end"):
            for tracker in self.tracker or ():
                tracker.finish()

    def write(
        self, iteration: Iteration, images: Tensor | None, meanwhile: Image.Image | None = None
    ) -> None:
        pictures = {} if meanwhile is None else {"evaluation": meanwhile}
        try:
            self._append("metrics.jsonl", iteration.metrics)
            self._append("timings.jsonl", {"iteration": iteration.number, **iteration.seconds})
            if images is not None:
                pictures["candidates"] = candidates_grid(
                    images, iteration.prompts, iteration.rewards, iteration.chosen
                )
            for kind, picture in pictures.items():
                name = (
                    f"{iteration.number:06d}.png"
                    if kind == "candidates"
                    else f"{kind}-{iteration.number:06d}.png"
                )
                save_png(picture, self.folder / "images" / name)
        except OSError as error:
            warnings.warn(f"a log could not be written: {error}", RuntimeWarning, stacklevel=2)
        values = {k: v for k, v in iteration.metrics.items() if k != "iteration"}
        values |= {f"seconds/{k}": v for k, v in iteration.seconds.items()}
        with _warned("a tracker failed"):
            for tracker in self.tracker or ():
                for kind, picture in pictures.items():
                    _show(tracker, kind, picture, iteration.number)
                tracker.log(values, step=iteration.number)

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _strict(v) for k, v in values.items()}, allow_nan=False) + "\n")


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """Make a warning of whatever the packages of trackers raise."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what}: {error}", RuntimeWarning, stacklevel=3)


def _trackers(config: TrainConfig, folder: Path) -> list[Any]:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()
    trackers: list[Any] = []
    for name in config.logging.trackers:
        if name == "tensorboard":
            trackers.append(TensorBoardTracker("tensorboard", logging_dir=str(folder)))
        else:
            trackers.append(
                WandBTracker(
                    "driftrl", name=folder.resolve().name, group=config.name, dir=str(folder), config=flat(config),
                    id=_wandb_id(folder), resume="allow",
                )
            )  # fmt: skip
        if hasattr(trackers[-1], "start"):  # older releases of accelerate start by themselves
            trackers[-1].start()
    return trackers


def _show(tracker: Any, kind: str, picture: Image.Image, step: int) -> None:
    """Send a picture, made small enough for a web page."""
    small = picture.convert("RGB")
    small.thumbnail((PAGE, PAGE))
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({kind: np.asarray(small)[None]}, step=step, **layout)


def _wandb_id(folder: Path) -> str:
    """Which run of W&B this folder is, so that a resumed run goes on in the same one."""
    path = folder / "wandb-id.txt"
    if not path.is_file():
        write_text(path, uuid4().hex)
    return path.read_text("utf-8").strip()


def _strict(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a crash: dropped


def _differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in a.items():
        if isinstance(value, dict) and isinstance(b.get(key), dict):
            yield from _differing(value, b[key], f"{prefix}{key}.")
        elif value != b.get(key, value):  # a key that is newer than the checkpoint has its default
            yield f"{prefix}{key}", value, b[key]


def _learned_nothing(folder: Path) -> bool:
    """Whether it is a run that ended before its first iteration did, for its reward failed, say: nothing in it is missed."""
    saved = [path.name for path in checkpoint.listing(folder / "checkpoints")]
    begun = (folder / "config.yaml").is_file() and (folder / prompts.FILE).is_file()
    return begun and saved == [checkpoint.name_of(Position(0))] and not (folder / "metrics.jsonl").exists()


def _resumed(folder: object, out: str | Path | None) -> Path:
    """The folder of the run to go on with, which is not to be named twice."""
    if not isinstance(folder, str | Path):
        raise InputError(f"resume: expected a run folder, or True and the run folder as out; got {folder!r}")
    if out is not None:
        raise InputError(
            f"resume: expected no out beside the run folder {folder}, which is written to; got {out}"
        )
    return Path(folder)


def _free(path: Path) -> Path:
    """The path, or a numbered one that neither exists nor is that of a run yet to begin."""
    number, free = 1, path
    while free.exists() or str(free.absolute()) in _PROMISED:
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _demand_writable(folder: Path) -> None:
    """Refuse a place that cannot be written to, before any model is loaded."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder}: cannot be written to: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written to: {place} is read-only for this user")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder: a second process is refused. The lock goes with the process, however it ends."""
    import fcntl

    try:
        opened = (folder / ".lock").open("a+")
    except OSError as error:
        raise InputError(f"{folder / '.lock'}: cannot be written to: {error.strerror}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder}: another process is writing this run") from None
        yield


@contextmanager
def signals(stop: Callable[[int], None]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM finish the iteration and checkpoint; on a second one stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        # What Python does of itself, even where a script in the background made us ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, previous[signal.SIGTERM])
        stop(number)

    for each in (signal.SIGINT, signal.SIGTERM):
        previous[each] = signal.signal(each, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_space(folder: Path) -> int:
    """Bytes that can still be written where ``folder`` is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free if os.access(place, os.W_OK) else 0
