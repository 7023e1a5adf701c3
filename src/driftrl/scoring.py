"""Rewards of an iteration's images: of all at once, or of each batch while the next one is drawn."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

from driftrl.checks import NotFiniteError
from driftrl.types import Reward


class Scoring:
    """Scores images by several rewards in turn, in the background if that is wanted.

    Each call of a reward gets a whole batch, all rewards the very same tensor, so that those on one CLIP model embed
    it once; guards count attempts and seconds by call. In the background there is one thread: the next batch waits for
    the one before, and after an error none is asked any more. To be used within ``with``, once.
    """

    def __init__(self, rewards: Sequence[Reward], prompts: Sequence[str], overlap: bool) -> None:
        """For N images of ``prompts`` [N]; with ``overlap`` each batch is scored as soon as it is added."""
        self._rewards, self._prompts, self._overlap = tuple(rewards), list(prompts), overlap
        self._parts: list[Future[list[Tensor]]] = []
        self._added = 0
        self._device: torch.device | None = None
        self._queue: SimpleQueue[tuple[Future[list[Tensor]], Tensor, list[str]] | None] = SimpleQueue()
        self._left = threading.Event()

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._queue.put(None)

    def add(self, images: Tensor) -> None:
        """The next images [n, 3, H, W] are finished."""
        if not self._overlap:
            return
        if not self._parts:
            self._device = images.device
            # A daemon: a reward that hangs must not keep the process alive, as a pool's thread would.
            threading.Thread(target=self._work, name="driftrl-reward", daemon=True).start()
        future: Future[list[Tensor]] = Future()
        prompts = self._prompts[self._added : self._added + len(images)]
        self._added += len(images)
        self._parts.append(future)
        self._queue.put((future, images, prompts))

    def scores(self, images: Tensor) -> list[Tensor]:
        """What each reward gives all N images [N, 3, H, W], which were added before: [N], or [N, R] of R at once.

        Raises:
            Exception: what a reward raised, of several batches in the first one.
        """
        if not self._overlap:
            return self._score(images, self._prompts)
        parts = [future.result() for future in self._parts]
        return [torch.cat(columns) for columns in zip(*parts, strict=True)]

    def _score(self, images: Tensor, prompts: list[str]) -> list[Tensor]:
        return [reward(images, prompts).float() for reward in self._rewards]

    def _work(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # which each thread has of its own
        problem: BaseException | None = None
        while (job := self._queue.get()) is not None and not self._left.is_set():
            future, images, prompts = job
            del job
            try:
                if problem is not None:
                    raise problem
                if not bool(
                    torch.isfinite(images).all()
                ):  # the latents are not either, which ends the iteration
                    raise NotFiniteError("an image is not finite")
                future.set_result(self._score(images, prompts))
            except BaseException as error:
                problem = error
                future.set_exception(error)
            del future, images  # not kept until the next ones come
