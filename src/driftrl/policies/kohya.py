"""A LoRA under the names of kohya's scripts, which ComfyUI and its like read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from driftrl.checks import InputError

_NAMES = {
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
}


def write_kohya(source: Path, target: Path) -> Path:
    """Rename the tensors of a diffusers LoRA, and put the alpha of its metadata into a tensor beside each pair.

    ``unet.down_blocks.0.attn.to_q.lora.down.weight`` becomes ``lora_unet_down_blocks_0_attn_to_q.lora_down.weight``, with a
    scalar ``lora_unet_down_blocks_0_attn_to_q.alpha``. Layers of transformers keep their names, which ComfyUI knows for SD3,
    FLUX.1, FLUX.2, Qwen-Image and Z-Image: ``transformer.layers.0.attn.to_q.lora_down.weight``. Names as in its ``comfy/lora.py``.

    Args:
        source: ``pytorch_lora_weights.safetensors`` of a checkpoint.
        target: the file to write.

    Raises:
        InputError: if ``source`` is no LoRA that a checkpoint has.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(source, "pt") as file:
            settings = json.loads((file.metadata() or {})["lora_adapter_metadata"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{source}: expected a LoRA as a checkpoint has it: {error}") from error
    renamed = {}
    for name, value in tensors.items():
        ending = next((ending for ending in _NAMES if name.endswith(ending)), None)
        if ending is None:
            raise InputError(f"{source}: {name} is no part of a LoRA that can be renamed")
        part, _, layer = name.removesuffix(ending).partition(".")
        place = f"lora_unet_{layer.replace('.', '_')}" if part == "unet" else f"{part}.{layer}"
        renamed[f"{place}.{_NAMES[ending]}"] = value
        renamed[f"{place}.alpha"] = torch.tensor(float(settings[f"{part}.lora_alpha"]))
    save_file(renamed, target)
    return target
