"""What Ctrl-C leaves, said before the program ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def on_interrupt(console: Console, told: str) -> Iterator[None]:
    """Say ``told`` if Ctrl-C comes within this context; the exit status is 130, as ever."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"stopped; {told}", highlight=False, soft_wrap=True, markup=False)
        raise
