"""Full fine-tuning: every weight of the network is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


class FullWeights:
    """All weights of a diffusers model, kept in float32; the ones it came with wait in main memory until they are asked for."""

    autocast = True
    """Whether a network that came in half precision is computed by autocast."""

    def __init__(self, network: Any) -> None:
        """Make ``network`` trainable."""
        self.network = network
        self._start = {name: value.detach().cpu().clone() for name, value in network.named_parameters()}
        torch.nn.Module.to(network, torch.float32)  # diffusers' own warns of what is meant here
        network.requires_grad_(True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context ``network`` has the weights that it came with."""
        named = dict(self.network.named_parameters())
        kept = {name: parameter.data for name, parameter in named.items()}
        for name, parameter in named.items():
            # Who asks once asks in every batch: from now on they are on the device, as short as they came.
            self._start[name] = self._start[name].to(parameter.device)
            parameter.data = self._start[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in named.items():
                parameter.data = kept[name]

    def save(self, folder: Path, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the network as diffusers does: ``type(network).from_pretrained(folder)`` reads it."""
        self.network.save_pretrained(folder, max_shard_size="1TB")
