"""docs/images/same-reward.png: the base model, GRPO, shaping by its gradient at the same reward and at its end, from the same noise.

    driftrl experiment experiments/plans/flat.yaml --out runs/flat                       # or these two runs of it
    python docs/figures/same_reward.py runs/flat/runs/grpo-seed0 runs/flat/runs/draft-shaped-seed0

Of the first run it takes the checkpoint of iteration 96, of the second the one that is nearest to that in reward, and the last; and prompts
evenly spaced from the one that lost most diversity to the one that lost least, in the first. The curves are those of docs/results/flat:
means over seeds bold, seeds faint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from driftrl.evaluation import compare
from driftrl.evaluation.evaluate import load_evaluation
from driftrl.evaluation.gallery import evenly, prompt_rows, side
from driftrl.evaluation.picture import COLOURS, MUTED, Chart, Stroke, draw

DOCS = Path(__file__).resolve().parents[1]
CURVES = {"grpo": COLOURS[0], "draft-shaped": COLOURS[1], "shaped-kl-0.02": COLOURS[2]}
"""Of docs/results/flat: colours, as of the pictures."""
PROMPTS, IMAGES, AT = 6, 4, 96


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grpo", type=Path)
    parser.add_argument("shaped", type=Path)
    runs = parser.parse_args()
    evaluations = [load_evaluation(folder) for folder in (runs.grpo, runs.shaped)]
    plain = next(point for point in evaluations[0].tuned if point.iteration == AT)
    level = plain.figures["reward"].mean
    near = min(evaluations[1].tuned, key=lambda point: abs(point.figures["reward"].mean - level))
    rows = evenly(prompt_rows(evaluations[0], plain), PROMPTS)
    shown = [
        ("base model", MUTED, 0, evaluations[0].base),
        ("GRPO", CURVES["grpo"], 0, plain),
        ("shaped, by gradient", CURVES["draft-shaped"], 1, near),
        ("its end", CURVES["draft-shaped"], 1, evaluations[1].tuned[-1]),
    ]
    folders = (runs.grpo, runs.shaped)
    sides = [
        side(
            f"{title} ({point.figures['reward'].mean:.1f})",
            colour,
            folders[k],
            evaluations[k],
            point,
            rows,
            IMAGES,
        )
        for title, colour, k, point in shown
    ]
    methods = {m.name: m for m in compare.load_methods([DOCS / "results/flat"])}
    charts = [
        Chart(
            title,
            "reward",
            [
                *(Stroke(run.curve(metric), colour, 0.8, 0.3) for name, colour in CURVES.items() for run in methods[name].runs),
                *(Stroke(methods[name].mean_curve(metric), colour, marker="o") for name, colour in CURVES.items()),
            ],
        )
        for metric, title in (("diversity", "diversity over reward"), ("diversity/latents", "latent diversity over reward"))
    ]  # fmt: skip
    draw(DOCS / "images/same-reward.png", [row["prompt"] for row in rows], sides, charts)
    for title, _, _, point in shown:
        print(title, point.told, {k: round(f.mean, 3) for k, f in point.figures.items()})


if __name__ == "__main__":
    main()
