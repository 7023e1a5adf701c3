"""Diversity shaping: definitions, clipping, the warning, telescoping, and what is invariant."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.checks import InputError
from driftrl.shaping import (
    LEVELS,
    MEASURES,
    DiversityWarning,
    Shaping,
    constant_diversity,
    diversity_bonus,
    entropy_share,
    group_diversity,
    intrinsic_advantage,
    nearest_distance,
    novelty,
    reweight_above_average,
    shape_advantages,
    shape_at_advantage,
    shape_at_reward,
    shape_rewards,
    shaping_weight,
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


def test_diversity_that_is_no_number_is_refused_and_whole_numbers_are_not():
    with pytest.raises(InputError, match="diversity"):
        intrinsic_advantage(torch.tensor([[0.1, torch.nan]]))
    assert intrinsic_advantage(torch.tensor([[1, 2, 3, 2]])).tolist() == [[-1.0, 0.0, 1.0, 0.0]]
    assert intrinsic_advantage(torch.zeros(2, 0)).shape == (2, 0)


def test_of_two_images_each_is_as_far_from_the_other_and_the_warning_says_so():
    distances = torch.rand(2, 2, 2).add(0.1)
    diversity = group_diversity(distances + distances.mT)
    with pytest.warns(DiversityWarning, match="keep three or more"):
        assert intrinsic_advantage(diversity).tolist() == [[0.0] * 2] * 2


def test_whole_numbers_are_taken_as_their_equals():
    distances = torch.tensor([[[0, 1, 3], [1, 0, 2], [3, 2, 0]]])
    for measure in MEASURES:
        shaping = Shaping(measure=measure, clusters=2)
        assert torch.equal(novelty(distances, shaping), novelty(distances.float(), shaping))
    advantages, weights = torch.tensor([[2, 1, -2]]), torch.tensor([[3, 1, 2]])
    expected = reweight_above_average(advantages.float(), weights.float())
    assert torch.equal(reweight_above_average(advantages, weights), expected)
    assert expected.tolist() == [[3.0, 0.5, -2.0]]


def test_equal_diversity_has_gradient_zero():
    diversity = torch.full((1, 4), 0.3, requires_grad=True)
    with pytest.warns(DiversityWarning):
        intrinsic_advantage(diversity).sum().backward()
    assert diversity.grad.tolist() == [[0.0] * 4]


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


def _distances(prompts: int, group: int, seed: int = 0) -> torch.Tensor:
    half = _uniform(prompts, group, group, seed=seed)
    return (half + half.mT) * (1 - torch.eye(group, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_nearest_and_entropy_by_sorting(k):
    distances = _distances(3, 5)
    near, entropy = nearest_distance(distances, k), entropy_share(distances, k)
    for p in range(3):
        for i in range(5):
            others = sorted(float(distances[p, i, j]) for j in range(5) if j != i)
            assert float(near[p, i]) == pytest.approx(others[k - 1])
            assert float(entropy[p, i]) == pytest.approx(math.log(math.sqrt(2 * others[k - 1])))
    assert entropy_share(torch.zeros(1, 3, 3), 1, floor=0.01)[0].tolist() == pytest.approx(
        [math.log(0.01)] * 3
    )


def test_the_entropy_estimate_is_that_of_the_circle():
    """Kozachenko and Leonenko, m = 1 and k = 1: psi(n) - psi(1) + log 2 + mean log r; the circle has log 2 pi."""
    n = 2000
    angle = 2 * math.pi * _uniform(n, seed=3)
    distances = 1 - (angle[:, None] - angle).cos()
    share = entropy_share(distances[None], 1, floor=1e-12)
    digamma = torch.digamma(torch.tensor([float(n), 1.0], dtype=torch.float64))
    estimate = digamma[0] - digamma[1] + math.log(2) + share.mean()
    # log r has a standard deviation of pi / sqrt(6) per point, and neighbours share it: 4 errors of sqrt(2) that.
    assert float(estimate) == pytest.approx(math.log(2 * math.pi), abs=4 * 1.28 * math.sqrt(2 / n))


def test_above_average_images_are_reweighted_by_novelty():
    advantages = torch.tensor([[2.0, 1.0, 0.0, -3.0]])
    novelty_ = torch.tensor([[4.0, 1.0, 2.0, 1.0]])  # mean 2
    assert reweight_above_average(advantages, novelty_).tolist() == [[4.0, 0.5, 0.0, -3.0]]
    assert reweight_above_average(advantages, novelty_, 0.5).tolist() == [[3.0, 0.75, 0.0, -3.0]]
    assert reweight_above_average(advantages, novelty_, 3.0).tolist() == [[8.0, 0.0, 0.0, -3.0]]
    for same in (torch.full((1, 4), 0.7), torch.zeros(1, 4)):
        torch.testing.assert_close(reweight_above_average(advantages, same), advantages)
    assert torch.equal(reweight_above_average(advantages, novelty_, 0.0), advantages)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("level", LEVELS)
def test_switched_off_it_is_grpo(measure, level):
    rewards, distances = _uniform(2, 6, seed=1), _distances(2, 6)
    off = Shaping(ratio=0.0, measure=measure, level=level)
    bonus = diversity_bonus(distances, off)
    assert shape_at_reward(rewards, bonus, off) is rewards
    assert shape_at_advantage(rewards, bonus, off) is rewards


@pytest.mark.filterwarnings("ignore::driftrl.shaping.DiversityWarning")
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("level", ["advantage", "multiply"])
def test_images_equally_far_apart_leave_the_advantages(measure, level):
    """Every measure is constant there: all in one cluster, or each alone, and the rest by symmetry."""
    advantages = _uniform(1, 4, seed=2) - 0.5
    distances = 0.3 * (1 - torch.eye(4, dtype=torch.float64))[None]
    for clusters in (1, 4):
        on = Shaping(measure=measure, level=level, clusters=clusters)
        bonus = diversity_bonus(distances, on)
        torch.testing.assert_close(bonus, bonus[:, :1].expand(1, 4))
        if level == "advantage" or measure != "entropy":
            torch.testing.assert_close(shape_at_advantage(advantages, bonus, on), advantages)


def test_the_cluster_bonus_is_one_over_the_size():
    x = torch.tensor([0.0, 0.01, 0.02, 5.0, 5.01, 9.0], dtype=torch.float64)
    found = novelty((x[:, None] - x).abs()[None], Shaping(measure="clusters", clusters=3))
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1.0]]).double())


def test_levels_are_what_they_say():
    rewards, distances = _uniform(2, 6, seed=1), _distances(2, 6)
    at = {level: Shaping(ratio=0.3, level=level) for level in LEVELS}
    d = group_diversity(distances)
    assert torch.equal(diversity_bonus(distances, at["reward"]), d)
    torch.testing.assert_close(shape_at_reward(rewards, d, at["reward"]), rewards + 0.3 * d.clamp(-1, 1))
    assert shape_at_advantage(rewards, d, at["reward"]) is rewards
    z = (d - d.mean(1, keepdim=True)) / d.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(
        shape_at_advantage(rewards, d, at["advantage"]), rewards + 0.3 * z.clamp(-1, 1)
    )
    weight = 1 + 0.3 * (d / d.mean(1, keepdim=True) - 1)
    torch.testing.assert_close(shape_at_advantage(rewards, d, at["multiply"]), rewards * weight)
    assert (
        shape_at_reward(rewards, d, at["advantage"]) is shape_at_reward(rewards, d, at["multiply"]) is rewards
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_stepwise_pays_each_step_what_its_potentials_earn_from_there(gamma):
    distances = torch.stack([_distances(2, 4, seed=k) for k in range(5)], dim=1)  # [P, T + 1, G, G]
    bonus = diversity_bonus(distances, Shaping(potential="stepwise", gamma=gamma))
    phi = torch.stack([group_diversity(distances[:, k]) for k in range(5)])  # [T + 1, P, G]
    assert bonus.shape == (2, 4, 4)
    for k in range(4):
        paid = sum(gamma ** (j - k) * (gamma * phi[j + 1] - phi[j]) for j in range(k, 4))
        torch.testing.assert_close(bonus[..., k], paid)


def test_steps_that_are_not_scored_get_no_bonus_and_no_warning():
    advantages, bonus = _uniform(2, 4), _uniform(2, 4, 3, seed=1)
    bonus[..., 2] = 0.0  # an exact last step
    on = Shaping(potential="stepwise", ratio=0.5)
    shaped = shape_at_advantage(advantages, bonus, on, torch.tensor([True, True, False]))
    torch.testing.assert_close(shaped[..., 2], advantages)
    for step in (0, 1):
        expected = advantages + 0.5 * intrinsic_advantage(bonus[..., step])
        torch.testing.assert_close(shaped[..., step], expected)


def test_stepwise_with_no_potential_before_the_image_is_terminal():
    distances = torch.zeros(2, 4, 5, 5, dtype=torch.float64)
    distances[:, -1] = _distances(2, 5)
    bonus = diversity_bonus(distances, Shaping(potential="stepwise"))
    terminal = diversity_bonus(distances[:, -1], Shaping())
    torch.testing.assert_close(bonus, terminal[..., None].expand(2, 5, 3))


@pytest.mark.parametrize("potential", ["terminal", "stepwise"])
def test_each_potential_wants_its_shape(potential):
    wrong = torch.zeros(1, 2, 3, 3) if potential == "terminal" else torch.zeros(1, 3, 3)
    with pytest.raises(InputError, match="distances"):
        diversity_bonus(wrong, Shaping(potential=potential))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: nearest_distance(torch.zeros(1, 3, 3), 3), "k: expected 1 to 2"),
        (lambda: entropy_share(torch.zeros(1, 3, 3), floor=0.0), "floor"),
        (lambda: novelty(torch.zeros(1, 3, 3), Shaping(measure="nerest")), "nearest"),
        (lambda: shape_at_reward(torch.zeros(1, 3), torch.zeros(1, 3), Shaping(level="rewards")), "level"),
        (lambda: reweight_above_average(torch.zeros(1, 3), torch.zeros(1, 4)), "novelty"),
    ],
)
def test_new_functions_refuse_what_does_not_fit(call, name):
    with pytest.raises(InputError, match=name):
        call()


def test_the_discount_is_not_rounded_before_its_powers():
    potentials = torch.zeros(1, 1, 51, dtype=torch.bfloat16)
    potentials[..., -1] = 1
    returns = stepwise_intrinsic(potentials, 0.99)[1][0, 0]
    assert returns.dtype == torch.bfloat16
    assert returns[0].item() == pytest.approx(0.99**50, rel=2**-8)


def test_images_all_alike_have_a_finite_gradient_of_entropy():
    distances = torch.zeros(1, 3, 3, requires_grad=True)
    share = entropy_share(distances)
    assert share.tolist() == [[pytest.approx(math.log(1e-3))] * 3]
    share.sum().backward()
    assert bool(torch.isfinite(distances.grad).all())


def test_neighbours_are_counted_in_whole_numbers_of_any_kind():
    distances = _uniform(2, 4, 4)
    assert torch.equal(nearest_distance(distances, np.int64(2)), nearest_distance(distances, 2))
    with pytest.raises(InputError, match=r"k: expected a whole number; got 1\.5"):
        nearest_distance(distances, 1.5)
    with pytest.raises(InputError, match="groups of at least two"):
        nearest_distance(torch.zeros(2, 1, 1))


def test_constant_steps_are_counted_as_such():
    with pytest.warns(DiversityWarning, match="6 of 6 groups and steps"):
        intrinsic_advantage(torch.ones(2, 4, 3))


def test_a_bonus_that_its_clip_makes_constant_warns():
    rewards, bonus = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.3, 0.4, 0.5]])
    with pytest.warns(DiversityWarning, match=r"Clipped to 0\.2, .* a larger shaping\.clip"):
        shaped = shape_at_reward(rewards, bonus, Shaping(level="reward", clip=0.2))
    torch.testing.assert_close(shaped, rewards + 0.5 * 0.2)
    with pytest.warns(DiversityWarning, match="All images alike"):
        shape_at_reward(rewards, torch.full((1, 3), 0.3), Shaping(level="reward", clip=0.2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shape_at_reward(rewards, bonus, Shaping(level="reward", clip=0.4))


@pytest.mark.parametrize("level", ["reward", "multiply"])
def test_clusters_of_one_size_are_no_warning_where_they_enter_as_they_are(level):
    advantages, bonus = torch.tensor([[1.0, 2.0, -3.0]]), torch.ones(1, 3)
    shaping = Shaping(level=level, measure="clusters")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shape_at_reward(advantages, bonus, shaping)
        assert torch.equal(shape_at_advantage(advantages, bonus, shaping), advantages)


def test_nothing_is_standardised_without_a_warning_of_torch():
    advantages, bonus = _uniform(2, 4), _uniform(2, 4, 3, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert intrinsic_advantage(torch.zeros(0, 3)).shape == (0, 3)
        assert constant_diversity(torch.zeros(0, 3)).shape == (0,)
        assert constant_diversity(torch.zeros(2, 3, 0)).shape == (2, 0)
        stepwise = Shaping(potential="stepwise")
        shaped = shape_at_advantage(advantages, bonus, stepwise, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(shaped, advantages[..., None].expand(2, 4, 3))


def test_diversity_whose_squares_overflow():
    diversity = _uniform(2, 4)
    torch.testing.assert_close(intrinsic_advantage(2.0**560 * diversity), intrinsic_advantage(diversity))


def test_groups_of_none_have_no_clusters():
    assert novelty(torch.zeros(2, 0, 0), Shaping(measure="clusters")).shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: nearest_distance(torch.tensor([[[0.0, torch.nan], [1.0, 0.0]]])),
            "distances: 1 of 4 values",
        ),
        (lambda: entropy_share(torch.tensor([[[0.0, torch.inf], [1.0, 0.0]]])), "distances: 1 of 4 values"),
        (lambda: at_steps([True, False]), r"scored: expected a tensor of shape \[T\]; got list"),
        (
            lambda: at_steps(torch.ones(3, dtype=torch.bool)),
            r"scored: expected one per step, \[2\]; got \[3\]",
        ),
        (lambda: at_steps(torch.ones(2, 1, dtype=torch.bool)), r"scored: expected shape \[T\]"),
        (lambda: shape_at_advantage(torch.ones(1, 2), [[1.0, 2.0]], Shaping()), "bonus: expected a tensor"),
        (
            lambda: shape_at_reward(torch.ones(1, 2), [[1.0]], Shaping(level="reward")),
            "bonus: expected a tensor",
        ),
    ],
)
def test_what_would_go_unnoticed_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def at_steps(scored):
    return shape_at_advantage(_uniform(1, 3), _uniform(1, 3, 2), Shaping(potential="stepwise"), scored)


def test_the_nearest_is_found_whatever_the_diagonal_holds():
    distances = torch.tensor([[[torch.nan, 2.0], [1.0, torch.inf]]])
    assert nearest_distance(distances).tolist() == [[2.0, 1.0]]


def test_the_weight_of_shaping_is_in_proportion_to_lambda():
    plain, bonus = _uniform(3, 8) - 0.5, _uniform(3, 8, seed=1)
    expected = float(intrinsic_advantage(bonus).abs().mean() / plain.abs().mean())
    for ratio in (0.0, 0.5, 2.0):
        shaped = shape_at_advantage(plain, bonus, Shaping(ratio=ratio))
        assert shaping_weight(plain, shaped) == pytest.approx(ratio * expected)


def test_the_weight_of_shaping_counts_scored_steps_alone_and_knows_no_reward():
    scored, plain = torch.tensor([True, True, False]), _uniform(2, 4) - 0.5
    shaped = shape_at_advantage(plain, _uniform(2, 4, 3), Shaping(potential="stepwise"), scored)
    by_hand = (shaped[..., :2] - plain[..., None]).abs().mean() / plain.abs().mean()
    assert shaping_weight(plain, shaped, scored) == pytest.approx(float(by_hand))
    assert math.isnan(shaping_weight(torch.zeros(1, 2), torch.tensor([[0.5, -0.5]])))
    assert shaping_weight(torch.zeros(1, 2), torch.zeros(1, 2)) == 0.0
