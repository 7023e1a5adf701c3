"""Pages from the package's templates."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from driftrl import __version__
from driftrl.checks import InputError, counted
from driftrl.files import make_parent

COLOURS = 16
"""Colours of methods in the style sheet (look.css); beyond them colour and shape come again."""


def minus(value: float, digits: int = 3, sign: bool = False) -> str:
    """A number with a true minus sign."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """A share's change in percent, with a true minus sign; none where it rounds to 0."""
    return minus(100 * share, 0, sign=True) + "%"


def webp_uri(picture: bytes) -> str:
    """A WebP file as the address of an image, so that a page needs no other file."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode("ascii")


def render(template: str, **values: Any) -> str:
    """Fill a template of ``assets``; values are escaped, and a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(str(resources.files("driftrl") / "assets")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["n"] = minus
    environment.filters["percent"] = percent
    environment.filters["counted"] = counted
    return environment.get_template(template).render(version=__version__, **values)


def short(path: str | None) -> str:
    """A model's name without the folders of this machine, for a report travels."""
    return Path(path or "").name if Path(path or "").is_absolute() else path or ""


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def check_out(out: Path) -> Path:
    """Return ``out`` if a page can be written there.

    Raises:
        InputError: if it is a folder, is not named like a page, or is the report of a run.
    """
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise InputError(f"--out: expected an HTML file, such as comparison.html; got {out}")
    folder = out.resolve().parent
    a_run = any((folder / name).is_file() for name in ("config.yaml", "evaluation.json"))
    if a_run and out.resolve().stem == "report":  # report.png beside it would be overwritten, too
        raise InputError(
            f"--out: expected a page that is no run's own report; got {out}, which driftrl evaluate writes; take "
            f"another name, such as {out.with_name('comparison.html')}"
        )
    make_parent(out)
    return out
