"""What each way of computing a layer of the embedded UNet takes on this CPU: those in use beside those that are not.

    OMP_NUM_THREADS=1 python benchmarks/layers.py    # milliseconds of CPU time, all threads together

CPU time, so that other programs disturb it little; on one thread it is what the layer takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from driftrl.build import build_policy
from driftrl.config import TrainConfig
from driftrl.policies import fast_linear, frozen, winograd

DENSE = torch.channels_last
REST = torch.zeros(2**24)


def milliseconds(function: Callable[[], object], times: int = 7) -> float:
    """Median CPU time, with other things in the caches each time."""
    spent = []
    for _ in range(times + 1):
        REST.add_(1)
        start = time.process_time()
        function()
        spent.append(1e3 * (time.process_time() - start))
    return statistics.median(spent[1:])


def line(name: str, **ways: Callable[[], object]) -> None:
    """One line of the table."""
    print(
        f"{name:34}"
        + "".join(f"{way.replace('_', ' '):>22}{milliseconds(f):8.2f}" for way, f in ways.items())
    )


def packed(layer: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """A convolution whose weight lies in memory as oneDNN wants it."""
    ones = [1, 1]
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        layer.weight.detach().to_mkldnn(), ones, ones, ones, 1, list(x.shape)
    )
    return lambda: torch.ops.mkldnn._convolution_pointwise(
        x, weight, layer.bias, ones, ones, ones, 1, "none", [], ""
    )


def convolution(rows: int, inputs: int, outputs: int, side: int) -> None:
    """A 3 x 3 convolution, forward and backward."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1).to(memory_format=DENSE).requires_grad_(False)
    x = torch.randn(rows, inputs, side, side).to(memory_format=DENSE)
    gradient = layer(x)
    fast, winograd.LARGEST = winograd.Winograd(layer), side  # also where it is not in use
    name = f"convolution {inputs} to {outputs}, {side} x {side}"
    line(name, plain=lambda: layer(x), packed=packed(layer, x), Winograd=lambda: fast(x))
    line(
        "  backward",
        plain=lambda: conv2d_input(x.shape, layer.weight, gradient, padding=1),
        Winograd=lambda: fast.back(gradient, inputs),
    )


def upsampling(rows: int, channels: int, side: int) -> None:
    """Doubling an image, and a convolution."""
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=DENSE).requires_grad_(False)
    x = torch.randn(rows, channels, side, side).to(memory_format=DENSE)
    kernel = frozen.doubling_weight(layer.weight)
    line(
        f"upsampling {channels}, to {2 * side} x {2 * side}",
        plain=lambda: layer(F.interpolate(x, scale_factor=2.0, mode="nearest")),
        transposed=lambda: frozen.Doubling.apply(x, kernel, layer.bias),
    )


def products(tokens: int, width: int) -> None:
    """The gated layer and a LoRA's gradients."""
    linear = torch.ops.mkldnn._linear_pointwise
    x, weight, bias = torch.randn(tokens, width), torch.randn(8 * width, width), torch.randn(8 * width)
    (first, second), (one, other) = weight.chunk(2), bias.chunk(2)

    def fused() -> Tensor:
        active = linear(x, second, other, "gelu", [], "none")
        result: Tensor = linear.binary(x, active, first, one, "mul")
        return result

    line(
        f"gated layer, {tokens} x {width}",
        in_use=lambda: frozen.Gated.apply(x, weight, bias),
        fused_by_oneDNN=fused,
    )
    gradient, low, high = torch.randn(tokens, width), torch.randn(4, width), torch.randn(width, 4)

    def by_the_weight() -> tuple[Tensor, Tensor]:
        full = gradient.t() @ x
        return high.t() @ full, full @ low.t()

    line(
        "  LoRA's gradients",
        by_the_weight=by_the_weight,
        directly=lambda: ((gradient @ high).t() @ x, gradient.t() @ (x @ low.t())),
        in_use=lambda: fast_linear._lora_gradients(gradient, x, low, high, 1.0),
    )


def passes(rows: int) -> None:
    """The whole network with guidance: by diffusers with our linear layers, and in its fast form."""
    policy = build_policy(TrainConfig())
    fast, latents = policy.fast, torch.randn(rows // 2, *policy.latent_shape)
    assert fast is not None
    times = torch.full((rows // 2,), 500)
    encoded = policy.encode(["a cat"] * (rows // 2))
    embeds = torch.cat([encoded.null_embeds.expand_as(encoded.embeds), encoded.embeds])

    def plain() -> Tensor:
        output: Tensor = policy.network(
            latents.repeat(2, 1, 1, 1), times.repeat(2), embeds, return_dict=False
        )[0]
        return output

    with torch.no_grad():
        line(f"forward, {rows} rows", plain=plain, fast=lambda: fast(latents, times, embeds))
    line("forward and backward", plain=lambda: plain().square().mean().backward(),
         fast=lambda: fast(latents, times, embeds).square().mean().backward())  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=64, help="of the network: twice the images, with guidance"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    passes(args.rows)
    with torch.no_grad():
        for inputs, outputs, side in (
            (192, 192, 4), (384, 192, 4), (128, 128, 8), (320, 128, 8), (128, 64, 16)
        ):  # fmt: skip
            convolution(args.rows, inputs, outputs, side)
        for channels, side in ((192, 4), (128, 8)):
            upsampling(args.rows, channels, side)
        for tokens, width in ((64, 128), (16, 192)):
            products(tokens * args.rows, width)


if __name__ == "__main__":
    main()
