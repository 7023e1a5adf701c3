"""Processes, a few at a time: started, watched, tried again, told to stop."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAUSE = 0.2
"""Seconds between looks at the processes."""
WIDTH = "1000"
"""Of lines in logs, so that a message stays on one."""
REFUSED = 2
"""Exit status for bad input, which another try cannot help."""


def slots(jobs: int | None = None, threads: int | None = None, gpus: bool = True) -> list[dict[str, str]]:
    """The environment of each process that runs at a time.

    Args:
        jobs: how many; by default one for each GPU, or one for each core: processes of one thread each get more out
            of a CPU than one process of many threads.
        threads: CPU threads of each; by default the cores shared out.
        gpus: whether they may use GPUs; those that there are are then given out in turn.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cards = _gpus() if gpus else []
    count = jobs or len(cards) or cores
    own = {"OMP_NUM_THREADS": str(threads or max(1, cores // count))}
    return [own | ({"CUDA_VISIBLE_DEVICES": cards[k % len(cards)]} if cards else {}) for k in range(count)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(k) for k in range(count)]


@dataclass(frozen=True)
class Task:
    """Commands that run one after the other, each once the one before it has ended well."""

    name: str
    commands: Sequence[Sequence[str]]
    log: Path
    """What they print is appended here."""


@dataclass(frozen=True)
class Failure:
    """A task that was given up."""

    task: Task
    status: int
    """Exit status; negative is the signal that ended it."""

    @property
    def reason(self) -> str:
        """The last line of its log."""
        lines = self.task.log.read_text("utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@dataclass
class _Running:
    task: Task
    slot: int
    command: int
    process: subprocess.Popen[bytes]
    told: bool = False
    """To stop."""


class Pool:
    """Runs tasks in slots."""

    def __init__(
        self,
        tasks: Sequence[Task],
        slots: Sequence[Mapping[str, str]],
        retries: int = 1,
        tell: Callable[[str, Task], Any] = lambda event, task: None,
        look: Callable[[Sequence[Task]], Any] = lambda running: None,
    ) -> None:
        """Nothing starts before `run`.

        Args:
            tasks: in the order in which they start.
            slots: environment variables of each slot; there are as many tasks at a time as slots.
            retries: how often a task that fails is tried again, from the command that failed.
            tell: called with 'started', 'again', 'failed', 'stopped' or 'done', and the task.
            look: called over and over with the tasks that are running.
        """
        self.slots, self.tell, self.look = slots, tell, look
        self.failures: list[Failure] = []
        self._waiting = deque((task, 0) for task in tasks)
        self._free = deque(range(len(slots)))
        self._retries = dict.fromkeys((task.name for task in tasks), retries)
        self._again: set[str] = set()
        self._running: list[_Running] = []
        self._stopping = False

    def run(self) -> list[Failure]:
        """Run all tasks, and return those that failed; after `stop`, those that failed before."""
        try:
            while self._running or (self._waiting and not self._stopping):
                while self._waiting and self._free and not self._stopping:
                    task, command = self._waiting.popleft()
                    self._start(task, command, self._free.popleft())
                    self.tell("again" if task.name in self._again else "started", task)
                for each in self._running if self._stopping else ():
                    if not each.told:
                        each.process.terminate()
                        each.told = True
                for each in list(self._running):
                    status = each.process.poll()
                    if status is not None:
                        self._running.remove(each)
                        self._ended(each, status)
                self.look([each.task for each in self._running])
                if self._running:
                    time.sleep(PAUSE)
        finally:  # an exception, such as a second Ctrl-C, leaves no process behind
            for each in self._running:
                each.process.terminate()
            for each in self._running:
                each.process.wait()
        return self.failures

    def stop(self) -> None:
        """Start nothing more, and tell what is running to end; `run` returns when it has."""
        self._stopping = True

    def _start(self, task: Task, command: int, slot: int) -> None:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            process = subprocess.Popen(
                list(task.commands[command]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": WIDTH, **self.slots[slot]},
                start_new_session=True,  # Ctrl-C is for us: a process told twice would not save its work
            )
        self._running.append(_Running(task, slot, command, process))

    def _ended(self, each: _Running, status: int) -> None:
        task, following = each.task, each.command + 1
        if status == 0 and following < len(task.commands) and not self._stopping:
            self._start(task, following, each.slot)
            return
        self._free.append(each.slot)
        if status == 0 and following == len(task.commands):
            self.tell("done", task)
        elif self._stopping:
            self.tell("stopped", task)
        elif self._retries[task.name] and status != REFUSED:
            self._retries[task.name] -= 1
            self._again.add(task.name)
            self._waiting.append((task, each.command))
        else:
            self.failures.append(Failure(task, status))
            self.tell("failed", task)
