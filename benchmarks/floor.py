"""What Stable Diffusion 1.5 must cost on a GPU, by arithmetic: nothing is run but the counting.

    python benchmarks/floor.py [--config experiments/paper/sd15-pickscore.yaml] [--tflops 989] [--terabytes 3.35]

For one prompt group: floating-point operations of every phase over the card's dense bf16 rate, and bytes that must move
(weights once a batch, inputs and outputs of every layer once) over its memory bandwidth. Which of the two is larger
bounds the phase. Defaults are the data sheet's of an H100 SXM; no run reaches them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from driftrl.config import TrainConfig, load_config
from driftrl.pipelines import TINY_ANIMALS

HALF = 2
"""Bytes of a number."""


def count(network: nn.Module, call: Callable[[], Any]) -> tuple[float, float]:
    """Operations of ``call``, and bytes that its layers read and write beside their weights."""
    moved = 0.0

    def seen(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal moved
        moved += HALF * sum(t.numel() for t in (*inputs, output) if isinstance(t, Tensor))

    handles = [m.register_forward_hook(seen) for m in network.modules() if not list(m.children())]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return float(counter.get_total_flops()), moved


def parts_of(config: TrainConfig) -> tuple[nn.Module, nn.Module]:
    """UNet and autoencoder on the meta device: those of Stable Diffusion 1.5, or of the folder that the model is in."""
    folder = TINY_ANIMALS / "pipeline" if config.model.path == "tiny-animals" else Path(config.model.path)
    with torch.device("meta"):
        if folder.is_dir():
            unet, vae = (
                kind.from_config(kind.load_config(folder, subfolder=name))
                for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
            )
        else:
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
    return unet, vae


def rows_of(unet: Any, vae: Any, words: int = 77) -> tuple[tuple[float, float], tuple[float, float]]:
    """Operations and bytes of a row of the UNet, and of a picture's decoding."""
    side = unet.config.sample_size
    with torch.device("meta"):
        x, t = torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.int64)
        text = torch.empty(1, words, unet.config.cross_attention_dim)
        return count(unet, lambda: unet(x, t, text)), count(vae.decoder, lambda: vae.decoder(x))


def phases_of(
    config: TrainConfig, unet: nn.Module, vae: nn.Module, batch: int
) -> tuple[list[tuple[str, float, float]], int]:
    """(phase, operations, bytes moved) of one prompt, and the rows trained on."""
    row, picture = rows_of(unet, vae)
    weights = HALF * sum(p.numel() for p in unet.parameters())
    decoder = HALF * sum(p.numel() for p in vae.decoder.parameters())
    sampling = config.sampling
    branches = 1 if sampling.guidance_scale == 1 else 2
    sampled = sampling.candidates * sampling.steps * branches
    pairs = (
        config.selection.keep * max(1, round(config.objective.timesteps * (sampling.steps - 1))) * branches
    )
    # A backward pass through frozen layers is one product a layer, as the forward pass is; LoRA's own are left out.
    return [
        ("rollout", sampled * row[0], sampled * row[1] + sampled / batch * weights),
        ("decode", sampling.candidates * picture[0], sampling.candidates * picture[1] + decoder),
        ("update", 2 * pairs * row[0], 3 * pairs * row[1] + 2 * pairs / batch * weights),
    ], pairs


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("experiments/paper/sd15-pickscore.yaml"))
    parser.add_argument("--batch", type=int, default=32, help="rows of a forward pass")
    parser.add_argument("--tflops", type=float, default=989.0)
    parser.add_argument("--terabytes", type=float, default=3.35, help="a second")
    args = parser.parse_args()
    config = load_config(args.config)
    unet, vae = parts_of(config)
    row, picture = rows_of(unet, vae)
    phases, pairs = phases_of(config, unet, vae, args.batch)
    weights, sampling = HALF * sum(p.numel() for p in unet.parameters()), config.sampling
    branches = 1 if sampling.guidance_scale == 1 else 2
    print(f"UNet, one row of 64 x 64 latents: {row[0] / 1e9:.0f} GFLOP, {row[1] / 2**20:.0f} MiB moved beside {weights / 2**20:.0f} MiB "
          f"of weights; decoder: {picture[0] / 1e9:.0f} GFLOP a picture")  # fmt: skip
    print(
        f"one prompt: {sampling.candidates} candidates, {sampling.steps} steps, {branches} branch(es), {pairs} rows trained on\n"
    )
    print(f"{'':10}{'PFLOP':>8}{'TB':>8}{'by arithmetic, s':>18}{'by memory, s':>14}")
    total = [0.0, 0.0]
    for name, operations, moved in phases:
        seconds = (operations / args.tflops / 1e12, moved / args.terabytes / 1e12)
        total = [a + b for a, b in zip(total, seconds, strict=True)]
        print(f"{name:10}{operations / 1e15:8.2f}{moved / 1e12:8.2f}{seconds[0]:18.2f}{seconds[1]:14.2f}")
    print(f"{'total':10}{'':16}{total[0]:18.2f}{total[1]:14.2f}")


if __name__ == "__main__":
    main()
