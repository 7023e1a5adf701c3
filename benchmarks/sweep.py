"""Which settings make the embedded model's reward rise, and what they cost in variety: docs/log.md has the table.

    python benchmarks/sweep.py --out runs/sweep drift contrast        # these, one after the other
    python benchmarks/sweep.py --list

Each setting is one training run, then 8 images of each of the 45 animals, base and tuned from the same noise.
Rows go to OUT/results.jsonl; a setting that has its row is not run again. Set OMP_NUM_THREADS=1 and start two with
different settings to use two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import driftrl
from driftrl.build import build_encoder, build_reward
from driftrl.config import TrainConfig, load_config
from driftrl.diversity.functional import mean_pairwise_distance
from driftrl.evaluation.generate import generate, open_policy
from driftrl.prompts import load_prompts

GRPO = ["selection.strategy=random", "prompt_noise.eta=0.0", "shaping.ratio=0.0"]
CONTRAST = ["selection.strategy=contrast", "prompt_noise.eta=0.0", "shaping.ratio=0.0"]
COMMON = ["iterations=40", "sampling.steps=6", "objective.timesteps=0.4", "evaluation.at_end=false", "logging.trackers=[]", "logging.images_every=1000",
          "logging.checkpoint_every=40"]  # fmt: skip
NEIGHBOUR = ["selection.strategy=nearest_neighbor"]
GLOBAL = ["advantage.scale=global"]
UNSHAPED = ["shaping.ratio=0.0"]


def rate(value: float) -> list[str]:
    """Set the learning rate."""
    return [f"optimizer.learning_rate={value}"]


SLOW = ["iterations=60", "sampling.steps=8", *rate(1e-3)]
SETTINGS: dict[str, list[str]] = {
    "grpo": [*GRPO, *SLOW],
    "contrast": [*CONTRAST, *SLOW],
    "window": SLOW,
    "window-4e-3": [*SLOW, *rate(4e-3)],
    "window-global": [*GLOBAL, *SLOW],
    "window-unshaped": [*UNSHAPED, *SLOW],
    "neighbour": [*NEIGHBOUR, *SLOW],
    "neighbour-4e-3": [*NEIGHBOUR, *SLOW, *rate(4e-3)],
    "neighbour-global": [*NEIGHBOUR, *GLOBAL, *SLOW],
    "neighbour-global-0.15": [*NEIGHBOUR, *GLOBAL, *SLOW, "shaping.ratio=0.15"],
    "neighbour-unshaped": [*NEIGHBOUR, *UNSHAPED, *SLOW],
}


def measure(source: str | Path, config: TrainConfig, images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean reward and mean pairwise distance of each animal's images, [45] each."""
    policy, _ = open_policy(source, config.sampling.steps, config.sampling.guidance_scale)
    texts = load_prompts("animals")
    drawn = generate(policy, texts, images, seed=1, batch_size=32)
    with torch.no_grad():
        rewards = build_reward("tiny-animals", policy.device)(
            drawn.flatten(0, 1), [t for t in texts for _ in range(images)]
        )
        features = build_encoder("tiny-animals", policy.device)(drawn.flatten(0, 1))
    variety = [mean_pairwise_distance(own) for own in features.view(len(texts), images, -1)]
    return rewards.view(-1, images).mean(1), torch.stack(variety)


def main() -> None:
    """Run the settings named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--set", action="append", default=[], help="for all of them: key=value")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        for name, changes in SETTINGS.items():
            print(f"{name:30}", *changes)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    for name in args.settings:
        done = [json.loads(line)["name"] for line in results.open()] if results.exists() else []
        if name in done:
            continue
        config = load_config(None, [*COMMON, *SETTINGS[name], *args.set, f"name={name}"])
        begun = time.time()
        run = driftrl.Trainer(config, out=args.out / f"{name}-{time.time_ns()}").run()
        seconds = time.time() - begun
        base, tuned = measure("tiny-animals", config), measure(run, config)
        gain, change = tuned[0] - base[0], tuned[1] - base[1]
        row = {
            "name": name, "seconds": round(seconds), "base": round(float(base[0].mean()), 3),
            "gain": round(float(gain.mean()), 3), "gain_se": round(float(gain.std() / len(gain) ** 0.5), 3),
            "base_diversity": round(float(base[1].mean()), 4), "diversity_change": round(float(change.mean()), 4),
            "diversity_se": round(float(change.std() / len(change) ** 0.5), 4),
        }  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
