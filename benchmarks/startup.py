"""How long one waits: for ``driftrl --help``, and for the first lines of ``driftrl train`` with its defaults.

    python benchmarks/startup.py [--repeats 5]

Wall-clock seconds, medians; exits with 1 if help takes 0.5 s or more, or training 10 s or more to its first line.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

COMMAND = [sys.executable, "-m", "driftrl.cli.main"]


def helped() -> float:
    """Seconds of ``--help``."""
    start = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def trained() -> tuple[float, float]:
    """Seconds until training says that it begins, and until it has done an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        start, begun = time.perf_counter(), 0.0
        process = subprocess.Popen(
            [*COMMAND, "train", "--out", f"{folder}/run"], stderr=subprocess.PIPE, text=True
        )
        try:
            for line in process.stderr or ():
                if "iterations:" in line:
                    begun = time.perf_counter() - start
                if line.startswith("iteration 1/"):
                    return begun, time.perf_counter() - start
        finally:
            process.kill()
            process.communicate()
    raise RuntimeError("driftrl train ended before its first iteration")


def main() -> int:
    """Print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    helping = statistics.median(helped() for _ in range(repeats))
    begun, first = (
        statistics.median(times) for times in zip(*(trained() for _ in range(repeats)), strict=True)
    )
    print(f"driftrl --help               {helping:6.2f} s")
    print(f"driftrl train, first line    {begun:6.2f} s")
    print(f"driftrl train, 1st iteration {first:6.2f} s")
    return 0 if helping < 0.5 and begun < 10 else 1


if __name__ == "__main__":
    raise SystemExit(main())
