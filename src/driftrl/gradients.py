"""Gradients where an argument asks for them, and none elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def asked(*values: object) -> bool:
    """Whether gradients are being recorded, and one of ``values`` is a tensor that has one coming."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def on_demand(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function``, within `torch.no_grad` unless one of its arguments has a gradient coming.

    So rewards, encoders and autoencoders keep nothing for a backward pass in ordinary training, and are differentiable where a
    loss follows their gradient (``objective.loss`` ``adjoint`` and ``draft``).

    Example:
        >>> import torch
        >>> from driftrl.gradients import on_demand
        >>> weight = torch.ones(1, requires_grad=True)
        >>> brightness = on_demand(lambda images: (weight * images).mean())
        >>> brightness(torch.ones(2)).requires_grad, brightness(torch.ones(2, requires_grad=True)).requires_grad
        (False, True)
    """

    @wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.set_grad_enabled(asked(*args, *kwargs.values())):
            return function(*args, **kwargs)

    return called
