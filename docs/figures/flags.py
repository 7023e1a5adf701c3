"""The flags of the base model, and of two methods when each first reaches the same reward: docs/images/flags.png.

python docs/figures/flags.py                   # GRPO, and DRIFT less its selection, at their best rates
python docs/figures/flags.py --level -0.3 --methods grpo dancegrpo

A row for each country; its right flags are six, so more kinds than that are failures.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from driftrl.config import load_config
from driftrl.evaluation.picture import INK, MUTED

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/flags"))

import run  # noqa: E402
import world  # noqa: E402

SHOWN, GAP, TALL, WIDE = 12, 3, 16, 8
"""Flags of each country, and pixels: between two of them, of a flag's height, of a stripe's width."""


def sheet(images: Tensor) -> Tensor:
    """Flags [P, N, 3, 1, 3] as one picture [height, width, 3], a row for each country."""
    large = images.repeat_interleave(TALL, 3).repeat_interleave(WIDE, 4)
    large = torch.nn.functional.pad(large, (0, GAP, 0, GAP), value=1.0)
    rows, columns, _, height, width = large.shape
    return large.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)


def at_level(name: str, level: float, iterations: int, points: int) -> tuple[Tensor, list[float], int] | None:
    """Pictures, figures and iteration where seed 0 of a method first has a reward of ``level``, if it gets there."""
    file = ROOT / f"experiments/methods/{name}.yaml"
    config = run.here(load_config(file, []), iterations)
    rate = run.best_rates(run.RESULTS / "methods-rates.json").get(name, config.optimizer.learning_rate)
    config = config.model_copy(update={"optimizer": run.at_rate(config, rate)})
    for at, figures, images in run.train(run.base_model(), config, points):
        if figures[0] >= level:
            return images, figures, at
    return None


def main() -> None:
    """Train, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", type=float, default=-0.1, help="the reward")
    parser.add_argument("--methods", nargs="+", default=["grpo", "drift-no-selection"])
    parser.add_argument("--iterations", type=int, default=480)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/flags.png")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # a collapse is what is looked for
    first = run.here(load_config(ROOT / "experiments/methods/grpo.yaml", []), 0)
    _, figures, images = next(run.train(run.base_model(), first, 1))
    sides = [("base model", images, figures)]
    for name in args.methods:
        found = at_level(name, args.level, args.iterations, args.iterations // 10)
        if found is None:
            parser.error(f"{name} does not reach a reward of {args.level}; give a lower --level")
        sides.append((f"{name}, iteration {found[2]}", found[0], found[1]))
    canvas = Figure(figsize=(4.2 * len(sides), 2.35), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (name, images, figures) in zip(canvas.subplots(1, len(sides)), sides, strict=True):
        axes.imshow(sheet(images[:, :SHOWN]).numpy(), interpolation="nearest")
        axes.set_title(
            f"{name}\nreward {figures[0]:.2f}, diversity {figures[1]:.2f}", fontsize=9, color=INK, loc="left"
        )
        rows = len(world.COUNTRIES)
        axes.set_yticks([(TALL + GAP) * (row + 0.45) for row in range(rows)])
        axes.set_yticklabels(
            world.COUNTRIES if axes is canvas.axes[0] else [""] * rows, fontsize=7, color=MUTED
        )
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    canvas.savefig(args.out, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.08)


if __name__ == "__main__":
    main()
