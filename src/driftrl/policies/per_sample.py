"""Gradients of a LoRA sample by sample: of a sum with one term for each sample, what each term contributes.

A linear layer's weight gradient is a sum of outer products over the tokens of all samples. Summed over one sample's
tokens at a time it costs the same products, and needs memory for the adapter once a sample, not for the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.policies.fast_linear import Sink, add_outer, plain


class SampleGradients:
    """Those of every trained parameter of a network, in the order in which the network names them."""

    def __init__(self, layers: list[Any], places: dict[int, slice]) -> None:
        """For LoRA layers of PEFT, and the place of each parameter, by its id, among the numbers of all."""
        self._layers, self._places = layers, places
        self.size = max(place.stop for place in places.values())

    @classmethod
    def of(cls, network: nn.Module) -> SampleGradients | None:
        """None where anything is trained but the matrices of plain LoRAs on linear layers."""
        from peft.tuners.lora import Linear

        places, start = {}, 0
        for parameter in network.parameters():
            if parameter.requires_grad:
                places[id(parameter)] = slice(start, start + parameter.numel())
                start += parameter.numel()
        layers = [m for m in network.modules() if isinstance(m, Linear) and plain(m)]
        known = {id(matrix.weight) for layer in layers for matrix in _matrices(layer)}
        return cls(layers, places) if places and known == set(places) else None

    @contextmanager
    def collecting(self, samples: int) -> Iterator[Tensor]:
        """Float32 [samples, size], zero; each backward pass within this context adds to it, and to no ``.grad``.

        The rows that the network gets are those of the samples in order, once for each branch of guidance.
        """
        found = torch.zeros(samples, self.size, device=next(iter(_matrices(self._layers[0]))).weight.device)
        try:
            for layer in self._layers:
                sink = Sink(*(self._place(found, matrix.weight) for matrix in _matrices(layer)))
                forward = layer.__dict__.get("forward")
                if forward is not None:  # by `driftrl.policies.fast_linear`
                    forward.sink = sink
                    continue
                for matrix, into in zip(_matrices(layer), (sink.low, sink.high), strict=True):
                    matrix.forward = _MatrixForward(matrix, into)
            yield found
        finally:
            for layer in self._layers:
                if "forward" in layer.__dict__:
                    layer.__dict__["forward"].sink = None
                for matrix in _matrices(layer):
                    matrix.__dict__.pop("forward", None)

    def _place(self, found: Tensor, weight: Tensor) -> Tensor:
        return found[:, self._places[id(weight)]].unflatten(1, weight.shape)


def _matrices(layer: Any) -> tuple[Any, Any]:
    """A and B of a layer with one adapter."""
    (name,) = layer.lora_A
    return layer.lora_A[name], layer.lora_B[name]


class _MatrixForward:
    """What one matrix of a LoRA computes, its gradient going elsewhere."""

    def __init__(self, layer: nn.Linear, into: Tensor) -> None:
        self.layer, self.into = layer, into

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = _Matrix.apply(x, self.layer.weight, self.into)
        return result


class _Matrix(torch.autograd.Function):
    """x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, into: Tensor) -> Tensor:
        """For x [b n, ..., in], weight [out, in] and, for its gradients, ``into`` [n, out, in]."""
        short = weight.to(x.dtype)
        ctx.save_for_backward(x, short)
        ctx.into = into
        return nn.functional.linear(x, short)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient of x."""
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        rows = (part.reshape(len(x), -1, part.shape[-1]) for part in (gradient, x))
        add_outer(ctx.into, *rows)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None
