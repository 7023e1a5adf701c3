"""Check a pipeline folder: are the animals right, do styles and views vary, how sharp is the autoencoder."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tiny_animals import autoencoder, checker
from tiny_animals.bank import SIZE, VIEWS, Bank, article
from tiny_animals.drawings import ANIMALS, STYLE_NAMES

ROOT = Path(__file__).parents[2]
QUALITY = Path(__file__).parent / "quality.json"
SHEET = ROOT / "docs" / "images" / "tiny-animals.png"


def load(folder: Path) -> StableDiffusionPipeline:
    """Load a pipeline folder in float32, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    count: int,
    steps: int = 10,
    guidance: float = 1.5,
    eta: float = 1.0,
    batch: int = 60,
) -> Tensor:
    """Draw `count` images of every prompt, [P, count, 3, 64, 64] in 0..1.

    Each image has its own generator, keyed by prompt and number, so batches do not change it.
    """
    keys = [(p, k) for p in range(len(prompts)) for k in range(count)]
    parts = []
    for start in range(0, len(keys), batch):
        some = keys[start : start + batch]
        images = pipeline(
            [prompts[p] for p, _ in some],
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            generator=[torch.Generator().manual_seed(1_000_003 * p + k) for p, k in some],
            output_type="pt",
        ).images
        parts.append(images.float())
    return torch.cat(parts).view(len(prompts), count, 3, SIZE, SIZE)


@torch.no_grad()
def judge(images: Tensor, bank: Bank) -> dict:
    """What the checker says of images [45, count, 3, 64, 64] of the plain prompts."""
    model, count = checker.load(), images.shape[1]
    parts = [model(part) for part in images.flatten(0, 1).split(128)]
    guess = {k: torch.cat([p[k] for p in parts]).argmax(1).view(len(ANIMALS), count) for k in checker.HEADS}
    per_animal = {}
    for a, animal in enumerate(ANIMALS):
        styles = Counter(STYLE_NAMES[s] for s in guess["style"][a].tolist())
        faces = float((guess["view"][a] == VIEWS.index("face")).float().mean())
        taken = Counter(ANIMALS[g] for g in guess["animal"][a].tolist() if g != a)
        both = len(bank.view[bank.animal == a].unique()) == 2
        per_animal[animal] = {
            "right": float((guess["animal"][a] == a).float().mean()),
            "taken_for": dict(taken.most_common(2)),
            "styles": len(styles),
            "largest_style": styles.most_common(1)[0][0],
            "largest_style_share": styles.most_common(1)[0][1] / count,
            "face_share": faces,
            "rarer_view_share": min(faces, 1 - faces) if both else None,
        }
    rows = list(per_animal.values())
    right = [row["right"] for row in rows]
    views = [row["rarer_view_share"] for row in rows if row["rarer_view_share"] is not None]
    return {
        "images_per_prompt": count,
        "right_mean": sum(right) / len(right),
        "right_worst": min(right),
        "right_worst_animal": min(per_animal, key=lambda a: per_animal[a]["right"]),
        "animals_under_60%": sum(r < 0.6 for r in right),
        "styles_mean": sum(row["styles"] for row in rows) / len(rows),
        "largest_style_share_mean": sum(row["largest_style_share"] for row in rows) / len(rows),
        "largest_style_share_worst": max(row["largest_style_share"] for row in rows),
        "largest_style_share_worst_animal": max(
            per_animal, key=lambda a: per_animal[a]["largest_style_share"]
        ),
        "prompts_with_a_style_over_40%": sum(row["largest_style_share"] > 0.4 for row in rows),
        "style_shares": {
            name: float((guess["style"] == s).float().mean()) for s, name in enumerate(STYLE_NAMES)
        },
        "animals_drawn_in_both_views": len(views),
        "of_these_generated_in_both": sum(v > 0 for v in views),
        "rarer_view_share_mean": sum(views) / max(1, len(views)),
        "per_animal": per_animal,
    }


def table(quality: dict) -> str:
    """The figures as the markdown of `docs/tiny-animals.md`."""
    q = quality
    sampler = q["sampler"]
    lines = [
        f"{q['images_per_prompt']} images of each of the 45 plain prompts, {sampler['steps']} DDIM steps, "
        f"eta = {sampler['eta']:g}, guidance {sampler['guidance']:g}:",
        "",
        "| What | Figure | Aim |",
        "| --- | --- | --- |",
        f"| named right by the checker, mean over animals | {q['right_mean']:.1%} | >= 90% |",
        f"| the worst animal ({q['right_worst_animal']}) | {q['right_worst']:.1%} | >= 60% |",
        f"| drawing styles seen per prompt (of 9), mean | {q['styles_mean']:.1f} | |",
        f"| largest style's share of a prompt's images, mean | {q['largest_style_share_mean']:.1%} | |",
        f"| the same, worst prompt ({q['largest_style_share_worst_animal']}) | "
        f"{q['largest_style_share_worst']:.1%} | <= 40% |",
        f"| prompts with a style over 40% | {q['prompts_with_a_style_over_40%']} | 0 |",
        f"| animals drawn both as face and body that come out as both | {q['of_these_generated_in_both']} of "
        f"{q['animals_drawn_in_both_views']} | all |",
        f"| share of the rarer view, mean over those | {q['rarer_view_share_mean']:.1%} | |",
    ]
    if "psnr" in q:
        lines.append(f"| autoencoder's PSNR on held-out poses | {q['psnr']:.2f} dB | >= 27 dB |")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in q["style_shares"].items())
    worst = sorted(q["per_animal"].items(), key=lambda item: item[1]["right"])[:8]
    named = ", ".join(
        f"{animal} {row['right']:.0%} (taken for {next(iter(row['taken_for']), '-')})"
        for animal, row in worst
    )
    return "\n".join([*lines, "", f"Styles over all images: {shares}.", "", f"Least often right: {named}."])


def contact_sheet(images: Tensor, path: Path, across: int = 3, shown: int = 10) -> None:
    """Draw a few images of every animal, [45, >= shown, 3, 64, 64], with the animals' names."""
    name_width, gap = 74, 14
    rows = -(-len(ANIMALS) // across)
    width = name_width + shown * SIZE
    sheet = Image.new("RGB", (across * width + (across - 1) * gap, rows * SIZE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for a, animal in enumerate(ANIMALS):
        left, top = a // rows * (width + gap), a % rows * SIZE
        draw.text((left + name_width - 6, top + SIZE // 2), animal, "black", font, anchor="rm")
        strip = (images[a, :shown].permute(2, 0, 3, 1).reshape(SIZE, -1, 3) * 255).round().byte().numpy()
        sheet.paste(Image.fromarray(strip), (left + name_width, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def check(
    folder: Path,
    bank: Bank,
    count: int = 40,
    steps: int = 10,
    guidance: float = 1.5,
    eta: float = 1.0,
    quality: Path | None = QUALITY,
    sheet: Path | None = SHEET,
) -> dict:
    """Check the pipeline in `folder`; write the figures to `quality` and the contact sheet to `sheet`."""
    start = time.time()
    pipeline = load(folder)
    images = generate(pipeline, [article(animal) for animal in ANIMALS], count, steps, guidance, eta)
    spent = time.time() - start
    figures = {
        "sampler": {"steps": steps, "eta": eta, "guidance": guidance},
        **judge(images, bank),
        "psnr": autoencoder.psnr(pipeline.vae, bank),
        "seconds_for_all_images": round(spent, 1),
    }
    if quality is not None:
        quality.write_text(json.dumps(figures, indent=1) + "\n")
    if sheet is not None:
        contact_sheet(images, sheet)
    print(table(figures))
    return figures
