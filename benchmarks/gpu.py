"""Stable Diffusion 1.5 on a GPU: a prompt's rollout, reward and update, and what share of the card's rate they reach.

    python benchmarks/gpu.py                                 # 512 x 512, bf16, 16 candidates, 50 steps, guidance 5
    python benchmarks/gpu.py --memory 24                     # the same within 24 GB
    python benchmarks/gpu.py --set model.compile=true --set optimizer.updates=1
    python benchmarks/gpu.py --small                         # the embedded model, on any machine: whether it runs

The paper's configuration with one prompt an iteration, random weights of the true sizes (written once to --cache, 8 GB;
nothing is downloaded) and PickScore at CLIP-H's size. Operations are those of `benchmarks/floor.py`; the card's rate is
measured here, by products of 8192 x 8192 matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from floor import parts_of, phases_of

from driftrl import probe
from driftrl.build import build_loop, open_sizes
from driftrl.config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.path=tiny-animals", "model.dtype=float32", "reward=tiny-animals", "sampling.steps=4", "sampling.candidates=4",
    "selection.keep=2", "sampling.batch_size=4", "optimizer.batch_size=4",
]  # fmt: skip


def random_models(cache: Path) -> list[str]:
    """The settings that name random Stable Diffusion 1.5 and CLIP-H, which are made where they are missing."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/policies")]
    import families

    for name, make in (("sd15", families.make_sd15), ("clip-h", families.make_clip_h)):
        if not (cache / name / "whole").exists():
            print(f"writing {cache / name}", file=sys.stderr)
            make(cache / name)
            (cache / name / "whole").touch()
    return [f"model.path={cache / 'sd15'}", f"reward=pickscore@{cache / 'clip-h'}"]


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(11):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(config: TrainConfig, taught: int) -> float:
    """Of an iteration of one prompt: forward, and where something is learned backward; scoring again is not counted, nor
    is a second forward pass under checkpointing.
    """
    phases, pairs = phases_of(config, *parts_of(config), batch=config.sampling.batch_size or 1)
    found = {name: count for name, count, _ in phases}
    if taught:  # in one pass: backward for every candidate, and nothing is replayed
        branches = 1 if config.sampling.guidance_scale == 1 else 2
        rows = config.sampling.candidates * taught * branches
        found["update"] = found["update"] / (2 * pairs) * rows
    return sum(found.values())


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--memory", type=float, help="GB that the process may have")
    parser.add_argument("--iterations", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/gpu")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.exit(2, "error: this needs a CUDA GPU; --small runs a small model anywhere\n")
    warnings.simplefilter("ignore")
    settings = [
        "prompts.per_iteration=1",
        "shaping.encoder=tiny-animals",
        "model.vae_slicing=false",
        "logging.trackers=[]",
        "evaluation.at_end=false",
    ]
    settings += SMALL if args.small else random_models(args.cache)
    if args.memory:
        settings.append(f"model.memory_budget={args.memory / 1.073741824:.2f}")
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 1e9 / total))
    config = load_config(ROOT / "experiments/paper/sd15-pickscore.yaml", settings + args.set)
    loop = build_loop(config, Path())
    probe.fit(loop, config.model.memory_budget, *open_sizes(config))
    device: Any = loop.policy.device
    laps = []
    for number in range(args.iterations + 1):
        if number == 1:
            probe.start_peak(device)
        wait(device)
        start = time.perf_counter()
        done = loop.iterate()
        wait(device)
        laps.append({**done.seconds, "all": time.perf_counter() - start})
    best = rate(device, getattr(torch, config.model.dtype))
    plan = probe.plan_of(loop)
    count = operations(config, plan.backward)
    median = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[-1]}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {config.model.dtype}; {plan.candidates} candidates, {plan.keep} kept, {plan.steps} steps; batches of "
          f"{plan.rollout_batch} and {plan.update_batch}; {'one pass' if plan.backward else 'replay'}")  # fmt: skip
    for phase, seconds in median.items():
        print(f"{phase:12}{seconds:9.3f} s")
    print(f"peak memory {probe.peak(device) / 2**30:.2f} GiB")
    print(
        f"matrix products {best / 1e12:.2f} TFLOP/s; an iteration's {count / 1e12:.2f} TFLOP at {count / median['all'] / best:.0%} of that"
    )
    ratio, scored = done.metrics["policy/ratio_deviation"], done.metrics["policy/rescored_by"]
    print(f"|ratio - 1| at most {ratio:.2e}, scoring again changed log-probabilities by {scored:.2e}")
    print("RESULT " + json.dumps({"seconds": median, "rate": best, "operations": count, "device": name}))


if __name__ == "__main__":
    main()
