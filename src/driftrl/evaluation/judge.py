"""What raters said on a blinded page: un-blinded, counted, tested (`driftrl.evaluation.blind` makes the page)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from driftrl.checks import InputError, counted
from driftrl.evaluation.blind import FORMAT, KEY, QUESTIONS, Answers, Key, Record
from driftrl.evaluation.choices import binomial_interval, cohen_kappa, fleiss_kappa, sign_test
from driftrl.evaluation.evaluate import first_problem
from driftrl.evaluation.pareto import bootstrap_interval
from driftrl.files import read_json, write_json

FILE, PICTURE = "analysis.json", "analysis.png"
LEVEL = 0.95

_File = TypeVar("_File", Answers, Key)


class Rate(Record):
    """A share and its interval."""

    mean: float
    low: float
    high: float


class Standing(Record):
    """How one method fared on one question."""

    method: str
    chosen: int
    """Choices of it, of all raters over all prompts."""
    win_rate: Rate
    """Share of its choices among all, ties included; mean over prompts, interval bootstrapped over prompts."""
    prompts: int
    """Prompts on which more raters chose it than the other."""
    prompt_rate: Rate | None
    """Share of those among the prompts that were decided, with the exact binomial interval; None without any."""


class Agreement(Record):
    """How far raters agree, on which method or that there is no difference."""

    share: float
    """Of the pairs of raters who gave the same answer, over all prompts."""
    kappa: float | None
    """Beyond chance; None where everybody only ever said one thing."""
    kind: str
    """'Cohen' for two raters, 'Fleiss' for more."""


class Finding(Record):
    """The answers to one question."""

    question: str
    standings: list[Standing]
    """Two, in the order of the key."""
    same: int
    """Choices of 'about the same'."""
    undecided: int
    """Prompts on which as many raters chose the one method as the other."""
    p_value: float
    """Two-sided sign test over the prompts that were decided."""
    left: int
    """Choices of the left set, whatever method it was: with ``right``, whether raters favour a side."""
    right: int
    agreement: Agreement | None
    """None for a single rater."""


class Analysis(Record):
    """The contents of ``analysis.json``."""

    format: int = FORMAT
    kit: str
    level: float = LEVEL
    prompts: int
    raters: list[str]
    findings: list[Finding]


def judge(folder: Path, files: Sequence[Path]) -> Analysis:
    """Un-blind answers with the folder's key, write ``analysis.json`` and ``analysis.png`` there, and return them.

    Prompts are what is counted, never single choices: raters who see the same pictures are no independent draws.

    Args:
        folder: what `write_blind` filled.
        files: one ``answers.json`` for each rater.

    Raises:
        InputError: for a damaged key, or answers that are damaged, of another page, incomplete or given twice.
    """
    key = _key(folder)
    given = [_answers(file, key) for file in files]
    if not given:
        raise InputError("judge: expected at least one file of answers")
    names = _raters(files, given)
    findings = [_finding(question, key, given) for question in QUESTIONS]
    analysis = Analysis(kit=key.kit, prompts=len(key.trials), raters=names, findings=findings)
    write_json(folder / FILE, analysis.model_dump(mode="json"))
    _draw(analysis, folder / PICTURE)
    return analysis


def _read(path: Path, model: type[_File], what: str) -> _File:
    data = read_json(path)
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: expected {what} of format {FORMAT}; got {found!r}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: expected {what}; {first_problem(error)}") from None


def _key(folder: Path) -> Key:
    path = folder / KEY
    if not path.is_file():
        raise InputError(f"{path}: not there; expected a folder made by driftrl compare RUN RUN --blind DIR")
    key = _read(path, Key, "a key")
    methods = {shown.method for shown in key.shown}
    trials = {trial.trial for trial in key.trials}
    whole = len(key.shown) == len(methods) == 2 and len(trials) == len(key.trials) > 0
    if not whole or any({trial.left, trial.right} != methods for trial in key.trials):
        raise InputError(f"{path} is damaged: expected two methods, and both of them in each pair")
    return key


def _answers(path: Path, key: Key) -> Answers:
    answers = _read(path, Answers, "answers")
    if answers.kit != key.kit:
        raise InputError(
            f"{path}: these answers belong to another page: its number is {answers.kit!r}, the key's {key.kit!r}"
        )
    asked, given = [t.trial for t in key.trials], [a.trial for a in answers.answers]
    if sorted(given) != sorted(asked):
        missing, strange = sorted(set(asked) - set(given)), sorted(set(given) - set(asked))
        twice = sorted(trial for trial, count in Counter(given).items() if count > 1)
        problems = (("not answered", missing), ("unknown", strange), ("answered twice", twice))
        listing = "; ".join(f"{what}: {', '.join(trials)}" for what, trials in problems if trials)
        raise InputError(f"{path}: expected one answer for each of {len(asked)} pairs; {listing}")
    return answers


def _raters(files: Sequence[Path], given: Sequence[Answers]) -> list[str]:
    """Names of the raters; a file without one is called after itself."""
    names = [answers.rater.strip() or str(file) for file, answers in zip(files, given, strict=True)]
    paths = [file.resolve() for file in files]
    for k, name in enumerate(names):
        if name in names[:k] or paths[k] in paths[:k]:
            other = next(j for j in range(k) if names[j] == name or paths[j] == paths[k])
            raise InputError(
                f"{files[other]} and {files[k]} are by the same rater, {name!r}; a rater counts once: leave one "
                "out, or correct 'rater' in the file"
            )
    return names


def _finding(question: str, key: Key, given: Sequence[Answers]) -> Finding:
    methods = [shown.method for shown in key.shown]
    by_trial = [{a.trial: getattr(a, question) for a in answers.answers} for answers in given]
    sides = [[choices[trial.trial] for choices in by_trial] for trial in key.trials]
    # For each prompt, what each rater chose: a method, or 'same' as None, for a method may be called so.
    chosen = [
        [{"left": trial.left, "right": trial.right}.get(side) for side in row]
        for trial, row in zip(key.trials, sides, strict=True)
    ]
    first, second = methods
    margins = [row.count(first) - row.count(second) for row in chosen]
    ahead = {first: sum(m > 0 for m in margins), second: sum(m < 0 for m in margins)}
    standings = []
    for method, other in ((first, second), (second, first)):
        rate = bootstrap_interval([row.count(method) / len(row) for row in chosen], LEVEL)
        decided = ahead[method] + ahead[other]
        low, high = binomial_interval(ahead[method], ahead[other], LEVEL)
        standings.append(
            Standing(
                method=method,
                chosen=sum(row.count(method) for row in chosen),
                win_rate=Rate(mean=rate.mean, low=rate.low, high=rate.high),
                prompts=ahead[method],
                prompt_rate=Rate(mean=ahead[method] / decided, low=low, high=high) if decided else None,
            )
        )
    return Finding(
        question=question,
        standings=standings,
        same=sum(row.count(None) for row in chosen),
        undecided=margins.count(0),
        p_value=sign_test(ahead[first], ahead[second]),
        left=sum(row.count("left") for row in sides),
        right=sum(row.count("right") for row in sides),
        agreement=_agreement(chosen),
    )


def _agreement(chosen: Sequence[Sequence[str | None]]) -> Agreement | None:
    raters = len(chosen[0])
    if raters < 2:
        return None
    pairs = len(chosen) * raters * (raters - 1)
    share = sum(row.count(choice) - 1 for row in chosen for choice in row) / pairs
    if raters == 2:
        first, second = zip(*chosen, strict=True)
        return Agreement(share=share, kappa=cohen_kappa(first, second), kind="Cohen")
    return Agreement(share=share, kappa=fleiss_kappa(chosen), kind="Fleiss")


def _draw(analysis: Analysis, path: Path) -> None:
    """Shares of the choices as a bar for each question; below it the intervals of where each method's part ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, muted, colours, neutral = "#23211d", "#6b665d", ("#0f766e", "#c2571a"), "#ddd6c8"
    figure = Figure(figsize=(7.2, 0.75 + 0.85 * len(analysis.findings)), dpi=150, facecolor="#ffffff")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.19, 0.17, 0.78, 0.66))
    for row, finding in enumerate(analysis.findings):
        first, second = finding.standings
        total = first.chosen + second.chosen + finding.same
        widths = [first.chosen / total, finding.same / total, second.chosen / total]
        starts = [0.0, widths[0], widths[0] + widths[1]]
        for start, width, colour in zip(starts, widths, (colours[0], neutral, colours[1]), strict=True):
            axes.barh(row, width, 0.5, start, color=colour)
            if width >= 0.06:
                axes.text(
                    start + width / 2,
                    row,
                    f"{width:.0%}",
                    ha="center",
                    va="center",
                    fontsize=9.5,
                    color=ink if colour == neutral else "#ffffff",
                )
        ends = (first.win_rate.low, first.win_rate.high), (1 - second.win_rate.high, 1 - second.win_rate.low)
        for span, below, colour in zip(ends, (0.33, 0.41), colours, strict=True):
            axes.plot(span, (row + below, row + below), color=colour, linewidth=2, solid_capstyle="butt")
        axes.text(
            1,
            row - 0.33,
            f"sign test p = {_p(finding.p_value)}",
            ha="right",
            va="bottom",
            fontsize=8,
            color=muted,
        )
    names = [standing.method for standing in analysis.findings[0].standings]
    for x, name, colour, side in ((0.0, names[0], colours[0], "left"), (1.0, names[1], colours[1], "right")):
        figure.text(
            0.19 + 0.78 * x, 0.9, name, color=colour, fontsize=11, weight="bold", ha=side, parse_math=False
        )
    figure.text(0.58, 0.9, "about the same", color=muted, fontsize=9.5, ha="center")
    axes.set_yticks(range(len(analysis.findings)), [finding.question for finding in analysis.findings])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(analysis.findings) - 0.4, -0.55)
    axes.set_xticks([])
    axes.tick_params(labelsize=10, colors=ink, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    raters = len(analysis.raters)
    figure.text(
        0.19,
        0.03,
        f"{counted(analysis.prompts, 'prompt')}, {counted(raters, 'rater')}; lines: {analysis.level:.0%} intervals "
        "over prompts",
        color=muted,
        fontsize=8,
    )
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", facecolor="#ffffff")
    temporary.replace(path)


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else f"{value:.0e}"
