"""Full fine-tuning of a network that is too large for each process: weights, gradients and optimiser in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.distributed import own
from driftrl.policies.full import WEIGHTS, FullWeights


class ShardedWeights(FullWeights):
    """All weights of a diffusers model by torch's FSDP (`fully_shard`): of each tensor a process holds and trains a part.

    A block's weights are put together for its forward and its backward pass, so all processes must call the network
    equally often. Gradients come as means over the processes.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        """Make ``network`` trainable and share it out."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.network, self.kind = network, type(network)
        nn.Module.to(network, torch.float32)
        network.requires_grad_(True)
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP wants no other memory format
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # The outermost part too is given back after each pass, or else it would miss that `reference` changes weights.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        self._start = {name: mine.cpu().clone() for name, mine in self._parts().items()}

    def _parts(self) -> dict[str, Tensor]:
        """What this process holds of each parameter."""
        return {name: own(parameter) for name, parameter in self.network.named_parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context ``network`` has the weights that it came with."""
        parts = self._parts()
        kept = {name: mine.clone() for name, mine in parts.items()}
        _copy(parts, self._start)
        try:
            yield
        finally:
            _copy(parts, kept)

    def save(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Write the network as diffusers does, given all of its parameters."""
        from safetensors.torch import save_file

        if values is None:
            raise ValueError("a network in parts is saved with the values of its parameters")
        state = {name: values.get(name, value) for name, value in self.network.state_dict().items()}
        sharded, self.network.__class__ = self.network.__class__, self.kind  # whose name is written
        try:
            self.network.save_config(folder)
        finally:
            self.network.__class__ = sharded
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in state.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )


@torch.no_grad()
def _copy(parts: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, mine in parts.items():
        mine.copy_(values[name])


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is put together at a time: members of the network's lists of blocks, and the middle one of a UNet."""
    found = [
        b
        for child in network.children()
        if isinstance(child, nn.ModuleList)
        for b in child
        if list(b.parameters())
    ]
    middle = getattr(network, "mid_block", None)
    return [*found, middle] if isinstance(middle, nn.Module) else found
