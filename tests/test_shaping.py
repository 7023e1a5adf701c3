"""Diversity shaping: definitions, clipping, the warning, telescoping, and what is invariant."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.checks import InputError
from driftrl.shaping import (
    DiversityWarning,
    group_diversity,
    intrinsic_advantage,
    shape_advantages,
    shape_rewards,
    stepwise_intrinsic,
)


def _uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_group_diversity_is_the_mean_distance_to_the_others():
    distances = _uniform(2, 5, 5)
    diversity = group_diversity(distances)
    for p in range(2):
        for i in range(5):
            others = [float(distances[p, i, j]) for j in range(5) if j != i]
            assert float(diversity[p, i]) == pytest.approx(sum(others) / 4)


def test_group_diversity_ignores_the_diagonal_and_survives_a_group_of_one():
    distances = _uniform(1, 4, 4)
    changed = distances.clone()
    changed[:, range(4), range(4)] = torch.nan
    torch.testing.assert_close(group_diversity(changed), group_diversity(distances))
    assert group_diversity(torch.zeros(3, 1, 1)).tolist() == [[0.0]] * 3


def test_intrinsic_advantage_standardises_then_clips():
    diversity = torch.tensor([[1.0, 2.0, 3.0, 10.0]], dtype=torch.float64)
    z = (diversity - 4.0) / diversity.std(correction=0)
    torch.testing.assert_close(intrinsic_advantage(diversity, clip=100.0), z)
    torch.testing.assert_close(intrinsic_advantage(diversity, clip=0.5), z.clamp(-0.5, 0.5))
    assert float(intrinsic_advantage(diversity).max()) == 1.0  # the default clip


def test_intrinsic_advantage_per_step_treats_each_step_alone():
    diversity = _uniform(2, 6, 3)
    together = intrinsic_advantage(diversity)
    for step in range(3):
        torch.testing.assert_close(together[..., step], intrinsic_advantage(diversity[..., step]))


@pytest.mark.parametrize(
    "diversity",
    [
        torch.zeros(2, 4),
        torch.full((2, 4), 0.3),
        # What float32 makes of 1 - cosine for four equal images: rounding, not variety.
        torch.tensor([[0.0, 1.2e-7, -6e-8, 6e-8], [6e-8, 0.0, 0.0, 0.0]]),
    ],
)
def test_constant_diversity_warns_once_and_gives_zero(diversity):
    with pytest.warns(DiversityWarning, match="2 of 2 groups") as caught:
        assert intrinsic_advantage(diversity).tolist() == [[0.0] * 4] * 2
    assert len(caught) == 1


def test_small_but_real_diversity_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = intrinsic_advantage(torch.tensor([[0.001, 0.002, 0.003, 0.002]]))
    assert float(values.abs().max()) == 1.0


def test_only_the_constant_group_is_zeroed():
    diversity = torch.stack([torch.full((4,), 0.2), torch.tensor([0.1, 0.2, 0.3, 0.4])])
    with pytest.warns(DiversityWarning, match="1 of 2 groups"):
        values = intrinsic_advantage(diversity)
    assert values[0].tolist() == [0.0] * 4
    assert float(values[1].abs().min()) > 0.4


def test_shaping_adds_ratio_times_the_bonus():
    advantages, bonus = _uniform(2, 4), _uniform(2, 4, seed=1)
    torch.testing.assert_close(shape_advantages(advantages, bonus), advantages + 0.5 * bonus)
    assert torch.equal(shape_advantages(advantages, bonus, ratio=0.0), advantages)
    per_step = _uniform(2, 4, 3, seed=2)
    shaped = shape_advantages(advantages, per_step, ratio=0.2)
    torch.testing.assert_close(shaped[..., 1], advantages + 0.2 * per_step[..., 1])
    torch.testing.assert_close(
        shape_rewards(advantages, 3.0 * bonus, ratio=2.0, clip=0.9),
        advantages + 2.0 * (3.0 * bonus).clamp(max=0.9),
    )


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 12), gamma=st.sampled_from([0.0, 0.5, 0.97, 1.0]), seed=st.integers(0, 100))
def test_returns_are_the_discounted_sums_of_the_step_rewards(steps, gamma, seed):
    potentials = _uniform(2, 3, steps + 1, seed=seed)
    step_rewards, returns = stepwise_intrinsic(potentials, gamma)
    for k in range(steps):
        torch.testing.assert_close(step_rewards[..., k], gamma * potentials[..., k + 1] - potentials[..., k])
        expected = sum(gamma ** (j - k) * step_rewards[..., j] for j in range(k, steps))
        torch.testing.assert_close(returns[..., k], expected)


def test_undiscounted_returns_telescope_to_the_ends():
    potentials = _uniform(2, 3, 6)
    _, returns = stepwise_intrinsic(potentials)
    torch.testing.assert_close(returns, potentials[..., -1:] - potentials[..., :-1])


def test_a_terminal_potential_pays_every_step_the_final_diversity():
    diversity = _uniform(2, 4)
    potentials = torch.cat([torch.zeros(2, 4, 5, dtype=torch.float64), diversity[..., None]], dim=-1)
    _, returns = stepwise_intrinsic(potentials)
    torch.testing.assert_close(returns, diversity[..., None].expand(2, 4, 5))


def test_shaping_that_vanishes_at_the_end_leaves_the_best_policy_alone():
    """Ng et al.: over all action sequences of a small deterministic problem, the best stays the best."""
    generator = torch.Generator().manual_seed(3)
    steps, actions = 4, 3
    step_reward = torch.rand(steps, actions, generator=generator, dtype=torch.float64)
    state_potential = torch.rand(steps + 1, actions**steps, generator=generator, dtype=torch.float64)
    paths = torch.cartesian_prod(*[torch.arange(actions)] * steps)  # [paths, steps]
    plain = sum(step_reward[k, paths[:, k]] for k in range(steps))
    # A state is the prefix of a path; its potential is looked up by that prefix.
    prefix = torch.zeros(len(paths), dtype=torch.long)
    columns = [state_potential[0, prefix]]
    for k in range(steps):
        prefix = prefix * actions + paths[:, k]
        columns.append(state_potential[k + 1, prefix])
    for final, same in ((torch.zeros_like(plain), True), (5.0 * columns[-1], False)):
        potentials = torch.stack([*columns[:-1], final], dim=-1)[None]
        _, returns = stepwise_intrinsic(potentials)
        shaped = plain + returns[0, :, 0]
        assert (int(shaped.argmax()) == int(plain.argmax())) is same
        # In either case the change is exactly the terminal potential, up to what the start fixes.
        torch.testing.assert_close(shaped - plain, final - columns[0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: group_diversity(torch.zeros(2, 3)), r"\[P, G, G\]"),
        (lambda: group_diversity(torch.zeros(2, 3, 4)), r"\[P, G, G\]"),
        (lambda: intrinsic_advantage(torch.zeros(3)), r"\[P, G\]"),
        (lambda: intrinsic_advantage(torch.zeros(1, 3), clip=-1.0), "at least 0"),
        (lambda: shape_advantages(torch.zeros(1, 3), torch.zeros(1, 4)), "intrinsic"),
        (lambda: shape_advantages(torch.zeros(1, 3), torch.zeros(1, 3), ratio=-0.5), "at least 0"),
        (lambda: shape_rewards(torch.zeros(1, 3), torch.zeros(1, 4)), "diversity"),
        (lambda: stepwise_intrinsic(torch.zeros(1, 3, 1)), "at least two"),
        (lambda: stepwise_intrinsic(torch.zeros(1, 3, 4), gamma=1.5), "0 to 1"),
    ],
)
def test_refuses_what_it_cannot_use(call, says):
    with pytest.raises(InputError, match=says):
        call()
