"""Flow-matching models as Gaussian policies: three ways to put noise into the deterministic flow.

The rectified flow is ``x_t = (1 - t) x_0 + t noise`` with t from 1 (noise) to 0 (image); the network predicts
the velocity ``v = noise - x_0``. diffusers calls t ``sigma``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from driftrl.checks import InputError, at_least, floating, per_sample, same_shape

NOISE = 1 - 5e-4
"""Times above are pure noise: the start of a schedule, which not every scheduler puts at 1 exactly."""


def flow_sde_transition(
    velocity: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, noise_level: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """One Euler-Maruyama step of Flow-GRPO's SDE, which keeps the marginals of the flow as steps get small.

    With ``sigma_t = noise_level sqrt(t / (1 - t))`` and ``dt = t_prev - t < 0``:
    ``mean = x_t + (v + sigma_t^2 / (2 t) (x_t + (1 - t) v)) dt`` and ``std = sigma_t sqrt(-dt)``.

    At t = 1, where sigma_t is infinite, or within 5e-4 of it (SANA's schedule begins at 0.99967), ``1 - t_prev`` takes the place of ``1 - t`` inside sigma_t only, as
    in Flow-GRPO's code (there written as the second entry of the schedule, which is the same number, since
    t = 1 is its first).
    Note that the last step (``t_prev = 0``) does add noise, unlike DDIM with a final alpha of 1: images drawn
    with few steps are a little grainy. CPS below has neither fault.

    Args:
        velocity: [N, ...], after guidance.
        x_t: [N, ...].
        t: [N], in (0, 1].
        t_prev: [N], in [0, t).
        noise_level: a, at least 0; 0 is the plain Euler step of the flow.

    Returns:
        ``(mean [N, ...], std [N, 1, ..., 1], x0 [N, ...])``, x0 being the predicted clean latent
        ``x_t - t v``; in float32, or float64 if ``x_t`` or ``velocity`` is.

    Raises:
        InputError: for shapes that do not agree or a noise level below 0.

    Source: Flow-GRPO, arXiv 2505.05470, eq. 9 and the schedule of sigma_t below it.

    Example:
        >>> import torch
        >>> from driftrl.transitions.flow_sde import flow_sde_transition
        >>> t, t_prev = torch.tensor([0.5]), torch.tensor([0.25])
        >>> mean, std, x0 = flow_sde_transition(torch.ones(1, 2), torch.ones(1, 2), t, t_prev, 1.0)
        >>> mean, std, x0
        (tensor([[0.3750, 0.3750]]), tensor([[0.5000]]), tensor([[0.5000, 0.5000]]))
    """
    at_least("noise_level", noise_level, 0.0)
    now, after, _ = _times(velocity, x_t, t, t_prev)
    room = torch.where(now > NOISE, 1.0 - after, 1.0 - now)
    return _euler_maruyama(velocity, x_t, t, t_prev, noise_level**2 * now / room)


def dance_sde_transition(
    velocity: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, noise_level: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """One Euler-Maruyama step of DanceGRPO's SDE: that of Flow-GRPO with the same noise at all times, ``sigma_t = noise_level``.

    ``mean = x_t + (v + sigma_t^2 / (2 t) (x_t + (1 - t) v)) dt`` and ``std = sigma_t sqrt(-dt)`` with ``dt = t_prev - t < 0``; the bracket
    is minus t times the score. Less noise than Flow-GRPO's early on and more near the image; the last step adds noise too.

    Args:
        velocity: [N, ...], after guidance.
        x_t: [N, ...].
        t: [N], in (0, 1].
        t_prev: [N], in [0, t).
        noise_level: eta, at least 0; 0 is the plain Euler step of the flow.

    Returns:
        As `flow_sde_transition`.

    Raises:
        InputError: for shapes that do not agree or a noise level below 0.

    Source: DanceGRPO, arXiv 2505.07818, whose eta is 0.3 for FLUX.1.

    Example:
        >>> import torch
        >>> from driftrl.transitions.flow_sde import dance_sde_transition
        >>> t, t_prev = torch.tensor([0.5]), torch.tensor([0.25])
        >>> mean, std, _ = dance_sde_transition(torch.ones(1, 2), torch.ones(1, 2), t, t_prev, 1.0)
        >>> mean, std
        (tensor([[0.3750, 0.3750]]), tensor([[0.5000]]))
    """
    at_least("noise_level", noise_level, 0.0)
    now, _, _ = _times(velocity, x_t, t, t_prev)
    return _euler_maruyama(velocity, x_t, t, t_prev, torch.full_like(now, noise_level**2))


def cps_transition(
    velocity: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, noise_level: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of coefficients-preserving sampling (CPS): the noise put in replaces noise taken out.

    With the predicted ends ``x0 = x_t - t v`` and ``x1 = x_t + (1 - t) v``:
    ``mean = (1 - t_prev) x0 + sqrt(t_prev^2 - std^2) x1`` and ``std = t_prev sin(noise_level pi / 2)``.
    The shares of predicted image and noise at t_prev are those of the flow at every step size, so pictures have no
    excess noise; but x0 is a mean, and fresh noise does not make up for the variety of images around it. Of data that
    are no single point the mean is kept and the spread is not: of N(0.5, 0.6^2), 50 steps at level 0.7 leave a
    standard deviation of 0.49, where the plain flow leaves 0.58 (``tests/transitions/test_marginals.py``). The last step
    (``t_prev = 0``) is exactly noise-free: it has no density and must not be scored.

    Args:
        velocity: [N, ...], after guidance.
        x_t: [N, ...].
        t: [N], in (0, 1].
        t_prev: [N], in [0, t).
        noise_level: 0 (the plain Euler step of the flow) to 1 (all of the noise is fresh).

    Returns:
        ``(mean [N, ...], std [N, 1, ..., 1], x0 [N, ...])``; float32, or float64 if ``x_t`` or ``velocity``
        is.

    Raises:
        InputError: for shapes that do not agree or a noise level outside 0 .. 1.

    Source: Flow-CPS, arXiv 2509.05952. Its code scores ``-(x - mean)^2`` without the variance; we score the
    Gaussian density itself (``driftrl.transitions.gaussian``), so that ratios are those of the policy.

    Example:
        >>> import torch
        >>> from driftrl.transitions.flow_sde import cps_transition
        >>> t, t_prev = torch.tensor([0.5]), torch.tensor([0.0])
        >>> mean, std, x0 = cps_transition(torch.ones(1, 2), torch.ones(1, 2), t, t_prev)
        >>> mean, std
        (tensor([[0.5000, 0.5000]]), tensor([[0.]]))
    """
    if not 0.0 <= noise_level <= 1.0:
        raise InputError(f"noise_level: expected 0 to 1; got {noise_level}")
    now, after, dtype = _times(velocity, x_t, t, t_prev)

    def column(coefficient: Tensor) -> Tensor:
        return coefficient.to(dtype).view(-1, *[1] * (x_t.dim() - 1))

    x, v = x_t.to(dtype), velocity.to(dtype)
    x0, x1 = x - column(now) * v, x + column(1.0 - now) * v
    angle = noise_level * math.pi / 2
    # sqrt(t_prev^2 - std^2) = t_prev cos(angle), without the cancellation.
    mean = column(1.0 - after) * x0 + column(after * math.cos(angle)) * x1
    return mean, column(after * math.sin(angle)), x0


def _euler_maruyama(
    velocity: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor, sigma_squared: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of the SDE that has the flow's marginals, with ``sigma_squared`` [N] noise a unit of time."""
    now, after, dtype = _times(velocity, x_t, t, t_prev)
    dt = after - now

    def column(coefficient: Tensor) -> Tensor:
        return coefficient.to(dtype).view(-1, *[1] * (x_t.dim() - 1))

    x, v = x_t.to(dtype), velocity.to(dtype)
    score_part = sigma_squared / (2.0 * now)
    mean = column(1.0 + score_part * dt) * x + column((1.0 + score_part * (1.0 - now)) * dt) * v
    return mean, column((sigma_squared * -dt).sqrt()), x - column(now) * v


def flow_noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The noised latent ``x_t = (1 - t) x_0 + t noise`` of the flow.

    Args:
        x0: [N, ...], clean.
        noise: the shape of ``x0``, standard normal.
        t: [N], in 0..1.

    Returns:
        The shape and dtype of ``x0`` (the default float dtype for integers); coefficients are computed in float64.

    Raises:
        InputError: for shapes that do not agree.

    Example:
        >>> import torch
        >>> from driftrl.transitions.flow_sde import flow_noised
        >>> flow_noised(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.25]))
        tensor([[0.7500, 0.7500]])
    """
    same_shape("noise", noise, "x0", x0)
    x0 = floating(x0)
    share = per_sample("t", t, x0).view(-1, *[1] * (x0.dim() - 1))
    return (1 - share).to(x0.dtype) * x0 + share.to(x0.dtype) * noise.to(x0.dtype)


def _times(velocity: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check shapes; return both times in float64 (float32 on MPS) and the dtype of the result."""
    same_shape("velocity", velocity, "x_t", x_t)
    dtype = torch.promote_types(torch.promote_types(x_t.dtype, velocity.dtype), torch.float32)
    return per_sample("t", t, x_t), per_sample("t_prev", t_prev, x_t), dtype
