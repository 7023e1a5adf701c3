"""driftrl beside TRL's DDPOTrainer on identical work, and beside the floor: the bare forward and backward passes.

With --ddpo also beside ddpo-pytorch (github.com/kvablack/ddpo-pytorch), of which you bring a checkout: its own training
script is run from there, in its own environment.

    python benchmarks/peers.py                      # makes .venv-trl from pinned versions, then measures
    python benchmarks/peers.py --rounds 5 --out runs/peers.json
    OMP_NUM_THREADS=1 python benchmarks/peers.py    # on one core
    python benchmarks/peers.py --alignprop --trained 1   # the gradient of the reward instead, beside TRL's AlignPropTrainer
    python benchmarks/peers.py --ddpo ../ddpo-pytorch  # makes .venv-ddpo as well (Python 3.11)

Same pipeline folder, images, denoising steps, guidance, trained steps, adapter (rank, targets), precision (float32),
reward and number of optimiser steps (one an iteration). With one step driftrl takes gradients while it draws; the row "with
replay" is driftrl where it replays the candidates, as the rivals do and as several steps need. Everyone first tries batch sizes and keeps the fastest, so
that a rival is not measured at a bad one. Then the contenders take turns, each in its own process, round by round, so
that a machine which slows down slows all of them; ratios are of medians over all timed iterations.

What is not identical, in the rivals' favour: driftrl also embeds every image and measures the groups' diversity, and the
pictures that ddpo-pytorch writes for its log are not counted. docs/performance.md lists the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "src/driftrl/assets/tiny-animals/pipeline"
PHASES = ("rollout", "decode", "reward", "diversity", "update")
DDPO_FILES = ("scripts/train.py", "config/base.py", "ddpo_pytorch/rewards.py", "ddpo_pytorch/prompts.py")


def rival_environment(folder: Path, pins: str, packages: list[str]) -> Path:
    """A rival's Python, installed on first use, torch first."""
    python = folder / "bin/python"
    if not (folder / "installed").exists():
        print(f"installing a rival's libraries into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["-c", HERE / "peers" / pins]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, *packages], check=True)
        (folder / "installed").touch()
    return python


def refuse(checkout: Path, environment: Path) -> str | None:
    """Why ddpo-pytorch cannot be run from there, if so."""
    missing = [name for name in DDPO_FILES if not (checkout / name).is_file()]
    if missing:
        return f"--ddpo {checkout} is no checkout of ddpo-pytorch: it has no {', '.join(missing)}"
    if sys.version_info >= (3, 12) and not (environment / "installed").exists():
        return "--ddpo needs Python 3.11: its pinned libraries of 2023 have no wheels for later ones"
    return None


def measure(command: list[str | Path], work: list[str]) -> dict[str, Any]:
    """Run a contender once."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [*command, *work], check=False, capture_output=True, text=True, cwd=HERE / "peers", env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def median(results: list[dict[str, Any]], key: str) -> float:
    """Over all timed iterations."""
    return statistics.median(lap.get(key, 0.0) for result in results for lap in result["laps"])


def find_contenders(args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """The command of each, rivals first, from environments that are made where they are missing."""
    trl = rival_environment(
        args.environment, "constraints.txt", ["trl", "diffusers", "transformers", "peft", "ftfy"]
    )
    if args.alignprop:
        return {"TRL AlignProp": [trl, "trl_alignprop.py"], "driftrl": [sys.executable, "ours.py", "--draft"]}
    contenders: dict[str, list[str | Path]] = {"TRL DDPO": [trl, "trl_ddpo.py"]}
    if args.ddpo:
        ddpo = rival_environment(args.ddpo_environment, "ddpo-constraints.txt", [
            "diffusers", "accelerate", "transformers", "huggingface_hub", "numpy", "setuptools", "absl-py", "ml-collections",
            "inflect", "pydantic"])  # fmt: skip
        contenders["ddpo-pytorch"] = [ddpo, "kvablack_ddpo.py", args.ddpo.resolve()]
    contenders["driftrl"] = [sys.executable, "ours.py"]
    contenders["with replay"] = [sys.executable, "ours.py", "--replay"]
    contenders["floor"] = [sys.executable, "ours.py", "--floor"]
    return contenders


def best_batches(command: list[str | Path], work: list[str], batches: list[int]) -> list[str]:
    """The options of the fastest batch sizes, each tried in one iteration."""
    tried = {
        b: measure(command, [*work, f"--rollout-batch={b}", f"--update-batch={b}", "--iterations=1"])
        for b in batches
    }
    rollout = min(batches, key=lambda b: tried[b]["laps"][0]["rollout"])
    fits = [b for b in batches if rollout % b == 0]  # both rivals demand it
    update = min(fits, key=lambda b: tried[b]["laps"][0]["update"])
    return [f"--rollout-batch={rollout}", f"--update-batch={update}"]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trained", type=int, default=9)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--environment", type=Path, default=HERE.parent / ".venv-trl")
    parser.add_argument("--ddpo", type=Path, metavar="PATH", help="your checkout of ddpo-pytorch")
    parser.add_argument("--ddpo-environment", type=Path, default=HERE.parent / ".venv-ddpo")
    parser.add_argument(
        "--alignprop", action="store_true", help="the gradient of the reward, through --trained steps"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.ddpo and (reason := refuse(args.ddpo, args.ddpo_environment)):
        parser.exit(2, f"error: {reason}\n")
    return args


def main() -> int:
    """Measure, print the table, say whether the aims are met."""
    args = parse()
    contenders = find_contenders(args)
    work = [f"--model={args.model.resolve()}"]
    work += [
        f"--{k}={getattr(args, k)}" for k in ("prompts", "candidates", "steps", "trained", "guidance", "rank")
    ]
    images = args.prompts * args.candidates
    batches = [b for b in args.batches if images % b == 0]
    settings: dict[str, list[str]] = {}
    for name, command in contenders.items():
        settings[name] = best_batches(command, work, batches)
        print(f"{name}: {' '.join(settings[name])}", file=sys.stderr)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        for name, command in contenders.items():
            results[name].append(
                measure(command, [*work, *settings[name], f"--iterations={args.iterations}"])
            )
            print(f"round {turn + 1}: {name} {median(results[name][-1:], 'total'):.2f} s", file=sys.stderr)

    threads = results["driftrl"][0]["threads"]
    print(f"{images} images, {args.steps} steps, guidance {args.guidance:g}, {args.trained} trained steps, rank {args.rank}, "
          f"float32, {threads} thread(s); median seconds an iteration\n")  # fmt: skip
    print(
        f"{'':13}{'total':>8}{'spread':>16}"
        + "".join(f"{p:>11}" for p in PHASES)
        + f"{'images/s':>10}{'peak MiB':>10}"
    )
    for name, own in results.items():
        totals = sorted(lap["total"] for result in own for lap in result["laps"])
        spread = f"{totals[0]:.2f} to {totals[-1]:.2f}"
        print(f"{name:13}{median(own, 'total'):8.2f}{spread:>16}" + "".join(f"{median(own, p):11.2f}" for p in PHASES)
              + f"{images / median(own, 'total'):10.2f}{max(r['peak_mib'] for r in own):10.0f}")  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"settings": settings, "work": work[1:], "results": results}, indent=1)
        )
    ours = median(results["driftrl"], "total")
    print()
    if args.alignprop:
        faster = median(results["TRL AlignProp"], "total") / ours
        print(f"driftrl is {faster:.2f} times as fast as TRL's AlignPropTrainer (goal 1.5)")
        return 0 if faster >= 1.5 else 1
    faster, over = median(results["TRL DDPO"], "total") / ours, ours / median(results["floor"], "total")
    if args.ddpo:
        ratio = median(results["ddpo-pytorch"], "total") / ours
        print(f"driftrl is {ratio:.2f} times as fast as ddpo-pytorch")
    print(
        f"driftrl is {faster:.2f} times as fast as TRL (goal 1.5), and takes {over:.2f} times its floor (goal 1.15)"
    )
    return 0 if faster >= 1.5 and over <= 1.15 else 1


if __name__ == "__main__":
    raise SystemExit(main())
