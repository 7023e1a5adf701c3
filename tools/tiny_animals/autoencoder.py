"""Train the autoencoder: 3 x 64 x 64 pixels to 4 x 16 x 16 latents."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tiny_animals.bank import Bank, composite
from tiny_animals.training import Training, join_processes, rank

TRAIN_POSES, TEST_POSES = slice(0, 28), slice(28, 32)


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _terms(
    model: AutoencoderKL, images: Tensor, generator: torch.Generator, decoder_only: bool
) -> dict[str, Tensor]:
    x = images * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(not decoder_only):
            posterior = model.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
        z = mean + std * torch.randn(mean.shape, generator=generator)
        y = model.decode(z).sample.float()
    error = y - x
    square, absolute = error.pow(2).mean(), error.abs().mean()
    kl = 0.5 * (mean.pow(2) + std.pow(2) - 1 - 2 * std.log()).mean()
    # |error| keeps lines crisp, its square is what PSNR counts; the pull to N(0, 1) keeps latents smooth.
    loss = square + 0.1 * absolute + (0.0 if decoder_only else 3e-4) * kl
    return {"loss": loss, "psnr": -10 * torch.log10(square.detach() / 4), "kl": kl.detach()}


def train(bank: Bank, folder: Path, images: int, decoder_from: Path | None = None) -> AutoencoderKL:
    """Train the whole autoencoder, or with `decoder_from` only the decoder of the one in that folder."""
    join_processes()
    model = new_autoencoder() if decoder_from is None else AutoencoderKL.from_pretrained(decoder_from)
    if decoder_from is not None:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    training = Training(
        model, folder / "training", images, batch=16, lr=1e-3 if decoder_from is None else 6e-4
    )

    def loss(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        rgba, which = bank.draw(n, generator, TRAIN_POSES)
        pictures, _ = composite(rgba, bank.style[which], generator)
        return _terms(model, pictures, generator, decoder_from is not None)

    ema = training.run(loss)
    if rank() == 0:
        generator = torch.Generator().manual_seed(0)
        if decoder_from is None:
            rgba, which = bank.draw(512, generator, TRAIN_POSES)
            with torch.no_grad():
                z = ema.encode(composite(rgba, bank.style[which], generator)[0] * 2 - 1).latent_dist.mean
            ema.register_to_config(scaling_factor=1.0 / float(z.std()))
        ema.save_pretrained(folder)
        print(f"PSNR on held-out poses {psnr(ema, bank):.2f} dB, scaling {ema.config.scaling_factor:.3f}")
    return ema


@torch.no_grad()
def psnr(model: AutoencoderKL, bank: Bank, n: int = 1024) -> float:
    """Mean PSNR in dB over `n` pictures in poses that training did not see."""
    generator, values = torch.Generator().manual_seed(1), []
    for _ in range(n // 64):
        rgba, which = bank.draw(64, generator, TEST_POSES)
        x, _ = composite(rgba, bank.style[which], generator)
        y = model.decode(model.encode(x * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        error = (y.clamp(0, 1) - x).pow(2).mean((1, 2, 3))
        values += [-10 * math.log10(e) for e in error.tolist()]
    return sum(values) / len(values)
