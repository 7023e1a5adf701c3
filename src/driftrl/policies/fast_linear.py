"""Linear layers on a CPU by oneDNN, and a LoRA's matrices multiplied into the weight: the same numbers, sooner.

PyTorch computes float32 products by its BLAS, which on some CPUs reaches half of what oneDNN, which computes its
convolutions, does there. And a LoRA layer y = W x + s B (A x) costs three products and two passes over the
activations; with (W + s B A) x, whose sum is small next to the activations, it costs one. Its gradients need no product
as large as the weight: with u = B^T g, dA = s u x^T and dB = s g (A x)^T. Rollout and replay both call these layers, so
the ratio of an untouched policy stays 1. Rounding differs from PEFT's by about 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, for x [..., in] and weight [out, in], float32 on a CPU; autograd does not see it."""
    if x.numel() == 0:  # oneDNN refuses it
        return nn.functional.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class Frozen(torch.autograd.Function):
    """`product` with a weight and a bias that are not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """For x [..., in] and weight [out, in]."""
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (weight,) = ctx.saved_tensors
        return product(gradients[0], weight.t().contiguous()), None, None


@dataclass(frozen=True)
class Sink:
    """Where the gradients of a LoRA's matrices A [r, in] and B [out, r] go when each of n samples has its own."""

    low: Tensor
    """[n, r, in]."""
    high: Tensor
    """[n, out, r]."""

    def add(self, gradient: Tensor, x: Tensor, low: Tensor, high: Tensor, scale: float) -> None:
        """From gradient [b n, S, out] and x [b n, S, in], branch of guidance after branch."""
        add_outer(self.low, (gradient @ _few_rows(high)).mul_(scale), x)
        add_outer(self.high, gradient, (x @ low.t()).mul_(scale))


def add_outer(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right of each sample, of left [b n, S, p] and right [b n, S, q], to ``into`` [n, p, q]."""
    into += torch.bmm(left.transpose(1, 2), right).unflatten(0, (-1, len(into))).sum(0)


class _LoRA(torch.autograd.Function):
    """x (W + s B A)^T + b, where A [r, in] and B [out, r] are trained and nothing else is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, high: Tensor, scale: float,
        rows: int, sink: Sink | None,
    ) -> Tensor:  # fmt: skip
        """For x [..., in] of so many rows, weight [out, in], low [r, in] and high [out, r]."""
        merged = torch.addmm(weight, high, low, alpha=scale)
        ctx.save_for_backward(x, merged, low, high)
        ctx.scale, ctx.rows, ctx.sink = scale, rows, sink
        return product(x, merged, bias)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None, None, None]:
        """Gradients of x, A and B, where they are asked for; with a sink those of A and B go there."""
        x, merged, low, high = ctx.saved_tensors
        gradient = gradients[0]
        own = of_low = of_high = None
        if ctx.needs_input_grad[0]:
            own = product(gradient, merged.t().contiguous())
        if ctx.sink is not None:
            by_row = (part.reshape(ctx.rows, -1, part.shape[-1]) for part in (gradient, x))
            ctx.sink.add(*by_row, low, high, ctx.scale)
        elif ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            rows, columns = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            of_low, of_high = _lora_gradients(rows, columns, low, high, ctx.scale)
        return own, None, None, of_low, of_high, None, None, None


def _lora_gradients(
    rows: Tensor, columns: Tensor, low: Tensor, high: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Those of A and B for g [n, out] and x [n, in], by whichever way has fewer products."""
    (rank, size), out = low.shape, len(high)
    if 2 * rank * (size + out) < size * out:
        over_high, over_low = rows @ _few_rows(high), columns @ low.t()
        return scale * (over_high.t() @ columns), scale * (over_low.t() @ rows).t()
    full = rows.t() @ columns
    return scale * (high.t() @ full), scale * (full @ low.t())


def _few_rows(narrow: Tensor) -> Tensor:
    """The same matrix [m, r], as a few long rows in memory: MKL takes a quarter of the time so."""
    return narrow.t().contiguous().t()


def available(network: nn.Module) -> bool:
    """Whether ``network`` computes in float32 on a CPU whose PyTorch has oneDNN."""
    first = next(network.parameters())
    return (
        first.device.type == "cpu"
        and first.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def install(network: nn.Module) -> None:
    """Let the frozen linear layers and LoRA layers of ``network`` compute so, where that is possible.

    Layers that do anything else (trained themselves, a bias that is trained, DoRA, dropout, several adapters) stay as
    they are.
    """
    from peft.tuners.lora import Linear as LoRALinear

    if not available(network):
        return
    inner = set()
    for module in network.modules():
        if isinstance(module, LoRALinear):
            inner |= {id(part) for part in module.modules() if part is not module}
            if plain(module):
                module.forward = _LoRAForward(module)  # type: ignore[method-assign]
    for module in network.modules():
        if type(module) is nn.Linear and id(module) not in inner and not trained(module):
            module.forward = _LinearForward(module)  # type: ignore[method-assign,assignment]


def trained(module: nn.Module) -> bool:
    """Whether anything in ``module`` is."""
    return any(parameter.requires_grad for parameter in module.parameters())


def fast(module: nn.Module) -> bool:
    """Whether `install` has changed this layer."""
    return isinstance(module.__dict__.get("forward"), (_LinearForward, _LoRAForward))


def plain(module: Any) -> bool:
    """Whether a LoRA layer of PEFT is one matrix product after the other, and nothing else in it is trained."""
    names = list(module.lora_A)
    return (
        len(names) == 1
        and type(module.base_layer) is nn.Linear
        and not trained(module.base_layer)
        and not module.lora_bias[names[0]]
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and not getattr(module, "lora_variant", {})
    )


class _LinearForward:
    """What a frozen linear layer computes."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        result: Tensor = Frozen.apply(x, self.layer.weight, self.layer.bias)
        return result


class _LoRAForward:
    """What a LoRA layer computes: with its adapter, or without where that is switched off. With the adapter fused into the
    weight, or others beside it, as PEFT does.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.names = layer, list(layer.lora_A)
        self.name = self.names[0]
        self.sink: Sink | None = None

    def __call__(self, x: Tensor, *_: Any, rows: int | None = None, **__: Any) -> Tensor:
        """For x [rows, ..., in], or, if it is told how many rows they are, x [rows * S, in]."""
        layer, base = self.layer, self.layer.base_layer
        result: Tensor
        if layer.merged or list(layer.active_adapters) != self.names:
            result = type(layer).forward(layer, x)
        elif layer.disable_adapters:
            result = Frozen.apply(x, base.weight, base.bias)
        else:
            low, high = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            result = _LoRA.apply(
                x, base.weight, base.bias, low, high, layer.scaling[self.name], rows or len(x), self.sink
            )
        return result
