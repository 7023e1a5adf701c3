"""The command line: one file per command, imported when it is used, so that --help is instant."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from driftrl import __version__
from driftrl.cli import commands

app = typer.Typer(
    name="driftrl",
    help="""Reinforcement fine-tuning of text-to-image models [bold]without losing their variety[/bold].

    Every command has examples in its own help: driftrl train --help.

    Examples:

      driftrl doctor

      driftrl train

      driftrl sample runs/drift-seed0 --prompt "a cat"
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.register(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"driftrl {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_version, is_eager=True, help="Say which version this is."
        ),
    ] = False,
) -> None:
    pass


def fail(message: str, status: int = 2, by_all: bool = False) -> NoReturn:
    """Print one message and exit; of processes that have it ``by_all``, the first one prints it."""
    from rich.console import Console

    from driftrl.distributed import leads, linger

    linger()
    if by_all and not leads():
        raise SystemExit(status)
    Console(stderr=True, emoji=False).print(
        f"[red bold]driftrl:[/] {_escape(message)}", highlight=False, soft_wrap=True
    )
    raise SystemExit(status)


def _one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """A warning without the place in our code that it came from, which says nothing to who uses the program."""
    return f"{category.__name__}: {message}\n"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """Run the command line: bad input gives one message and exit status 2."""
    try:
        _main()
    except SystemExit as end:
        if end.code in (None, 0) and "WORLD_SIZE" in os.environ:
            from driftrl.distributed import leave

            leave()
        raise


def _main() -> None:
    warnings.formatwarning = _one_line
    try:
        app()
    except ValueError as error:
        from driftrl.checks import InputError
        from driftrl.distributed import raised_by_all

        if not isinstance(error, InputError):
            raise
        fail(str(error), by_all=raised_by_all(error))
    except RuntimeError as error:
        from driftrl.checks import RunFailedError
        from driftrl.distributed import LostProcessError, raised_by_all

        if not isinstance(error, RunFailedError | LostProcessError):
            raise
        fail(str(error), 3, raised_by_all(error))
    except OSError as error:  # a path that cannot be written to; a connection names no file
        if not isinstance(error.filename, str | Path):
            raise
        fail(f"{error.filename}: {error.strerror}", 3 if error.errno == errno.ENOSPC else 2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
