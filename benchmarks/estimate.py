"""How near `driftrl estimate` comes: seconds and memory of an iteration, estimated and measured, each in a fresh process.

    python benchmarks/estimate.py                            # several settings of the embedded model; minutes, on a machine left alone
    python benchmarks/estimate.py --only lora --iterations 3

Exits with 1 if an estimate is off by more than a fifth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

COMMON = ["prompts.per_iteration=3", "sampling.candidates=8", "selection.keep=6", "logging.trackers=[]"]
CASES = {
    "lora": [],
    "guided": ["sampling.guidance_scale=5.0", "objective.kl_weight=0.01", "sampling.batch_size=8"],
    "checkpointed": [
        "model.gradient_checkpointing=true",
        "objective.timesteps=1.0",
        "optimizer.batch_size=16",
    ],
    "full": ["adapter.kind=full", "sampling.steps=6", "optimizer.updates=1"],
    "one pass": [
        "selection.strategy=all",
        "selection.keep=8",
        "optimizer.updates=1",
        "objective.timesteps=1.0",
    ],
    "bfloat16": ["model.dtype=bfloat16", "sampling.steps=6"],
}


def loop_of(name: str) -> Any:
    """The objects of a run."""
    from transformers.utils import logging

    from driftrl.build import build_loop
    from driftrl.config import load_config

    logging.disable_progress_bar()
    return build_loop(load_config(None, COMMON + CASES[name]), Path(tempfile.mkdtemp()))


def estimated(name: str) -> tuple[float, int]:
    """Seconds and bytes of an iteration, as `driftrl estimate` says."""
    from driftrl import probe
    from driftrl.estimate import peaks, seconds

    loop = loop_of(name)
    plan, standing, gradients = probe.plan_of(loop), probe.standing_of(loop), probe.gradients_of(loop)
    stored, pictures, costs = probe.stored_of(loop, plan), probe.pictures_of(loop, plan), probe.measure(loop)
    took = sum(own for _, own in seconds(plan, costs).items())
    in_use = peaks(plan, standing, stored, pictures, gradients, costs.working)
    return took, int(max(most for _, most in in_use.items()))


def measured(name: str, iterations: int) -> tuple[float, int]:
    """The same of real iterations: the median, after a first one that only warms up, and the most memory of all."""
    from driftrl import probe

    loop, times = loop_of(name), []
    probe.start_peak(loop.policy.device)
    for _ in range(iterations + 1):
        start = time.perf_counter()
        loop.iterate()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), probe.peak(loop.policy.device)


def in_a_process(kind: str, name: str, iterations: int) -> tuple[float, int]:
    """What another process found."""
    command = [sys.executable, __file__, "--only", name, "--kind", kind, "--iterations", str(iterations)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    took, most = json.loads(found)
    return took, most


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--kind", choices=["estimated", "measured"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kind:
        warnings.simplefilter("ignore")
        found = estimated(given.only) if given.kind == "estimated" else measured(given.only, given.iterations)
        print(json.dumps(found))
        return
    worst = 0.0
    print("| Settings | Seconds, estimated | measured | off by | MiB, estimated | measured | off by |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in [given.only] if given.only else CASES:
        guess, real = (in_a_process(kind, name, given.iterations) for kind in ("estimated", "measured"))
        off = [g / r - 1 for g, r in zip(guess, real, strict=True)]
        worst = max(worst, *map(abs, off))
        print(
            f"| {name} | {guess[0]:.2f} | {real[0]:.2f} | {off[0]:+.0%} | {guess[1] / 2**20:.0f} "
            f"| {real[1] / 2**20:.0f} | {off[1]:+.0%} |", flush=True,
        )  # fmt: skip
    sys.exit(worst > 0.2)


if __name__ == "__main__":
    main()
