"""`driftrl settings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from driftrl.checks import InputError
from driftrl.config import TrainConfig

HEADER = """# Settings

Everything that a configuration may say. In a file they are nested (`shaping: {ratio: 0.2}`), on the command line dotted
(`--set shaping.ratio=0.2`); what is not said has its default. A run's `config.yaml` has all of them. This page is made by
`driftrl settings --markdown`; `driftrl settings WORD` finds those with a word in their name or meaning.
"""


@dataclass(frozen=True)
class Setting:
    """A key of the configuration, in words."""

    key: str
    allowed: str
    default: str
    meaning: str


def sections() -> list[tuple[str, str, list[Setting]]]:
    """Name, meaning and settings of each part of a configuration; those outside of any come first, as "run"."""
    schema = TrainConfig.model_json_schema()
    top: list[Setting] = []
    found = [("run", "Of the whole run, outside of any part.", top)]
    for name, field in schema["properties"].items():
        if "$ref" in field:
            found.append((name, *_section(schema, field["$ref"], f"{name}.")))
        else:
            top.append(_setting(name, field))
    found.insert(1, ("reward[]", *_section(schema, "RewardPart", "reward[].")))
    return found


def settings(word: str | None, markdown: bool) -> None:
    """Print the settings, or those with ``word`` in their key or meaning.

    Raises:
        InputError: if no setting has it.
    """
    chosen = sections()
    if word is not None:
        chosen = [
            (name, what, [s for s in found if word.lower() in f"{s.key} {s.meaning} {s.allowed}".lower()])
            for name, what, found in chosen
        ]
        if not any(found for *_, found in chosen):
            from driftrl.config import setting_like

            like = setting_like(word)
            raise InputError(
                f"no setting has {word!r} in its name or meaning"
                + (f"; did you mean {like}?" if like else "")
            )
    chosen = [part for part in chosen if part[2]]
    if markdown:
        print(_markdown(chosen), end="")
        return
    console = Console(highlight=False)
    for name, what, found in chosen:
        console.print(f"\n[bold]{escape(name)}[/]: {escape(what)}")
        for each in found:
            console.print(
                f"  [bold cyan]{escape(each.key)}[/] = {escape(each.default)}  [dim]{escape(each.allowed)}[/]"
            )
            console.print(Padding(escape(each.meaning), (0, 0, 0, 6), expand=False))


def _markdown(chosen: list[tuple[str, str, list[Setting]]]) -> str:
    lines = [HEADER]
    for name, what, found in chosen:
        lines.append(
            f"## {name}\n{what}\n\n| Setting | Default | May be | Meaning |\n| --- | --- | --- | --- |"
        )
        cells = ((f"`{s.key}`", f"`{s.default}`", s.allowed, s.meaning) for s in found)
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _section(schema: dict[str, Any], name: str, prefix: str) -> tuple[str, list[Setting]]:
    part = schema["$defs"][name.rpartition("/")[2]]
    return part["description"], [
        _setting(f"{prefix}{key}", field) for key, field in part["properties"].items()
    ]


def _setting(key: str, field: dict[str, Any]) -> Setting:
    default = "(to be given)"
    if "default" in field:
        default = yaml.safe_dump(field["default"], default_flow_style=True).splitlines()[0]
    return Setting(key, _allowed(field), default, " ".join(field["description"].split()))


def _allowed(field: dict[str, Any]) -> str:
    """What the JSON schema of a setting lets it be, in words."""
    choices = field.get("anyOf") or field.get("oneOf")
    if choices:
        return ", or ".join(_allowed(choice) for choice in choices)
    if "enum" in field or "const" in field:
        return ", ".join(str(option) for option in field.get("enum", [field.get("const")]))
    kind = {"string": "text", "boolean": "true or false", "null": "null", "array": "a list"}.get(
        field.get("type", "")
    )
    if kind is not None:
        return kind + (f" of {_allowed(field['items'])}" if "enum" in field.get("items", {}) else "")
    names = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = " and ".join(f"{words} {field[name]}" for name, words in names.items() if name in field)
    return " ".join(
        part for part in ("whole number" if field.get("type") == "integer" else "number", bounds) if part
    )
