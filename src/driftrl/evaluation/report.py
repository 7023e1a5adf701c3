"""The report: one self-contained page for a run or a comparison, and one picture for a README.

Nothing is drawn or measured here: it shows what ``evaluation.json``, ``metrics.jsonl`` and the sheets of images
hold, and leaves out what is not there.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from driftrl.checks import InputError, counted
from driftrl.config import dump_config
from driftrl.distributed import join
from driftrl.evaluation import compare as comparing
from driftrl.evaluation.compare import Method
from driftrl.evaluation.evaluate import (
    SHOWN,
    Evaluation,
    Figure,
    Point,
    Settings,
    load_evaluation,
    sheet_cells,
)
from driftrl.evaluation.evaluate import evaluate as measured
from driftrl.evaluation.page import minus, percent, render, webp_uri
from driftrl.evaluation.pareto import difference_at_equal, upper_envelope
from driftrl.evaluation.picture import COLOURS as PICTURE_COLOURS
from driftrl.evaluation.picture import MUTED, Chart, Side, Stroke, draw
from driftrl.evaluation.plots import Line, plot
from driftrl.evaluation.results import read_metrics
from driftrl.files import make_parent, write_text
from driftrl.prompts import prompt_sets

COLOURS = 16
"""Colours of methods in the style sheet (look.css); beyond them colour and shape come again."""
PART = re.compile(r"reward/.+/mean")
"""One of several rewards in metrics.jsonl."""
AXIS = 34
"""Letters that fit below a plot, beside its hint."""
SENTENCES = 3
"""Methods up to which each has a sentence of its own."""
LEAST = 0.005
"""Change of variety, as a share, below which it rounds to 0%, and is not worth a word."""
FULL_TINT = 0.25
"""Change of variety, as a share, from which a cell is tinted fully."""
FEW = 5
"""Prompts below which an interval over prompts says little."""
FIRST = 8
"""Prompts whose pictures are open; the others are one click away."""


@dataclass(frozen=True)
class Metric:
    """What a figure is called and what it means."""

    title: str
    meaning: str
    headline: bool = False
    variety: bool = False
    """Whether it measures variety: plotted against the reward."""
    digits: int = 3


METRICS = {
    "reward": Metric("reward", "What training raised.", headline=True),
    "similarity": Metric("prompt-image similarity", "How well images match their prompts, by a CLIP model."),
    "diversity": Metric(
        "diversity",
        "Mean distance between two images of a prompt, by the image encoder.",
        headline=True,
        variety=True,
    ),
    "diversity/clip": Metric(
        "CLIP diversity",
        "1 minus the mean cosine between two images of a prompt, by a CLIP model: not the encoder of shaping.",
        headline=True,
        variety=True,
    ),
    "diversity/latents": Metric(
        "latent diversity",
        "The same by the model's own autoencoder: neither a reward nor, unless told to, shaping uses it.",
        variety=True,
    ),
    "recall": Metric(
        "recall",
        "Share of the base model's images that lie within what the tuned model draws. The base model's own "
        "figure is that of a second draw: what a perfect copy would reach.",
        headline=True,
        variety=True,
    ),
    "vendi": Metric(
        "Vendi score",
        "Effective number of different images per prompt.",
        headline=True,
        variety=True,
        digits=2,
    ),
    "vendi/2": Metric("Vendi score, order 2", "The same, counting common kinds for more.", digits=2),
    "precision": Metric("precision", "Share of the images that lie within what the base model draws."),
    "density": Metric("density", "How densely the base model's images surround them; may exceed 1."),
    "coverage": Metric("coverage", "Share of the base model's images with one of them nearby.", variety=True),
}
VARIETY = tuple(name for name, metric in METRICS.items() if metric.variety)
FIRED = {
    "warning/constant_reward_groups": (
        "Groups whose rewards were all equal",
        "They taught nothing. Draw more candidates, or choose a reward that tells them apart.",
    ),
    "warning/constant_diversity_groups": (
        "Groups whose diversity was constant",
        "Shaping had nothing to tell apart there: the encoder may not see the differences, or the images are "
        "all the same.",
    ),
    "warning/prompt_noise": (
        "Looks at the noise on the prompt that found it too strong",
        "It took more than a tenth of the prompt-image similarity that a prompt gives: lower prompt_noise.eta.",
    ),
    "warning/skipped": (
        "Iterations whose update was skipped",
        "A latent, reward, loss or gradient in them was not finite; the weights were left as they were.",
    ),
}


def describe(name: str, settings: Settings) -> Metric:
    """What the figure ``name`` is called and means under these settings."""
    if name == "reward":
        known = METRICS[name]
        return Metric(f"reward: {settings.rewards[0]}", known.meaning, known.headline)
    if name.startswith("reward/"):
        title = f"reward: {name.removeprefix('reward/')}"
        if name in _trained(settings):
            return Metric(title, "Part of what training raised, as it is: neither normalised nor weighed.")
        return Metric(title, "Not trained on; scored beside the one that was.")
    return METRICS.get(name) or Metric(name, "")


def _trained(settings: Settings) -> list[str]:
    """The figures of the rewards that training raised together, if they were several."""
    return [f"reward/{part.name}" for part in settings.mixture if part.weight]


def evaluate(source: str | Path, **settings: Any) -> Path:
    """Measure a run or model beside its base model and write ``report.html`` and ``report.png``; return the folder.

    Args:
        source: a run folder, one of its checkpoints, a pipeline folder, a hub name or 'tiny-animals'.
        **settings: as `driftrl.evaluation.evaluate.evaluate` takes them: prompts, images, checkpoints, rewards and more.

    Raises:
        InputError: if anything cannot be used.

    Example:
        >>> import driftrl
        >>> folder = driftrl.evaluate("runs/first", images=16, checkpoints="all")  # doctest: +SKIP
    """
    folder, team = measured(source, **settings), join()
    if team.leads:
        write_report(folder)
        write_picture(folder)
    team.wait()
    return folder


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of an evaluated run or model into its folder, and return its path.

    Raises:
        InputError: if there is no evaluation, or it is damaged.
    """
    evaluation = load_evaluation(folder)
    tuned = evaluation.tuned[-1] if evaluation.tuned else None
    log = read_metrics(folder / "metrics.jsonl")
    config = folder / "config.yaml"
    page = render(
        "report.html.j2",
        colours=COLOURS,
        describe=describe,
        first=FIRST,
        short=_short,
        kind="run",
        title=evaluation.name,
        evaluation=evaluation,
        settings=evaluation.settings,
        asked=_asked(evaluation.settings),
        tuned=tuned,
        verdict=[_verdict(evaluation, tuned)],
        cards=_cards(evaluation, tuned),
        notices=_notices(evaluation, tuned, log),
        fronts=_run_fronts(evaluation) if tuned else [],
        curves=_training_curves(log),
        rows=_prompt_rows(evaluation, tuned),
        gallery=_gallery(evaluation, [("base model", folder, evaluation.base)], tuned, folder),
        all_figures=_all_figures(evaluation, tuned),
        config=config.read_text("utf-8") if config.is_file() else None,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def write_comparison(folders: Sequence[Path], out: Path, against: str | None = None) -> Path:
    """Write one page that compares evaluated runs, and return its path.

    Args:
        folders: two or more run folders with ``evaluation.json``; runs of one name are seeds of one method.
        out: the HTML file.
        against: the method that others are compared with; by default that of the first folder.

    Raises:
        InputError: for runs that were not measured alike, or anything as in `compare.load_methods`.
    """
    methods = comparing.load_methods(folders)
    metrics = comparing.diversity_metrics(methods, VARIETY)
    pairs = comparing.compare(methods, metrics, against)
    evaluation = methods[0].runs[0].evaluation
    settings = evaluation.settings
    names, rival = [m.name for m in methods], against or methods[0].name
    tables = []
    for name in metrics:
        volumes = comparing.hypervolumes(methods, name)
        gains = {pair.method: pair for pair in pairs if pair.metric == name}
        tables.append(
            (describe(name, settings), [(m.name, gains.get(m.name), volumes[m.name]) for m in methods])
        )
    page = render(
        "report.html.j2",
        colours=COLOURS,
        describe=describe,
        first=FIRST,
        short=_short,
        kind="comparison",
        title=_listed(names) if len(names) < 4 else f"{len(names) - 1} methods beside {rival}",
        evaluation=evaluation,
        settings=settings,
        asked=_asked(settings),
        methods=methods,
        rival=rival,
        single=min(len(m.runs) for m in methods) == 1,
        several=max(len(m.runs) for m in methods) > 1,
        verdict=_comparison_verdict(methods, pairs, rival),
        summary=_summary(methods, metrics),
        board=_board(methods, metrics, pairs, rival),
        differences=_differences(methods, metrics, rival),
        tables=tables,
        fronts=_comparison_fronts(methods, metrics),
        curves=_checkpoint_curves(methods, metrics),
        gallery=_comparison_gallery(methods),
        differing=comparing.differing_settings(methods),
        configs=[(run.folder.name, dump_config(run.config)) for m in methods for run in m.runs if run.config],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _asked(settings: Settings) -> str:
    """The prompt set in words; a user's file by its name only, for a report travels."""
    return settings.prompt_set if settings.prompt_set in prompt_sets() else Path(settings.prompt_set).name


def _short(path: str | None) -> str:
    """A model's name without the folders of this machine, for a report travels."""
    return Path(path or "").name if Path(path or "").is_absolute() else path or ""


def _direction(figure: Figure) -> int:
    """1 where a figure rose beyond its interval, -1 where it fell, 0 where the interval holds 0."""
    if figure.change is None:
        return 0
    return 1 if figure.change.low > 0 else -1 if figure.change.high < 0 else 0


def _verdict(evaluation: Evaluation, tuned: Point | None) -> str:
    if tuned is None:
        return "Only the base model was measured: there is nothing to compare it with yet."
    reward = tuned.figures["reward"]
    assert reward.change is not None
    how = {1: "rose", -1: "fell", 0: "did not change measurably"}[_direction(reward)]
    before = evaluation.base.figures["reward"].mean
    text = f"The reward {how}, from {minus(before)} to {minus(reward.mean)}"
    prompts = len(evaluation.settings.prompts)
    if prompts < FEW:
        text = (
            f"On {counted(prompts, 'prompt')}, too few to tell much of any other: {text[0].lower()}{text[1:]}"
        )
    kept = []
    for name in ("diversity", "diversity/clip", "vendi"):
        if name in tuned.figures and evaluation.base.figures[name].mean > 0:
            share = tuned.figures[name].mean / evaluation.base.figures[name].mean
            kept.append(f"{share:.0%} of the {METRICS[name].title}")
    if kept:
        text += f". Compared with the base model, the tuned one has {_listed(kept)}"
    return f"{text}."


def _cards(evaluation: Evaluation, tuned: Point | None) -> list[dict[str, Any]]:
    cards = []
    for name, metric in METRICS.items():
        if not metric.headline or name not in evaluation.base.figures:
            continue
        base, now = evaluation.base.figures[name], tuned.figures[name] if tuned else None
        relative = None
        if now is not None and now.change is not None and base.mean > 0:
            relative = now.change.mean / base.mean
        cards.append(
            {
                "metric": describe(name, evaluation.settings),
                "base": base,
                "now": now,
                "relative": None if relative is None else percent(relative),
                "direction": 0 if now is None else _direction(now),
                "digits": metric.digits,
            }
        )
    return cards


def _notices(
    evaluation: Evaluation, tuned: Point | None, log: list[dict[str, float]]
) -> list[tuple[str, str]]:
    """The warnings of design 2.6 that fired, as (what, what it means)."""
    notices = []
    if tuned is not None and _direction(tuned.figures["reward"]) > 0:
        trained = _trained(evaluation.settings)
        others = [
            name
            for name in tuned.figures
            if name == "similarity" or (name.startswith("reward/") and name not in trained)
        ]
        stuck = [
            describe(name, evaluation.settings).title
            for name in others
            if _direction(tuned.figures[name]) <= 0
        ]
        if stuck:
            notices.append(
                (
                    f"The reward that was trained on rose; {', '.join(stuck)} did not",
                    "A gain on one reward that others do not share can be a sign of reward hacking: look at the images.",
                )
            )
    if tuned is not None and "similarity" in tuned.figures and _direction(tuned.figures["similarity"]) < 0:
        notices.append(
            (
                "Images match their prompts less than the base model's do",
                "Prompt-image similarity fell. Noise on the prompt may be too strong, or training went too far.",
            )
        )
    for key in dict.fromkeys(k for line in log for k in line if k.startswith("warning/")):
        counts = [line.get(key, 0) for line in log]
        fired = sum(1 for c in counts if isinstance(c, int | float) and c > 0)
        if fired:
            what, meaning = FIRED.get(key, (key.removeprefix("warning/").replace("_", " "), ""))
            total = int(sum(c for c in counts if isinstance(c, int | float) and math.isfinite(c)))
            notices.append((f"{what}: {total}, in {fired} of {counted(len(log), 'iteration')}", meaning))
    return notices


def _run_fronts(evaluation: Evaluation) -> list[tuple[str, Markup]]:
    settings, fronts = evaluation.settings, []
    for name in VARIETY:
        if name not in evaluation.base.figures:
            continue
        points = evaluation.points
        path = [(p.figures["reward"].mean, p.figures[name].mean) for p in points]
        tips = [_tip(p, name) for p in points]
        last = len(points) - 1
        title = METRICS[name].title
        described = f"{title} against reward: " + "; ".join(tips)
        lines = [
            Line(
                path,
                tips=tips,
                names={last: _named(points[-1])},
                spread={last: _whiskers(points[0], points[-1], name)},
            ),
            Line(path[:1], -1, "none", tips[:1], {0: "base"}),
        ]
        fronts.append(
            (
                title,
                plot(lines, _reward_axis(settings), described, "better \N{NORTH EAST ARROW}"),
            )
        )
    return fronts


def _reward_axis(settings: Settings) -> str:
    """What the axis of the reward is called: by its name, if there is room for it."""
    whole = f"reward ({settings.rewards[0]})"
    parts = f"reward ({counted(len(settings.mixture), 'part')} together)" if settings.mixture else "reward"
    return whole if len(whole) <= AXIS else parts


def _named(point: Point) -> str:
    return "base" if point.label == "base" else f"iteration {point.iteration}"


def _tip(point: Point, name: str) -> str:
    digits = METRICS[name].digits if name in METRICS else 3
    return f"{_named(point)}: reward {minus(point.figures['reward'].mean)}, {minus(point.figures[name].mean, digits)}"


def _whiskers(base: Point, point: Point, name: str) -> tuple[float, float, float, float]:
    """The intervals of the changes from the base model: prompts differ more from each other than models do."""
    ends: list[float] = []
    for figure, before in ((point.figures[k], base.figures[k].mean) for k in ("reward", name)):
        low, high = (figure.change.low, figure.change.high) if figure.change else (0.0, 0.0)
        ends += [before + low, before + high]
    return ends[0], ends[1], ends[2], ends[3]


def _training_curves(log: list[dict[str, float]]) -> list[tuple[str, Markup]]:
    curves = []
    for title, points in _series(log):
        smooth = _smoothed(points)
        described = f"{title} over {counted(len(points), 'iteration')} of training, from {smooth[0][1]:.3f} to {smooth[-1][1]:.3f}"
        lines = [Line(points, 0, "faint"), Line(smooth, 0, "bold")]
        curves.append((f"{title}, over training", plot(lines, "iteration", described, integer_x=True)))
    return curves


def _series(log: list[dict[str, float]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """What is drawn over training: reward and diversity; of several rewards each, for their sum may be 0 throughout."""
    keys = [key for key in dict.fromkeys(k for line in log for k in line) if PART.fullmatch(key)]
    titles = {key: key.removesuffix("/mean").removeprefix("reward/") for key in keys or ["reward/mean"]}
    titles["diversity/kept_mean"] = "diversity"
    series = [
        (title, [(float(line["iteration"]), float(line[key])) for line in log if _number(line.get(key))])
        for key, title in titles.items()
    ]
    return [(title, points) for title, points in series if len(points) > 1]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over a tenth of the run, for prompts differ from iteration to iteration."""
    half = max(1, len(points) // 20)
    windows = [points[max(0, k - half) : k + half + 1] for k in range(len(points))]
    return [(point[0], sum(y for _, y in w) / len(w)) for point, w in zip(points, windows, strict=True)]


def _prompt_rows(evaluation: Evaluation, tuned: Point | None) -> list[dict[str, Any]]:
    """Base, tuned and change of each prompt, the greatest loss of diversity first."""
    base, rows = evaluation.base.figures, []
    for place, prompt in enumerate(evaluation.settings.prompts):
        row: dict[str, Any] = {"prompt": prompt, "place": place, "cells": []}
        for name in _columns(evaluation):
            before = base[name].per_prompt[place]
            now = tuned.figures[name].per_prompt[place] if tuned else before
            row["cells"].append({"base": before, "now": now, "change": now - before})
        row["loss"] = row["cells"][1]["change"] if tuned else base["diversity"].per_prompt[place]
        rows.append(row)
    return sorted(rows, key=lambda row: row["loss"])


def _columns(evaluation: Evaluation) -> list[str]:
    return [
        name
        for name in ("reward", "diversity", "diversity/clip", "recall", "vendi")
        if name in evaluation.base.figures
    ]


def _all_figures(evaluation: Evaluation, tuned: Point | None) -> list[tuple[Metric, Figure, Figure | None]]:
    base = evaluation.base.figures
    return [(describe(k, evaluation.settings), base[k], tuned.figures[k] if tuned else None) for k in base]


def _data_uri(path: Path) -> str | None:
    try:
        return webp_uri(path.read_bytes())
    except OSError:
        return None


def _gallery(
    evaluation: Evaluation, sides: list[tuple[str, Path, Point]], tuned: Point | None, folder: Path
) -> list[dict[str, Any]]:
    """Sheets of each prompt, side by side; the order is that of the table, greatest loss first."""
    sides = [*sides, (f"tuned, {_named(tuned)}", folder, tuned)] if tuned else sides
    rows, cards = _prompt_rows(evaluation, tuned), []
    shown = min(SHOWN, evaluation.settings.images)
    for row in rows:
        pictures = []
        for number, (name, where, point) in enumerate(sides):
            uri = _data_uri(evaluation.sheet(where, point, row["place"]))
            if uri is not None:
                prompt = row["prompt"]
                pictures.append(
                    {
                        "name": name,
                        "colour": (number - 1) % COLOURS if number else -1,
                        "uri": uri,
                        "alt": f"{counted(shown, 'image')} of \u201c{prompt}\u201d by {name}",
                    }
                )
        if len(pictures) == len(sides):
            note = ""
            if tuned:
                reward, diversity = row["cells"][0], row["cells"][1]
                note = (
                    f"reward {minus(reward['base'])} \u2192 {minus(reward['now'])}, "
                    f"diversity {minus(diversity['base'])} \u2192 {minus(diversity['now'])}"
                )
            cards.append({"prompt": row["prompt"], "pictures": pictures, "note": note})
    return _spread(cards)


def _spread(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evenly spaced cards first, from the greatest loss to the least, so that no side is picked; then the rest."""
    if len(cards) <= FIRST:
        return cards
    chosen = sorted({round(k * (len(cards) - 1) / (FIRST - 1)) for k in range(FIRST)})
    return [cards[k] for k in chosen] + [card for k, card in enumerate(cards) if k not in chosen]


def _comparison_verdict(methods: list[Method], pairs: list[comparing.Comparison], rival: str) -> list[str]:
    """Sentences, one for each thing that is said of methods of which it holds."""
    if len(methods) > SENTENCES:
        return _verdict_of_many(methods, pairs, rival)
    runs = {method.name: len(method.runs) for method in methods}
    alike: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    fallen = [method.name for method in methods if not _gained_reward(method)]
    for method in methods:
        if method.name == rival or {method.name, rival} & set(fallen):
            continue
        ahead, behind = [], []
        for pair in pairs:
            gain = pair.diversity_gain
            if pair.method != method.name or gain is None:
                continue
            title = METRICS[pair.metric].title
            if gain.low > 0:
                ahead.append(title)
            elif gain.high < 0:
                behind.append(title)
        told = [f"more than {rival} of: {', '.join(ahead)}"] if ahead else []
        told += [f"less{'' if ahead else f' than {rival}'} of: {', '.join(behind)}"] if behind else []
        single = min(runs[method.name], runs[rival]) == 1
        alike.setdefault((single, tuple(told)), []).append(method.name)
    parts = []
    for (single, found), names in alike.items():
        who, level = _listed(names), "At equal reward, on a single seed," if single else "At equal reward"
        has = "has" if len(names) == 1 else "have"
        if found:
            parts.append(f"{level} {who} {has} {'; '.join(found)}.")
        else:
            both = (
                f"{who} and {rival} cannot be told apart"
                if len(names) == 1
                else f"{who} cannot be told apart from {rival}"
            )
            parts.append(f"{level} {both} in variety.")
    if fallen:
        parts.append(
            f"{_listed(fallen)} never got above the base model's reward, so there is nothing to compare at equal reward."
        )
    if any(single for single, _ in alike):
        parts.append("More seeds would tell chance from effect.")
    return parts or [f"Only one method, {rival}, with {counted(len(methods[0].runs), 'seed')}."]


def _verdict_of_many(methods: list[Method], pairs: list[comparing.Comparison], rival: str) -> list[str]:
    """Who has more variety by most measures, who less, and of whom that cannot be said."""
    fallen = [method.name for method in methods if not _gained_reward(method)]
    found: dict[str, list[tuple[int, str]]] = {"more": [], "less": [], "neither": []}
    measures = len({pair.metric for pair in pairs})
    for method in methods:
        if method.name == rival or {method.name, rival} & set(fallen):
            continue
        ways = [_way(pair) for pair in pairs if pair.method == method.name]
        most = next((way for way in (1, -1) if 2 * ways.count(way) > measures), 0)
        kind = {1: "more", -1: "less", 0: "neither"}[most]
        found[kind].append((-ways.count(most), method.name + (f" ({ways.count(most)})" if most else "")))
    told = {
        "more": f"more varied than {rival} by most of {measures} measures",
        "less": f"less varied than {rival} by most of {measures} measures",
        "neither": f"no clear difference to {rival}",
    }
    parts = [
        f"At equal reward {told[kind]}: {_listed([name for _, name in sorted(which)])}."
        for kind, which in found.items()
        if which
    ]
    if fallen:
        parts.append(
            f"{_listed(fallen)} never got above the base model's reward, so there is nothing to compare at equal reward."
        )
    if min(len(method.runs) for method in methods) == 1:
        parts.append("Of a single seed any of this may be chance.")
    return parts


def _way(pair: comparing.Comparison) -> int:
    """1 where a method has more variety at equal reward than its rival beyond the interval, -1 where it has less, 0 where
    that is not clear or rounds to 0%.
    """
    gain, share = pair.diversity_gain, pair.diversity_share
    if gain is None or share is None or gain.low <= 0 <= gain.high or abs(share.mean) < LEAST:
        return 0
    return 1 if gain.mean > 0 else -1


def _board(
    methods: list[Method], metrics: list[str], pairs: list[comparing.Comparison], rival: str
) -> list[dict[str, Any]]:
    """For each method what variety it has at equal reward beyond the rival's, as a share, by each measure."""
    runs = {method.name: len(method.runs) for method in methods}
    rows = []
    for number, method in enumerate(methods):
        if method.name == rival:
            continue
        cells: list[dict[str, Any] | None] = []
        for metric in metrics:
            pair = next(p for p in pairs if (p.method, p.metric) == (method.name, metric))
            gain, share = pair.diversity_gain, pair.diversity_share
            if gain is None or share is None:
                cells.append(None)
                continue
            single = min(runs[method.name], runs[rival]) == 1
            sure = 0.0 if not _way(pair) else 0.6 if single else 1.0
            cells.append(
                {
                    "value": share.mean,
                    "text": percent(share.mean),
                    "tint": round(sure * min(1.0, abs(share.mean) / FULL_TINT) ** 0.5, 3),
                    "way": "more" if share.mean > 0 else "less",
                    "tip": f"{minus(gain.mean, sign=True)}, {minus(gain.low, sign=True)} to {minus(gain.high, sign=True)}",
                }
            )
        rows.append({"name": method.name, "colour": number % COLOURS, "cells": cells})
    return rows


def _differences(methods: list[Method], metrics: list[str], rival: str) -> list[tuple[str, Markup]]:
    """For each measure a plot of how much more variety each method has than the rival, over the reward."""
    against = next(method for method in methods if method.name == rival)
    zero = methods.index(against) % COLOURS
    plots = []
    for metric in metrics:
        title, lines = METRICS[metric].title, []
        for number, method in enumerate(methods):
            if method is against:
                continue
            try:
                found = difference_at_equal(
                    method.mean_curve(metric), against.mean_curve(metric), "reward"
                ).tolist()
            except InputError:
                continue  # these two share no reward
            points = [(level, gain) for level, gain in found]
            tips = [f"{method.name}, reward {minus(x)}: {minus(y, sign=True)}" for x, y in points]
            lines.append(Line(points, number % COLOURS, "bold", tips))
        if not lines:
            continue
        ends = [x for line in lines for x, _ in line.points]
        lines.insert(0, Line([(min(ends), 0.0), (max(ends), 0.0)], zero, "bold"))
        described = f"{title} beyond that of {rival} at equal reward, over the reward"
        plots.append((title, plot(lines, "reward", described, "more \N{UPWARDS ARROW}")))
    return plots


def _gained_reward(method: Method) -> bool:
    """Whether any checkpoint of any seed has more reward than the base model."""
    return any(
        max(rewards) > rewards[0] for rewards in ([x for x, _ in run.curve("reward")] for run in method.runs)
    )


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _summary(methods: list[Method], metrics: list[str]) -> list[dict[str, Any]]:
    """Base model, then each method's last shared checkpoint: mean and interval over seeds."""
    names = ["reward", *metrics]
    base = methods[0].runs[0].evaluation.base
    rows: list[dict[str, Any]] = [
        {
            "name": "base model",
            "colour": -1,
            "seeds": "",
            "at": "",
            "cells": [(base.figures[n].mean, None) for n in names],
        }
    ]
    for number, method in enumerate(methods):
        last = [method.over_time(name)[-1] for name in names]
        cells = [(i.mean, i if len(method.runs) > 1 else None) for i in last]
        rows.append(
            {
                "name": method.name,
                "colour": number % COLOURS,
                "seeds": len(method.runs),
                "at": method.shared()[-1],
                "cells": cells,
            }
        )
    return rows


def _comparison_fronts(methods: list[Method], metrics: list[str]) -> list[tuple[str, Markup]]:
    fronts = []
    for name in metrics:
        title, lines, told = METRICS[name].title, [], []
        for number, method in enumerate(methods):
            colour = number % COLOURS
            if len(method.runs) > 1:
                lines += [Line(run.curve(name), colour, "faint") for run in method.runs]
            mean, at = method.mean_curve(name), method.shared()
            envelope = upper_envelope(mean).tolist()
            lines.append(Line([(p[0], p[1]) for p in envelope], colour, "bold"))
            tips = [
                f"{method.name}, iteration {i}: reward {minus(r)}, {minus(v)}"
                for i, (r, v) in zip(at, mean, strict=True)
            ]
            lines.append(Line(mean[1:], colour, "none", tips[1:]))
            told.append(tips[-1])
        base = methods[0].runs[0].curve(name)[:1]
        lines.append(Line(base, -1, "none", ["base model"], {0: "base"}))
        described = f"{title} against reward, upper envelopes of {len(methods)} methods: {'; '.join(told)}"
        fronts.append((title, plot(lines, "reward", described, "better \N{NORTH EAST ARROW}")))
    return fronts


def _checkpoint_curves(methods: list[Method], metrics: list[str]) -> list[tuple[str, Markup]]:
    curves = []
    for name in ["reward", *metrics]:
        title, lines = METRICS[name].title, []
        for number, method in enumerate(methods):
            at, over = method.shared(), method.over_time(name)
            points = [(float(i), o.mean) for i, o in zip(at, over, strict=True)]
            tips = [f"{method.name}, iteration {i}: {minus(o.mean)}" for i, o in zip(at, over, strict=True)]
            band = [(o.low, o.high) for o in over] if len(method.runs) > 1 else ()
            lines.append(Line(points, number % COLOURS, "bold", tips, band=band))
        described = f"{title} over checkpoints of {', '.join(m.name for m in methods)}"
        curves.append((title, plot(lines, "iteration", described, integer_x=True)))
    return curves


def _last(method: Method) -> Point:
    """The last checkpoint that all runs of a method have, of its first run."""
    at = method.shared()[-1]
    return next(p for p in method.runs[0].evaluation.points if p.iteration == at)


def _comparison_gallery(methods: list[Method]) -> list[dict[str, Any]]:
    """Base model and the last checkpoint of each method's first seed, on the same seeds of noise."""
    first = methods[0].runs[0]
    sides = [("base model", first.folder, first.evaluation, first.evaluation.base)]
    for method in methods:
        run = method.runs[0]
        sides.append((method.name, run.folder, run.evaluation, _last(method)))
    cards = []
    shown = min(SHOWN, first.evaluation.settings.images)
    for place, prompt in enumerate(first.evaluation.settings.prompts):
        pictures = []
        for number, (name, folder, evaluation, point) in enumerate(sides):
            uri = _data_uri(evaluation.sheet(folder, point, place))
            if uri is not None:
                pictures.append(
                    {
                        "name": name,
                        "colour": (number - 1) % COLOURS if number else -1,
                        "uri": uri,
                        "alt": f"{counted(shown, 'image')} of \u201c{prompt}\u201d by {name}",
                    }
                )
        if len(pictures) == len(sides):
            cards.append({"prompt": prompt, "pictures": pictures, "note": ""})
    return _spread(cards)


def write_picture(folder: Path, prompts: int = 6, images: int = 6) -> Path:
    """Write ``report.png``: base beside tuned on the same seeds, reward and diversity curves.

    Args:
        folder: of an evaluated run.
        prompts: rows, evenly spaced from the prompt that lost most variety to the one that lost least.
        images: per prompt and side.

    Raises:
        InputError: if there is no evaluation, or it is damaged.
    """
    evaluation = load_evaluation(folder)
    tuned = evaluation.tuned[-1] if evaluation.tuned else None
    rows = _evenly(_prompt_rows(evaluation, tuned), prompts)
    sides = [_side("base model", MUTED, folder, evaluation, evaluation.base, rows, images)]
    if tuned:
        name = f"after {counted(tuned.iteration, 'iteration')}"
        sides.append(_side(name, PICTURE_COLOURS[0], folder, evaluation, tuned, rows, images))
    series = _series(read_metrics(folder / "metrics.jsonl"))
    series = [*series[:2], series[-1]] if len(series) > 3 else series  # three fit
    charts = [
        Chart(
            title,
            "iteration",
            [
                Stroke(points, PICTURE_COLOURS[0], 0.9, 0.3),
                Stroke(_smoothed(points), PICTURE_COLOURS[0]),
            ],
        )
        for title, points in series
    ]
    return draw(folder / "report.png", [row["prompt"] for row in rows], sides, charts)


def write_comparison_picture(
    folders: Sequence[Path], out: Path, against: str | None = None, prompts: int = 6, images: int = 4
) -> Path | None:
    """Write a PNG of a comparison: base model and methods on the same seeds, and diversity over reward.

    It shows the last checkpoint that all seeds of a method have, of its first seed, and prompts as `write_picture`
    chooses them, by what the first method lost.

    Returns:
        ``out``, or None where the runs kept no pictures.

    Raises:
        InputError: as `write_comparison`.
    """
    methods = comparing.load_methods(folders)
    names = comparing.diversity_metrics(methods, VARIETY)
    colours = {
        method.name: colour for method, colour in zip(methods, itertools.cycle(PICTURE_COLOURS), strict=False)
    }  # those of the page
    methods = sorted(methods, key=lambda method: method.name != (against or methods[0].name))
    methods = methods[: len(PICTURE_COLOURS)]
    first = methods[0].runs[0]
    lasts = [_last(method) for method in methods]
    rows = _evenly(_prompt_rows(first.evaluation, lasts[0]), prompts)
    sides = [_side("base model", MUTED, first.folder, first.evaluation, first.evaluation.base, rows, images)]
    for method, point in zip(methods, lasts, strict=True):
        run = method.runs[0]
        sides.append(
            _side(method.name, colours[method.name], run.folder, run.evaluation, point, rows, images)
        )
    if not all(row for side in sides for row in side.rows):
        return None
    charts = [
        Chart(
            f"{describe(name, first.evaluation.settings).title} over reward",
            "reward",
            [Stroke(method.mean_curve(name), colours[method.name], marker="o") for method in methods],
        )
        for name in names[:2]
    ]
    return draw(out, [row["prompt"] for row in rows], sides, charts)


def _evenly(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` of the rows, evenly spaced, the first and the last among them."""
    count = min(count, len(rows))
    return [rows[round(k * (len(rows) - 1) / max(1, count - 1))] for k in range(count)]


def _side(
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


def check_out(out: Path) -> Path:
    """Return ``out`` if a page can be written there.

    Raises:
        InputError: if it is a folder, or is not named like a page.
    """
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise InputError(f"--out: expected an HTML file, such as report.html; got {out}")
    make_parent(out)
    return out
