"""The pictures of an evaluation, prompt by prompt, as pages and PNGs show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driftrl.checks import counted
from driftrl.evaluation.evaluate import Evaluation, Point
from driftrl.evaluation.page import COLOURS, webp_uri
from driftrl.evaluation.picture import Side
from driftrl.evaluation.sheets import SHOWN, sheet_cells

FIRST = 8
"""Prompts whose pictures are open; the others are one click away."""


def prompt_rows(evaluation: Evaluation, tuned: Point | None) -> list[dict[str, Any]]:
    """Base, tuned and change of each prompt, the greatest loss of diversity first."""
    base, rows = evaluation.base.figures, []
    for place, prompt in enumerate(evaluation.settings.prompts):
        row: dict[str, Any] = {"prompt": prompt, "place": place, "cells": []}
        for name in columns(evaluation):
            before = base[name].per_prompt[place]
            now = tuned.figures[name].per_prompt[place] if tuned else before
            row["cells"].append({"base": before, "now": now, "change": now - before})
        row["loss"] = row["cells"][1]["change"] if tuned else base["diversity"].per_prompt[place]
        rows.append(row)
    return sorted(rows, key=lambda row: row["loss"])


def columns(evaluation: Evaluation) -> list[str]:
    """The figures that are told prompt by prompt."""
    return [
        name
        for name in ("reward", "diversity", "diversity/clip", "recall", "vendi")
        if name in evaluation.base.figures
    ]


def data_uri(path: Path) -> str | None:
    """A sheet as the address of an image; None if it is not there."""
    try:
        return webp_uri(path.read_bytes())
    except OSError:
        return None


def pictures(sides: Sequence[tuple[str, Path, Evaluation, Point]], place: int) -> list[dict[str, Any]]:
    """The sheets of one prompt, the base model's first; none where any is missing."""
    found = []
    for number, (name, folder, evaluation, point) in enumerate(sides):
        uri = data_uri(evaluation.sheet(folder, point, place))
        if uri is None:
            return []
        shown = counted(min(SHOWN, evaluation.settings.images), "image")
        found.append(
            {
                "name": name,
                "colour": (number - 1) % COLOURS if number else -1,
                "uri": uri,
                "alt": f"{shown} of \u201c{evaluation.settings.prompts[place]}\u201d by {name}",
            }
        )
    return found


def spread(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evenly spaced cards first, from the greatest loss to the least, so that no side is picked; then the rest."""
    if len(cards) <= FIRST:
        return cards
    chosen = sorted({round(k * (len(cards) - 1) / (FIRST - 1)) for k in range(FIRST)})
    return [cards[k] for k in chosen] + [card for k, card in enumerate(cards) if k not in chosen]


def side(
    name: str,
    colour: str,
    folder: Path,
    evaluation: Evaluation,
    point: Point,
    rows: Sequence[dict[str, Any]],
    images: int,
) -> Side:
    """The first ``images`` kept pictures of each prompt, fewer where fewer were kept."""
    sheets = [evaluation.sheet(folder, point, row["place"]) for row in rows]
    return Side(name, colour, [sheet_cells(sheet, evaluation.settings.images)[:images] for sheet in sheets])


def evenly(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` of the rows, evenly spaced, the first and the last among them."""
    count = min(count, len(rows))
    return [rows[round(k * (len(rows) - 1) / max(1, count - 1))] for k in range(count)]
