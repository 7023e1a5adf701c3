"""Conditioning of the policy: noise on prompt embeddings, annealed along the denoising steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl.checks import InputError, at_least, floating, has_shape, one_of, safe_unit, same_shape

NOISE_SCHEDULES: tuple[str, ...] = ("linear", "constant", "cosine", "cads")
LOST = 0.1
"""Share of the similarity that a prompt gives its images beyond which noise on the prompt is too strong."""


@dataclass(frozen=True)
class NoiseCost:
    """What noise on the prompt does to prompt-image similarity; see `noise_cost`."""

    similarity: float
    """Mean over images drawn with the noise."""
    without: float
    """Mean over the same images drawn without it."""
    lost: float
    """Share lost of what the prompt gives; NaN where images match their prompts no better than others."""
    falls: bool
    """Whether that is more than `LOST`, and more than chance."""


def annealed_noise(
    embeds: Tensor,
    noise: Tensor,
    timesteps: Tensor | float,
    eta: float,
    schedule: str = "linear",
    num_train_timesteps: int = 1000,
    *,
    tau1: float = 0.6,
    tau2: float = 0.9,
    psi: float = 1.0,
) -> Tensor:
    """Prompt embeddings with noise that fades as the image takes shape: ``e + eta a(t) rms(e) noise``.

    With ``s = t / num_train_timesteps``, ``a`` is ``s`` (``linear``), 1 (``constant``) or
    ``(1 - cos(pi s)) / 2`` (``cosine``); rms is the root mean square of each sample's embedding over tokens
    and channels, so that ``eta`` means the same for every text encoder. Tokens that are all zeros are padding: they are
    left out of the rms and stay zero, so that it means the same for short and long prompts too.

    ``cads`` is the rule of that paper instead: ``sqrt(g) e + eta sqrt(1 - g) noise`` with ``g`` rising
    linearly from 0 at ``s >= tau2`` to 1 at ``s <= tau1``; brought back to the mean and standard deviation of
    ``e`` and mixed in by the share ``psi``. There the embedding itself fades too, and the noise is not scaled
    by the rms.

    Args:
        embeds: [N, L, D], the conditional branch only: unconditional embeddings stay clean.
        noise: [N, L, D], standard normal, drawn once per candidate and used again in replay.
        timesteps: [N] or one number, in training timesteps: 0 is clean, ``num_train_timesteps`` is noise.
        eta: strength; DRIFT has 0.05. With 0 the embeddings are returned as they are, whatever the schedule.
        schedule: one of ``NOISE_SCHEDULES``.
        num_train_timesteps: length of the training schedule.
        tau1: (cads) share of the schedule below which the embedding is clean.
        tau2: (cads) share above which it is all noise.
        psi: (cads) share of the rescaled embedding, 0 to 1.

    Returns:
        [N, L, D] in the dtype of ``embeds`` (the default float dtype for integers); the arithmetic is float32 or better. ``a`` never leaves [0, 1],
        even for timesteps outside the schedule.

    Raises:
        InputError: for shapes that do not agree, eta below 0, an unknown schedule, or CADS settings that are
            not 0 <= tau1 < tau2 <= 1 and 0 <= psi <= 1.

    Source: DRIFT (arXiv 2601.12401: annealed Gaussian noise on the embedding in training, eta = 0.05; scaling
    by the rms and the linear schedule are ours). CADS: arXiv 2310.17347, section 3.

    Example:
        >>> import torch
        >>> from driftrl.conditioning import annealed_noise
        >>> e, noise = torch.full((2, 1, 2), 3.0), torch.ones(2, 1, 2)
        >>> annealed_noise(e, noise, torch.tensor([1000, 500]), eta=0.1)[:, 0]
        tensor([[3.3000, 3.3000],
                [3.1500, 3.1500]])
    """
    one_of("schedule", schedule, NOISE_SCHEDULES)
    at_least("eta", eta, 0.0)
    at_least("num_train_timesteps", num_train_timesteps, 1)
    has_shape("embeds", embeds, "[N, L, D]")
    same_shape("noise", noise, "embeds", embeds)
    if not (0.0 <= tau1 < tau2 <= 1.0 and 0.0 <= psi <= 1.0):
        raise InputError(
            f"tau1, tau2, psi: expected 0 <= tau1 < tau2 <= 1 and 0 <= psi <= 1; got {tau1}, {tau2}, {psi}"
        )
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    when = torch.as_tensor(timesteps, device=embeds.device).to(dtype)
    if when.dim() > 1 or (when.dim() == 1 and when.shape[0] not in (1, embeds.shape[0])):
        raise InputError(f"timesteps: expected a number or [{embeds.shape[0]}]; got {list(when.shape)}")
    embeds = floating(embeds)
    if eta == 0:
        return embeds

    share = (when / num_train_timesteps).clamp(0.0, 1.0).reshape(-1, 1, 1)
    clean, draw = embeds.to(dtype), noise.to(device=embeds.device, dtype=dtype)
    tokens = (clean != 0).any(dim=-1, keepdim=True)
    if schedule == "cads":
        gamma = ((tau2 - share) / (tau2 - tau1)).clamp(0.0, 1.0)
        gamma = gamma.masked_fill(share <= tau1, 1.0)  # at tau1 itself rounding would leave some of the noise
        noised = (gamma.sqrt() * clean + eta * (1.0 - gamma).sqrt() * draw) * tokens
        return torch.lerp(noised, _with_moments_of(clean, noised, tokens), psi).to(embeds.dtype)
    if schedule == "linear":
        amount = share
    elif schedule == "cosine":
        amount = 0.5 - 0.5 * (math.pi * share).cos()
    else:
        amount = torch.ones_like(share)
    return (clean + eta * amount * _rms(clean, tokens) * draw * tokens).to(embeds.dtype)


def _mean(values: Tensor, tokens: Tensor) -> Tensor:
    """Mean [N, 1, 1] over the channels of those ``tokens`` [N, L, 1] that there are; ``values`` are 0 at the others."""
    padding = tokens.shape[1] / tokens.sum(dim=1, keepdim=True).clamp(min=1)  # 1 where there is none
    return values.mean(dim=(1, 2), keepdim=True) * padding.to(values.dtype)


def _rms(values: Tensor, tokens: Tensor) -> Tensor:
    """Root mean square [N, 1, 1] over those ``tokens``, in a unit in which no square over- or underflows."""
    unit = safe_unit(values.detach().abs().amax(dim=(1, 2), keepdim=True)) if values.numel() else 1.0
    return _mean((values / unit).square(), tokens).sqrt() * unit


def _with_moments_of(target: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """``values`` moved and scaled to each sample's mean and standard deviation of ``target``, both over its tokens."""
    mean = _mean(target, tokens)
    centred = (values - _mean(values, tokens)) * tokens
    std, target_std = _rms(centred, tokens), _rms((target - mean) * tokens, tokens)
    return (centred * (target_std / std.clamp(min=torch.finfo(std.dtype).tiny)) + mean) * tokens


def noise_cost(noised: Tensor, clean: Tensor, unrelated: Tensor) -> NoiseCost:
    """How much of prompt-image similarity the noise on the prompt costs, in units that every scorer has.

    What a prompt gives its images is how much better they match it than another prompt. The noise is too strong where
    it takes more than `LOST` of that, ``mean(clean - noised) / mean(clean - unrelated)``, and both differences are
    more than two standard errors above 0.

    Args:
        noised: [n], similarity to their prompts of images drawn with noise on the prompt; n >= 2.
        clean: [n], of the same images drawn without it, from the same noise otherwise.
        unrelated: [n], of the clean images to other prompts.

    Raises:
        InputError: if the shapes are not [n] or n is below 2.

    Source: ours; DRIFT (arXiv 2601.12401) warns of noise that is too large, as we have it without a measure.

    Example:
        >>> import torch
        >>> from driftrl.conditioning import noise_cost
        >>> cost = noise_cost(torch.tensor([5.0, 6.0]), torch.tensor([8.0, 8.0]), torch.tensor([2.0, 4.0]))
        >>> cost.lost, cost.falls
        (0.5, True)
    """
    if len(has_shape("noised", noised, "[n]")) < 2:
        raise InputError(
            f"noised: expected shape [n], n >= 2, to tell a fall from chance; got {list(noised.shape)}"
        )
    for name, scores in (("clean", clean), ("unrelated", unrelated)):
        if has_shape(name, scores, "[n]").shape != noised.shape:
            raise InputError(
                f"{name}: expected shape {list(noised.shape)}, as noised has it; got {list(scores.shape)}"
            )
    noised, clean, unrelated = noised.double(), clean.double(), unrelated.double()
    loss, gift = clean - noised, clean - unrelated
    lost = float(loss.mean() / gift.mean()) if float(gift.mean()) > 0 else math.nan
    sure = all(bool(d.mean() > 2 * d.std() / len(d) ** 0.5) for d in (loss, gift))
    return NoiseCost(float(noised.mean()), float(clean.mean()), lost, lost > LOST and sure)
