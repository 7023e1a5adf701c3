"""The report of a run: one self-contained page, and one picture for a README.

Nothing is drawn or measured here: it shows what ``evaluation.json``, ``metrics.jsonl`` and the sheets of images
hold, and leaves out what is not there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

from markupsafe import Markup

from driftrl.checks import counted
from driftrl.distributed import join
from driftrl.evaluation.evaluate import Asked, Evaluation, Figure, Point, Settings, in_words, load_evaluation
from driftrl.evaluation.evaluate import evaluate as measured
from driftrl.evaluation.gallery import FIRST, evenly, pictures, prompt_rows, side, spread
from driftrl.evaluation.measures import METRICS, VARIETY, Metric, asked, describe, too_few, trained
from driftrl.evaluation.page import COLOURS, listed, minus, percent, render, short
from driftrl.evaluation.picture import COLOURS as PICTURE_COLOURS
from driftrl.evaluation.picture import MUTED, Chart, Side, Stroke, draw
from driftrl.evaluation.plots import Line, plot
from driftrl.evaluation.results import read_metrics
from driftrl.evaluation.studio import Progress
from driftrl.files import write_text

PART = re.compile(r"reward/.+/mean")
"""One of several rewards in metrics.jsonl."""
SMOOTHED = 5
"""Iterations from which on a moving average is drawn: of two it would be a level line."""
AXIS = 34
"""Letters that fit below a plot, beside its hint."""
LOST, HARDLY = 0.5, 0.25
"""A prompt that keeps less than the first share of its diversity, and gains less than the second of the mean gain in reward, was
narrowed for next to nothing."""
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
        "A latent, reward, loss or gradient in them was not finite; that step went into no weight.",
    ),
}


def evaluate(source: str | Path, *, progress: Progress | None = None, **settings: Unpack[Asked]) -> Path:
    """Measure a run or model beside its base model and write ``report.html`` and ``report.png``; return the folder.

    Args:
        source: a run folder, one of its checkpoints, a pipeline folder, a safetensors file, a hub name or 'tiny-animals'.
        progress: told how far it is, as (what is being drawn, images done, images in all); by default a bar of tqdm.
        **settings: as `driftrl.evaluation.evaluate.evaluate` takes them: prompts, images, checkpoints, rewards and more.

    Raises:
        InputError: if anything cannot be used.

    Example:
        >>> import driftrl
        >>> folder = driftrl.evaluate("runs/first", images=16, checkpoints="all")  # doctest: +SKIP
    """
    team = join()
    with nullcontext(progress) if progress is not None else _bar(not team.leads) as shown:
        folder = measured(source, progress=shown, **settings)
    if team.leads:
        write_report(folder)
        write_picture(folder)
    team.wait()
    return folder


@contextmanager
def _bar(hidden: bool) -> Iterator[Progress]:
    from tqdm.auto import tqdm

    with tqdm(desc="evaluating", unit="image", disable=hidden) as bar:

        def tell(label: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(f"evaluating {in_words(label)}", refresh=False)
            bar.update(done - bar.n)

        yield tell


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
        short=short,
        kind="run",
        title=evaluation.name,
        evaluation=evaluation,
        settings=evaluation.settings,
        asked=asked(evaluation.settings),
        few=too_few(evaluation.settings),
        tuned=tuned,
        verdict=[_verdict(evaluation, tuned)],
        cards=_cards(evaluation, tuned),
        notices=_notices(evaluation, tuned, log),
        fronts=_run_fronts(evaluation) if tuned else [],
        curves=_training_curves(log),
        smoothed=any(len(points) >= SMOOTHED for _, points in _series(log)),
        rows=prompt_rows(evaluation, tuned),
        gallery=_gallery(evaluation, [("base model", folder, evaluation.base)], tuned, folder),
        all_figures=_all_figures(evaluation, tuned),
        config=config.read_text("utf-8") if config.is_file() else None,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


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
    before, few = evaluation.base.figures["reward"].mean, too_few(evaluation.settings)
    change = f"from {minus(before)} to {minus(reward.mean)}"
    text = f"{few}: the reward went {change}" if few else f"The reward {how}, {change}"
    kept = []
    for name in ("diversity", "diversity/clip", "vendi"):
        if name in tuned.figures and evaluation.base.figures[name].mean > 0:
            share = tuned.figures[name].mean / evaluation.base.figures[name].mean
            kept.append(f"{share:.0%} of the {METRICS[name].title}")
    if kept:
        text += f". Compared with the base model, the tuned one has {listed(kept)}"
    return f"{text}."


def _cards(evaluation: Evaluation, tuned: Point | None) -> list[dict[str, Any]]:
    cards, few = [], too_few(evaluation.settings)
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
                "direction": 0 if now is None or few else _direction(now),
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
        raised = trained(evaluation.settings)
        others = [
            name
            for name in tuned.figures
            if name == "similarity" or (name.startswith("reward/") and name not in raised)
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
    if tuned is not None and not too_few(evaluation.settings) and (spent := narrowed(evaluation, tuned)):
        notices.append(
            (
                f"{spent} of {counted(len(evaluation.settings.prompts), 'prompt')} lost more than half of their diversity for "
                "less than a quarter of the mean gain in reward",
                "Mostly those that the base model draws well already. Shaping keeps their variety (shaping.target), or leave "
                "them out of training.",
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


def narrowed(evaluation: Evaluation, tuned: Point) -> int:
    """How many prompts lost more than half of their diversity for less than a quarter of the mean gain in reward; 0 where the reward
    did not rise.
    """
    if _direction(tuned.figures["reward"]) <= 0:
        return 0
    before, now = (
        [point.figures[name].per_prompt for name in ("reward", "diversity")]
        for point in (evaluation.base, tuned)
    )
    gained = [after - first for first, after in zip(before[0], now[0], strict=True)]
    narrow = [after < LOST * first for first, after in zip(before[1], now[1], strict=True)]
    enough = HARDLY * fmean(gained)
    return sum(thin and gain < enough for thin, gain in zip(narrow, gained, strict=True))


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
                names={k: p.told for k, p in enumerate(points) if k == last or (k and settings.scaled)},
                spread={} if too_few(settings) else {last: _whiskers(points[0], points[-1], name)},
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


def _tip(point: Point, name: str) -> str:
    digits = METRICS[name].digits if name in METRICS else 3
    return f"{point.told}: reward {minus(point.figures['reward'].mean)}, {minus(point.figures[name].mean, digits)}"


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
        lines = (
            [Line(points, 0, "faint"), Line(smooth, 0, "bold")]
            if len(points) >= SMOOTHED
            else [Line(points, 0, "bold")]
        )
        curves.append(
            (f"{title} of the images of training", plot(lines, "iteration", described, integer_x=True))
        )
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
    """A centred moving average over a tenth of the run, for prompts differ from iteration to iteration; of fewer than
    `SMOOTHED` iterations they are as they are.
    """
    if len(points) < SMOOTHED:
        return points
    half = max(1, len(points) // 20)
    windows = [points[max(0, k - half) : k + half + 1] for k in range(len(points))]
    return [(point[0], sum(y for _, y in w) / len(w)) for point, w in zip(points, windows, strict=True)]


def _all_figures(evaluation: Evaluation, tuned: Point | None) -> list[tuple[Metric, Figure, Figure | None]]:
    base = evaluation.base.figures
    return [(describe(k, evaluation.settings), base[k], tuned.figures[k] if tuned else None) for k in base]


def _gallery(
    evaluation: Evaluation, sides: list[tuple[str, Path, Point]], tuned: Point | None, folder: Path
) -> list[dict[str, Any]]:
    """Sheets of each prompt, side by side; the order is that of the table, greatest loss first."""
    shown = [(name, where, evaluation, point) for name, where, point in sides]
    for point in _some_scales(evaluation) if evaluation.settings.scaled else [tuned] if tuned else []:
        shown.append((f"tuned, {point.told}", folder, evaluation, point))
    cards = []
    for row in prompt_rows(evaluation, tuned):
        if sheets := pictures(shown, row["place"]):
            note = ""
            if tuned:
                reward, diversity = row["cells"][0], row["cells"][1]
                note = (
                    f"reward {minus(reward['base'])} \u2192 {minus(reward['now'])}, "
                    f"diversity {minus(diversity['base'])} \u2192 {minus(diversity['now'])}"
                )
            cards.append({"prompt": row["prompt"], "pictures": sheets, "note": note})
    return spread(cards)


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
    rows = evenly(prompt_rows(evaluation, tuned), prompts)
    if evaluation.settings.scaled:
        return draw(
            folder / "report.png", [row["prompt"] for row in rows], *_by_scale(folder, evaluation, rows)
        )
    sides = [side("base model", MUTED, folder, evaluation, evaluation.base, rows, images)]
    if tuned:
        name = f"after {counted(tuned.iteration, 'iteration')}"
        sides.append(side(name, PICTURE_COLOURS[0], folder, evaluation, tuned, rows, images))
    series = _series(read_metrics(folder / "metrics.jsonl"))
    series = [*series[:2], series[-1]] if len(series) > 3 else series  # three fit
    charts = [
        Chart(
            f"{title}, in training",
            "iteration",
            [
                *([Stroke(points, PICTURE_COLOURS[0], 0.9, 0.3)] if len(points) >= SMOOTHED else []),
                Stroke(_smoothed(points), PICTURE_COLOURS[0]),
            ],
            whole=True,
        )
        for title, points in series
    ]
    return draw(folder / "report.png", [row["prompt"] for row in rows], sides, charts)


def _by_scale(
    folder: Path, evaluation: Evaluation, rows: list[dict[str, Any]], images: int = 4
) -> tuple[list[Side], list[Chart]]:
    """The base model and at most three scales of the adapter, and variety over reward of all."""
    shown = [evaluation.base, *_some_scales(evaluation)]
    sides = [
        side(
            "base model" if k == 0 else f"scale {point.lora_scale:g}",
            MUTED if k == 0 else PICTURE_COLOURS[0],
            folder,
            evaluation,
            point,
            rows,
            images,
        )
        for k, point in enumerate(shown)
    ]
    charts = [
        Chart(
            f"{METRICS[name].title} over reward",
            "reward",
            [
                Stroke(
                    [(p.figures["reward"].mean, p.figures[name].mean) for p in evaluation.points],
                    PICTURE_COLOURS[0],
                    marker="o",
                )
            ],
        )
        for name in VARIETY[:2]
        if name in evaluation.base.figures
    ]
    return sides, charts


def _some_scales(evaluation: Evaluation) -> list[Point]:
    """The least, the middle and the greatest."""
    points = evaluation.tuned
    return [points[k] for k in sorted({0, len(points) // 2, len(points) - 1})]
