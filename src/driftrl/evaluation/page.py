"""Pages from the package's templates."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

from driftrl import __version__
from driftrl.checks import counted


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
    environment.filters["counted"] = counted
    return environment.get_template(template).render(version=__version__, **values)
