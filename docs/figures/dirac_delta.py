"""A policy small enough to know the answer: what KL-regularised training converges to, and the Dirac delta.

The policy is one Gaussian, the reward one parabola, and the training loop is the package's: group-relative
advantages, clipped surrogate, mean-over-dimensions log-probabilities, closed-form KL. Its optimum is known,
``p* proportional to p_ref exp(R / beta)``, and ``tests/invariants/test_gaussian_optimum.py`` holds the loop
to it.

Draw the figure:  python docs/figures/dirac_delta.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from driftrl.advantages import group_relative
from driftrl.objectives.clipped_surrogate import clipped_surrogate
from driftrl.objectives.kl import kl_equal_variance
from driftrl.shaping import group_diversity, shape_rewards
from driftrl.transitions.gaussian import log_prob, sample


class Problem(NamedTuple):
    """Start and reference N(mean, std^2); reward ``-sum_d (x_d - target_d)^2 / (2 width_d^2)``; each [D]."""

    mean: Tensor
    std: Tensor
    target: Tensor
    width: Tensor

    def reward(self, x: Tensor) -> Tensor:
        """Reward of each row of ``x`` [N, D]."""
        return -0.5 * ((x - self.target) / self.width).square().sum(dim=1)

    def optimum(self, beta: float, ratio: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean and std [D] of ``p_ref exp((R + ratio d) / beta)``, ``d(x) = E |x - x'|^2`` under itself.

        Precisions add. The diversity takes ``2 ratio / beta`` off them and leaves the mean where it is.
        """
        prior, pull = self.std**-2, self.width**-2 / beta
        mean = (prior * self.mean + pull * self.target) / (prior + pull)
        return mean, (prior + pull - 2 * ratio / beta).rsqrt()


def one_dimension() -> Problem:
    """Reference N(0, 1); the reward asks for 2, give or take 1."""
    return Problem(*(torch.tensor([value], dtype=torch.float64) for value in (0.0, 1.0, 2.0, 1.0)))


def train(
    problem: Problem,
    beta: float,
    *,
    penalty: str = "reward",
    scale: str = "none",
    ratio: float = 0.0,
    prompts: int = 1,
    group: int = 256,
    iterations: int = 800,
    learning_rate: float = 0.03,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Train and return the policy's mean and std after every iteration, each [iterations + 1, D].

    ``penalty='reward'`` subtracts ``beta`` times the log-ratio to the reference from the reward: both mean
    and std learn. That ratio is a mean over D dimensions, so the KL itself is weighed by ``beta / D``.
    ``penalty='loss'`` adds ``beta`` times the closed-form KL to the loss, as the trainer does: that KL is for
    equal variances, so only the mean learns. Surrogate and KL are both means there, so ``beta`` is ``beta``.
    ``ratio`` adds that much of the group's diversity, measured in squared distances, to the reward.
    """
    generator = torch.Generator().manual_seed(seed)
    dimensions = problem.mean.shape[0]
    mean = problem.mean.clone().requires_grad_()
    log_std = problem.std.log().requires_grad_(penalty == "reward")
    learned = [p for p in (mean, log_std) if p.requires_grad]
    optimiser = torch.optim.Adam(learned, lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, learning_rate / 30)
    means, stds = [mean.detach().clone()], [log_std.detach().exp()]
    batch = prompts * group
    for _ in range(iterations):
        with torch.no_grad():
            wide = mean.expand(batch, dimensions)
            std = log_std.exp().expand(batch, dimensions)
            noise = torch.randn(batch, dimensions, generator=generator, dtype=mean.dtype)
            x = sample(wide, std, noise)
            old = log_prob(x, wide, std)
            rewards = problem.reward(x)
            if ratio:
                groups = x.view(prompts, group, dimensions)
                diversity = group_diversity((groups[:, :, None] - groups[:, None]).square().sum(dim=-1))
                rewards = shape_rewards(rewards.view_as(diversity), diversity, ratio, clip=math.inf).flatten()
            if penalty == "reward":
                reference = log_prob(x, problem.mean.expand_as(x), problem.std.expand_as(x))
                rewards = rewards - beta * (old - reference)
            advantages = group_relative(rewards.view(prompts, group), scale).flatten()
        for _ in range(2):  # the second is off-policy, so that the ratio and its clip have work to do
            wide, std = mean.expand(batch, dimensions), log_std.exp().expand(batch, dimensions)
            loss = clipped_surrogate(log_prob(x, wide, std), old, advantages, clip_range=0.2).loss.mean()
            if penalty == "loss":
                loss = loss + beta * kl_equal_variance(wide, problem.mean.expand_as(wide), std).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
        means.append(mean.detach().clone())
        stds.append(log_std.detach().exp())
    return torch.stack(means), torch.stack(stds)


def draw(path: Path) -> None:
    """Train at several beta and draw how the distribution moves, where it ends, and how fast it narrows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problem = one_dimension()
    betas = (1.0, 0.1, 0.01, 0.0)
    colours = ("#2a6f97", "#468f5b", "#d98c1f", "#b3262e")
    runs = [train(problem, beta) for beta in betas]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    fans = rows[0].subplots(1, 4, sharey=True)
    iterations = torch.arange(1, len(runs[0][0]) + 1)

    for axis, beta, colour, (means, stds) in zip(fans, betas, colours, runs, strict=True):
        mean, std = means[:, 0], stds[:, 0]
        for width, shade in ((2, 0.2), (1, 0.35)):
            axis.fill_between(
                iterations, mean - width * std, mean + width * std, color=colour, alpha=shade, lw=0
            )
        axis.plot(iterations, mean, color=colour, lw=1.8)
        axis.axhline(2.0, color="0.35", lw=1, ls=":")
        if beta:
            best, spread = (float(value) for value in problem.optimum(beta))
            for edge in (best - 2 * spread, best + 2 * spread):
                axis.axhline(edge, color="black", lw=1, ls="--")
        axis.set(xscale="log", xlim=(1, len(iterations)), ylim=(-2.3, 4.3), xlabel="iteration")
        axis.set_title(rf"$\beta$ = {beta:g}" if beta else r"$\beta$ = 0: the Dirac delta", color=colour)
    fans[0].set_ylabel("sample $x$")
    fans[-1].annotate("highest reward", (1.15, 2.1), color="0.35", fontsize=8.5)
    fans[0].annotate(r"optimum $\pm\,2\sigma$", (60, -0.9), color="black", fontsize=8.5, ha="center")

    left, right = rows[1].subplots(1, 2)
    grid = torch.linspace(-3, 4, 1401, dtype=torch.float64)

    def density(mean: float, std: float) -> Tensor:
        return (-0.5 * ((grid - mean) / std).square()).exp() / (std * math.sqrt(2 * math.pi))

    left.fill_between(grid, density(0.0, 1.0), color="0.85", lw=0, label="reference, where training starts")
    for beta, colour, (means, stds) in zip(betas, colours, runs, strict=True):
        label = rf"trained, $\beta$ = {beta:g}"
        left.plot(grid, density(float(means[-1]), float(stds[-1])), color=colour, lw=2, label=label)
        if beta:
            best, spread = (float(value) for value in problem.optimum(beta))
            left.plot(grid[::20], density(best, spread)[::20], "o", ms=3, mfc="white", mec=colour)
    left.plot([], [], "o", ms=3, mfc="white", mec="0.3", label=r"$\propto p_{\rm ref}\,e^{R/\beta}$")
    left.set(xlim=(-3, 4), ylim=(0, 4.6), xlabel="sample $x$", ylabel="density", title="Where it ends")
    left.legend(frameon=False, fontsize=9, loc="upper left")

    for beta, colour, (_, stds) in zip(betas, colours, runs, strict=True):
        right.plot(iterations, stds[:, 0], color=colour, lw=2)
        if beta:
            level = float(problem.optimum(beta)[1])
            right.axhline(level, color=colour, lw=1, ls="--")
            right.annotate(rf"$\beta$ = {beta:g}", (1.1, level * 0.9), color=colour, fontsize=9, va="top")
    right.annotate(r"$\beta$ = 0", (330, 0.045), color=colours[-1], fontsize=9, va="top")
    normalised = train(problem, 0.0, scale="selected")[1][:, 0]
    right.plot(iterations, normalised, color=colours[-1], lw=1.6, ls=(0, (4, 1.5)))
    right.annotate(
        r"$\beta$ = 0, advantages divided" + "\nby the group's std (GRPO)",
        (4, 3e-3),
        color=colours[-1],
        fontsize=9,
    )
    right.set(
        xscale="log", yscale="log", xlim=(1, len(iterations)), ylim=(1e-4, 1.6),
        xlabel="iteration", ylabel=r"standard deviation of $x$", title="How fast variety goes",
    )  # fmt: skip
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    draw(parser.parse_args().out)
