"""Several rewards made one: the formula, its invariances, and what it has to do with decoupled advantages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from driftrl.advantages import AdvantageRule, advantages_of, group_relative
from driftrl.checks import InputError
from driftrl.mixture import NORMALIZATIONS, Part, columns, mixed


def scores(prompts=3, candidates=6, seed=0):
    """Rewards in units of their own: about 20, about 0.2, and kilobytes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, candidates, 3, generator=draw) * torch.tensor(
        [1.0, 0.01, 40.0]
    ) + torch.tensor([20.0, 0.2, 100.0])


def test_the_formula():
    x = scores()
    parts = [Part("a", 1.0), Part("b", 3.0, "fixed", mean=0.2, std=0.01), Part("c", -0.5, "prompt")]
    a, b, c = x.double().unbind(-1)
    spread = (c - c.mean(1, keepdim=True)) / c.var(1, keepdim=True, correction=0).sqrt()
    torch.testing.assert_close(
        mixed(x, parts).double(), a + 3 * (b - 0.2) / 0.01 - 0.5 * spread, atol=1e-5, rtol=1e-6
    )
    whole = mixed(x, [Part("a", 0.0), Part("b", 2.0, "batch"), Part("c", 0.0, "prompt")]).double()
    torch.testing.assert_close(whole, 2 * (b - b.mean()) / b.var(correction=0).sqrt(), atol=1e-5, rtol=1e-6)


def test_a_single_reward_stays_as_it_is():
    x = torch.randn(3, 4)
    assert mixed(x, []) is x and columns(x, []) == {}
    assert list(columns(scores(), [Part("a"), Part("b"), Part("c")])) == ["a", "b", "c"]
    assert torch.equal(columns(scores(), [Part("a"), Part("b"), Part("c")])["b"], scores()[..., 1])


@given(
    factor=st.floats(0.01, 1000), shift=st.floats(-100, 100), which=st.sampled_from(["prompt", "batch"]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_unit_of_a_normalised_reward_does_not_matter(factor, shift, which, seed):
    x = scores(seed=seed).double()
    other = x.clone()
    other[..., 1] = factor * x[..., 1] + shift
    parts = [Part("a", 1.0, which), Part("b", 0.7, which), Part("c", 2.0, which)]
    torch.testing.assert_close(mixed(other, parts), mixed(x, parts), atol=1e-6, rtol=1e-6)


def test_per_prompt_is_within_the_prompt_and_batch_is_not():
    x = scores()
    louder = x.clone()
    louder[0] *= 10
    each = {n: [Part(name, 1.0, n) for name in "abc"] for n in NORMALIZATIONS}
    torch.testing.assert_close(mixed(louder, each["prompt"]), mixed(x, each["prompt"]), atol=1e-4, rtol=0)
    assert not torch.allclose(mixed(louder, each["batch"])[1:], mixed(x, each["batch"])[1:], atol=0.1)
    order = torch.tensor([2, 0, 1])
    for parts in each.values():
        torch.testing.assert_close(mixed(x[order], parts), mixed(x, parts)[order])


def test_a_constant_reward_adds_nothing_not_noise():
    x = scores()
    x[1, :, 2] = 1e6 * (1 + torch.randint(0, 2, (6,)) * torch.finfo(torch.float32).eps)
    both = mixed(x, [Part("a", 1.0, "prompt"), Part("b", 0.0), Part("c", 5.0, "prompt")])
    alone = mixed(x[..., :1], [Part("a", 1.0, "prompt")])
    assert torch.equal(both[1], alone[1]) and not torch.equal(both[0], alone[0])


def test_statistics_of_another_model():
    x, base = scores(), scores(seed=1)
    parts = [Part("a", 1.0, "prompt"), Part("b", 1.0, "batch"), Part("c", 0.01)]
    a, b, _ = base.double().unbind(-1)
    mean, std = a.mean(1, keepdim=True), a.std(1, keepdim=True, correction=0)
    expected = (x[..., 0] - mean) / std + (x[..., 1] - b.mean()) / b.std(correction=0) + 0.01 * x[..., 2]
    torch.testing.assert_close(mixed(x, parts, base).double(), expected, atol=1e-5, rtol=0)


def test_per_prompt_sums_are_decoupled_advantages():
    """GDPO (arXiv 2601.05242): each reward's own group-relative advantage, weighed and added, then one batch-wide std."""
    x, weights = scores(), torch.tensor([1.0, 0.5, 2.0])
    own = torch.stack([group_relative(x[..., k]) for k in range(3)], dim=-1)
    parts = [Part(name, float(w), "prompt") for name, w in zip("abc", weights, strict=True)]
    rewards = mixed(x, parts)
    summed = (own * weights).sum(-1)
    torch.testing.assert_close(
        advantages_of(rewards, AdvantageRule(scale="none"), rewards), summed, atol=1e-5, rtol=0
    )
    whitened = advantages_of(rewards, AdvantageRule(scale="global"), rewards)
    torch.testing.assert_close(whitened, summed / summed.std(correction=0), atol=1e-5, rtol=0)
    # Aggregated at the level of rewards, the one with the largest unit decides nearly alone.
    together = advantages_of(x @ weights, AdvantageRule(), x @ weights)
    torch.testing.assert_close(together, own[..., 2], atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("x", "parts", "message"),
    [
        (torch.zeros(2, 3, 2), [Part("a")], r"expected 1 columns, one per reward; got \[2, 3, 2\]"),
        (torch.zeros(3), [Part("a")], r"expected shape \[P, N, R\]; got \[3\]"),
        (torch.zeros(2, 3, 1), [Part("a", normalize="promt")], "did you mean 'prompt'"),
    ],
)
def test_what_does_not_fit_is_one_message(x, parts, message):
    with pytest.raises(InputError, match=message):
        mixed(x, parts)


@pytest.mark.parametrize("among", [(2, 3, 1), (1, 3, 1), (3, 3, 2), (3, 0, 1), (3, 3)])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_statistics_of_what_does_not_fit_are_refused(among, normalize):
    with pytest.raises(InputError, match="among: expected"):
        mixed(torch.zeros(3, 4, 1), [Part("a", normalize=normalize)], torch.zeros(among))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_nothing_is_mixed_to_nothing(normalize):
    for shape in ((0, 3, 1), (2, 0, 1)):
        assert mixed(torch.zeros(shape), [Part("a", normalize=normalize)]).shape == shape[:2]


@pytest.mark.parametrize("normalize", ["prompt", "batch"])
@pytest.mark.parametrize("scale", [2.0**560, 2.0**-560])
def test_units_whose_squares_over_or_underflow(normalize, scale):
    x = scores().double()
    parts = [Part(name, 1.0, normalize) for name in "abc"]
    torch.testing.assert_close(mixed(scale * x, parts), mixed(x, parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vanishes_as_group_relative_has_it(dtype):
    """Rounded once: a spread of two steps between neighbouring numbers is signal, of half a step it is not."""
    step = torch.finfo(dtype).eps * 16  # between neighbours at 20
    parts = [Part("a", 1.0, "prompt")]
    for values in ([20.0, 20 + 2 * step, 20 + 4 * step], [20.0, 20.0, 20 + step]):
        x = torch.tensor([values]).to(dtype)
        found = mixed(x[..., None], parts)
        assert torch.equal(found, group_relative(x)) and bool(found.any()) == (values[1] > 20)
