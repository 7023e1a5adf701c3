"""What the scorer, the encoder and the checker see: drawings disturbed in many ways, and pictures of nothing."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_animals.autoencoder import TRAIN_POSES
from tiny_animals.bank import SIZE, Bank, composite

POOL, POOL_JUNK = 4096, 768


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """`n` numbers between `low` and `high`, shaped [n, 1, 1, 1]."""
    return (low + (high - low) * torch.rand(n, generator=generator))[:, None, None, None]


def some(n: int, share: float, generator: torch.Generator) -> Tensor:
    """A mask, [n, 1, 1, 1], true with probability `share`."""
    return uniform(n, 0, 1, generator) < share


def move(images: Tensor, generator: torch.Generator, strength: float = 1.0, border: bool = False) -> Tensor:
    """Flip, turn, stretch and shift float pictures [n, c, 64, 64]; outside is transparent, or the border's colour."""
    n = len(images)
    angle = uniform(n, -0.35, 0.35, generator).flatten() * strength
    scale = torch.exp(uniform(n, -0.28, 0.16, generator).flatten() * strength)
    stretch = torch.exp(uniform(n, -0.12, 0.12, generator).flatten() * strength)
    shear = uniform(n, -0.12, 0.12, generator).flatten() * strength
    flip = 1.0 - 2.0 * some(n, 0.5, generator).flatten().float()
    shift = uniform(2 * n, -0.16, 0.16, generator).view(2, n) * strength
    cos, sin = angle.cos(), angle.sin()
    x = torch.stack([flip * cos / (scale * stretch), sin / scale + shear, shift[0]], 1)
    y = torch.stack([-flip * sin / (scale * stretch), cos / scale, shift[1]], 1)
    grid = F.affine_grid(torch.stack([x, y], 1), [n, images.shape[1], SIZE, SIZE], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border" if border else "zeros", align_corners=False)


def tint(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Change brightness, contrast, saturation and, a little, the balance of colours of [n, 3, 64, 64] in 0..1."""
    n = len(images)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * torch.exp(uniform(n, -0.5, 0.4, generator) * strength)
    balance = (0.16 * torch.rand(n, 3, generator=generator) - 0.08)[:, :, None, None] * strength
    contrast = torch.exp(uniform(n, -0.3, 0.2, generator) * strength)
    return ((images - 0.5) * contrast + 0.5 + balance + uniform(n, -0.08, 0.08, generator) * strength).clamp(
        0, 1
    )


def _blur(images: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (kernel[:, None] * kernel).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def disturb(images: Tensor, generator: torch.Generator, cut: float = 0.3) -> Tensor:
    """Blur some pictures, add noise to some, and cover a rectangle of some (share `cut`)."""
    n = len(images)
    images = torch.where(some(n, 0.25, generator), _blur(images), images)
    noise = torch.randn(images.shape, generator=generator) * uniform(n, 0, 0.08, generator)
    images = images + noise * some(n, 0.4, generator)
    size, place = (
        torch.randint(8, 26, (2, n, 1), generator=generator),
        torch.rand(2, n, 1, generator=generator),
    )
    start = (place * (SIZE - size)).long()
    at = torch.arange(SIZE)
    inside = (at >= start) & (at < start + size)  # [2, n, 64]
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :] & some(n, cut, generator)
    images = torch.where(hole, torch.rand(n, 3, 1, 1, generator=generator), images)
    return images.clamp(0, 1)


def reconstructions(bank: Bank, cache: Path) -> dict[str, Tensor] | None:
    """Pictures that the autoencoder decoded from slightly noisy latents, or None before it is trained.

    A dictionary with `pixels` (uint8 [m, 3, 64, 64]), `drawing` and `background` ([m]), and `junk`: what
    decodes from the mixed latents of two animals and from latents mostly noise. Kept in `cache`.
    """
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    path = cache / "reconstructions.safetensors"
    if path.is_file():
        return load_file(path)
    if not (cache / "autoencoder" / "config.json").is_file():
        return None
    vae = AutoencoderKL.from_pretrained(cache / "autoencoder").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    pixels, drawing, background, junk = [], [], [], []

    def latents() -> tuple[Tensor, Tensor, Tensor]:
        rgba, which = bank.draw(64, generator, TRAIN_POSES)
        x, colour = composite(rgba, bank.style[which], generator)
        return vae.encode(x * 2 - 1).latent_dist.mean, which, colour

    def decode(z: Tensor) -> Tensor:
        return ((vae.decode(z).sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(POOL // 64):
            z, which, colour = latents()
            noise = torch.randn(z.shape, generator=generator) * uniform(64, 0, 0.35, generator)
            pixels.append(decode(z + z.float().std() * noise))
            drawing.append(which)
            background.append(colour)
        for _ in range(POOL_JUNK // 64):
            (z, which, _), (other, whose, _) = latents(), latents()
            mixed = torch.lerp(z.float(), other.float(), uniform(64, 0.4, 0.6, generator))
            noise = torch.randn(z.shape, generator=generator) * z.float().std()
            same = (bank.animal[which] == bank.animal[whose])[:, None, None, None]
            mostly = (0.2 * z + noise) if which[0] % 2 else noise * uniform(64, 0.5, 1.2, generator)
            junk.append(decode(torch.where(same | some(64, 0.4, generator), mostly, mixed)))
    data = {
        "pixels": torch.cat(pixels), "drawing": torch.cat(drawing),
        "background": torch.cat(background), "junk": torch.cat(junk),
    }  # fmt: skip
    save_file(data, path)
    return data


class Pictures:
    """Draws disturbed pictures of drawings, a share of them as the autoencoder renders them."""

    def __init__(self, bank: Bank, cache: Path, share: float = 0.35) -> None:
        self.bank, self.pool, self.share = bank, reconstructions(bank, cache), share
        if self.pool is not None:
            self.pool_weight = bank.weight[self.pool["drawing"]]

    def draw(
        self, n: int, generator: torch.Generator, strength: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `n` pictures: float [n, 3, 64, 64] in 0..1 not yet disturbed, their drawings and backgrounds [n]."""
        m = 0 if self.pool is None else round(self.share * n)
        rgba, which = self.bank.draw(n - m, generator, TRAIN_POSES)
        rgba = move(rgba.float() / 255, generator, strength)
        colour = torch.where(some(n - m, 0.5, generator), tint(rgba[:, :3], generator), rgba[:, :3])
        rgba = torch.cat([colour, rgba[:, 3:]], 1) * 255
        images, background = composite(rgba, self.bank.style[which], generator)
        if m:
            pick = torch.randint(len(self.pool["pixels"]), (m,), generator=generator)
            seen = move(self.pool["pixels"][pick].float() / 255, generator, 0.5 * strength, border=True)
            images = torch.cat([images, seen])
            which = torch.cat([which, self.pool["drawing"][pick]])
            background = torch.cat([background, self.pool["background"][pick]])
        return images, which, background

    def draw_twice(
        self, n: int, generator: torch.Generator, strength: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `n` pictures and the same again, half of them on another background; and their drawings [n]."""
        m = 0 if self.pool is None else round(self.share * n)
        rgba, which = self.bank.draw(n - m, generator, TRAIN_POSES)
        rgba = move(rgba.float() / 255, generator, strength) * 255
        style = self.bank.style[which]
        one, two = composite(rgba, style, generator)[0], composite(rgba, style, generator)[0]
        two = torch.where(some(n - m, 0.5, generator), two, one)
        if m:
            pick = torch.randint(len(self.pool["pixels"]), (m,), generator=generator)
            seen = move(self.pool["pixels"][pick].float() / 255, generator, 0.5 * strength, border=True)
            one, two = torch.cat([one, seen]), torch.cat([two, seen])
            which = torch.cat([which, self.pool["drawing"][pick]])
        return one, two, which

    def junk(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw `n` pictures of nothing in particular: noise, shuffled or blurred pictures, halves, empty pages."""
        images, which, _ = self.draw(n, generator)
        kinds = torch.randint(6 if self.pool is None else 8, (n,), generator=generator)
        for i, kind in enumerate(kinds.tolist()):
            images[i] = self._junk(images, which, i, kind, generator)
        return images

    def _junk(self, images: Tensor, which: Tensor, i: int, kind: int, generator: torch.Generator) -> Tensor:
        x, other = images[i], images[i - 1]
        if kind == 0:  # noise, fine to coarse
            side = int(2 ** torch.randint(1, 7, (1,), generator=generator))
            noise = torch.rand(1, 3, side, side, generator=generator)
            return F.interpolate(noise, (SIZE, SIZE), mode="bilinear")[0]
        if kind == 1:  # patches in another order
            p = int(2 ** torch.randint(3, 6, (1,), generator=generator))
            patches = F.unfold(x[None], p, stride=p)
            order = torch.randperm(patches.shape[2], generator=generator)
            return F.fold(patches[:, :, order], (SIZE, SIZE), p, stride=p)[0]
        if kind == 2:  # blurred away
            return F.interpolate(F.adaptive_avg_pool2d(x[None], 5), (SIZE, SIZE), mode="bilinear")[0]
        if kind in (3, 4) and self.bank.animal[which[i]] != self.bank.animal[which[i - 1]]:  # two halves
            halves = (x[:, :32], other[:, 32:]) if kind == 3 else (x[:, :, :32], other[:, :, 32:])
            return torch.cat(halves, kind - 2)
        if kind in (6, 7) and self.pool is not None:
            pick = int(torch.randint(len(self.pool["junk"]), (1,), generator=generator))
            return self.pool["junk"][pick].float() / 255
        return x[:, :1, :1].expand(3, SIZE, SIZE).clone()  # an empty page
