"""Full fine-tuning of a network that is too large for each process: weights, gradients and optimiser in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.distributed import in_parts, own
from driftrl.policies.full import WEIGHTS, FullWeights


class ShardedWeights(FullWeights):
    """All weights of a diffusers model by torch's FSDP (`fully_shard`): of each tensor a process holds and trains a part.

    A block's weights are put together for its forward and its backward pass, in the precision that the network came in, so all
    processes must call the network equally often. Gradients come as means over the processes.
    """

    autocast = False  # it keeps a lowered copy of each weight that it has seen, so of the whole network

    def __init__(self, network: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Make ``network`` trainable and share it out; it computes in ``dtype``, and may still be in main memory. One block at a
        time comes to ``device`` whole.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.network, self.kind = network, type(network)
        network.requires_grad_(True)
        precision = MixedPrecisionPolicy()
        if dtype != torch.float32:
            # Inputs stay as they are, as for any network in half precision: times and rotations do not bear rounding.
            precision = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        came = {name: parameter.dtype for name, parameter in network.named_parameters()}
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        # The outermost part too is given back after each pass, or else it would miss that `reference` changes weights.
        self._shared: list[Any] = [*_blocks(network), network]
        for module in self._shared:
            _widen(module)
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        self._start = {name: mine.to("cpu", came[name], copy=True) for name, mine in self._parts().items()}
        self._kept: dict[str, Tensor] = {}
        self._is_reference = False

    def _parts(self) -> dict[str, Tensor]:
        """What this process holds of each parameter."""
        for module in self._shared:
            module.reshard()  # of what is put together there would be all
        return {name: own(parameter) for name, parameter in self.network.named_parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context ``network`` has the weights that it came with.

        They are copied: FSDP has pointers of its own to a parameter's memory, so exchanging the parameter's would change nothing
        that is computed.
        """
        if self._is_reference:
            yield
            return
        parts = self._parts()
        if not self._kept:  # who asks once asks in every batch: from now on room for both is on the device
            self._start = {name: value.to(parts[name].device) for name, value in self._start.items()}
            self._kept = {name: torch.empty_like(mine) for name, mine in parts.items()}
        _copy(self._kept, parts)
        _copy(parts, self._start)
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False
            _copy(self._parts(), self._kept)

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
            {name: _wide(value.detach()).cpu().contiguous() for name, value in state.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )


@torch.no_grad()
def _copy(parts: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, mine in parts.items():
        mine.copy_(values[name])


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value


def _widen(module: nn.Module) -> None:
    """Make those of its weights that are not in parts yet float32, one after the other; buffers stay what they are computed with."""
    for parameter in module.parameters():
        if not in_parts(parameter):
            parameter.data = parameter.data.to(
                torch.float32
            ).contiguous()  # FSDP wants no other memory format


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
