"""LoRA adapters by PEFT: added, switched off for the reference, saved in diffusers' format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from driftrl.checks import InputError
from driftrl.noise import seed_of
from driftrl.policies.per_sample import SampleGradients

WEIGHTS = "pytorch_lora_weights.safetensors"
HALF = (torch.float16, torch.bfloat16)


def add_lora(network: nn.Module, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Freeze ``network`` (a diffusers model) and add a trainable float32 LoRA to the modules named ``targets``.

    Raises:
        InputError: if no module has one of these names.
    """
    from peft import LoraConfig

    names = {name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing:
        known = sorted({n.rsplit(".", 1)[-1] for n in names if not n.rsplit(".", 1)[-1].isdigit()})
        raise InputError(
            f"adapter.targets: the model has no linear or convolution layer named {', '.join(missing)}; "
            f"it has {', '.join(known[:20])}"
        )
    everything = {name for name, _ in network.named_modules()}
    asked = {n for n in everything if any(n == t or n.endswith(f".{t}") for t in targets)}
    if not asked <= names:  # FLUX.2 has layers and lists of layers named to_out, and PEFT refuses lists
        targets = sorted(asked & names)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")  # type: ignore[arg-type]
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # the initial weights depend on the seed alone
        torch.manual_seed(seed_of(seed, "lora"))
        network.add_adapter(settings)  # type: ignore[operator]
    # PEFT keeps a set, whose order differs between processes, and with it the bytes of the saved adapter.
    network.peft_config["default"].target_modules = sorted(set(targets))  # type: ignore[union-attr,index]
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _in_the_layers_precision(network)


class _Matrix(nn.Linear):
    """A matrix of a LoRA that is trained in float32, and multiplied in the precision of what comes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """For x [..., in]."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def _in_the_layers_precision(network: nn.Module) -> None:
    """Let the LoRA on linear layers in half precision compute in it: PEFT would copy what comes into each of them to
    float32, keep the copies for the backward pass, and multiply without the GPU's fast units.
    """
    from peft.tuners.lora import Linear

    for layer in network.modules():
        if isinstance(layer, Linear) and layer.get_base_layer().weight.dtype in HALF:
            matrices = [*layer.lora_A.values(), *layer.lora_B.values()]
            if all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices):
                layer.cast_input_dtype_enabled = False
                for matrix in matrices:
                    matrix.__class__ = _Matrix


def lora_scale(scale: float) -> float:
    """The scale itself.

    Raises:
        InputError: if it is no number of at least 0.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError(
            f"--lora-scale: expected numbers of at least 0, such as 0.4 or 0.4,0.8; got {scale:g}"
        )
    return scale


def scale_lora(parameters: Mapping[str, nn.Parameter], scale: float) -> None:
    """Turn an adapter down, in place: its change of each weight is B A, and B becomes ``scale`` B, as diffusers'
    ``set_adapters`` has it; 0 is the base model.

    Raises:
        InputError: if there is no LoRA among the ``parameters``, by name, or the scale is no number of at least 0.
    """
    lora_scale(scale)
    matrices = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
    if not matrices:
        raise InputError("--lora-scale: expected a LoRA; this is a whole network (adapter.kind: full)")
    with torch.no_grad():
        for matrix in matrices:
            matrix.mul_(scale)


class LoRA:
    """An adapter on a part of a pipeline: trainable, switched off for the reference."""

    def __init__(
        self,
        pipeline: Any,
        component: str,
        network: Any,
        rank: int,
        alpha: float,
        targets: list[str],
        seed: int,
    ) -> None:
        """Add it; ``component`` is the name of ``network`` in ``pipeline``."""
        self.pipeline, self.component, self.network = pipeline, component, network
        add_lora(network, rank, alpha, targets, seed)
        self.by_sample = SampleGradients.of(network)
        """None where the gradients of single samples cannot be had."""
        self._is_reference = False

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context, or several of it, the network computes what it did before the adapter was added."""
        if self._is_reference:
            yield
            return
        self.network.disable_adapters()
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False
            self.network.enable_adapters()

    def save(self, folder: Path, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write it in diffusers' LoRA format."""
        save_lora(self.pipeline, self.component, self.network, folder)


def save_lora(pipeline: Any, component: str, network: nn.Module, folder: Path) -> None:
    """Write the adapter so that ``pipeline.load_lora_weights(folder)`` of stock diffusers reads it."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    # By PEFT's names: diffusers has older ones for attention layers only, and cannot load a mixture.
    layers = get_peft_model_state_dict(network)
    pipeline.save_lora_weights(
        folder,
        **{f"{component}_lora_layers": {k: v.detach().cpu() for k, v in layers.items()}},
        **_collate_lora_metadata({component: network}),
    )
