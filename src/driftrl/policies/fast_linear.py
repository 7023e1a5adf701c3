"""Linear layers on a CPU by oneDNN, and a LoRA's matrices multiplied into the weight: the same numbers, sooner.

PyTorch computes float32 products by its BLAS, which on some CPUs reaches half of what oneDNN, which computes its
convolutions, does there. And a LoRA layer y = W x + s B (A x) costs three products and two passes over the
activations; with (W + s B A) x, whose sum is small next to the activations, it costs one. Rollout and replay both
call these layers, so the ratio of an untouched policy stays 1. Rounding differs from PEFT's by about 1e-6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """x W^T + b by oneDNN; the bias is not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """For x [..., in] and weight [out, in], both float32 on a CPU."""
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x and of the weight, where they are asked for."""
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        own = of_weight = None
        if ctx.needs_input_grad[0]:
            own = _product(gradient, weight.t().contiguous(), None)
        if ctx.needs_input_grad[1]:
            rows, columns = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            of_weight = _product(rows.t().contiguous(), columns.t().contiguous(), None)
        return own, of_weight, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0:  # oneDNN refuses it
        return nn.functional.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


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
            if _plain(module):
                module.forward = _LoRAForward(module)  # type: ignore[method-assign]
    for module in network.modules():
        if type(module) is nn.Linear and id(module) not in inner and not _trained(module):
            module.forward = _LinearForward(module)  # type: ignore[method-assign,assignment]


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _plain(module: Any) -> bool:
    names = list(module.lora_A)
    return (
        len(names) == 1
        and type(module.base_layer) is nn.Linear
        and not _trained(module.base_layer)
        and not module.lora_bias[names[0]]
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and not getattr(module, "lora_variant", {})
    )


class _LinearForward:
    """What a frozen linear layer computes."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.layer.weight, self.layer.bias)
        return product


class _LoRAForward:
    """What a LoRA layer computes: with its adapter, or without where that is switched off."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.name = layer, next(iter(layer.lora_A))

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        layer = self.layer
        weight: Tensor = layer.base_layer.weight
        if not layer.disable_adapters:
            low, high = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            weight = torch.addmm(weight, high, low, alpha=layer.scaling[self.name])
        product: Tensor = _Product.apply(x, weight, layer.base_layer.bias)
        return product
