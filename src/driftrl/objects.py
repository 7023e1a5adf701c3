"""Python's objects by name. A configuration is text: a reward or an encoder that stands in no module is called ``python:NAME``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from driftrl.checks import InputError

PREFIX = "python:"
_KNOWN: dict[str, Any] = {}


def register(name: str, thing: Callable[..., Any]) -> str:
    """Let configurations in this process call ``thing`` by a name, and return that: ``python:NAME``.

    A run that has it in its configuration is resumed and measured in another process after the same call there.

    Args:
        name: letters, digits, ``-``, ``_`` and ``.``; what had it before has it no longer.
        thing: a reward, ``(images, prompts) -> Tensor[N]``, or an encoder, ``images -> features [N, D]``.

    Raises:
        InputError: if the name has something else in it, or ``thing`` cannot be called.

    Example:
        >>> from driftrl.objects import register
        >>> register("bright", lambda images, prompts: images.mean((1, 2, 3)))
        'python:bright'
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"register: expected a name of letters, digits, '-', '_' and '.'; got {name!r}")
    if not callable(thing) or isinstance(thing, type):
        raise InputError(f"register: expected a function, or an object that can be called; got {thing!r}")
    _KNOWN[name] = thing
    return f"{PREFIX}{name}"


def named(thing: Any, importable: bool = True) -> Any:
    """What a configuration calls ``thing``: ``module:function`` where it can be imported by that, if that is of use, else
    ``python:NAME``; what cannot be called, such as a name, stays as it is.
    """
    if not callable(thing):
        return thing
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    if importable and name and getattr(sys.modules.get(module), name, None) is thing:
        return f"{module}:{name}"
    for known, other in _KNOWN.items():
        if other is thing:
            return f"{PREFIX}{known}"
    usual = re.sub(r"[^\w.-]+", "", name.rpartition(".")[2] or type(thing).__name__) or "object"
    number, free = 1, usual
    while free in _KNOWN:
        number += 1
        free = f"{usual}-{number}"
    return register(free, thing)


def found(name: str, key: str) -> Any:
    """The object that ``python:NAME`` stands for.

    Raises:
        InputError: naming ``key``, if nothing in this process has that name.
    """
    own = name.removeprefix(PREFIX)
    if own not in _KNOWN:
        raise InputError(
            f"{key}: {name!r} was an object in the Python that this configuration is of; here nothing has that name: give it by "
            f"driftrl.objects.register({own!r}, ...) first, or put it into a module and call it module:function"
        )
    return _KNOWN[own]
