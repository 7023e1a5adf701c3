"""The hub that model names refer to: whether it answers, and what of it lies in this machine's cache."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from driftrl import single_file

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
    return cached(name, file, revision) is not None


def cached(name: str, file: str, revision: str | None = None) -> Path | None:
    """Where ``file`` of the hub name ``name`` lies in this machine's cache, if it does."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def files(name: str, revision: str | None = None) -> list[str]:
    """The files that the hub has of ``name``; none where it will not say."""
    from huggingface_hub import HfApi

    with suppress(Exception):  # whoever loads them is told why
        return list(HfApi().list_repo_files(name, revision=revision))
    return []


def off() -> bool:
    """Whether the user has switched the hub off."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def silence() -> str:
    """Why it does not answer, behind "the hub", in messages."""
    return "is switched off by HF_HUB_OFFLINE" if off() else "does not answer"


def of_hub(name: str) -> bool:
    """Whether it has the form of a hub name and is not there as a path."""
    formed = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not single_file.named(name)
    return formed and not Path(name).exists()
