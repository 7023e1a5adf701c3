"""Evaluated runs that were never trained, for tests of what is made of evaluations."""

from __future__ import annotations

import json

from PIL import Image

from driftrl.config import dump_config, parse_config
from driftrl.evaluation.evaluate import Evaluation, Point, Settings, _figures
from driftrl.files import write_json

PROMPTS = ["a cat", "<script>alert(1)</script>", "a fox"]
MANY = PROMPTS * 2


def make_run(folder, name="drift", seed=0, gain=2.0, loss=0.1, changes=None, similarity=0.0, **settings):
    """A run of two checkpoints whose reward rises by ``gain`` and whose diversity falls by ``loss``.

    Of the three `PROMPTS`, too few for a verdict, or of as many times these as ``prompts=MANY`` has.
    """
    config = parse_config({"name": name, "seed": seed, **(changes or {})})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    chosen = Settings(**{
        "model": "tiny-animals", "prompt_set": "animals", "prompts": PROMPTS, "images": 4, "seed": 0, "steps": 10,
        "guidance_scale": 1.0, "eta": 1.0, "rewards": ["tiny-animals"], "encoder": "tiny-animals", "clip": None,
        "neighbours": 3, **settings,
    })  # fmt: skip
    points, again = [], len(chosen.prompts) // len(PROMPTS)
    for step in range(3):
        share = step / 2
        values = {
            "reward": [1.0 + gain * share, 1.2 + gain * share, 1.1 + gain * share],
            "similarity": [0.5 + similarity * share] * 3,
            "diversity": [0.5 - loss * share, 0.6 - 2 * loss * share, 0.7],
            "vendi": [3.0 - loss * share, 3.1, 3.2],
        }
        label = "base" if step == 0 else f"{step * 10:06d}"
        values = {key: numbers * again for key, numbers in values.items()}
        base = points[0] if points else None
        points.append(Point(label=label, iteration=step * 10, identity="", figures=_figures(values, base)))
    evaluation = Evaluation(name=name, training_seed=seed, settings=chosen, points=points)
    write_json(folder / "evaluation.json", evaluation.model_dump(mode="json"))
    for point in points:
        for place in range(len(chosen.prompts)):
            sheet = evaluation.sheet(folder, point, place)
            sheet.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 8), (80 * (place % 3), 120, 200)).save(sheet)
    lines = [
        {
            "iteration": i,
            "reward/mean": 1 + i / 10,
            "diversity/kept_mean": 0.5,
            "warning/constant_reward_groups": i % 2,
        }
        for i in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 2'
    )
    return folder
