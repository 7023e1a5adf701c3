"""Random numbers by key: every draw has its own generator, so batches and processes change no sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from driftrl.checks import whole_number


def seed_of(*key: int | str) -> int:
    """A 63-bit seed for a key, the same on every machine; different keys give unrelated seeds. A number is itself,
    whether Python's or NumPy's. (PyTorch's CPU generators start from the lower 32 bits of a seed.)

    Raises:
        InputError: for a part that is neither a string nor a whole number.

    Example:
        >>> from driftrl.noise import seed_of
        >>> seed_of(0, 1, "latents") == seed_of(0, 1, "latents") != seed_of(0, 1, "other")
        True
    """
    parts = (
        "str:" + part.replace("/", "//") if isinstance(part, str) else f"int:{whole_number('key', part)}"
        for part in key
    )
    text = "/".join(parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, iteration: int, prompt: int, candidate: int, purpose: str) -> torch.Generator:
    """The CPU generator of one candidate's draws for one purpose.

    Hand a list of these for ``purpose="latents"`` to a diffusers pipeline as ``generator=`` and it draws what
    driftrl draws: the initial latent first, then the noise of each step.
    """
    return torch.Generator().manual_seed(seed_of(seed, iteration, prompt, candidate, purpose))


def normal(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [len(generators), *shape], a row from each generator; no row without generators."""
    if len(generators) == 0:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(tuple(shape), generator=g, dtype=torch.float32) for g in generators])


def placed(draws: Tensor, device: torch.device) -> Tensor:
    """``draws`` on ``device``. From pinned memory, so that the host need not wait until a GPU has caught up."""
    return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)
