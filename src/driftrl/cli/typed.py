"""Messages that name the option that was typed, where what it sets has a key of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_typed(options: Mapping[str, tuple[str, Any]]) -> Iterator[None]:
    """Within this context a message about a key names the option that set it.

    Args:
        options: key to the option's name and what was given for it: one value, several, or None. Only messages that
            name such a value are about the option: without it they are about a run's own setting.
    """
    try:
        yield
    except ValueError as error:
        from driftrl.checks import InputError  # which takes seconds, and --help is instant

        if not isinstance(error, InputError):
            raise
        message = str(error)
        for key, (option, given) in options.items():
            values = [] if given is None else given if isinstance(given, list) else [given]
            if message.startswith(f"{key}: ") and any(str(value) in message for value in values):
                told = f"{option}{message.removeprefix(key)}"
                for other, (its, _) in options.items():
                    told = told.replace(f"--set {other}=", f"{its} ")
                error.args = (told,)  # the same error, for that all processes raise it may be known of it
                break
        raise
