"""The command line: one file per command, imported when it is used, so that --help is instant."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from driftrl.cli import commands

app = typer.Typer(
    name="driftrl",
    help="Reinforcement fine-tuning of text-to-image models [bold]without losing their variety[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.register(app)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print one message and exit."""
    from rich.console import Console

    from driftrl.distributed import linger

    linger()
    Console(stderr=True).print(f"[red bold]driftrl:[/] {_escape(message)}", highlight=False, soft_wrap=True)
    raise SystemExit(status)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """Run the command line: bad input gives one message and exit status 2."""
    try:
        app()
    except ValueError as error:
        from driftrl.checks import InputError

        if not isinstance(error, InputError):
            raise
        fail(str(error))
    except RuntimeError as error:
        from driftrl.checks import RunFailedError
        from driftrl.distributed import LostProcessError

        if not isinstance(error, RunFailedError | LostProcessError):
            raise
        fail(str(error), 3)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
