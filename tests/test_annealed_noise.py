"""Noise on prompt embeddings: each schedule's values, its strength, CADS, and its gradient."""

import math

import pytest
import torch

from driftrl.checks import InputError
from driftrl.conditioning import LOST, NOISE_SCHEDULES, annealed_noise, noise_cost


def _normal(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


E = _normal(3, 5, 7, seed=0) * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None, None] + 0.2
NOISE = _normal(3, 5, 7, seed=1)
TIMES = torch.tensor([1000, 250, 0])


@pytest.mark.parametrize(
    ("schedule", "amounts"),
    [
        ("linear", [1.0, 0.25, 0.0]),
        ("constant", [1.0, 1.0, 1.0]),
        ("cosine", [1.0, (1 - math.cos(math.pi / 4)) / 2, 0.0]),
    ],
)
def test_adds_eta_times_schedule_times_rms(schedule, amounts):
    got = annealed_noise(E, NOISE, TIMES, 0.05, schedule)
    for i, amount in enumerate(amounts):
        rms = math.sqrt(float((E[i] ** 2).sum()) / 35)
        torch.testing.assert_close(got[i], E[i] + 0.05 * amount * rms * NOISE[i])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_fades_to_nothing_without_ever_growing(schedule):
    times = torch.arange(1000, -1, -50)
    embeds, noise = E[:1].expand(len(times), -1, -1), NOISE[:1].expand(len(times), -1, -1)
    size = (annealed_noise(embeds, noise, times, 0.3, schedule) - embeds).norm(dim=(1, 2))
    assert bool((size.diff() < 0).all())
    assert torch.equal(annealed_noise(E, NOISE, 0, 0.3, schedule), E)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_zero_strength_returns_the_embeddings_exactly(schedule):
    assert torch.equal(annealed_noise(E, NOISE, TIMES, 0.0, schedule), E)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_one_timestep_for_all_or_one_each(schedule):
    for one in (400, 400.0, torch.tensor(400), torch.tensor([400])):
        torch.testing.assert_close(
            annealed_noise(E, NOISE, one, 0.1, schedule),
            annealed_noise(E, NOISE, torch.tensor([400, 400, 400]), 0.1, schedule),
        )


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_samples_do_not_influence_each_other(schedule):
    together = annealed_noise(E, NOISE, TIMES, 0.1, schedule)
    for i in range(3):
        alone = annealed_noise(E[i : i + 1], NOISE[i : i + 1], TIMES[i : i + 1], 0.1, schedule)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_other_training_lengths_and_times_outside_the_schedule():
    torch.testing.assert_close(
        annealed_noise(E, NOISE, 20, 0.1, num_train_timesteps=40), annealed_noise(E, NOISE, 500, 0.1)
    )
    assert torch.equal(annealed_noise(E, NOISE, 1500, 0.1), annealed_noise(E, NOISE, 1000, 0.1))


def test_cads_is_the_papers_rule():
    tau1, tau2, strength = 0.5, 0.9, 0.25
    for t, gamma in ((400, 1.0), (500, 1.0), (700, 0.5), (900, 0.0), (1000, 0.0)):
        plain = math.sqrt(gamma) * E + strength * math.sqrt(1 - gamma) * NOISE
        got = annealed_noise(E, NOISE, t, strength, "cads", tau1=tau1, tau2=tau2, psi=0.0)
        torch.testing.assert_close(got, plain)
        rescaled = annealed_noise(E, NOISE, t, strength, "cads", tau1=tau1, tau2=tau2, psi=1.0)
        z = (plain - plain.mean((1, 2), keepdim=True)) / plain.std((1, 2), keepdim=True)
        torch.testing.assert_close(rescaled, z * E.std((1, 2), keepdim=True) + E.mean((1, 2), keepdim=True))
        mixed = annealed_noise(E, NOISE, t, strength, "cads", tau1=tau1, tau2=tau2, psi=0.3)
        torch.testing.assert_close(mixed, 0.3 * rescaled + 0.7 * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cads_leaves_the_embedding_alone_from_tau1_on(dtype):
    """At tau1 itself rounding would leave some of the noise."""
    embeds, noise = E.to(dtype), NOISE.to(dtype)
    for tenths in range(9):
        for t in (100 * tenths, 100 * tenths - 1, 0):
            got = annealed_noise(embeds, noise, t, 0.3, "cads", tau1=tenths / 10, tau2=0.9, psi=0.0)
            assert torch.equal(got, embeds)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_the_strength_is_that_of_any_unit(schedule, scale):
    """Squares of such numbers are no float32."""
    embeds, noise = E.float(), NOISE.float()
    expected = scale * annealed_noise(embeds, noise, TIMES, 0.1, schedule)
    torch.testing.assert_close(
        annealed_noise(scale * embeds, noise, TIMES, 0.1, schedule), expected, rtol=1e-6, atol=0
    )


def test_cads_brings_large_embeddings_back_too():
    embeds = 2.0**100 * E.float()
    got = annealed_noise(embeds, NOISE.float(), 750, 0.1, "cads")
    torch.testing.assert_close(got.std((1, 2)), embeds.std((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("padding", [1, 251])
def test_padding_has_no_say_and_gets_no_noise(schedule, padding):
    """Zeros after a prompt: the same noise on its tokens however long they are."""
    zeros = torch.zeros(3, padding, 7, dtype=E.dtype)
    noise = torch.cat([NOISE, _normal(3, padding, 7, seed=9)], 1)
    got = annealed_noise(torch.cat([E, zeros], 1), noise, TIMES, 0.05, schedule)
    torch.testing.assert_close(got[:, :5], annealed_noise(E, NOISE, TIMES, 0.05, schedule))
    assert torch.equal(got[:, 5:], zeros)
    assert torch.equal(annealed_noise(zeros, zeros + 1, 500, 0.05, schedule), zeros)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_gradient_reaches_embeddings_and_noise(schedule):
    embeds, noise = _normal(2, 2, 3, seed=2).requires_grad_(), _normal(2, 2, 3, seed=3).requires_grad_()
    times = torch.tensor([800, 300])
    assert torch.autograd.gradcheck(lambda e, n: annealed_noise(e, n, times, 0.2, schedule), (embeds, noise))


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_half_precision_keeps_its_dtype_and_rounds_once(schedule):
    embeds = E.bfloat16()
    got = annealed_noise(embeds, NOISE.float(), TIMES, 0.1, schedule)
    assert got.dtype == torch.bfloat16
    exact = annealed_noise(embeds.float(), NOISE.float(), TIMES, 0.1, schedule)
    assert torch.equal(got, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"embeds": torch.zeros(2, 3)}, r"\[N, L, D\]"),
        ({"noise": torch.zeros(3, 5, 6)}, "noise"),
        ({"timesteps": torch.zeros(2)}, "timesteps"),
        ({"eta": -0.1}, "eta"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"tau1": 0.9, "tau2": 0.6}, "tau1"),
        ({"psi": 2.0}, "psi"),
    ],
)
def test_refuses_what_it_cannot_use(change, says):
    arguments = {"embeds": E, "noise": NOISE, "timesteps": TIMES, "eta": 0.1} | change
    with pytest.raises(InputError, match=says):
        annealed_noise(**arguments)


CLEAN = 10 + _normal(8, seed=2)
UNRELATED = 2 + _normal(8, seed=3)


def test_what_noise_costs_is_a_share_of_what_the_prompt_gives():
    for share in (0.0, 0.5, 1.0):
        cost = noise_cost(CLEAN - share * (CLEAN - UNRELATED), CLEAN, UNRELATED)
        assert cost.lost == pytest.approx(share)
        assert cost.without == pytest.approx(float(CLEAN.mean()))
        assert cost.falls == (share > LOST)


def test_the_cost_is_the_same_in_any_unit_of_similarity():
    noised = CLEAN - 3 + _normal(8, seed=4)
    here, there = (
        noise_cost(noised, CLEAN, UNRELATED),
        noise_cost(*(0.01 * x - 7 for x in (noised, CLEAN, UNRELATED))),
    )
    assert here.lost == pytest.approx(there.lost)
    assert here.falls
    assert there.falls


def test_chance_is_no_fall():
    """One image of eight that lost everything, and images that match no prompt at all."""
    once = CLEAN.clone()
    once[3] = UNRELATED[3]
    assert LOST < noise_cost(once, CLEAN, UNRELATED).lost < 0.2
    assert not noise_cost(once, CLEAN, UNRELATED).falls
    assert not noise_cost(CLEAN - 5, CLEAN, CLEAN).falls
    assert math.isnan(noise_cost(CLEAN - 5, CLEAN, CLEAN).lost)
    assert not noise_cost(CLEAN * math.nan, CLEAN, UNRELATED).falls


@pytest.mark.parametrize(
    "wrong", [(CLEAN, CLEAN[1:], UNRELATED), (CLEAN, CLEAN, UNRELATED[1:]), (CLEAN[:1],) * 3]
)
def test_the_cost_wants_equally_many_scores(wrong):
    with pytest.raises(InputError, match="expected shape"):
        noise_cost(*wrong)


def test_one_score_is_too_few_and_the_message_says_so():
    with pytest.raises(InputError, match=r"noised: expected shape \[n\], n >= 2, .*; got \[1\]"):
        noise_cost(*(CLEAN[:1],) * 3)
