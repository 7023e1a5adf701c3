"""Which part of DRIFT keeps variety, in a world small enough to try everything: a choice among 64 pictures.

A prompt's policy is a softmax over 64 pictures, each with a reward and an embedding; an iteration draws 16, selects half
and follows the policy gradient of their advantages. Selection, advantages and shaping are the package's own. There
are no networks and no denoising steps, so what is seen here is what the rules do by themselves. Every rule has the
same number of iterations and the best of the same learning rates, as a fair comparison wants.

Four worlds. Rewards are two-humped, as the embedded model's are: a third of the pictures fail.

- `two humps`: failures are as unlike each other as good pictures are.
- `odd failures`: good pictures resemble each other, failures resemble nothing, so variety and reward are at odds.
- `wild rewards`: as `two humps`, and one score in sixteen is off by 8 standard deviations of the good ones' rewards.
- `hacked`: as `two humps`, and one picture in twenty scores best though it is among the worst. The front is drawn with
  the true reward.

Draw the figure and print the tables of docs/results/parts.md:  python docs/figures/which_part.py   (half a minute)
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from driftrl.advantages import group_relative
from driftrl.checks import InputError
from driftrl.evaluation.pareto import Interval, bootstrap_interval, gain_at_equal, hypervolume
from driftrl.evaluation.picture import COLOURS, INK, MUTED, RULE
from driftrl.selection import select
from driftrl.shaping import (
    DiversityWarning,
    group_diversity,
    intrinsic_advantage,
    reweight_above_average,
    shape_advantages,
)

WORLDS = ("two humps", "odd failures", "wild rewards", "hacked")
RATES = (0.25, 1.0, 4.0)
SEEDS, PROMPTS, PICTURES = 8, 12, 64
LEVEL = 0.5
"""A reward that every rule reaches in the first world."""


@dataclass(frozen=True)
class Rule:
    """A method, as far as it is one here."""

    name: str
    strategy: str
    ratio: float = 0.0
    scale: str = "selected"
    gardo: bool = False
    """Positive advantages times how far an image is from the others, in place of a bonus."""


RULES = (
    Rule("GRPO", "random"),
    Rule("GRPO + shaping 0.25", "random", 0.25),
    Rule("GRPO + shaping 0.5", "random", 0.5),
    Rule("GRPO + shaping 1", "random", 1.0),
    Rule("GRPO + GARDO's weights", "random", 1.0, gardo=True),
    Rule("contrast", "contrast"),
    Rule("contrast + shaping 1", "contrast", 1.0),
    Rule("concentrated", "concentrated"),
    Rule("concentrated + shaping 0.5", "concentrated", 0.5),
    Rule("concentrated + shaping 1", "concentrated", 1.0),
    Rule("nearest neighbour", "nearest_neighbor"),
    Rule("nearest neighbour + shaping 0.5", "nearest_neighbor", 0.5),
    Rule("nearest neighbour + shaping 1", "nearest_neighbor", 1.0),
    Rule("nearest neighbour + shaping 0.25, global", "nearest_neighbor", 0.25, "global"),
    Rule("nearest neighbour + shaping 0.5, global", "nearest_neighbor", 0.5, "global"),
)


@dataclass(frozen=True)
class World:
    """SEEDS * PROMPTS prompts with PICTURES pictures each."""

    distances: Tensor
    """[SP, K, K]: 1 - cosine."""
    logits: Tensor
    """[SP, K]: of the policy that training starts from."""
    trained: Tensor
    """[SP, K]: the reward that training sees, but for noise of a standard deviation of 0.3."""
    true: Tensor
    """[SP, K]: the reward that is meant."""
    fails: Tensor
    """bool [SP, K]: the pictures of the lower hump."""
    wild: bool


def world(kind: str) -> World:
    """One of WORLDS, always the same."""
    draw = torch.Generator().manual_seed(WORLDS.index(kind))
    prompts = SEEDS * PROMPTS

    def directions(count: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(prompts, count, 16, generator=draw), dim=-1)

    features, common = directions(PICTURES), directions(1)
    logits, value = (torch.randn(prompts, PICTURES, generator=draw) for _ in range(2))
    fails = torch.rand(prompts, PICTURES, generator=draw) < 0.35
    true = torch.where(fails, 0.8 * value - 3.0, 0.6 * value)
    if kind == "odd failures":
        alike = torch.nn.functional.normalize(0.6 * features + 0.8 * common, dim=-1)
        features = torch.where(fails[..., None], features, alike)
    trained = true
    if kind == "hacked":
        fooled = torch.rand(prompts, PICTURES, generator=draw) < 0.05
        trained, true = torch.where(fooled, 2.0, true), torch.where(fooled, -3.0, true)
    return World(1 - features @ features.mT, 0.5 * logits, trained, true, fails, kind == "wild rewards")


def spread(place: World, chance: Tensor) -> Tensor:
    """Expected distance [SP] of two pictures drawn with ``chance`` [SP, K]."""
    return torch.einsum("pi,pij,pj->p", chance, place.distances, chance)


def train(place: World, rule: Rule, rate: float, iterations: int, every: int, candidates: int = 16) -> Tensor:
    """Curves [SEEDS, checkpoints, 4]: expected true reward, expected distance of two pictures, share of failures, and
    expected distance of two pictures that do not fail.
    """
    draw = torch.Generator().manual_seed(1)
    logits, points = place.logits, []
    row = torch.arange(len(logits))[:, None]
    for iteration in range(iterations + 1):
        chance = logits.softmax(1)
        if iteration % every == 0:
            reward = (chance * place.true).sum(1)
            failing, good = (chance * place.fails).sum(1), chance * ~place.fails
            good = good / good.sum(1, keepdim=True)
            figures = [reward, spread(place, chance), failing, spread(place, good)]
            points.append(torch.stack(figures, 1).unflatten(0, (SEEDS, PROMPTS)).mean(1))
        drawn = chance.multinomial(candidates, replacement=True, generator=draw)
        noise = 0.3 * torch.randn(drawn.shape, generator=draw)
        if place.wild:
            wild = torch.rand(drawn.shape, generator=draw) < 1 / 16
            noise = noise + wild * 4.8 * torch.randn(drawn.shape, generator=draw)
        rewards = place.trained.gather(1, drawn) + noise
        chosen = select(rewards, candidates // 2, rule.strategy, draw)
        kept = drawn.gather(1, chosen)
        advantages = group_relative(rewards.gather(1, chosen), rule.scale, candidates=rewards).clamp(-5, 5)
        if rule.ratio:
            variety = group_diversity(place.distances[row[..., None], kept[:, :, None], kept[:, None]])
            advantages = (
                reweight_above_average(advantages, variety, rule.ratio)
                if rule.gardo
                else shape_advantages(advantages, intrinsic_advantage(variety), rule.ratio)
            )
        # The gradient of sum_g A_g log softmax(logits)[kept_g] / G.
        rise = torch.zeros_like(logits).scatter_add(1, kept, advantages / kept.shape[1])
        logits = logits + rate * (rise - chance * advantages.mean(1, keepdim=True))
    return torch.stack(points, 1)


def volumes(curves: Tensor) -> list[float]:
    """Of each seed, above its base model's reward and no variety."""
    return [hypervolume(curve, (float(curve[0, 0]), 0.0)) for curve in curves[..., :2]]


def tuned(place: World, rule: Rule, iterations: int, candidates: int) -> tuple[float, Tensor]:
    """The rate with the largest mean hypervolume, and its curves."""
    every = max(1, iterations // 50)
    tried = [(rate, train(place, rule, rate, iterations, every, candidates)) for rate in RATES]
    return max(tried, key=lambda pair: sum(volumes(pair[1])))


def gained(curves: Tensor, against: Tensor) -> Interval | None:
    """Percent of variety at equal reward over that of ``against``; None where no reward is reached by both."""
    try:
        pairs = zip(curves[..., :2], against[..., :2], strict=True)
        gains = [gain_at_equal(*pair, "reward").relative or 0.0 for pair in pairs]
    except InputError:
        return None
    return bootstrap_interval([100 * gain for gain in gains], level=0.9)


def cell(curves: Tensor, against: Tensor, kind: str) -> str:
    """Hypervolume, and variety at equal reward against GRPO's, with 90% intervals over seeds."""
    volume = bootstrap_interval(volumes(curves), level=0.9)
    text = f"{volume.mean:.2f} ± {(volume.high - volume.low) / 2:.2f}"
    gain = None if curves is against or kind == "hacked" else gained(curves, against)
    return text if gain is None else f"{text}; {gain.mean:+.0f}% ± {(gain.high - gain.low) / 2:.0f}"


def composition(curves: Tensor, level: float) -> str:
    """Where the mean reward first reaches ``level``: the share of failures, and how varied the others are."""
    mean = curves.mean(0)
    after = int((mean[:, 0] >= level).nonzero()[0])
    share = (level - mean[after - 1, 0]) / (mean[after, 0] - mean[after - 1, 0])
    _, _, failing, good = torch.lerp(mean[after - 1], mean[after], share).tolist()
    return f"{100 * failing:.0f}% | {good:.2f}"


def panel(axes: object, kind: str, found: dict[str, tuple[float, Tensor]], shown: tuple[str, ...]) -> None:
    """Fronts, means over seeds."""
    for name, colour in zip(shown, COLOURS, strict=False):
        axes.plot(*found[name][1].mean(0)[:, :2].T.tolist(), color=colour, linewidth=1.6, label=name)
    axes.set_title(kind, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("true reward" if kind == "hacked" else "reward", fontsize=8, color=MUTED)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines[:].set_visible(False)


def main() -> None:
    """Try everything, draw, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "images/which-part.png")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=16, help="drawn for each prompt; half are kept")
    args = parser.parse_args()
    warnings.simplefilter("ignore", DiversityWarning)  # near the end, groups of one picture are the point
    canvas = Figure(figsize=(11.5, 2.9), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    rows: dict[str, list[str]] = {rule.name: [] for rule in RULES}
    places = canvas.subplots(1, len(WORLDS), squeeze=False)[0]
    names = ("GRPO", "contrast", "nearest neighbour", "nearest neighbour + shaping 0.5", "GRPO + shaping 1")
    for axes, kind in zip(places, WORLDS, strict=True):
        place = world(kind)
        found = {rule.name: tuned(place, rule, args.iterations, args.candidates) for rule in RULES}
        against = found["GRPO"][1]
        for name, (_, curves) in found.items():
            rows[name].append(cell(curves, against, kind))
        panel(axes, kind, found, names)
        if kind == "two humps":
            plain = [rule.name for rule in RULES if not rule.ratio]
            print(
                f"| Rule, at a reward of {LEVEL} | Failures | Variety of the others |\n" + "| --- " * 3 + "|"
            )
            for name in plain:
                print(f"| {name} | {composition(found[name][1], LEVEL)} |")
    places[0].set_ylabel("distance of two pictures", fontsize=8, color=MUTED)
    places[0].legend(fontsize=6.5, frameon=False, loc="lower left")
    canvas.savefig(args.out, metadata={"Software": None})
    print("| Rule | " + " | ".join(WORLDS) + " |\n" + "| --- " * (len(WORLDS) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
