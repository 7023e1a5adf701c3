"""Vendi score: ours beside the published package ``vendi-score``, in one process and one run.

    pip install vendi-score
    python benchmarks/vendi.py [--items 5000] [--features 512] [--repeats 5]

``score_X`` is what the package offers for features and decomposes the N x N kernel; ``score_dual``, which a
user has to find, decomposes the D x D one as ours does. Exits with status 1 if ours is not at least
``--least`` times as fast as ``score_X``, or if the figures differ.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from vendi_score import vendi

from driftrl.diversity.functional import vendi_score


def best_of(repeats: int, call: Callable[[], float]) -> tuple[float, float]:
    """Return the result and the least of the wall times in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times)


def main() -> int:
    """Time each, print a table, and say whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--least", type=float, default=10.0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.items, options.features, generator=generator, dtype=torch.float64)
    array, single = x.numpy(), x.float()
    vendi_score(x)  # first call loads the libraries
    ours, our_time = best_of(options.repeats, lambda: float(vendi_score(x)))
    rows = [
        ("driftrl vendi_score, float64", ours, our_time),
        ("driftrl vendi_score, float32 in", *best_of(options.repeats, lambda: float(vendi_score(single)))),
        ("driftrl vendi_score, q = 0.5", *best_of(options.repeats, lambda: float(vendi_score(x, 0.5)))),
        ("vendi-score score_dual", *best_of(options.repeats, lambda: float(vendi.score_dual(array)))),
        ("vendi-score score_X", *best_of(1, lambda: float(vendi.score_X(array)))),
    ]
    print(f"n = {options.items}, d = {options.features}, {torch.get_num_threads()} thread(s)\n")
    print(f"{'':32}{'score':>12}{'seconds':>12}{'over ours':>12}")
    for name, score, seconds in rows:
        print(f"{name:32}{score:12.5f}{seconds:12.4f}{seconds / our_time:12.2f}")
    theirs, their_time = rows[-1][1:]
    agree = abs(ours - theirs) <= 1e-6 * theirs
    ratio = their_time / our_time
    verdict = "agree" if agree else "DIFFER"
    print(f"\n{ratio:.0f} times as fast as score_X (goal: {options.least:g}); figures {verdict}")
    return 0 if agree and ratio >= options.least else 1


if __name__ == "__main__":
    raise SystemExit(main())
