"""A reward that may raise, hang or lie, made safe to train with."""

from __future__ import annotations

import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from driftrl.batches import BatchSize, in_batches
from driftrl.checks import InputError, RunFailedError
from driftrl.gradients import asked
from driftrl.rewards.calling import ask, scores_of
from driftrl.types import Reward


class GuardedReward:
    """Retries a reward that raises or takes too long, then reports it with its prompts."""

    def __init__(
        self,
        reward: Reward,
        attempts: int = 3,
        timeout: float | None = None,
        pause: float = 1.0,
        name: str = "",
    ) -> None:
        """Wrap ``reward``.

        Args:
            reward: ``(images [N, 3, H, W], prompts) -> Tensor[N]``, with ``metadata`` too if it has such an argument.
            attempts: how often it is tried, at least once.
            timeout: seconds for one try; None waits for ever.
            pause: seconds before the second try; doubled before each further one.
            name: which of several rewards this is, for messages.
        """
        self.reward, self.attempts, self.timeout, self.pause = reward, attempts, timeout, pause
        self.name, self.title = name, f"reward {name}".strip()
        self._batch: BatchSize | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images: float32 [N], detached unless the images have a gradient coming.

        Raises:
            InputError: if what the reward returned is no tensor of N numbers: it would do so again.
            RunFailedError: if every attempt raised or took too long, or the reward raised this itself: it has
                tried again on its own.
        """
        problem, last = "", None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self._scores(images, prompts)
            except (InputError, RunFailedError) as error:
                if self.name in str(error):  # the empty name is in every one
                    raise
                raise type(error)(f"{self.title}: {error}") from error
            except (Exception, SystemExit) as error:  # sys.exit in a reward is not the end of the program
                problem, last = f"{type(error).__name__}: {error}{where_raised(error)}", error
        asked = list(dict.fromkeys(prompts))
        named = ", ".join(repr(p) for p in asked[:3]) + (
            f" and {len(asked) - 3} more" if len(asked) > 3 else ""
        )
        often = "once" if self.attempts == 1 else f"{self.attempts} times"
        raise RunFailedError(
            f"the {self.title} failed {often} for {named}; the last time: {problem}"
        ) from last

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of all, fewer at once where memory does not suffice, and from then on."""
        batch = self._batch or BatchSize(max(1, len(prompts)), f"{self.title}: images at once,")

        scores = in_batches(batch, len(prompts), lambda rows: self._part(images[rows], prompts[rows]))
        if batch.now < len(prompts):
            self._batch = batch
        return scores

    def _part(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        answer = self._call(images, prompts)
        return scores_of(answer, len(prompts), self.title, asked(images)).to(torch.float32)

    def _call(self, images: Tensor, prompts: Sequence[str]) -> object:
        return untouched(self.title, images, lambda: self._answer(images, prompts))

    def _answer(self, images: Tensor, prompts: Sequence[str]) -> object:
        if self.timeout is None:
            return ask(self.reward, images, prompts)
        answer: list[object] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                if images.device.type == "cuda":
                    torch.cuda.set_device(images.device)  # which each thread has of its own
                answer.append(ask(self.reward, images, prompts))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True)  # a hung call must not keep the process alive
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise TimeoutError(f"no answer within {self.timeout:g} s")
        if failure:
            raise failure[0]
        return answer[0]


def untouched(title: str, images: Tensor, call: Callable[[], object]) -> object:
    """What ``call`` returns, if it leaves ``images`` as they are.

    Raises:
        InputError: if not.
    """
    before = _writes(images)
    answer = call()
    if _writes(images) != before:
        raise InputError(
            f"{title}: it changed the images that it was given, which others measure too; expected a reward that "
            "works on copies (x = images.clone(), x - mean in place of x.sub_(mean))"
        )
    return answer


def _writes(images: Tensor) -> tuple[int, str]:
    """What changes when a tensor is written to in place; NumPy's writes are not counted, so on a CPU the sum is taken too."""
    count = 0 if images.is_inference() else images._version
    return count, str(float(images.detach().sum(dtype=torch.float64))) if images.device.type == "cpu" else ""


def where_raised(error: BaseException) -> str:
    """Where in the user's code an error came up: the last place that is neither this package's nor an installed one's."""
    package = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((package, sysconfig.get_path("stdlib"), "<")) and (
            "site-packages" not in frame.filename
        ):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""
