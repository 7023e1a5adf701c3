"""A blinded page on which people choose between two methods, and the key that tells which was which.

The page is one file that loads nothing and names no method, run or folder; what un-blinds it is in ``key.json``
alone. `driftrl.evaluation.judge` reads both.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from driftrl.checks import InputError
from driftrl.evaluation.compare import Run, load_runs
from driftrl.evaluation.evaluate import Point, Settings
from driftrl.evaluation.generate import generate, open_policy
from driftrl.evaluation.page import render, webp_uri
from driftrl.evaluation.sheets import SHOWN, sheet_cells, sheet_columns
from driftrl.files import new_folder, sha256, write_json, write_text
from driftrl.noise import generator
from driftrl.pictures import to_pil
from driftrl.rollout import NO_NOISE

FORMAT = 1
PAGE, KEY = "index.html", "key.json"
CELL, GAP = 256, 0.04
"""Greatest side of an image on the page in pixels; the gap between two as a share of an image's side."""
QUESTIONS = {
    "coherence": "Which set fits the words better, with fewer broken pictures?",
    "distinctiveness": "In which set do the pictures differ more from one another?",
}
Choice = Literal["left", "right", "same"]


class Record(BaseModel):
    """What a file of the kit holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Shown(Record):
    """One of the two models that are compared."""

    method: str
    run: str
    """Name of the run folder."""
    training_seed: int
    checkpoint: str


class Trial(Record):
    """A pair of sets, in the page's order."""

    trial: str
    place: int
    """The prompt's place in the evaluation, from 0."""
    prompt: str
    left: str
    """Method of the left set."""
    right: str


class Key(Record):
    """The contents of ``key.json``: never shown to raters."""

    format: int = FORMAT
    kit: str
    """Checksum of what the page shows; answers carry it."""
    seed: int
    """Of the order and the sides."""
    shown: list[Shown]
    """Two."""
    trials: list[Trial]


class Answer(Record):
    """What one rater said about one pair."""

    trial: str
    coherence: Choice
    distinctiveness: Choice


class Answers(Record):
    """The contents of a rater's ``answers.json``."""

    format: int = FORMAT
    kit: str
    rater: str
    """What raters call themselves; may be empty."""
    answers: list[Answer]


def write_blind(sources: Sequence[Path], folder: Path, seed: int | None = None) -> Path:
    """Write the page and its key, and return the page's path.

    Each prompt is a pair: the first images of both methods, on the same seeds. Pairs come in random order; each
    method is on the left in half of them, at random which. Images are those that the evaluations kept: the PNGs
    where both have them (``driftrl evaluate --keep-images``), else the sheets, else they are drawn again.

    Args:
        sources: two evaluated run folders, or checkpoints in them; of a run the last one that was measured. With one
            source it is its base model that stands beside it.
        folder: not there yet, or empty.
        seed: of the order and the sides, recorded in the key; by default one that nobody can guess.

    Raises:
        InputError: for more than two sources, two that were not measured alike or are the same checkpoint, a folder
            that holds something, or images that can neither be found nor drawn.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"--blind: expected a new or empty folder; got {folder}, which is taken; answers that were given "
            "to a page need its key, so choose another one"
        )
    names, sides = _sides(sources)
    settings = sides[0][0].evaluation.settings
    sets = _sets(sides)
    seed = secrets.randbits(32) if seed is None else seed
    order = _shuffled(len(settings.prompts), seed, "order")
    first_left = [k % 2 == 0 for k in _shuffled(len(settings.prompts), seed, "sides")]

    trials, cards, digest = [], [], hashlib.sha256()
    for number, place in enumerate(order):
        left = 0 if first_left[number] else 1
        prompt, shown = settings.prompts[place], [sets[left][place], sets[1 - left][place]]
        trial = f"{number + 1:03d}"
        trials.append(Trial(trial=trial, place=place, prompt=prompt, left=names[left], right=names[1 - left]))
        cards.append(
            {"trial": trial, "prompt": prompt, "left": webp_uri(shown[0]), "right": webp_uri(shown[1])}
        )
        for part in (prompt.encode(), *shown):
            digest.update(len(part).to_bytes(8, "big") + part)
    kit = digest.hexdigest()[:16]
    key = Key(
        kit=kit,
        seed=seed,
        shown=[
            Shown(
                method=name,
                run=run.folder.resolve().name,
                training_seed=run.seed,
                checkpoint=point.label,
            )
            for name, (run, point) in zip(names, sides, strict=True)
        ],
        trials=trials,
    )
    page = render(
        "blind.html.j2", kit=kit, cards=cards, count=_count(settings), questions=QUESTIONS, format=FORMAT
    )
    with new_folder(folder) as temporary:
        write_text(temporary / PAGE, page)
        write_json(temporary / KEY, key.model_dump(mode="json"))
    return folder / PAGE


def _sides(sources: Sequence[Path]) -> tuple[list[str], list[tuple[Run, Point]]]:
    """What the two sides are called, and what they show."""
    if not 1 <= len(sources) <= 2:
        raise InputError(
            f"--blind: expected two runs, shown side by side, or one, beside its base model; got {len(sources)}"
        )
    places = [_run_and_checkpoint(source) for source in sources]
    runs = load_runs([run for run, _ in places])
    sides = [(run, _point(run, label)) for run, (_, label) in zip(runs, places, strict=True)]
    if len(sides) == 1:
        run, point = sides[0]
        return ["base model", run.evaluation.name], [(run, run.evaluation.base), (run, point)]
    calls: list[Callable[[Run, Point], str]] = [
        lambda run, _: run.evaluation.name,
        lambda run, _: f"{run.evaluation.name}, seed {run.seed}",
        lambda run, point: f"{run.evaluation.name}, {point.label}",
        lambda run, _: run.folder.resolve().name,
    ]
    for call in calls:  # the shortest that tells them apart
        names = [call(*side) for side in sides]
        if len(set(names)) == len(names):
            return names, sides
    raise InputError(f"--blind: {sources[0]} and {sources[1]} are the same, so there is nothing to choose")


def _run_and_checkpoint(source: Path) -> tuple[Path, str | None]:
    """(run folder, name of the checkpoint) of a checkpoint; (run folder, None) of a run."""
    is_checkpoint = (source / "manifest.json").is_file()
    return (source.resolve().parent.parent, source.resolve().name) if is_checkpoint else (source, None)


def _point(run: Run, label: str | None) -> Point:
    found = [point for point in run.evaluation.tuned if label in (None, point.label)]
    if not found:
        raise InputError(
            f"{run.folder}: checkpoint {label} was not measured; run: driftrl evaluate {run.folder} "
            f"--checkpoint {int(label or 0)}"
        )
    return found[-1]


def _shuffled(count: int, seed: int, purpose: str) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, 0, 0, 0, f"blind/{purpose}")).tolist()
    return order


def _count(settings: Settings) -> int:
    return min(SHOWN, settings.images)


def _sets(sides: Sequence[tuple[Run, Point]]) -> list[list[bytes]]:
    """A picture of the first images of each prompt, for each side; both from the same kind of source, for
    otherwise the quality of the files would tell the sides apart.
    """
    for read in (_from_files, _from_sheets):
        sets = [read(run, point) for run, point in sides]
        if all(sets):
            return sets
    return [_drawn(run, point) for run, point in sides]


def _from_files(run: Run, point: Point) -> list[bytes]:
    """From the PNGs that the evaluation kept; empty where any is missing."""
    settings, pictures = run.evaluation.settings, []
    for place in range(len(settings.prompts)):
        sheet = run.evaluation.sheet(run.folder, point, place)
        files = sorted(sheet.parent.glob(f"{place:03d}-*/[0-9]*.png"))[: _count(settings)]
        try:
            images = [_opened(file) for file in files]
        except (OSError, SyntaxError):  # Pillow's word for some broken files
            return []
        if len(images) < _count(settings):
            return []
        pictures.append(_picture(images))
    return pictures


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _from_sheets(run: Run, point: Point) -> list[bytes]:
    """From the sheets that reports show; empty where any is missing."""
    settings, pictures = run.evaluation.settings, []
    for place in range(len(settings.prompts)):
        images = sheet_cells(run.evaluation.sheet(run.folder, point, place), settings.images)
        if not images:
            return []
        pictures.append(_picture(images))
    return pictures


def _drawn(run: Run, point: Point) -> list[bytes]:
    """Drawn again on the evaluation's seeds, by the checkpoint that was measured, or by the base model."""
    settings, path = run.evaluation.settings, run.folder / "checkpoints" / point.label
    base = point is run.evaluation.base
    if not base and (
        not (path / "manifest.json").is_file() or sha256(path / "manifest.json") != point.identity
    ):
        raise InputError(
            f"{run.folder}: the images of {point.label} are gone, and that checkpoint is not there as it was "
            f"measured; run: driftrl evaluate {run.folder}"
        )
    policy, noise = open_policy(
        run.folder if base else path, settings.steps, settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
    )  # fmt: skip
    with policy.reference() if base else nullcontext():
        drawn = generate(
            policy,
            settings.prompts,
            _count(settings),
            settings.seed,
            prompt_noise=NO_NOISE if base else noise,
        )
    return [_picture([to_pil(image) for image in images]) for images in drawn]


def _picture(images: Iterable[Image.Image]) -> bytes:
    """A WebP of the images in rows of four, the gaps between them transparent."""
    cells = list(images)
    scale = min(1.0, CELL / max(cells[0].size))
    width, height = (max(1, round(side * scale)) for side in cells[0].size)
    gap, columns = max(2, round(GAP * width)), sheet_columns(len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for k, cell in enumerate(cells):
        small = (
            cell if cell.size == (width, height) else cell.resize((width, height), Image.Resampling.LANCZOS)
        )
        sheet.paste(small, ((k % columns) * (width + gap), (k // columns) * (height + gap)))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=92, method=4)
    return file.getvalue()
