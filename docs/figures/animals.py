"""docs/images/animals.png: the base model, GRPO, DRaFT and DRaFT with DRIFT's shaping at the end of training on all 45 animals, from the same noise.

    driftrl experiment experiments/plans/animals.yaml --out runs/animals                 # or these three runs of it
    python docs/figures/animals.py runs/animals/runs/grpo-seed1 runs/animals/runs/draft-seed0 runs/animals/runs/draft-shaped-seed0

Prompts are evenly spaced from the one that lost most diversity to the one that lost least, in the last run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from driftrl.evaluation.evaluate import load_evaluation
from driftrl.evaluation.gallery import evenly, prompt_rows, side
from driftrl.evaluation.picture import COLOURS, MUTED, draw

DOCS = Path(__file__).resolve().parents[1]
PROMPTS, IMAGES = 8, 4


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("grpo", "draft", "shaped"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    folders = [given.grpo, given.draft, given.shaped]
    evaluations = [load_evaluation(folder) for folder in folders]
    rows = evenly(prompt_rows(evaluations[-1], evaluations[-1].tuned[-1]), PROMPTS)
    shown = [("base model", MUTED, folders[0], evaluations[0], evaluations[0].base)]
    shown += [
        (title, colour, folder, evaluation, evaluation.tuned[-1])
        for title, colour, folder, evaluation in zip(
            ("GRPO", "DRaFT", "shaped, by gradient"), (COLOURS[0], COLOURS[2], COLOURS[1]), folders, evaluations, strict=True
        )
    ]  # fmt: skip
    sides = [
        side(f"{title} ({point.figures['reward'].mean:.1f})", colour, folder, evaluation, point, rows, IMAGES)
        for title, colour, folder, evaluation, point in shown
    ]
    picture = draw(DOCS / "images/animals.png", [row["prompt"] for row in rows], sides, [])
    with Image.open(picture) as drawn:  # a quarter of the size
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
    for title, *_, point in shown:
        print(title, point.told, {k: round(f.mean, 3) for k, f in point.figures.items()})


if __name__ == "__main__":
    main()
