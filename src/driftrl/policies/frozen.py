"""Frozen convolutions and normalisations of a UNet, forward and backward by hand: the same numbers with less work.

Only what is trained needs a gradient: so a frozen convolution keeps no input, activations are computed in place, a skip
connection that nothing trained has touched gets no gradient, and that of a convolution's weight is never asked for.
Everything is float32 on a CPU, in channels-last memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from driftrl.policies.fast_linear import product
from driftrl.policies.winograd import Plain, Winograd


@dataclass(frozen=True)
class Norm:
    """A frozen group normalisation of [n, C, H, W], then SiLU."""

    layer: nn.GroupNorm

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `backward` wants if it is to be kept."""
        (n, channels, height, width), layer = x.shape, self.layer
        normal, mean, rstd = torch.native_group_norm(
            x, layer.weight, layer.bias, n, channels, height * width, layer.num_groups, layer.eps
        )
        if not keep:
            return F.silu(normal, inplace=True), ()
        return F.silu(normal), (x, mean, rstd, normal)

    def backward(self, gradient: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The gradient of x [n, C, H, W]; given that of the first groups only, that of theirs."""
        x, mean, rstd, normal = kept
        (n, channels, height, width), weight = gradient.shape, self.layer.weight
        groups = channels * self.layer.num_groups // x.shape[1]
        if channels < x.shape[1]:  # the kernel reads dense rows only
            x, normal = (dense(part[:, :channels]) for part in (x, normal))
            mean, rstd = mean[:, :groups].contiguous(), rstd[:, :groups].contiguous()
        # The kernel takes the gradient for laid out as x is.
        gradient = dense(torch.ops.aten.silu_backward(gradient, normal))
        own: Tensor = torch.ops.aten.native_group_norm_backward(
            gradient,
            x,
            mean,
            rstd,
            weight[:channels],
            n,
            channels,
            height * width,
            groups,
            [True, False, False],
        )[0]
        return own


def dense(x: Tensor) -> Tensor:
    """[n, C, H, W] in channels-last memory without gaps."""
    return x.contiguous(memory_format=torch.channels_last)


class NormConvolution(torch.autograd.Function):
    """`Norm`, then a convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, layer: Winograd | Plain) -> Tensor:
        """For x [n, C, H, W]."""
        active, kept = norm.forward(x, ctx.needs_input_grad[0])
        ctx.norm, ctx.layer = norm, layer
        ctx.save_for_backward(*kept)
        return layer(active)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        kept = ctx.saved_tensors
        return ctx.norm.backward(ctx.layer.back(gradients[0], kept[0].shape[1]), kept), None, None


class Convolution(torch.autograd.Function):
    """A frozen convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Plain) -> Tensor:
        """For x [n, C, H, W], H and W multiples of the stride."""
        ctx.layer, ctx.channels = layer, x.shape[1]
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        return ctx.layer.back(gradients[0], ctx.channels), None


def doubling_weight(weight: Tensor) -> Tensor:
    """The kernel [C, O, 4, 4] of the transposed convolution (stride 2, padding 1) that equals "each pixel four times,
    then the 3 x 3 convolution ``weight`` [O, C, 3, 3]": of the nine products with each copy, those of one pixel are summed.
    """
    sums = torch.tensor(
        [[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=torch.float64, device=weight.device
    )
    kernel = torch.einsum("ai,bj,ocij->coab", sums, sums, weight.detach().double().flip(2, 3))
    return kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last)


class Doubling(torch.autograd.Function):
    """Nearest-neighbour upsampling by two and a 3 x 3 convolution in 4/9 of the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """For x [n, C, H, W] and a kernel by `doubling_weight`: [n, O, 2 H, 2 W]."""
        ctx.save_for_backward(kernel)
        return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (kernel,) = ctx.saved_tensors
        return F.conv2d(gradients[0], kernel, stride=2, padding=1), None, None


def joined(x: Tensor, skip: Tensor) -> Tensor:
    """x [b n, C, H, W] beside the skip connection [n, S, H, W], which its b branches share: [b n, C + S, H, W]."""
    n, channels, height, width = x.shape
    out = torch.empty((n, height, width, channels + skip.shape[1]), dtype=x.dtype).permute(0, 3, 1, 2)
    out[:, :channels].copy_(x)
    for rows in out[:, channels:].split(len(skip)):
        rows.copy_(skip)
    return out


@dataclass(frozen=True)
class ResidualLayers:
    """The frozen layers of a diffusers `ResnetBlock2D`."""

    first: Norm
    first_conv: Winograd | Plain
    second: Norm
    second_conv: Winograd | Plain
    shortcut: Plain | None


class Residual(torch.autograd.Function):
    """A residual block, with what comes over a skip connection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, time: Tensor, layers: ResidualLayers) -> Tensor:
        """For x [b n, C, H, W], a skip connection [n or b n, S, H, W] and time [b n, O], the projected embedding."""
        keep = any(ctx.needs_input_grad)
        whole = x if skip is None else joined(x, skip)
        active, first = layers.first.forward(whole, keep)
        hidden = layers.first_conv(active)
        hidden += time[:, :, None, None]
        active, second = layers.second.forward(hidden, keep)
        out = layers.second_conv(active)
        out += whole if layers.shortcut is None else layers.shortcut(whole)
        ctx.layers, ctx.kept = layers, len(first)
        ctx.channels, ctx.branches = x.shape[1], 1 if skip is None else len(x) // len(skip)
        ctx.save_for_backward(*first, *second)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Gradients of x and of the skip connection, where it has one."""
        layers: ResidualLayers = ctx.layers
        first, second = ctx.saved_tensors[: ctx.kept], ctx.saved_tensors[ctx.kept :]
        (gradient,) = gradients
        wanted = every = first[0].shape[1]
        if not ctx.needs_input_grad[1]:  # then no channel of the groups that hold none of x
            size = every // layers.first.layer.num_groups
            wanted = -(-ctx.channels // size) * size
        hidden = layers.second_conv.back(gradient, second[0].shape[1])
        hidden = layers.second.backward(hidden, second)
        own = layers.first.backward(layers.first_conv.back(hidden, wanted), first)
        own += gradient if layers.shortcut is None else layers.shortcut.back(gradient, wanted)
        if wanted == ctx.channels:
            return own, None, None, None
        own, skip = own[:, : ctx.channels], own[:, ctx.channels :]
        if not ctx.needs_input_grad[1]:
            return dense(own), None, None, None
        return dense(own), skip.unflatten(0, (ctx.branches, -1)).sum(0), None, None


class Gated(torch.autograd.Function):
    """GEGLU: of 2 F features by a frozen linear layer, the first F times the GELU of the others.

    They are computed apart, so that each lies densely in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """For x [..., C] and weight [2 F, C]: [..., F]."""
        (first, second), (bias_1, bias_2) = weight.chunk(2), bias.chunk(2)
        value, gate = product(x, first, bias_1), product(x, second, bias_2)
        active = F.gelu(gate)
        if not ctx.needs_input_grad[0]:
            return active.mul_(value)
        ctx.save_for_backward(weight, value, gate, active)
        return active * value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        weight, value, gate, active = ctx.saved_tensors
        first, second = (part.t().contiguous() for part in weight.chunk(2))
        own = product(gradients[0] * active, first)
        own += product(torch.ops.aten.gelu_backward(gradients[0] * value, gate), second)
        return own, None, None
