"""Where the command begins: imports nothing that takes time, so that Ctrl-C never ends in a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is imported gives exit status 130, as later."""
    try:
        from driftrl.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
