"""What a LoRA adds to the memory traffic of Stable Diffusion 1.5 in half precision: nothing is run but the counting.

    python benchmarks/adapter.py [--rank 16] [--rows 4]

Bytes that the kernels of a forward pass at 512 x 512 read and write, on the meta device, with the adapter switched off, with it as
driftrl has it, and with what comes into each of its layers copied to float32, as PEFT does where nobody says otherwise; and
what is kept for the backward pass. Attention counts as one kernel, as on a GPU.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import Linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from driftrl.policies.lora import add_lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Traffic(TorchDispatchMode):
    """Adds up what kernels read and write; what only looks at memory in another way moves nothing."""

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in (
            "_unsafe_view",
            "_reshape_alias",
            "detach",
        ):
            tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def forward_pass(unet: Any, rows: int, gradients: bool) -> tuple[float, float]:
    """GB moved for each row, and GiB kept for a backward pass."""
    with torch.device("meta"):
        latents, text = torch.empty(rows, 4, 64, 64), torch.empty(rows, 77, 768)
        steps = torch.empty(rows, dtype=torch.int64)
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    half = latents.bfloat16(), steps, text.bfloat16()
    with (
        nullcontext() if gradients else torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        Traffic() as traffic,
    ):
        unet(*half)
    return traffic.bytes / 1e9 / rows, sum(s.nbytes() for s in kept.values()) / 2**30 / rows


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4, help="of a forward pass")
    args = parser.parse_args()

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return found

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]  # the CPU's would be many kernels
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).bfloat16()
        add_lora(unet, args.rank, float(args.rank), TARGETS, 0)
    layers = [m for m in unet.modules() if isinstance(m, Linear)]
    print(f"{'a row':34}{'GB moved':>10}{'GiB kept for the backward pass':>33}")
    for name, on, cast in (
        ("adapter switched off", False, False),
        ("LoRA in the layers' precision", True, False),
        ("LoRA in float32", True, True),
    ):
        unet.enable_adapters() if on else unet.disable_adapters()
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        moved = forward_pass(unet, args.rows, False)[0]
        kept = forward_pass(unet, args.rows, True)[1] if on else 0.0
        print(f"{name:34}{moved:10.2f}{kept:33.2f}")


if __name__ == "__main__":
    main()
