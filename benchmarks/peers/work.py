"""The work that every contender does, and how it reports: standard library and torch only, for each has its own
environment.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

PROMPTS = ("a bird", "a cat", "a cow", "a dog", "a horse", "a mouse", "a rabbit", "a sheep")
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def parse(doc: str) -> argparse.Namespace:
    """The options that say what the work is; the same for everyone."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", required=True, help="a StableDiffusionPipeline folder")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=8, help="images for each prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trained", type=int, default=9, help="denoising steps trained on, of each image")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rollout-batch", type=int, default=32)
    parser.add_argument("--update-batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3, help="timed, after one that is not")
    return parser.parse_args()


def reward(images: torch.Tensor) -> torch.Tensor:
    """How much more red than green there is in each of the images [N, 3, H, W]: costs next to nothing."""
    return (images[:, 0] - images[:, 1]).float().mean((1, 2))


class Clock:
    """Adds up the time spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted under ``name``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call

    def lap(self) -> dict[str, float]:
        """What was added up, and start again."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def report(laps: list[dict[str, float]], **facts: Any) -> None:
    """Print the one line that the table is made from."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        "RESULT " + json.dumps({"laps": laps, "peak_mib": peak, "threads": torch.get_num_threads(), **facts})
    )
