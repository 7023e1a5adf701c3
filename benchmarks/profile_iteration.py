"""Where the time of an iteration goes, by kind of work: torch's profiler over the work of `benchmarks/peers.py`.

    OMP_NUM_THREADS=1 python benchmarks/profile_iteration.py            # one pass
    OMP_NUM_THREADS=1 python benchmarks/profile_iteration.py --replay   # rollout, then replay

On one thread, for the profiler counts the seconds of the thread that calls.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

import ours  # noqa: E402
import work  # noqa: E402

from driftrl.build import build_loop  # noqa: E402

KINDS = (
    ("convolutions", ("convolution",)),
    ("attention", ("scaled_dot_product",)),
    ("linear layers and other matrix products", ("linear", "mm", "addmm", "matmul")),
    ("normalisation", ("norm",)),
    (
        "activations and other arithmetic",
        ("silu", "gelu", "aten::mul", "aten::add", "aten::sum", "aten::div"),
    ),
    ("copies", ("copy", "cat", "repeat", "stack", "index")),
)


def kind_of(operator: str) -> str:
    """The first kind that an operator's name fits."""
    return next((kind for kind, words in KINDS if any(word in operator for word in words)), "everything else")


def main() -> None:
    """Profile one iteration after one that is not, and print a table."""
    replay = "--replay" in sys.argv
    sys.argv = [sys.argv[0], f"--model={HERE.parent / 'src/driftrl/assets/tiny-animals/pipeline'}"]
    args = work.parse(__doc__ or "")
    args.replay = replay
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        loop = build_loop(ours.configuration(args, Path(folder)), Path(folder))
        loop.iterate()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            loop.iterate()
    seconds: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    whole = sum(seconds.values())
    print(
        f"an iteration, {'rollout and replay' if replay else 'one pass'}, {torch.get_num_threads()} thread(s): {whole:.1f} s\n"
    )
    for kind, own in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:42}{own:8.2f} s{own / whole:7.0%}")


if __name__ == "__main__":
    main()
