"""Argument checks whose messages say what was expected, what came and what to do."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:  # a mistyped setting should not wait for torch, which is imported where a tensor is checked
    from torch import Tensor


class InputError(ValueError):
    """What a user handed in cannot be used; the command line prints it and exits with status 2."""


class NotFiniteError(FloatingPointError):
    """A latent, reward, loss or gradient is NaN or infinite; the update was not taken."""


class RunFailedError(RuntimeError):
    """A run cannot go on, through no fault of its input; the command line exits with status 3."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the allowed name nearest to ``name``, or an empty string.

    Nearest in spelling, or the one of these initials.

    Example:
        >>> from driftrl.checks import nearest
        >>> nearest("lr", ["learning_rate", "betas"])
        "; did you mean 'learning_rate'?"
    """
    options = list(allowed)
    close = get_close_matches(name, options, n=1, cutoff=0.6) or [
        option for option in options if "".join(word[:1] for word in option.split("_")) == name
    ]
    return f"; did you mean '{close[0]}'?" if close else ""


def counted(count: int, what: str) -> str:
    """A number of things in words.

    Example:
        >>> from driftrl.checks import counted
        >>> counted(1, "run"), counted(2, "run")
        ('1 run', '2 runs')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        InputError: otherwise, naming the allowed values and the nearest one.
    """
    options = list(allowed)
    if value not in options:
        listing = ", ".join(options)
        raise InputError(f"{name}: expected one of {listing}; got {value!r}{nearest(str(value), options)}")
    return value


def is_tensor(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor.

    Raises:
        InputError: if it is an array, a list, or whatever else.
    """
    from torch import Tensor

    if not isinstance(value, Tensor):
        raise InputError(f"{name}: expected a tensor; got {type(value).__name__}")
    return value


def same_shape(name: str, tensor: Tensor, other: str, like: Tensor) -> Tensor:
    """Return ``tensor`` if it has the shape of ``like``, which messages call ``other``, and both are of one dimension or more.

    Raises:
        InputError: otherwise, and if either is no tensor.
    """
    is_tensor(other, like)
    if is_tensor(name, tensor).shape != like.shape:
        raise InputError(
            f"{name}: expected the shape of {other}, {list(like.shape)}; got {list(tensor.shape)}"
        )
    if like.dim() < 1:
        raise InputError(f"{other}: expected at least one dimension; got a single number, of shape []")
    return tensor


def has_shape(name: str, tensor: Tensor, shape: str) -> Tensor:
    """Return ``tensor`` if its number of dimensions is that of ``shape``, written like ``"[P, N]"``.

    Raises:
        InputError: if it is no tensor, or its number of dimensions differs.
    """
    from torch import Tensor

    expected = shape.count(",") + 1 if shape.strip("[] ") else 0
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: expected a tensor of shape {shape}; got {type(tensor).__name__}")
    if tensor.dim() != expected:
        raise InputError(f"{name}: expected shape {shape}; got {list(tensor.shape)}")
    return tensor


def is_finite(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` if all its elements are finite.

    Raises:
        InputError: naming how many elements are not, and the index of the first.
    """
    import torch

    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"{name}: {int(bad.sum())} of {tensor.numel()} values are not finite, first at {first}"
        )
    return tensor


def at_least(name: str, value: float, minimum: float) -> float:
    """Return ``value`` if it is at least ``minimum``.

    Raises:
        InputError: otherwise.
    """
    if not value >= minimum:
        raise InputError(f"{name}: expected at least {minimum}; got {value}")
    return value


def whole_number(name: str, value: SupportsIndex) -> int:
    """``value`` as a Python number, if it is a whole number of any kind, NumPy's too, and no truth value.

    Raises:
        InputError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InputError(f"{name}: expected a whole number; got {value!r}")
    return operator.index(value)


def per_sample(name: str, values: Tensor | float, samples: Tensor) -> Tensor:
    """``values`` as [N], one for each of ``samples`` [N, ...], on their device and in float64 (float32 on MPS); a
    single number counts for all.

    Raises:
        InputError: for another shape.
    """
    import torch

    wide = torch.float32 if samples.device.type == "mps" else torch.float64
    given = torch.as_tensor(values).to(device=samples.device, dtype=wide)
    if given.dim() == 0:
        given = given.expand(samples.shape[:1])
    if samples.dim() < 1 or given.shape != samples.shape[:1]:
        raise InputError(
            f"{name}: expected one per sample, {list(samples.shape[:1])}; got {list(given.shape)}"
        )
    return given


def safe_unit(magnitude: Tensor) -> Tensor:
    """A power of two for each largest ``magnitude``: numbers divided by it have squares that neither overflow nor vanish.

    It is 1 but for extremes, in float64 beyond 1e96 and below 1e-96; and dividing by a power of two rounds nothing, so what
    is computed in that unit has the bits that it would have without it.

    Args:
        magnitude: float32 or float64, at least 0; no gradient flows through it.

    Returns:
        The shape, dtype and device of ``magnitude``.

    Example:
        >>> import torch
        >>> from driftrl.checks import safe_unit
        >>> (safe_unit(torch.tensor([0.0, 1e-30, 1e9, 3e38])).log2() / 80).tolist()
        [-1.0, -1.0, 0.0, 1.0]
    """
    import torch

    far = 40 if magnitude.dtype == torch.float32 else 320
    unit = torch.ones_like(magnitude.detach())
    return unit.masked_fill(magnitude > 2.0**far, 2.0 ** (2 * far)).masked_fill(
        magnitude < 2.0**-far, 2.0 ** (-2 * far)
    )


def only_rounding(std: Tensor, magnitude: Tensor, precision: float) -> Tensor:
    """Whether a standard deviation is so small that it may be nothing but the rounding of what it was taken over.

    That is where it is at most 4 rounding errors of the largest magnitude; or 1 where numbers come in half precision, for they
    were computed in more, and are rounded once.

    Args:
        std: standard deviations.
        magnitude: the largest magnitude of the numbers that each was taken over, of a shape that broadcasts.
        precision: ``torch.finfo(...).eps`` of the dtype in which the numbers were handed over.

    Returns:
        bool, of the shape that both broadcast to.

    Example:
        >>> import torch
        >>> from driftrl.checks import only_rounding
        >>> std, largest = torch.tensor([0.01, 0.1]), torch.tensor([20.0, 20.0])
        >>> only_rounding(std, largest, torch.finfo(torch.bfloat16).eps)
        tensor([True, True])
        >>> only_rounding(std, largest, torch.finfo(torch.float32).eps)
        tensor([False, False])
    """
    errors = 1.0 if precision > 1e-6 else 4.0
    return std <= errors * precision * magnitude


def floating(tensor: Tensor) -> Tensor:
    """``tensor``, of the default dtype where it is of whole numbers or truth values.

    Example:
        >>> import torch
        >>> from driftrl.checks import floating
        >>> floating(torch.tensor([1, 2])).dtype, floating(torch.ones(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    import torch

    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
