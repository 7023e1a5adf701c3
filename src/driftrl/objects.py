"""Python's objects by name. A configuration is text: a user's reward or encoder is ``module:function`` in it, and ``python:NAME``
where no module has it.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
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


def named(thing: Any) -> Any:
    """What a configuration calls ``thing``: ``module:function`` where it can be imported by that, else ``python:NAME``; what
    cannot be called, such as a name, stays as it is.
    """
    if not callable(thing):
        return thing
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    if name and getattr(sys.modules.get(module), name, None) is thing:
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
    """The object that ``module:function`` or ``python:NAME`` stands for.

    Raises:
        InputError: naming ``key``, if there is none, or its module cannot be imported.
    """
    if not name.startswith(PREFIX):
        return _imported(name, key)
    own = name.removeprefix(PREFIX)
    if own not in _KNOWN:
        raise InputError(
            f"{key}: {name!r} was an object in the Python that this configuration is of; here nothing has that name: give it by "
            f"driftrl.objects.register({own!r}, ...) first, or put it into a module and call it module:function"
        )
    return _KNOWN[own]


def _imported(name: str, key: str) -> Any:
    module, _, function = name.partition(":")
    if "/" in module or module.endswith(".py"):
        raise InputError(
            f"{key}: expected module:function, as Python imports it; got the path {name!r}; for mine.py in this folder: "
            f"--set {key}=mine:function"
        )
    here = str(Path.cwd())
    if here not in sys.path:  # at the end: what is installed is found first
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever a user's module does at its import
        hint = ""
        if module == "__main__":
            hint = "; it is of the script or notebook that trained: put it into a module, and name that in config.yaml"
        elif isinstance(error, ModuleNotFoundError) and error.name == module:
            hint = f"; expected {module}.py in this folder, or a module that is installed"
        what = (
            error if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        )
        raise InputError(f"{key}: {name!r} cannot be imported: {what}{hint}") from error
