"""What every measure here asks of its features: the checks, and the step to float64."""

from __future__ import annotations

import torch
from torch import Tensor

from driftrl.checks import InputError, has_shape, is_finite, safe_unit


def as_float64(name: str, features: Tensor) -> Tensor:
    """Return ``features`` of shape [N, D] in float64, after checking them.

    float64 costs little beside the encoder that made the features, is exempt from autocast and TF32, and
    makes near-duplicates, the case that matters here, measurable. A device without float64 (MPS) hands the
    work to the CPU.

    Raises:
        InputError: if the shape is not [N, D] with N >= 2 and D >= 1, or a value is not finite.
    """
    return _checked(name, has_shape(name, features, "[N, D]"))


def unit_rows(name: str, features: Tensor) -> Tensor:
    """Return ``features`` of shape [..., N, D] in float64 with every row scaled to length 1, differentiably.

    Raises:
        InputError: as `as_float64`, or if a row is all zeros and so has no direction.
    """
    if not isinstance(features, Tensor) or features.dim() < 2:
        has_shape(name, features, "[N, D]")
    wide = _checked(name, features)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if not bool(
        ((length > 1e-90) & (length < 1e90)).all()
    ):  # zeros, or numbers whose squares over- or underflow
        wide = wide / safe_unit(wide.detach().abs().amax(dim=-1, keepdim=True))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    bad = length == 0
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0][:-1])
        raise InputError(
            f"{name}: cosine distance needs rows with a direction; the row at {first} has length 0; "
            "does the encoder return zeros for that image?"
        )
    return wide / length


def _checked(name: str, features: Tensor) -> Tensor:
    n, d = features.shape[-2:]
    if n < 2 or d < 1 or features.numel() == 0:
        raise InputError(
            f"{name}: expected at least 2 items of at least 1 feature each; got shape {list(features.shape)}"
        )
    if features.is_complex():
        raise InputError(f"{name}: expected real features; got {features.dtype}")
    is_finite(name, features)
    return features.cpu().double() if features.device.type == "mps" else features.double()
