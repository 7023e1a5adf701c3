"""The hub that model names refer to: whether it answers, and what of it lies in this machine's cache."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

SECONDS, ATTEMPTS = 10.0, 2
"""How long, and how often, it is waited for."""


@cache
def answers() -> bool:
    """Whether the hub can be asked, which is found out once.

    If not, the libraries that load from it are told to look into their caches only: by themselves they would try each
    file six times, for half a minute, and say so each time.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    for _ in range(ATTEMPTS):
        with suppress(Exception):  # which ones depends on the hub library's own, by its release
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            return True
    constants.HF_HUB_OFFLINE = True
    return False


def has(name: str, file: str, revision: str | None = None) -> bool:
    """Whether ``file`` of the hub name ``name`` is in this machine's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except HFValidationError:
        return False
