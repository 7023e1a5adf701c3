"""What Ctrl-C, or SIGTERM, leaves, said before the program ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console


class Terminated(SystemExit):
    """SIGTERM has come, as schedulers of clusters send it."""


@contextmanager
def on_interrupt(console: Console, told: str) -> Iterator[None]:
    """Say ``told`` if Ctrl-C or SIGTERM comes within this context; the exit status is 130 or 143, as ever."""
    try:
        with _sigterm_raises():
            yield
    except (KeyboardInterrupt, Terminated):
        console.print(f"stopped; {told}", highlight=False, soft_wrap=True, markup=False)
        raise


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within this context SIGTERM raises, if nothing else was to be done then."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: Any) -> NoReturn:
        raise Terminated(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
