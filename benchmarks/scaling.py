"""How an iteration's cost grows with the group size G and with prompts: the exponent of a power law, by phase.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--groups 4 8 16 32 64] [--prompts 2 4 8]

CPU seconds of whole iterations of DRIFT on the embedded model (2G candidates, G kept), few denoising steps so that what
is not linear would show. Of several threads CPU seconds count their waiting too, so take one. An exponent of 1 is linear;
below it, a fixed cost is still being spread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from driftrl.build import build_loop
from driftrl.config import parse_config


def cost(prompts: int, group: int, repeats: int) -> float:
    """Median CPU seconds of an iteration."""
    config = parse_config(
        {
            "prompts": {"set": "animals8", "per_iteration": prompts},
            "sampling": {"steps": 3, "candidates": 2 * group},
            "selection": {"keep": group},
        }
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = build_loop(config, Path(folder))
        loop.iterate()
        times = []
        for _ in range(repeats):
            start = time.process_time()
            loop.iterate()
            times.append(time.process_time() - start)
    return statistics.median(times)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of log cost over log size, least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    centre, height = statistics.mean(x), statistics.mean(y)
    rise = sum((a - centre) * (b - height) for a, b in zip(x, y, strict=True))
    return rise / sum((a - centre) ** 2 for a in x)


def main() -> int:
    """Print both tables; exit with 1 if a cost grows faster than linearly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    slopes = []
    for name, sizes, run in (
        ("G, 2 prompts", args.groups, lambda size: cost(2, size, args.repeats)),
        ("prompts, G = 8", args.prompts, lambda size: cost(size, 8, args.repeats)),
    ):
        costs = [run(size) for size in sizes]
        slopes.append(exponent(sizes, costs))
        print(f"{name:16}" + "".join(f"{size:>9}" for size in sizes))
        print(f"{'CPU seconds':16}" + "".join(f"{c:9.2f}" for c in costs))
        print(f"{'each, ms':16}" + "".join(f"{1000 * c / s:9.1f}" for s, c in zip(sizes, costs, strict=True)))
        print(f"exponent {slopes[-1]:.2f}\n")
    return 0 if max(slopes) <= 1.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
