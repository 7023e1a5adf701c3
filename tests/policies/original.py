"""A pipeline of diffusers as one file in the layout of the original code (LDM): what `from_single_file` does, the other way round.

That it is the other way round is seen where a file is read again: a name that is wrong would leave a weight without a value.
"""

import re
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING as NAMES
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _renamed(rest, names):
    return next((new + rest[len(old) :] for old, new in names.items() if rest.startswith(old)), rest)


def _unet_name(name, network):
    layers = network.config.layers_per_block + 1
    flat = NAMES["unet"]["layers"] | NAMES["unet"]["addition_embed_type"]
    if name in flat:
        return flat[name]
    side, *numbers, rest = re.fullmatch(
        r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    block, kind, k = int(numbers[0] or 0), numbers[1], int(numbers[2])
    rest = _renamed(rest, RESNET) if kind == "resnets" else rest
    place = block * layers + k
    if side == "mid":
        return f"middle_block.{2 * k if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{block * layers + layers}.0.op{rest.removeprefix('conv')}"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in network.config.up_block_types[block] else 1
        return f"output_blocks.{block * layers + layers - 1}.{after}.{rest}"
    start = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
    return f"{start}.{0 if kind == 'resnets' else 1}.{rest}"


def _autoencoder_name(name, blocks):
    if name in NAMES["vae"]:
        return NAMES["vae"][name]
    half, side, *numbers, rest = re.fullmatch(
        r"(\w+)\.(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    block, kind, k = int(numbers[0] or 0), numbers[1], int(numbers[2])
    rest = _renamed(rest, {"conv_shortcut": "nin_shortcut"} if kind == "resnets" else ATTENTION)
    if side == "mid":
        return f"{half}.mid.{'block' if kind == 'resnets' else 'attn'}_{k + 1}.{rest}"
    start = f"{half}.{side}.{block if side == 'down' else blocks - 1 - block}"
    return f"{start}.block.{k}.{rest}" if kind == "resnets" else f"{start}.{side}sample.{rest}"


def _open_clip(encoder, start):
    """The second text encoder of XL: queries, keys and values in one, and the projection transposed."""
    state, found = encoder.state_dict(), {}
    names = {new: old for old, new in NAMES["openclip"]["layers"].items()}
    for new, old in names.items():
        found[start + new] = state[old].T if new == "text_projection" else state[old]
    for k in range(encoder.config.num_hidden_layers):
        old, new = f"text_model.encoder.layers.{k}.", f"{start}transformer.resblocks.{k}."
        for end in ("weight", "bias"):
            each = [state[f"{old}self_attn.{part}_proj.{end}"] for part in "qkv"]
            found[f"{new}attn.in_proj_{end}"] = torch.cat(each)
            for was, becomes in {
                "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            }.items():  # fmt: skip
                found[f"{new}{becomes}.{end}"] = state[f"{old}{was}.{end}"]
    return found


def write_original(pipeline, file: Path) -> Path:
    """Write a Stable Diffusion pipeline, 1.x or XL, as one safetensors file."""
    xl = hasattr(pipeline, "text_encoder_2")
    found = {
        f"model.diffusion_model.{_unet_name(name, pipeline.unet)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    blocks = len(pipeline.vae.config.up_block_types)
    for name, value in pipeline.vae.state_dict().items():
        convolution = "mid_block.attentions" in name and value.dim() == 2
        found[f"first_stage_model.{_autoencoder_name(name, blocks)}"] = (
            value[:, :, None, None] if convolution else value
        )
    start = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for name, value in pipeline.text_encoder.state_dict().items():
        found[f"{start}text_model.{name.removeprefix('text_model.')}"] = value
    if xl:
        found |= _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    save_file({name: value.contiguous() for name, value in found.items()}, file)
    return file
