"""The openly licensed animal drawings behind tiny-animals: where they come from, and how to rasterise them.

`fetch` installs the icon packages from the npm registry, `catalogue` lists every drawing, and `rasterise`
draws one of them as RGBA pixels under an affine change of pose.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Style:
    """One set of drawings: its name in captions, its npm package, its family and what it is for."""

    name: str
    package: str
    version: str
    license: str
    family: str
    held_out: bool = False


STYLES = (
    Style("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "noto"),
    Style("blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "blob"),
    Style("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "twemoji"),
    Style("fluent", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "fluent"),
    Style("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "fluent"),
    Style("ink", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "fluent"),
    Style("3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "fluent"),
    Style("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "emojione"),
    Style("firefox", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "firefox"),
    # Share-alike: never trained on, never shipped; the scorer's unseen styles.
    Style("openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "openmoji", held_out=True),
    Style("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0", "emojione-v1", held_out=True),
)
STYLE_NAMES = tuple(style.name for style in STYLES if not style.held_out)
CODEPOINTS = json.loads((HERE / "codepoints.json").read_text())
ANIMALS = tuple(CODEPOINTS["animals"])


@dataclass(frozen=True)
class Drawing:
    """One drawing of one animal in one style; `source` is SVG text or the path of a raster image."""

    animal: str
    style: str
    family: str
    codepoint: str
    main: bool
    view: str
    held_out: bool
    source: str | Path

    @property
    def key(self) -> str:
        """The drawing's name in `views.json`: style/codepoint."""
        return f"{self.style}/{self.codepoint}"


def fetch(cache_dir: Path) -> Path:
    """Install the icon packages into `cache_dir` with npm, once; return the folder that holds them."""
    modules = cache_dir / "node_modules"
    missing = [s for s in STYLES if not (modules / s.package / "package.json").is_file()]
    if missing:
        if shutil.which("npm") is None:
            raise SystemExit("npm is needed to fetch the drawings (Debian: apt-get install npm)")
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / "package.json").write_text('{"private": true}\n')
        wanted = [f"{s.package}@{s.version}" for s in STYLES]
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *wanted]
        subprocess.run(command, cwd=cache_dir, check=True)
    return modules


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


@cache
def _package(modules: Path, package: str) -> tuple[dict, dict]:
    """Return one package's icons and its map of codepoint -> icon name (noto's where it has none)."""
    icons = _read(modules / package / "icons.json")
    chars = _read(modules / package / "chars.json") or dict(_read(modules / STYLES[0].package / "chars.json"))
    if package.endswith("/fxemoji"):
        chars = dict(CODEPOINTS["fxemoji_names"])
    elif "emojione" in package:
        chars |= CODEPOINTS["old_cat_names"]
    return icons, chars


def _svg(icons: dict, name: str) -> str | None:
    """Return an icon of an Iconify set as a stand-alone SVG document."""
    icon = icons["icons"].get(name)
    if icon is None:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or set(alias) - {"parent"}:
            return None
        icon = icons["icons"].get(alias["parent"])
        if icon is None:
            return None
    left, top, width, height = (
        icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = icon["body"].replace("currentColor", "#000000")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def _source(modules: Path, style: Style, codepoint: str) -> str | Path | None:
    if style.name == "3d":
        for name in (codepoint, f"{codepoint}-fe0f"):
            path = modules / style.package / "assets" / f"{name}.webp"
            if path.is_file():
                return path
        return None
    icons, chars = _package(modules, style.package)
    if codepoint not in chars:
        return None
    return _svg(icons, chars[codepoint])


def catalogue(modules: Path, held_out: bool = False) -> list[Drawing]:
    """List every drawing of the 45 animals (`held_out`: those of the share-alike styles instead).

    The view (face or body) is the one in `views.json`, labelled by looking at each drawing; where that file
    has none, the view that the Unicode name suggests.
    """
    views = _read(HERE / "views.json") if (HERE / "views.json").is_file() else {}
    drawings = []
    for style in STYLES:
        if style.held_out != held_out:
            continue
        for animal, points in CODEPOINTS["animals"].items():
            entries = [(p["codepoint"], p["view"], True) for p in points["main"]]
            entries += [(p, "face", False) for p in points["extra"]]
            if style.name == "firefox" and animal == "fox":  # that set has fox expressions without codepoints
                entries += [(p, "face", False) for p in CODEPOINTS["fxemoji_names"] if p.startswith("fx")]
            for codepoint, view, main in entries:
                source = _source(modules, style, codepoint)
                if source is None:
                    continue
                label = views.get(f"{style.name}/{codepoint}", view)
                if label == "skip":
                    continue
                drawings.append(
                    Drawing(animal, style.name, style.family, codepoint, main, label, held_out, source)
                )
    return drawings


def rasterise(
    drawing: Drawing,
    size: int = 64,
    scale: float = 0.92,
    rotate: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
) -> np.ndarray:
    """Draw `drawing` as uint8 RGBA of shape [size, size, 4].

    `scale` is the drawing's share of the frame, `rotate` in degrees, `shift` in shares of the frame.
    """
    if isinstance(drawing.source, Path):
        return _rasterise_bitmap(drawing.source, size, scale, rotate, shift, flip)
    match = re.match(r'<svg [^>]*viewBox="([-\d.e]+) ([-\d.e]+) ([\d.e]+) ([\d.e]+)">', drawing.source)
    assert match, drawing.key
    left, top, width, height = map(float, match.groups())
    body = drawing.source[match.end() : -len("</svg>")]
    unit = size * scale / max(width, height)
    pose = (
        f"translate({size * (0.5 + shift[0])} {size * (0.5 + shift[1])}) rotate({rotate}) "
        f"scale({-unit if flip else unit} {unit}) translate({-left - width / 2} {-top - height / 2})"
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="0 0 {size} {size}"><g transform="{pose}">{body}</g></svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


@cache
def _bitmap(path: Path) -> Image.Image:
    return Image.open(path).convert("RGBa").resize((256, 256), Image.Resampling.LANCZOS)


def _rasterise_bitmap(
    path: Path, size: int, scale: float, rotate: float, shift: tuple[float, float], flip: bool
) -> np.ndarray:
    image = _bitmap(path)
    big = 4 * size  # drawn large and reduced, because PIL's affine does not filter
    unit = image.width / (big * scale)
    c, s = math.cos(math.radians(rotate)) * unit, math.sin(math.radians(rotate)) * unit
    cx, cy = big * (0.5 + shift[0]), big * (0.5 + shift[1])
    rows = [[c, s, image.width / 2 - c * cx - s * cy], [-s, c, image.height / 2 + s * cx - c * cy]]
    if flip:
        rows[0] = [-rows[0][0], -rows[0][1], image.width - rows[0][2]]
    affine = (*rows[0], *rows[1])
    posed = image.transform((big, big), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(posed.resize((size, size), Image.Resampling.BOX).convert("RGBA"))
