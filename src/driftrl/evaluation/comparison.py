"""The comparison of methods: one self-contained page, and one picture for a README, from evaluated runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from driftrl.checks import InputError, counted
from driftrl.config import dump_config
from driftrl.evaluation import compare as comparing
from driftrl.evaluation.compare import Method
from driftrl.evaluation.evaluate import Point
from driftrl.evaluation.gallery import FIRST, evenly, pictures, prompt_rows, side, spread
from driftrl.evaluation.measures import METRICS, VARIETY, asked, describe, too_few
from driftrl.evaluation.page import COLOURS, listed, minus, percent, render, short
from driftrl.evaluation.pareto import difference_at_equal, upper_envelope
from driftrl.evaluation.picture import COLOURS as PICTURE_COLOURS
from driftrl.evaluation.picture import MUTED, Chart, Stroke, draw
from driftrl.evaluation.plots import Line, plot
from driftrl.files import write_text

SENTENCES = 3
"""Methods up to which each has a sentence of its own."""
LEAST = 0.005
"""Change of variety, as a share, below which it rounds to 0%, and is not worth a word."""
STRAIGHT = 0.5
"""Share of the compared rewards between two measured points of a front, from which that is said."""
FULL_TINT = 0.25
"""Change of variety, as a share, from which a cell is tinted fully."""


@dataclass(frozen=True)
class Findings:
    """What evaluated runs say beside each other."""

    methods: list[Method]
    metrics: list[str]
    pairs: list[comparing.Comparison]
    rival: str
    """The method that the others are compared with."""

    @property
    def few(self) -> str:
        """That so few prompts tell little, if it is so: then there are neither intervals nor a verdict."""
        return too_few(self.methods[0].runs[0].evaluation.settings)

    def verdict(self) -> list[str]:
        """In sentences."""
        if self.few:
            return [f"{self.few}: who has more variety is left open.", *_never_rose(self.methods)]
        return [*_verdict(self.methods, self.pairs, self.rival), *self.seldom()]

    def seldom(self) -> list[str]:
        """The sentence on methods that were measured too seldom for their fronts to be known, if there are such."""
        worst: dict[str, float] = {}
        for pair in self.pairs:
            if pair.metric == self.metrics[0] and not pair.apart:
                for name, share in zip((pair.method, pair.against), pair.straight, strict=True):
                    worst[name] = max(worst.get(name, 0.0), share)
        found = [f"{name} ({share:.0%})" for name, share in worst.items() if share > STRAIGHT]
        if not found:
            return []
        return [
            f"Measured too seldom: {listed(found)}. So much of the rewards compared lies between two checkpoints, where a front is taken "
            "to be straight; where it bulges, gains over it come out too large, and its own too small. Measure more of them: driftrl "
            "evaluate RUN --checkpoint all; where all are, train with a smaller logging.checkpoint_every."
        ]

    def summary(self) -> list[dict[str, Any]]:
        """Rows of a table: the base model and each method's last shared checkpoint, reward and every metric."""
        return _summary(self.methods, self.metrics)


def find(folders: Sequence[Path | str], against: str | None = None) -> Findings:
    """Compare evaluated runs.

    Args:
        folders: two or more run folders with ``evaluation.json``; runs of one name are seeds of one method.
        against: the method that others are compared with; by default that of the first folder.

    Raises:
        InputError: for runs that were not measured alike, or anything as in `compare.load_methods`.
    """
    methods = comparing.load_methods(folders)
    metrics = comparing.diversity_metrics(methods, VARIETY)
    return Findings(
        methods, metrics, comparing.compare(methods, metrics, against), against or methods[0].name
    )


def write_comparison(folders: Sequence[Path | str], out: Path | str, against: str | None = None) -> Path:
    """Write one page that compares evaluated runs, as `find` does, and return its path."""
    return write_page(find(folders, against), Path(out))


def write_page(findings: Findings, out: Path) -> Path:
    """Write what was found as one HTML file, and return its path."""
    methods, metrics, pairs, rival = findings.methods, findings.metrics, findings.pairs, findings.rival
    evaluation = methods[0].runs[0].evaluation
    settings = evaluation.settings
    names = [m.name for m in methods]
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
        short=short,
        kind="comparison",
        title=listed(names) if len(names) < 4 else f"{len(names) - 1} methods beside {rival}",
        evaluation=evaluation,
        settings=settings,
        asked=asked(settings),
        few=findings.few,
        methods=methods,
        rival=rival,
        single=min(len(m.runs) for m in methods) == 1,
        several=max(len(m.runs) for m in methods) > 1,
        verdict=findings.verdict(),
        summary=findings.summary(),
        board=_board(methods, metrics, pairs, rival, bool(findings.few)),
        differences=_differences(methods, metrics, rival),
        tables=tables,
        fronts=_fronts(methods, metrics),
        curves=_checkpoint_curves(methods, metrics, bool(findings.few)),
        gallery=_gallery(methods),
        differing=comparing.differing_settings(methods),
        configs=[(run.folder.name, dump_config(run.config)) for m in methods for run in m.runs if run.config],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


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
    rows = evenly(prompt_rows(first.evaluation, lasts[0]), prompts)
    sides = [side("base model", MUTED, first.folder, first.evaluation, first.evaluation.base, rows, images)]
    for method, point in zip(methods, lasts, strict=True):
        run = method.runs[0]
        sides.append(side(method.name, colours[method.name], run.folder, run.evaluation, point, rows, images))
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


def _verdict(methods: list[Method], pairs: list[comparing.Comparison], rival: str) -> list[str]:
    """Sentences, one for each thing that is said of methods of which it holds."""
    if len(methods) > SENTENCES:
        return _verdict_of_many(methods, pairs, rival)
    runs = {method.name: len(method.runs) for method in methods}
    alike: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    fallen = [method.name for method in methods if not _gained_reward(method)]
    for method in methods:
        if method.name == rival or {method.name, rival} & set(fallen):
            continue
        ahead: list[str] = []
        behind: list[str] = []
        for pair in pairs:
            way = _way(pair) if pair.method == method.name else 0
            if way:
                (ahead if way > 0 else behind).append(METRICS[pair.metric].title)
        told = [f"more than {rival} of: {', '.join(ahead)}"] if ahead else []
        told += [f"less{'' if ahead else f' than {rival}'} of: {', '.join(behind)}"] if behind else []
        single = min(runs[method.name], runs[rival]) == 1
        alike.setdefault((single, tuple(told)), []).append(method.name)
    parts = []
    for (single, found), names in alike.items():
        who, level = listed(names), "At equal reward, on a single seed," if single else "At equal reward"
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
    parts += _never_rose(methods)
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
        f"At equal reward {told[kind]}: {listed([name for _, name in sorted(which)])}."
        for kind, which in found.items()
        if which
    ]
    parts += _never_rose(methods)
    if min(len(method.runs) for method in methods) == 1:
        parts.append("Of a single seed any of this may be chance.")
    return parts


def _never_rose(methods: list[Method]) -> list[str]:
    """The sentence on methods without any gain of reward, if there are such."""
    fallen = [method.name for method in methods if not _gained_reward(method)]
    told = "never got above the base model's reward, so there is nothing to compare at equal reward."
    return [f"{listed(fallen)} {told}"] if fallen else []


def _way(pair: comparing.Comparison) -> int:
    """1 where a method has more variety at equal reward than its rival beyond the interval, -1 where it has less, 0 where
    that is not clear or rounds to 0%.
    """
    gain, share = pair.diversity_gain, pair.diversity_share
    if gain is None or share is None or gain.low <= 0 <= gain.high or abs(share.mean) < LEAST:
        return 0
    return 1 if gain.mean > 0 else -1


def _gained_reward(method: Method) -> bool:
    """Whether any checkpoint of any seed has more reward than the base model."""
    return any(
        max(rewards) > rewards[0] for rewards in ([x for x, _ in run.curve("reward")] for run in method.runs)
    )


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
                "colour": number,
                "seeds": len(method.runs),
                "at": method.told(method.shared()[-1]),
                "cells": cells,
            }
        )
    return rows


def _board(
    methods: list[Method], metrics: list[str], pairs: list[comparing.Comparison], rival: str, few: bool
) -> list[dict[str, Any]]:
    """For each method what variety it has at equal reward beyond the rival's, as a share, by each measure."""
    runs = {method.name: len(method.runs) for method in methods}
    rows = []
    for number, method in enumerate(methods):
        if method.name == rival:
            continue
        cells: list[dict[str, Any]] = []
        for metric in metrics:
            pair = next(p for p in pairs if (p.method, p.metric) == (method.name, metric))
            gain, share = pair.diversity_gain, pair.diversity_share
            if gain is None or share is None:
                cells.append({"apart": pair.apart or "no reward in common"})
                continue
            single = min(runs[method.name], runs[rival]) == 1
            sure = 0.0 if few or not _way(pair) else 0.6 if single else 1.0
            ends = f", {minus(gain.low, sign=True)} to {minus(gain.high, sign=True)}"
            cells.append(
                {
                    "value": share.mean,
                    "text": percent(share.mean),
                    "tint": round(sure * min(1.0, abs(share.mean) / FULL_TINT) ** 0.5, 3),
                    "way": "more" if share.mean > 0 else "less",
                    "tip": minus(gain.mean, sign=True) + ("" if few else ends),
                }
            )
        rows.append({"name": method.name, "colour": number, "cells": cells})
    return rows


def _differences(methods: list[Method], metrics: list[str], rival: str) -> list[tuple[str, Markup]]:
    """For each measure a plot of how much more variety each method has than the rival, over the reward."""
    against = next(method for method in methods if method.name == rival)
    zero = methods.index(against)
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
            lines.append(Line(points, number, "bold", tips))
        if not lines:
            continue
        ends = [x for line in lines for x, _ in line.points]
        lines.insert(0, Line([(min(ends), 0.0), (max(ends), 0.0)], zero, "bold"))
        described = f"{title} beyond that of {rival} at equal reward, over the reward"
        plots.append((title, plot(lines, "reward", described, "more \N{UPWARDS ARROW}")))
    return plots


def _fronts(methods: list[Method], metrics: list[str]) -> list[tuple[str, Markup]]:
    fronts = []
    for name in metrics:
        title, lines, told = METRICS[name].title, [], []
        for number, method in enumerate(methods):
            if len(method.runs) > 1:
                lines += [Line(run.curve(name), number, "faint") for run in method.runs]
            mean, at = method.mean_curve(name), method.shared()
            envelope = upper_envelope(mean).tolist()
            lines.append(Line([(p[0], p[1]) for p in envelope], number, "bold"))
            tips = [
                f"{method.name}, {method.told(i)}: reward {minus(r)}, {minus(v)}"
                for i, (r, v) in zip(at, mean, strict=True)
            ]
            lines.append(Line(mean[1:], number, "none", tips[1:]))
            told.append(tips[-1])
        base = methods[0].runs[0].curve(name)[:1]
        lines.append(Line(base, -1, "none", ["base model"], {0: "base"}))
        described = f"{title} against reward, upper envelopes of {len(methods)} methods: {'; '.join(told)}"
        fronts.append((title, plot(lines, "reward", described, "better \N{NORTH EAST ARROW}")))
    return fronts


def _checkpoint_curves(methods: list[Method], metrics: list[str], few: bool) -> list[tuple[str, Markup]]:
    curves = []
    for name in ["reward", *metrics]:
        title, lines = METRICS[name].title, list[Line]()
        for number, method in enumerate(methods):
            if method.scaled:  # which has no place along the iterations
                continue
            at, over = method.shared(), method.over_time(name)
            points = [(i, o.mean) for i, o in zip(at, over, strict=True)]
            tips = [
                f"{method.name}, {method.told(i)}: {minus(o.mean)}" for i, o in zip(at, over, strict=True)
            ]
            band = [(o.low, o.high) for o in over] if len(method.runs) > 1 and not few else ()
            lines.append(Line(points, number, "bold", tips, band=band))
        if not lines:
            continue
        described = f"{title} over checkpoints of {', '.join(m.name for m in methods if not m.scaled)}"
        curves.append((title, plot(lines, "iteration", described, integer_x=True)))
    return curves


def _last(method: Method) -> Point:
    """The last checkpoint that all runs of a method have, of its first run."""
    return method.runs[0].at(method.shared()[-1])


def _gallery(methods: list[Method]) -> list[dict[str, Any]]:
    """Base model and the last checkpoint of each method's first seed, on the same seeds of noise."""
    first = methods[0].runs[0]
    sides = [("base model", first.folder, first.evaluation, first.evaluation.base)]
    for method in methods:
        run = method.runs[0]
        sides.append((method.name, run.folder, run.evaluation, _last(method)))
    cards = []
    for place, prompt in enumerate(first.evaluation.settings.prompts):
        if shown := pictures(sides, place):
            cards.append({"prompt": prompt, "pictures": shown, "note": ""})
    return spread(cards)
