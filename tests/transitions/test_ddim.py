"""DDIM transitions against diffusers' scheduler, and against the forward process they must agree with."""

import pytest
import torch
from diffusers import DDIMScheduler

from driftrl.checks import InputError
from driftrl.transitions.ddim import PREDICTION_TYPES, ddim_noised, ddim_tables, ddim_transition

SHAPE = (2, 4, 3, 3)


def _scheduler(prediction_type="epsilon", steps=10, **options):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=False,
        **options,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def _tables(scheduler, prediction_type="epsilon", eta=1.0):
    return ddim_tables(
        scheduler.alphas_cumprod, scheduler.timesteps, scheduler.final_alpha_cumprod, eta, prediction_type
    )


def _normal(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _in_float64(scheduler):
    """The same scheduler computing in float64, so that its own rounding does not blur the comparison."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def _compare(scheduler, prediction_type, eta, dtype, rtol, skip_first=False):
    tables = _tables(scheduler, prediction_type, eta)
    for step, timestep in enumerate(scheduler.timesteps):
        if step == 0 and skip_first:
            continue
        x, out = _normal(*SHAPE, seed=step, dtype=dtype), _normal(*SHAPE, seed=100 + step, dtype=dtype)
        noise = _normal(*SHAPE, seed=200 + step, dtype=dtype)
        picked = torch.full((SHAPE[0],), step)
        mean, std, x0 = ddim_transition(
            out, x, tables.alpha[picked], tables.alpha_prev[picked], eta, prediction_type
        )
        expected_mean, expected_x0 = scheduler.step(
            out, int(timestep), x, eta=eta, variance_noise=torch.zeros_like(x), return_dict=False
        )
        expected, _ = scheduler.step(out, int(timestep), x, eta=eta, variance_noise=noise, return_dict=False)
        for got, want in ((mean, expected_mean), (x0, expected_x0), (mean + std * noise, expected)):
            assert got.dtype == dtype
            assert float((got - want).norm()) <= rtol * float(want.norm())
        # The variance by itself, as the scheduler has it.
        previous = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        variance = eta**2 * scheduler._get_variance(int(timestep), previous)
        torch.testing.assert_close(
            std.square().flatten(), variance.to(dtype).expand(SHAPE[0]), rtol=rtol, atol=0
        )
        torch.testing.assert_close(tables.std[step].to(dtype), std[0, 0, 0, 0], rtol=rtol, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 7])
@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
def test_equals_diffusers(prediction_type, set_alpha_to_one, spacing, steps, eta):
    scheduler = _scheduler(
        prediction_type, steps, set_alpha_to_one=set_alpha_to_one, timestep_spacing=spacing, steps_offset=0
    )
    _compare(_in_float64(scheduler), prediction_type, eta, torch.float64, rtol=1e-11)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_float32_latents_lose_only_float32_rounding(prediction_type, set_alpha_to_one):
    """Measured against diffusers in float64: in float32 its own 1 - a_t/a_prev is off by up to 1e-4."""
    scheduler = _scheduler(prediction_type, 10, set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    tables = _tables(scheduler, prediction_type)
    _in_float64(scheduler)
    for step, timestep in enumerate(scheduler.timesteps):
        x, out, noise = (_normal(*SHAPE, seed=seed + step) for seed in (0, 100, 200))
        picked = torch.full((SHAPE[0],), step)
        mean, std, _ = ddim_transition(
            out, x, tables.alpha[picked], tables.alpha_prev[picked], 1.0, prediction_type
        )
        expected = scheduler.step(
            out.double(), int(timestep), x.double(), eta=1.0, variance_noise=noise.double(), return_dict=False
        )[0]
        assert mean.dtype == std.dtype == torch.float32
        assert float((mean + std * noise - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_equals_diffusers_from_zero_terminal_signal(prediction_type, spacing, eta):
    scheduler = _scheduler(prediction_type, 8, rescale_betas_zero_snr=True, timestep_spacing=spacing)
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    assert int(scheduler.timesteps[0]) == 999
    # With eta = 1 the first step leaves no room for a direction; diffusers then takes the root of a rounding
    # error, which may be negative (NaN), so that step is checked by hand below.
    _compare(_in_float64(scheduler), prediction_type, eta, torch.float64, rtol=1e-11, skip_first=eta == 1.0)

    tables = _tables(scheduler, prediction_type)
    x, out = _normal(*SHAPE, seed=0, dtype=torch.float64), _normal(*SHAPE, seed=1, dtype=torch.float64)
    a_prev = tables.alpha_prev[:1]
    mean, std, x0 = ddim_transition(
        out, x, tables.alpha[:1].expand(2), a_prev.expand(2), 1.0, prediction_type
    )
    torch.testing.assert_close(x0, out if prediction_type == "sample" else -out)
    torch.testing.assert_close(mean, a_prev.sqrt() * x0)
    torch.testing.assert_close(std.flatten(), (1 - a_prev).sqrt().expand(2))


def test_epsilon_cannot_start_from_zero_terminal_signal():
    scheduler = _scheduler("epsilon", 8, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(InputError, match="zero terminal signal"):
        _tables(scheduler)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_only_the_step_to_a_clean_image_is_without_noise(set_alpha_to_one):
    tables = _tables(_scheduler(steps=10, set_alpha_to_one=set_alpha_to_one, steps_offset=1))
    assert tables.scored.tolist() == [True] * 9 + [not set_alpha_to_one]
    assert (float(tables.std[-1]) == 0.0) is set_alpha_to_one
    _, std, _ = ddim_transition(
        torch.zeros(1, 2), torch.zeros(1, 2), tables.alpha[-1:], tables.alpha_prev[-1:]
    )
    assert (float(std) == 0.0) is set_alpha_to_one


def test_a_step_that_goes_nowhere_is_not_scored():
    # Without an offset the last timestep is 0, and the final alpha is that of timestep 0 again.
    tables = _tables(_scheduler(steps=10, set_alpha_to_one=False, steps_offset=0))
    assert tables.scored.tolist() == [True] * 9 + [False]


def test_without_noise_nothing_is_scored():
    assert not bool(_tables(_scheduler(), eta=0.0).scored.any())


def test_a_clean_image_has_no_noise_to_take_away():
    with pytest.raises(
        InputError, match=r"alphas_cumprod: expected at least 0, and less than 1.* got 0\.5 to 1"
    ):
        ddim_tables(torch.tensor([1.0, 0.5]), torch.tensor([1, 0]), 1.0)


def test_samples_of_a_batch_may_be_at_different_steps():
    tables = _tables(_scheduler())
    picked = torch.tensor([3, 0, 7, 9])
    x, out = _normal(4, 2, 3, 3, seed=0), _normal(4, 2, 3, 3, seed=1)
    together = ddim_transition(out, x, tables.alpha[picked], tables.alpha_prev[picked])
    for i, step in enumerate(picked):
        alone = ddim_transition(
            out[i : i + 1], x[i : i + 1], tables.alpha[step].view(1), tables.alpha_prev[step].view(1)
        )
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[i : i + 1], b)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_perfect_network_on_gaussian_data_keeps_the_marginals(eta):
    """Data N(m, s^2): with the exact posterior mean for x0, x_{t-1} is Gaussian with the marginal's mean.

    For a point mass (s = 0) its variance is the marginal's too, 1 - a_prev, at every eta.
    """
    tables = _tables(_scheduler(), eta=eta)
    m, count = 0.7, 200_000
    for step in (0, 5, 8):
        a, a_prev = tables.alpha[step], tables.alpha_prev[step]
        noise, fresh = (_normal(count, 1, seed=s, dtype=torch.float64) for s in (step, step + 50))
        x = a.sqrt() * m + (1 - a).sqrt() * noise
        mean, std, x0 = ddim_transition(noise, x, a.expand(count), a_prev.expand(count), eta)
        after = mean + std * fresh
        torch.testing.assert_close(x0, torch.full_like(x0, m))
        standard_error = float((1 - a_prev).sqrt()) / count**0.5
        assert abs(float(after.mean() - a_prev.sqrt() * m)) < 5 * standard_error
        assert float(after.var()) == pytest.approx(float(1 - a_prev), rel=0.02)


def test_predictions_that_say_the_same_give_the_same_transition():
    tables = _tables(_scheduler())
    picked = torch.tensor([1, 6])
    a, a_prev = tables.alpha[picked], tables.alpha_prev[picked]
    x0, eps = _normal(2, 3, seed=0, dtype=torch.float64), _normal(2, 3, seed=1, dtype=torch.float64)
    signal, noise = a.sqrt()[:, None], (1 - a).sqrt()[:, None]
    x, v = signal * x0 + noise * eps, signal * eps - noise * x0
    results = [
        ddim_transition(out, x, a, a_prev, 1.0, name)
        for name, out in (("epsilon", eps), ("v_prediction", v), ("sample", x0))
    ]
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradient_through_the_mean(prediction_type):
    tables = _tables(_scheduler())
    picked = torch.tensor([2, 8])
    x = _normal(2, 2, 2, seed=0, dtype=torch.float64)
    out = _normal(2, 2, 2, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o: ddim_transition(
            o, x, tables.alpha[picked], tables.alpha_prev[picked], 1.0, prediction_type
        )[::2],
        out,
    )


def test_half_precision_is_computed_in_float32():
    a, a_prev = torch.tensor([0.3]), torch.tensor([0.6])
    out, x = _normal(1, 4, seed=0).bfloat16(), _normal(1, 4, seed=1).bfloat16()
    got = ddim_transition(out, x, a, a_prev)
    want = ddim_transition(out.float(), x.float(), a, a_prev)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, w)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda one: ddim_transition(torch.zeros(1, 3), torch.zeros(1, 2), one, one), "shape of x_t"),
        (lambda one: ddim_transition(torch.zeros(2, 2), torch.zeros(2, 2), one, one), "one per sample"),
        (
            lambda one: ddim_transition(torch.zeros(1, 2), torch.zeros(1, 2), one, one, 1.0, "eps"),
            "expected one of epsilon",
        ),
        (
            lambda one: ddim_transition(torch.zeros(1, 2), torch.zeros(1, 2), one, one, -1.0),
            "eta: expected 0 to 1",
        ),
        (
            lambda one: ddim_transition(torch.zeros(1, 2), torch.zeros(1, 2), one, one, 1.01),
            "eta: expected 0 to 1",
        ),
        (lambda one: ddim_tables(one, torch.tensor([0]), 1.0, 1.01), "eta: expected 0 to 1; got 1.01"),
        (
            lambda one: ddim_tables(one, torch.tensor([0]), torch.ones(1)),
            "final_alpha_cumprod: expected a single",
        ),
        (lambda one: ddim_tables(one, torch.tensor([1]), 1.0), "timesteps"),
        (lambda one: ddim_tables(one, torch.zeros(2, dtype=torch.long), 1.0), "timesteps"),
        (lambda one: ddim_tables(one[None], torch.tensor([0]), 1.0), "alphas_cumprod"),
    ],
)
def test_refuses_what_it_cannot_use(call, says):
    with pytest.raises(InputError, match=says):
        call(torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("alphas", "times", "final", "says"),
    [
        ([0.9, 0.6, 0.3], [0, 2], 1.0, "timesteps: expected whole numbers, each less"),
        ([0.9, 0.6, 0.3], [2, 2], 1.0, "timesteps: expected whole numbers, each less"),
        ([0.9, 0.6, 0.3], [1.5, 0.5], 1.0, "timesteps: expected whole numbers"),
        ([0.9, 0.6, 0.3], [2, 0], 2.0, "nearer to the clean image"),
        ([0.9, 0.6, 0.3], [2, 0], float("nan"), "nearer to the clean image"),
        ([0.3, 0.6, 0.9], [2, 0], 1.0, "nearer to the clean image"),
        ([0.9, 0.0, 0.0], [2, 1, 0], 1.0, "nearer to the clean image"),
    ],
)
def test_refuses_schedules_that_lead_nowhere(alphas, times, final, says):
    with pytest.raises(InputError, match=says):
        ddim_tables(torch.tensor(alphas), torch.tensor(times), final, prediction_type="v_prediction")


def test_noised_in_half_precision_rounds_once():
    x0, eps = torch.full((1, 1), 300.0).bfloat16(), torch.zeros(1, 1)
    got = ddim_noised(x0, eps, torch.tensor([1e-5]))
    assert got.dtype == torch.bfloat16 and got.item() == pytest.approx(300 * 1e-5**0.5, rel=2**-7)
    for wrong in ((x0, torch.zeros(3), torch.tensor([0.5])), (x0, eps, torch.tensor([0.5, 0.5]))):
        with pytest.raises(InputError, match="expected"):
            ddim_noised(*wrong)


def test_one_number_counts_for_all_samples():
    x, out = _normal(3, 4, seed=0), _normal(3, 4, seed=1)
    each = ddim_transition(out, x, torch.full((3,), 0.3), torch.full((3,), 0.6))
    for a, b in zip(ddim_transition(out, x, 0.3, torch.tensor(0.6)), each, strict=True):
        torch.testing.assert_close(a, b)
