"""3 x 3 convolutions with a quarter of the products: Winograd's F(4 x 4, 3 x 3) (Lavin & Gray 2016, arXiv 1509.09308).

Four neighbouring outputs of a filter of three take six products instead of twelve, of sums of the inputs with sums of
the filter; along height and width, 36 instead of 144. The sums along a row or a column are a product with a small matrix,
[6 W / 4, W], so all is done by batched matrix products, without changing the memory layout. Rounding errors are about
five times those of the plain convolution, 3e-6 of its values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

POINTS = (0.0, 1.0, -1.0, 0.5, -0.5)
"""Where the polynomials are evaluated, and at infinity."""
TILE, TAPS = 4, 3
PARTS = TILE + TAPS - 1
WIDE, LARGEST = 96, 8
"""Channels from which, and pixels of an image's side up to which, it was measured to be faster: it saves products and costs
passes over the images, of which there are fewer the more channels share them; beyond 8 x 8 it was not."""


def _polynomial(roots: list[float]) -> list[float]:
    """Coefficients of prod (x - r), constant first."""
    out = [1.0]
    for root in roots:
        out = [a - root * b for a, b in zip([0.0, *out], [*out, 0.0], strict=True)]
    return out


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Float64 matrices of inputs [6, 6], filter [6, 3] and outputs [4, 6] with y = out ((filter w) * (inputs x)), for
    which y_i = sum_k w_k x_{i + k}.
    """
    inputs, taps, out = (
        torch.zeros(s, dtype=torch.float64) for s in ((PARTS, PARTS), (PARTS, TAPS), (TILE, PARTS))
    )
    for i, point in enumerate(POINTS):
        others = [p for p in POINTS if p != point]
        scale = 1.0
        for other in others:
            scale *= point - other
        inputs[i, : PARTS - 1] = torch.tensor(_polynomial(others), dtype=torch.float64)
        taps[i] = torch.tensor([point**k / scale for k in range(TAPS)], dtype=torch.float64)
        out[:, i] = torch.tensor([point**k for k in range(TILE)], dtype=torch.float64)
    inputs[-1] = torch.tensor(_polynomial(list(POINTS)), dtype=torch.float64)
    taps[-1, -1] = out[-1, -1] = 1
    return inputs, taps, out


@dataclass(frozen=True)
class Line:
    """The matrices for a row or column of pixels between two zeros."""

    inputs: Tensor
    """[6 size / 4, size]."""
    out: Tensor
    """[size, 6 size / 4]."""

    @classmethod
    def of(cls, size: int, like: Tensor) -> Line:
        """For a number of pixels that four divides."""
        into, _, back = matrices()
        tiles = size // TILE
        inputs = torch.zeros(tiles * PARTS, size + 2, dtype=torch.float64)
        for tile in range(tiles):
            inputs[tile * PARTS : (tile + 1) * PARTS, tile * TILE : tile * TILE + PARTS] = into
        out = torch.block_diag(*[back] * tiles)
        return cls(inputs[:, 1:-1].to(like).contiguous(), out.to(like).contiguous())

    def turned(self) -> Line:
        """For gradients, which go the other way."""
        return Line(self.out.t().contiguous(), self.inputs.t().contiguous())


def _along_both(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """x [n, H, W, C] with ``columns`` [H', H] and ``rows`` [W', W] applied: [n, H', W', C]."""
    n, height, width, channels = x.shape
    x = torch.bmm(rows.expand(n * height, -1, -1), x.reshape(n * height, width, channels))
    x = torch.bmm(columns.expand(n, -1, -1), x.view(n, height, -1))
    return x.view(n, columns.shape[0], rows.shape[0], channels)


class Winograd:
    """What a frozen 3 x 3 convolution of stride and padding 1 computes, and the gradient of its input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        """Transform the weight, which takes four times its memory for each tile of an image."""
        self.layer = layer
        self._weights: dict[tuple[int, int], Tensor] = {}
        self._lines: dict[int, tuple[Line, Line]] = {}

    def _line(self, size: int, way: int) -> Line:
        if size not in self._lines:
            line = Line.of(size, self.layer.weight.detach())
            self._lines[size] = line, line.turned()
        return self._lines[size][way]

    def _weight(self, tiles: tuple[int, int]) -> Tensor:
        """[6 H / 4 * 6 W / 4, C, O]: each part of each tile has its own."""
        if tiles not in self._weights:
            taps, weight = matrices()[1], self.layer.weight.detach()
            parts = torch.einsum("ih,jw,ochw->ijco", taps, taps, weight.double()).to(weight.dtype)
            every = parts.expand(*tiles, *parts.shape).permute(0, 2, 1, 3, 4, 5)
            self._weights[tiles] = every.flatten(0, 3).contiguous()
        return self._weights[tiles]

    def __call__(self, x: Tensor) -> Tensor:
        """[n, O, H, W] from x [n, C, H, W] in channels-last memory; autograd does not see it."""
        if not pays(x):
            return F.conv2d(x, self.layer.weight, self.layer.bias, padding=1)
        return self._products(x, 0, None, self.layer.bias)

    def back(self, gradient: Tensor, channels: int) -> Tensor:
        """The gradient of the first so many channels of x, from that of the output [n, O, H, W]."""
        if not pays(gradient):
            return convolved_back(gradient, self.layer, channels)
        return self._products(gradient, 1, channels, None)

    def _products(self, x: Tensor, way: int, channels: int | None, bias: Tensor | None) -> Tensor:
        (n, _, height, width), rows, columns = (
            x.shape,
            self._line(x.shape[3], way),
            self._line(x.shape[2], way),
        )
        parts = _along_both(rows.inputs, columns.inputs, x.permute(0, 2, 3, 1)).flatten(1, 2)
        weight = self._weight((height // TILE, width // TILE))
        if channels is not None:
            weight = weight[:, :channels].transpose(1, 2)
        # [6 H / 4 * 6 W / 4, n, O], then [H, 6 W / 4, n O], then [H, W, n, O].
        mixed = torch.bmm(parts.transpose(0, 1), weight)
        wide, size = rows.out.shape[1], mixed.shape[-1]
        mixed = torch.mm(columns.out, mixed.view(columns.out.shape[1], -1)).view(height, wide, n * size)
        mixed = torch.bmm(rows.out.expand(height, -1, -1), mixed).view(height, width, n, size)
        out = torch.empty(n, height, width, size, dtype=x.dtype)
        if bias is None:
            out.copy_(mixed.permute(2, 0, 1, 3))
        else:
            torch.add(mixed.permute(2, 0, 1, 3), bias, out=out)
        return out.permute(0, 3, 1, 2)


def pays(x: Tensor) -> bool:
    """Whether images [n, C, H, W] are of a size for which this is the faster way."""
    return all(size % TILE == 0 and size <= LARGEST for size in x.shape[2:])


class Plain:
    """The same by oneDNN's own convolution, of any size and stride."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """[n, O, H', W'] from x [n, C, H, W]."""
        layer = self.layer
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    def back(self, gradient: Tensor, channels: int) -> Tensor:
        """The gradient of the first so many channels of x, from that of the output."""
        return convolved_back(gradient, self.layer, channels)


def convolution(layer: nn.Conv2d, transform: bool) -> Winograd | Plain:
    """How to compute a frozen layer; ``transform`` says whether memory for transformed weights may be taken."""
    usable = layer.kernel_size == (TAPS, TAPS) and layer.stride == (1, 1) and layer.padding == (1, 1)
    wide = min(layer.in_channels, layer.out_channels) >= WIDE
    return Winograd(layer) if transform and usable and wide else Plain(layer)


def convolved_back(gradient: Tensor, layer: nn.Conv2d, channels: int) -> Tensor:
    """The gradient of the first ``channels`` channels of a convolution's input, by oneDNN.

    The input's height and width are the output's times the stride.
    """
    n, _, height, width = gradient.shape
    down, right = layer.stride
    shape = torch.Size((n, channels, height * down, width * right))
    weight = layer.weight.detach()
    if channels < weight.shape[1]:
        weight = weight[:, :channels].contiguous(memory_format=torch.channels_last)
    return conv2d_input(shape, weight, gradient, layer.stride, layer.padding)
