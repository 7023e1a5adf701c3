"""Losses that follow adjoints: their formulas, and the optimum that adjoint matching has in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from driftrl.advantages import SCALES, AdvantageRule, advantages_of, no_history, remember
from driftrl.batches import BatchSize
from driftrl.checks import InputError
from driftrl.mixture import Part, mixed
from driftrl.objectives.pathwise import (
    AdjointMatching,
    DirectReward,
    adjoint_matching,
    direct_reward,
    slope,
)
from driftrl.pathwise import carried_back, worth
from driftrl.shaping import Shaping, shape_rewards
from driftrl.types import Transition


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradients_are_the_formulas():
    mean, base, adjoint = (draws(3, 2, 2, 2, seed=i) for i in range(3))
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    mean.requires_grad_()
    adjoint_matching(mean, base, std, adjoint).sum().backward()
    torch.testing.assert_close(mean.grad, (mean.detach() - base) / std**2 - adjoint)
    mean.grad = None
    direct_reward(mean, base, adjoint).sum().backward()
    torch.testing.assert_close(mean.grad, -adjoint)
    assert direct_reward(base, base, adjoint).tolist() == [0, 0, 0]


def test_at_the_minimum_the_loss_is_zero_whatever_the_noise():
    base, adjoint, std = draws(4, 5), draws(4, 5, seed=1), torch.tensor([0.1, 0.3, 1.0, 3.0]).double()
    best = base + std[:, None] ** 2 * adjoint
    torch.testing.assert_close(adjoint_matching(best, base, std, adjoint), torch.zeros(4).double())
    torch.testing.assert_close(AdjointMatching(2.0)(best, base, std, adjoint / 2), torch.zeros(4).double())


def test_which_steps_are_learned_from():
    scored = torch.tensor([True, True, True, False])
    assert AdjointMatching().learned(scored).tolist() == [True, True, True, False]
    assert DirectReward(1).learned(scored).tolist() == [False, False, False, True]
    assert DirectReward(3).learned(scored).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: adjoint_matching(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2), torch.zeros(2, 3)), "mean_ref"),
        (lambda: adjoint_matching(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), torch.zeros(2, 3)), "std: expected 2"),
        (lambda: direct_reward(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), "adjoint"),
        (lambda: slope(torch.zeros(3), torch.zeros(3)), r"values: .*\[P, G\]"),
        (lambda: slope(torch.zeros(2, 3), torch.zeros(2, 2)), "standardised"),
    ],
)  # fmt: skip
def test_refuses(call, says):
    with pytest.raises(InputError, match=says):
        call()


@pytest.mark.parametrize("scale", SCALES)
def test_a_unit_of_reward_is_worth_one_over_what_divides(scale):
    rewards = draws(2, 6, seed=3) * torch.tensor([[1.0], [4.0]])
    chosen = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    kept = rewards.gather(1, chosen)
    std = {
        "selected": kept.std(1, correction=0),
        "candidates": rewards.std(1, correction=0),
        "global": rewards.std(correction=0).expand(2),
        "none": torch.ones(2).double(),
    }[scale]
    found = worth(
        rewards, rewards, chosen, torch.zeros(2, 4).double(), AdvantageRule(scale, clip=0.1), Shaping(0.0)
    )
    torch.testing.assert_close(found.reward, (1 / std).view(2, 1, 1).expand(2, 4, 1))
    assert found.bonus.tolist() == [0, 0]


def test_running_statistics_divide_too():
    rewards, chosen = draws(1, 4), torch.arange(4)[None]
    past = remember(no_history(1, 8), [0], torch.cat([rewards, 3 * rewards], 1).float())
    rule = AdvantageRule(baseline="running", min_history=2)
    found = worth(rewards, rewards, chosen, torch.zeros(1, 4), rule, Shaping(0.0), history=past)
    std = past.values.double().std(correction=0) + 1e-6
    torch.testing.assert_close(found.reward[0, :, 0], (1 / std).expand(4), rtol=1e-6, atol=0)


def test_groups_that_teach_nothing_have_no_gradient():
    rewards, chosen = torch.full((1, 4), 3.0), torch.arange(4)[None]
    found = worth(rewards, rewards, chosen, torch.full((1, 4), 0.2), AdvantageRule(), Shaping(0.5))
    assert found.reward.abs().max() == found.bonus.abs().max() == 0


def test_the_bonus_is_worth_lambda_over_its_spread_or_its_share_of_the_reward():
    rewards, bonus, chosen = draws(2, 4), draws(2, 4, seed=1).abs(), torch.arange(4).expand(2, 4)
    std = bonus.std(1, correction=0)
    given = (rewards, rewards, chosen, bonus, AdvantageRule("selected"))
    torch.testing.assert_close(worth(*given, Shaping(0.5, clip=0.1)).bonus, 0.5 / std)
    own = torch.tensor([0.25, 2.0]).double()
    torch.testing.assert_close(worth(*given, Shaping(0.5), ratio=own).bonus, own / std)
    found = worth(*given, Shaping(0.5, clip=9.0, level="reward"))
    spread = shape_rewards(rewards, bonus, 0.5, 9.0).std(1, correction=0)
    torch.testing.assert_close(found.bonus, 0.5 / spread)
    torch.testing.assert_close(found.reward[:, :, 0], (1 / spread)[:, None].expand(2, 4))


def test_several_rewards_are_worth_what_mixing_makes_of_them():
    scores, chosen = draws(2, 5, 3), torch.tensor([[0, 1, 3], [4, 2, 0]])
    parts = [Part("a", 2.0), Part("b", 1.0, "prompt"), Part("c", -3.0, "batch")]
    rewards = mixed(scores, parts)
    found = worth(
        scores, rewards, chosen, torch.zeros(2, 3).double(), AdvantageRule("none"), Shaping(0.0), parts
    )
    std = scores.std(1, correction=0)
    torch.testing.assert_close(found.reward[..., 0], torch.full((2, 3), 2.0).double())
    torch.testing.assert_close(found.reward[..., 1], (1 / std[:, 1])[:, None].expand(2, 3))
    torch.testing.assert_close(
        found.reward[..., 2], torch.full((2, 3), -3.0).double() / scores[..., 2].std(correction=0)
    )


def test_statistics_are_those_of_the_advantages_that_would_be_taken():
    """A small change of one reward changes its advantage by the slope, once the statistics are held."""
    rewards, chosen = draws(1, 6), torch.arange(6)[None]
    rule = AdvantageRule("candidates")
    weight = worth(rewards, rewards, chosen, torch.zeros(1, 6), rule, Shaping(0.0)).reward[0, 0, 0]
    plain = advantages_of(rewards, rule, rewards)[0]
    torch.testing.assert_close(plain[1] - plain[0], weight * (rewards[0, 1] - rewards[0, 0]))


class Chain(nn.Module):
    """Sampling of x_0 ~ N(m, v) in closed form, in T memoryless steps whose means a shift may move: the policy of every test below."""

    def __init__(self, centre: Tensor, variance: float, steps: int) -> None:
        super().__init__()
        self.centre, self.variance = centre, variance
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        self.alpha = (
            (0.5 * math.pi * t).cos().square().clamp(1e-6)
        )  # the signal's share of the variance, rising to 1
        self.shift = nn.Parameter(torch.zeros(steps, *centre.shape, dtype=torch.float64))
        self.on = True

    def transition(self, x: Tensor, step: int) -> Transition:
        """DDIM with an eta of 1, by the exact prediction of x_0 given x_t."""
        now, then = self.alpha[step], self.alpha[step + 1]
        gain = now.sqrt() * self.variance / (now * self.variance + 1 - now)
        x0 = self.centre + gain * (x - now.sqrt() * self.centre)
        noise = (x - now.sqrt() * x0) / (1 - now).sqrt()
        std = ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0).sqrt()
        mean = then.sqrt() * x0 + (1 - then - std**2).clamp(min=0).sqrt() * noise
        return Transition(mean + (self.shift[step] if self.on else 0), std, x0)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Paths [count, T + 1, ...]."""
        shape = (count, *self.centre.shape)
        path = [torch.randn(shape, generator=generator, dtype=torch.float64)]
        for step in range(len(self.shift)):
            move = self.transition(path[-1], step)
            path.append(move.mean + move.std * torch.randn(shape, generator=generator, dtype=torch.float64))
        return torch.stack(path, 1)

    def replay(self, latents: Tensor, sample: Tensor, step: Tensor) -> Transition:
        """As `driftrl.terms.Replay`, for samples at one step."""
        return self.transition(latents, int(step[0]))


def test_adjoints_are_what_autograd_says_of_the_whole_path():
    chain, generator = Chain(draws(1, 2, 2), 0.5, 6), torch.Generator().manual_seed(1)
    with torch.no_grad():
        chain.shift.copy_(0.1 * draws(6, 1, 2, 2, seed=2))
        path = chain.draw(5, generator)
    noise = [path[:, t + 1] - chain.transition(path[:, t], t).mean.detach() for t in range(6)]
    given = draws(5, 1, 2, 2, seed=3)
    wanted = torch.tensor([False, True, False, True, True, False])
    bare = carried_back(chain.replay, path, given, wanted, BatchSize(8, "x"), with_means=False)
    assert bare.means is None
    for size in (8, 2):
        carried = carried_back(chain.replay, path, given, wanted, BatchSize(size, "x"))
        assert carried.place.tolist() == [-1, 0, -1, 1, 2, -1]
        torch.testing.assert_close(bare.adjoints, carried.adjoints)
        for step, place in ((1, 0), (3, 1), (4, 2)):
            x = path[:, step + 1].clone().requires_grad_()
            end = x
            for later in range(step + 1, 6):
                end = chain.transition(end, later).mean + noise[later]
            torch.testing.assert_close(end, path[:, -1])
            (expected,) = torch.autograd.grad((given * end).sum(), x)
            torch.testing.assert_close(carried.adjoints[:, place].double(), expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                carried.means[:, place].double(),
                chain.transition(path[:, step], step).mean.detach(),
                rtol=1e-6,
                atol=1e-6,
            )


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_adjoint_matching_ends_in_the_base_model_times_exp_reward(scale):
    """Of a linear reward c x that is N(m + s v c, v) for a base model N(m, v): moved, and as wide as before.

    The adjoints of a linear reward are the same on every path, and the loss is quadratic in the shifts, so that one Newton step ends
    training.
    """
    centre, c, steps = draws(1, 2, 2), draws(1, 2, 2, seed=1), 40
    chain, generator, loss = (
        Chain(centre, 0.5, steps),
        torch.Generator().manual_seed(0),
        AdjointMatching(scale),
    )
    scored = torch.ones(steps, dtype=torch.bool)
    scored[-1] = False
    with torch.no_grad():
        base = chain.draw(20000, generator)[:, -1]

    def gradient():
        """Of the loss in the shifts, on fresh paths."""
        with torch.no_grad():
            path = chain.draw(4, generator)
        chain.on = False
        carried = carried_back(chain.replay, path, c.expand(4, 1, 2, 2), scored, BatchSize(4, "x"))
        chain.on = True
        total = torch.zeros((), dtype=torch.float64)
        for step in range(steps - 1):
            move = chain.transition(path[:, step], step)
            seen = carried.means[:, step].double(), move.std.expand(4), carried.adjoints[:, step].double()
            total = total + loss(move.mean, *seen).mean()
        return torch.autograd.grad(total, chain.shift)[0]

    stds = torch.stack([chain.transition(centre[None], step).std for step in range(steps)]).view(-1, 1, 1, 1)
    before = gradient()
    with torch.no_grad():
        chain.shift.sub_(stds**2 * before)
    assert gradient().abs().max() < 1e-4 * before.abs().max()
    with torch.no_grad():
        ends = chain.draw(20000, generator)[:, -1]
    # Of 20,000 draws a mean is known to 0.005, a variance to 1%.
    expected = base.mean(0) + scale * base.var(0) * c
    torch.testing.assert_close(ends.mean(0), expected, atol=0.02 + 0.02 * scale, rtol=0)
    torch.testing.assert_close(ends.var(0), base.var(0), rtol=0.05, atol=0)
