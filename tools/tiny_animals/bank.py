"""Posed drawings, backgrounds and captions: what every network of tiny-animals is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiny_animals.drawings import ANIMALS, STYLE_NAMES, Drawing, catalogue, fetch, rasterise

SIZE = 64
BACKGROUNDS = {
    "white": (250, 250, 250), "black": (24, 24, 28), "gray": (150, 152, 156), "red": (214, 60, 56),
    "orange": (242, 146, 50), "yellow": (250, 216, 84), "green": (108, 184, 92), "teal": (52, 168, 168),
    "blue": (82, 148, 226), "purple": (138, 98, 190), "pink": (244, 160, 190), "brown": (142, 100, 70),
}  # fmt: skip
BACKGROUND_NAMES = tuple(BACKGROUNDS)
VIEWS = ("face", "body")


@dataclass(frozen=True)
class Bank:
    """Every drawing in several poses.

    `pixels`: uint8 [D, K, 4, 64, 64], RGBA; `animal`, `style`, `view`: LongTensor [D], indices into the
    names of `drawings.ANIMALS`, `drawings.STYLE_NAMES` and `VIEWS`; `weight`: float [D], the probability of
    drawing each, balanced by animal, then by style.
    """

    pixels: Tensor
    animal: Tensor
    style: Tensor
    view: Tensor
    weight: Tensor
    keys: tuple[str, ...]

    def draw(self, n: int, generator: torch.Generator, poses: slice = slice(None)) -> tuple[Tensor, ...]:
        """Draw `n` (drawing, pose) pairs: RGBA uint8 [n, 4, 64, 64] and the drawings' indices [n]."""
        which = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        pool = torch.arange(self.pixels.shape[1])[poses]
        pose = pool[torch.randint(len(pool), (n,), generator=generator)]
        return self.pixels[which, pose], which


def _weights(drawings: list[Drawing]) -> Tensor:
    """Balance by animal, then by style, then main drawings twice as often as extra ones."""
    raw = torch.tensor([1.0 if d.main else 0.5 for d in drawings], dtype=torch.float64)
    keys = [(d.animal, d.style) for d in drawings]
    total = {k: sum(w for w, key in zip(raw.tolist(), keys, strict=True) if key == k) for k in set(keys)}
    styles = {a: len({k for k in total if k[0] == a}) for a, _ in keys}
    return torch.tensor([w / total[k] / styles[k[0]] for w, k in zip(raw.tolist(), keys, strict=True)])


def build(
    cache_dir: Path, poses: int = 32, seed: int = 0, held_out: bool = False, spread: float = 1.0
) -> Bank:
    """Rasterise every drawing in `poses` poses, or load the cache.

    `spread` scales the poses: 1 is up to 8 degrees of rotation and a fifth of the size, for networks that look
    at pictures. 0 is the drawing itself, even numbers as drawn and odd ones mirrored, for the generator:
    a shift by a pixel changes all of an 8 x 8 latent, and costs more to learn than the variety is worth.
    """
    path = cache_dir / f"bank-{'held-out-' if held_out else ''}{poses}-{seed}-{spread:g}.npy"
    drawings = catalogue(fetch(cache_dir), held_out)
    if path.is_file():
        pixels = np.load(path)
    else:
        rng = np.random.default_rng(seed)
        pixels = np.empty((len(drawings), poses, 4, SIZE, SIZE), np.uint8)
        for i, drawing in enumerate(drawings):
            for k in range(poses):
                scale = 0.86 + spread * rng.uniform(-0.1, 0.1)
                flip = bool(rng.random() < 0.5) if spread else k % 2 == 1
                room = spread * ((1 - scale) / 2 + 0.01)
                shift = (rng.uniform(-room, room), rng.uniform(-room, room))
                image = rasterise(drawing, SIZE, scale, spread * rng.uniform(-8, 8), shift, flip)
                pixels[i, k] = image.transpose(2, 0, 1)
        np.save(path, pixels)
    if len(pixels) != len(drawings):
        raise SystemExit(
            f"{path} holds {len(pixels)} drawings, the catalogue {len(drawings)}: delete the file"
        )
    names = (*STYLE_NAMES, *sorted({d.style for d in drawings} - set(STYLE_NAMES)))
    return Bank(
        torch.from_numpy(pixels),
        torch.tensor([ANIMALS.index(d.animal) for d in drawings]),
        torch.tensor([names.index(d.style) for d in drawings]),
        torch.tensor([VIEWS.index(d.view) for d in drawings]),
        _weights(drawings),
        tuple(d.key for d in drawings),
    )


def composite(rgba: Tensor, style: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put drawings on random backgrounds.

    Args:
        rgba: uint8 [n, 4, 64, 64].
        style: LongTensor [n]; ink drawings turn white on dark backgrounds, as they would on paper.
        generator: draws the background and its shade.

    Returns:
        images, float32 [n, 3, 64, 64] in 0..1, and the background's index [n] into `BACKGROUND_NAMES`.
    """
    n = len(rgba)
    share = torch.ones(len(BACKGROUND_NAMES))
    share[0] = 3.0  # white is what most drawings are seen on
    which = torch.multinomial(share, n, replacement=True, generator=generator)
    colours = torch.tensor([BACKGROUNDS[name] for name in BACKGROUND_NAMES]) / 255
    base = colours[which] + 0.05 * (torch.rand(n, 3, generator=generator) - 0.5)
    base = base.clamp(0, 1)[:, :, None, None]
    colour, alpha = rgba[:, :3].float() / 255, rgba[:, 3:].float() / 255
    dark = base.mean((1, 2, 3)) < 0.35
    ink = (style == STYLE_NAMES.index("ink")) & dark
    colour = torch.where(ink[:, None, None, None], 1 - colour, colour)
    return alpha * colour + (1 - alpha) * base, which


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(
    animal: int, style: int, view: int, background: int, rng: np.random.Generator, plain: float = 0.4
) -> str:
    """Caption a picture, from plain ("a cat", with probability `plain`) to fully attributed."""
    noun = ANIMALS[animal]
    if rng.random() < plain:
        return str(rng.choice([article(noun), article(noun), article(noun), noun, f"a drawing of {article(noun)}",
                               f"a picture of {article(noun)}"]))  # fmt: skip
    say_view, say_style, say_background = rng.random(3) < 0.5
    name = STYLE_NAMES[style]
    as_adjective = say_style and rng.random() < 0.5
    if say_view:
        noun = f"{noun} face" if VIEWS[view] == "face" else f"whole {noun}"
    text = article(f"{name} {noun}" if as_adjective else noun)
    if say_style and not as_adjective:
        text += f" in the {name} style"
    if say_background:
        text += f" on {article(BACKGROUND_NAMES[background])} background"
    return text
