"""Which fonts have the letters of a prompt: matplotlib's own, and for scripts that it lacks what the system has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

FIRST = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic and more."""
OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Heiti TC",
    "Apple SD Gothic Neo", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Devanagari", "Noto Sans Thai",
)  # fmt: skip


@cache
def families() -> list[str]:
    """Names of fonts, best first, as matplotlib takes them: a letter is drawn by the first that has it."""
    from matplotlib import font_manager

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of weights that a font has not
    there = {font.name for font in font_manager.fontManager.ttflist}
    return [FIRST, *(name for name in OTHERS if name in there)]


def font_file(texts: Sequence[str]) -> Path:
    """The first font that has every letter of ``texts``; matplotlib's own where none has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    letters = {ord(letter) for text in texts for letter in text if not letter.isspace()}
    files = [Path(font_manager.findfont(name)) for name in families()]
    whole = (file for file in files if letters <= FT2Font(str(file)).get_charmap().keys())
    return next(whole, files[0])
