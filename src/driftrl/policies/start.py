"""Training that goes on from a LoRA there is: what diffusers loads, as the first weights of ours."""

from __future__ import annotations

from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.checks import InputError
from driftrl.policies.lora import WEIGHTS

NAME = "start"


@dataclass(frozen=True)
class Start:
    """The matrices of a LoRA by the names of the layers that it is on: A [r, in, ...] and B [out, r, ...], float32, B with the
    scale in it.
    """

    source: str
    layers: dict[str, tuple[Tensor, Tensor]]

    def put_into(self, network: nn.Module, rank: int) -> None:
        """Let the LoRA of ``network``, of ``rank`` or more than this one's, compute what this one does; what it has more of both
        layers and rank starts as ever, at no change.

        Raises:
            InputError: if it has less.
        """
        from peft.tuners.lora import LoraLayer

        largest = max(len(a) for a, _ in self.layers.values())
        if largest > rank:
            raise InputError(
                f"adapter.start: {self.source} has rank {largest}, and adapter.rank is {rank}; expected at least as much: "
                f"--set adapter.rank={largest}"
            )
        ours = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        missing = sorted({layer_kind(name) for name in self.layers.keys() - ours.keys()})
        if missing:
            raise InputError(
                f"adapter.start: {self.source} changes layers that adapter.targets does not name: {', '.join(missing)}; name all of "
                f"its layers: --set 'adapter.targets=[{', '.join(sorted({layer_kind(name) for name in self.layers}))}]'"
            )
        with torch.no_grad():
            for name, (a, b) in self.layers.items():
                layer: Any = ours[name]
                first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                if a.shape[1:] != first.shape[1:] or b.shape[0] != second.shape[0]:
                    raise InputError(
                        f"adapter.start: {self.source} does not fit this model, at {name}: {list(b.shape)} by {list(a.shape)}"
                    )
                first[: len(a)] = a.to(first.device)
                second.zero_()
                second[:, : len(a)] = b.to(second.device) / layer.scaling["default"]


def layer_kind(name: str) -> str:
    """What `adapter.targets` calls a layer: to_out.0, say."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def load_start(pipeline: Any, component: str, network: Any, source: str) -> Start:
    """Read a LoRA as diffusers does, in any of the formats that it knows, and leave the pipeline as it was.

    Args:
        pipeline: a diffusers pipeline without adapters.
        component: the name of ``network`` in it.
        network: what is trained.
        source: a folder with ``pytorch_lora_weights.safetensors``, a safetensors file, or a repository of the hub.

    Raises:
        InputError: if it cannot be read or used.
    """
    from diffusers.utils import logging
    from peft.tuners.lora import LoraLayer

    path = Path(source)
    if path.exists() and not path.is_dir() and path.suffix != ".safetensors":
        raise InputError(f"adapter.start: expected a safetensors file, or a folder with one; got {source}")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise InputError(f"adapter.start: {source} has no {WEIGHTS}")
    where = (str(path.parent), {"weight_name": path.name}) if path.is_file() else (source, {})
    loud = logging.get_verbosity()
    try:
        logging.set_verbosity(CRITICAL)  # what is wrong is said below, in one line
        pipeline.load_lora_weights(where[0], adapter_name=NAME, use_safetensors=True, **where[1])
        changed = {name for name, adapters in pipeline.get_list_adapters().items() if NAME in adapters}
    except Exception as error:  # of many kinds: of diffusers, PEFT and safetensors
        pipeline.unload_lora_weights()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"adapter.start: {source} cannot be loaded as a LoRA of this model: {reason}"
        ) from error
    finally:
        logging.set_verbosity(loud)
    try:
        if changed != {component}:
            others = ", ".join(sorted(changed - {component})) or "nothing that this model has"
            raise InputError(
                f"adapter.start: expected a LoRA of the {component} alone; {source} changes {others}; merge it into the model "
                "(pipe.load_lora_weights, pipe.fuse_lora, pipe.save_pretrained), and name that as model.path"
            )
        layers = {}
        for name, module in network.named_modules():
            if isinstance(module, LoraLayer) and NAME in module.lora_A:
                layer: Any = module
                if layer.use_dora.get(NAME) or layer.lora_bias.get(NAME):
                    raise InputError(
                        f"adapter.start: expected a plain LoRA, without DoRA and biases; got {source}"
                    )
                a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
                a, b = (part.detach().float().cpu() for part in (a, b))
                layers[name] = (a.clone(), b * layer.scaling[NAME])
    finally:
        pipeline.unload_lora_weights()
    return Start(source, layers)
