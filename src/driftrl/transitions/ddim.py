"""DDIM with noise, as a Gaussian policy: mean and standard deviation of x_{t-1} given x_t.

Source: Song, Meng and Ermon (ICLR 2021, arXiv 2010.02502), eq. 12 (the step) and eq. 16 (its noise).
Equal to ``diffusers.DDIMScheduler.step`` with ``clip_sample=False`` and ``thresholding=False``.

``a_t`` below is the cumulative product that diffusers calls ``alphas_cumprod[t]``: the signal's share of the
variance of ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from driftrl.checks import InputError, floating, has_shape, one_of, per_sample, same_shape

PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction", "sample")


class DDIMTables(NamedTuple):
    """What a whole sampling schedule needs, one entry per step, in the order of sampling.

    Index with a tensor of step numbers to get each sample's values without asking the host.
    """

    timesteps: Tensor
    """int64 [T]: what the network is told."""
    alpha: Tensor
    """[T]: a_t before the step."""
    alpha_prev: Tensor
    """[T]: a_t after it; 1 means a clean image."""
    std: Tensor
    """[T]: sigma_t of eq. 16."""
    scored: Tensor
    """bool [T]: sigma_t > 0. Steps without noise have no density and never enter the objective."""


def ddim_tables(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    final_alpha_cumprod: Tensor | float,
    eta: float = 1.0,
    prediction_type: str = "epsilon",
) -> DDIMTables:
    """Look up a schedule once, in float64 (float32 on MPS), so that sampling makes no host look-ups.

    As in diffusers, the step from timestep t ends ``len(alphas_cumprod) // len(timesteps)`` training steps
    earlier (not at the next timestep of the list, which differs for trailing spacing where the division
    leaves a remainder), and past the end at ``final_alpha_cumprod``.

    Args:
        alphas_cumprod: [T_train], from the scheduler.
        timesteps: whole numbers [T], descending, from ``scheduler.set_timesteps``: all of them.
        final_alpha_cumprod: 1 with ``set_alpha_to_one``, else ``alphas_cumprod[0]``; a single number.
        eta: 0 for the deterministic sampler, 1 for the noise of DDPM; not above, see `ddim_transition`.
        prediction_type: one of ``PREDICTION_TYPES``, to refuse what cannot work.

    Returns:
        The tables, on the device of ``alphas_cumprod``.

    Raises:
        InputError: for wrong shapes, timesteps or alphas out of range, eta outside 0 .. 1, or epsilon prediction on a
            schedule that starts at a_t = 0, where the noise says nothing about the image.

    Example:
        >>> import torch
        >>> from driftrl.transitions.ddim import ddim_tables
        >>> tables = ddim_tables(torch.tensor([0.9, 0.6, 0.3, 0.1]), torch.tensor([2, 0]), 1.0)
        >>> tables.alpha_prev.tolist()[1], tables.std.tolist()[1], tables.scored.tolist()
        (1.0, 0.0, [True, False])
    """
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    _checked_eta(eta)
    has_shape("alphas_cumprod", alphas_cumprod, "[T_train]")
    has_shape("timesteps", timesteps, "[T]")
    steps, trained = timesteps.shape[0], alphas_cumprod.shape[0]
    if not 1 <= steps <= trained:
        raise InputError(f"timesteps: expected 1 to {trained} of them; got {steps}")
    device = alphas_cumprod.device
    times = timesteps.to(device=device, dtype=torch.int64)
    if bool((times < 0).any()) or bool((times >= trained).any()):
        raise InputError(
            f"timesteps: expected 0 to {trained - 1}; got {int(times.min())} to {int(times.max())}"
        )
    if bool((times != timesteps.to(device)).any()) or bool((times.diff() >= 0).any()):
        raise InputError(
            f"timesteps: expected whole numbers, each less than the one before, as scheduler.set_timesteps leaves them; "
            f"got {timesteps.tolist()}"
        )

    wide = torch.float32 if device.type == "mps" else torch.float64
    table = alphas_cumprod.to(wide)
    final = torch.as_tensor(final_alpha_cumprod, dtype=wide, device=device)
    if final.dim() > 0:
        raise InputError(f"final_alpha_cumprod: expected a single number; got shape {list(final.shape)}")
    previous = times - trained // steps
    alpha = table[times]
    alpha_prev = torch.where(previous >= 0, table[previous.clamp(min=0)], final)
    if not bool(((alpha >= 0) & (alpha < 1)).all()):
        raise InputError(
            "alphas_cumprod: expected at least 0, and less than 1 at the timesteps, for a clean image has no noise to take "
            f"away; got {float(alpha.min()):g} to {float(alpha.max()):g}"
        )
    if prediction_type == "epsilon" and bool((alpha <= 0).any()):
        raise InputError(
            "prediction_type: 'epsilon' cannot start from a schedule with zero terminal signal "
            "(alphas_cumprod reaches 0); use 'v_prediction' or 'sample'"
        )
    if not bool(((alpha_prev > 0) & (alpha_prev >= alpha - 1e-6) & (alpha_prev <= 1)).all()):
        raise InputError(
            "alphas_cumprod, final_alpha_cumprod: expected that every step ends nearer to the clean image, above 0 and at most at 1; "
            f"got {[round(a, 6) for a in alpha.tolist()]} before the steps and {[round(a, 6) for a in alpha_prev.tolist()]} after them"
        )
    std = eta * _variance(alpha, alpha_prev).sqrt()
    return DDIMTables(times, alpha, alpha_prev, std, std > 0)


def ddim_transition(
    model_output: Tensor,
    x_t: Tensor,
    alpha_t: Tensor,
    alpha_prev: Tensor,
    eta: float = 1.0,
    prediction_type: str = "epsilon",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of x_{t-1} given x_t, and the predicted clean latent.

    ``mean = sqrt(a_prev) x0 + sqrt(1 - a_prev - std^2) eps`` (eq. 12) and
    ``std = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev)`` (eq. 16). The coefficients are
    computed in float64 and then cast; the rest is float32, or float64 if ``x_t`` or ``model_output`` is.

    Args:
        model_output: [N, ...], what the network says, after guidance.
        x_t: [N, ...].
        alpha_t: [N], a_t of each sample (from ``DDIMTables.alpha``); in (0, 1), or 0 for v- and
            sample-prediction.
        alpha_prev: [N], from ``DDIMTables.alpha_prev``; in [a_t, 1].
        eta: scale of the noise, 0 to 1. Beyond 1 there can be more of it than ``1 - a_prev`` has room for, the root of eq. 12
            would be of a negative number, and the step would lead to another noise level than a_prev.
        prediction_type: whether ``model_output`` is the noise (``epsilon``), the clean latent (``sample``) or
            ``v = sqrt(a) noise - sqrt(1 - a) x0`` (``v_prediction``).

    Returns:
        ``(mean [N, ...], std [N, 1, ..., 1], x0 [N, ...])``. ``std`` is exactly 0 where ``alpha_prev`` is 1.

    Raises:
        InputError: for shapes that do not agree, eta outside 0 .. 1, or an unknown prediction type.

    Example:
        >>> import torch
        >>> from driftrl.transitions.ddim import ddim_transition
        >>> a_t, a_prev = torch.tensor([0.5]), torch.tensor([1.0])
        >>> mean, std, x0 = ddim_transition(torch.zeros(1, 2), torch.ones(1, 2), a_t, a_prev)
        >>> mean, std
        (tensor([[1.4142, 1.4142]]), tensor([[0.]]))
    """
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    _checked_eta(eta)
    same_shape("model_output", model_output, "x_t", x_t)
    a, a_prev = per_sample("alpha_t", alpha_t, x_t), per_sample("alpha_prev", alpha_prev, x_t)
    dtype = torch.promote_types(torch.promote_types(x_t.dtype, model_output.dtype), torch.float32)
    variance = eta**2 * _variance(a, a_prev)

    def column(coefficient: Tensor) -> Tensor:
        return coefficient.to(dtype).view(-1, *[1] * (x_t.dim() - 1))

    x, out = x_t.to(dtype), model_output.to(dtype)
    signal, noise = column(a.sqrt()), column((1 - a).sqrt())
    if prediction_type == "epsilon":
        x0, eps = (x - noise * out) / signal, out
    elif prediction_type == "sample":
        x0, eps = out, (x - signal * out) / noise
    else:
        x0, eps = signal * x - noise * out, signal * out + noise * x
    # Rounding may push 1 - a_prev - variance just below zero where there is no room for a direction.
    direction = column((1 - a_prev - variance).clamp(min=0).sqrt())
    mean = column(a_prev.sqrt()) * x0 + direction * eps
    return mean, column(variance.sqrt()), x0


def ddim_noised(x0: Tensor, noise: Tensor, alpha_t: Tensor) -> Tensor:
    """The noised latent ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`` of the forward process.

    Args:
        x0: [N, ...], clean.
        noise: the shape of ``x0``, standard normal.
        alpha_t: [N], from ``DDIMTables.alpha``.

    Returns:
        The shape and dtype of ``x0`` (the default float dtype for integers); coefficients are computed in float64.

    Raises:
        InputError: for shapes that do not agree.

    Example:
        >>> import torch
        >>> from driftrl.transitions.ddim import ddim_noised
        >>> ddim_noised(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.25]))
        tensor([[0.5000, 0.5000]])
    """
    same_shape("noise", noise, "x0", x0)
    x0 = floating(x0)
    alpha = per_sample("alpha_t", alpha_t, x0).view(-1, *[1] * (x0.dim() - 1))
    return alpha.sqrt().to(x0.dtype) * x0 + (1 - alpha).sqrt().to(x0.dtype) * noise.to(x0.dtype)


def _checked_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta: expected 0 to 1; got {eta}")


def _variance(alpha: Tensor, alpha_prev: Tensor) -> Tensor:
    """sigma_t^2 of eq. 16 at eta = 1; clamped, for schedules whose neighbouring entries are equal."""
    return ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).clamp(min=0)
