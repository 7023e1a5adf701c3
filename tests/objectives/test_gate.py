"""The gate on the divergence: ranks, disagreement, the most suspect share; and when the reference moves."""

import pytest
import torch

from driftrl.checks import InputError
from driftrl.objectives.gate import gate, reference_is_due, reward_disagreement, win_rates


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_win_rates_by_counting():
    rewards = torch.tensor([[3.0, 1.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    for p, row in enumerate(rewards.tolist()):
        for i, own in enumerate(row):
            others = [value for j, value in enumerate(row) if j != i]
            wins = sum(own > value for value in others) + 0.5 * sum(own == value for value in others)
            assert float(win_rates(rewards)[p, i]) == pytest.approx(wins / 3)


def test_what_is_no_number_has_no_rank():
    with pytest.raises(InputError, match="rewards: 1 of 2 values are not finite"):
        win_rates(torch.tensor([[torch.nan, 1.0]]))


def test_disagreement_counts_ranks_not_units():
    rewards, one, other = (_normal(3, 6, seed=s) for s in range(3))
    expected = win_rates(rewards) - (win_rates(one) + win_rates(other)) / 2
    torch.testing.assert_close(reward_disagreement(rewards, [one.exp() * 100, other / 7]), expected)
    assert reward_disagreement(rewards, [rewards]).abs().max() == 0


@pytest.mark.parametrize(
    "row",
    [
        torch.tensor([1, 2, 200], dtype=torch.uint8), torch.tensor([-128, 0, 127], dtype=torch.int8),
        torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32), torch.tensor([0.0, 60000.0, 65504.0]).half(),
    ],
)  # fmt: skip
def test_ranks_are_compared_not_subtracted(row):
    """Whole numbers would wrap around, halves overflow."""
    torch.testing.assert_close(win_rates(row[None]).float(), torch.tensor([[0.0, 0.5, 1.0]]))
    assert win_rates(torch.tensor([[False, True]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("own", "judge"),
    [
        (torch.tensor([[1, 2, 3]]), torch.tensor([[0.3, 0.2, 0.1]])),
        (torch.tensor([[1.0, 2.0, 3.0]]).half(), torch.tensor([[90000.0, 80000.0, 70000.0]])),
        (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2**24 + 2, 2**24 + 1, 2**24]])),
    ],
)
def test_a_judge_is_ranked_in_its_own_numbers(own, judge):
    """Not in those of the reward, in which neighbours may be one number."""
    assert reward_disagreement(own, [judge]).tolist() == [[-1.0, 0.0, 1.0]]
    with pytest.raises(InputError, match="rewards: expected a tensor"):
        reward_disagreement([[1.0, 2.0]], [judge])


def test_the_gate_takes_the_most_suspect_share():
    u = _normal(4, 5, seed=1)
    for share in (0.05, 0.1, 0.5, 0.9):
        count = max(1, round(share * 20))
        cut = sorted(u.flatten().tolist(), reverse=True)[count - 1]
        assert torch.equal(gate(u, share), ((u >= cut) & (u > 0)).to(u))
    assert torch.equal(gate(u, 1.0), torch.ones_like(u))  # the plain KL
    assert gate(-u.abs(), 0.5).sum() == 0
    assert gate(torch.ones(2, 2), 0.5).tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("kl", "age", "threshold", "every", "due"),
    [
        (9.0, 99, None, None, False), (0.2, 1, 0.1, None, True), (0.1, 1, 0.1, None, False),
        (0.0, 4, None, 5, False), (0.0, 5, None, 5, True), (0.0, 4, 0.1, 5, False), (float("nan"), 1, 0.1, 5, False),
    ],
)  # fmt: skip
def test_when_the_reference_moves(kl, age, threshold, every, due):
    assert reference_is_due(kl, age, threshold, every) is due


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: win_rates(torch.zeros(3, 1)), "two candidates"),
        (lambda: reward_disagreement(torch.zeros(1, 2), []), "others"),
        (lambda: reward_disagreement(torch.zeros(1, 2), [torch.zeros(1, 3)]), "others"),
        (lambda: reward_disagreement(torch.zeros(1, 2), [torch.full((1, 2), torch.nan)]), "not finite"),
        (lambda: gate(torch.zeros(1, 2), 0.0), "share"),
    ],
)
def test_refuses_what_does_not_fit(call, name):
    with pytest.raises(InputError, match=name):
        call()
