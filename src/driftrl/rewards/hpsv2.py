"""HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): their published weights as a CLIP model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from driftrl.checks import InputError

HEAD_WIDTHS = {"vision": 80, "text": 64}
"""Of an attention head in ViT-H-14, which no tensor tells."""
WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
}
"""Beginnings of the published names and what transformers calls them (its spelling)."""
BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
"""The same within a layer."""


def convert(published: Mapping[str, Tensor], folder: Path | str) -> None:
    """Write ``config.json`` and ``model.safetensors`` of the published weights; CLIP's tokenizer may join them.

    Args:
        published: the ``state_dict`` that ``HPS_v2_compressed.pt`` or ``HPS_v2.1_compressed.pt`` holds: tensors by
            open_clip's names. Sizes are read off them; what scoring does not need is left out.
        folder: where to write; made if it is not there.

    Raises:
        InputError: if something that scoring needs is missing or of another shape.
    """
    from transformers import CLIPModel

    try:
        config = _config_of(published)
    except (KeyError, ValueError) as error:
        raise InputError(f"HPSv2: expected the published state_dict, but it lacks {error}") from error
    found: dict[str, Tensor] = {}
    for name, value in published.items():
        found |= _renamed(name, value.detach().float())
    model: Any = CLIPModel(config)
    needed = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [name for name, shape in needed.items() if name not in found or found[name].shape != shape]
    if wrong:
        raise InputError(
            f"HPSv2: expected the published state_dict, but {len(wrong)} of {len(needed)} tensors are missing or of "
            f"another shape; the first would become {wrong[0]}"
        )
    model.load_state_dict({name: found[name] for name in needed})
    model.save_pretrained(folder)


def _renamed(name: str, value: Tensor) -> dict[str, Tensor]:
    """A published tensor as transformers has it: one, three of the joint projections, or none that it needs."""
    if name in ("text_projection", "visual.proj"):
        side = "text" if name == "text_projection" else "visual"
        return {f"{side}_projection.weight": value.T.contiguous()}
    for theirs, ours in WHOLE.items():
        if name.startswith(theirs):
            return {ours + name.removeprefix(theirs): value}
    for theirs, ours in (("visual.transformer.", "vision_model."), ("transformer.", "text_model.")):
        if name.startswith(f"{theirs}resblocks."):
            number, _, part = name.removeprefix(f"{theirs}resblocks.").partition(".")
            layer = f"{ours}encoder.layers.{number}."
            if part.startswith("attn.in_proj_"):
                kind, thirds = part.removeprefix("attn.in_proj_"), value.chunk(3)
                return {
                    f"{layer}self_attn.{k}_proj.{kind}": v.clone() for k, v in zip("qkv", thirds, strict=True)
                }
            for inner, outer in BLOCK.items():
                if part.startswith(inner):
                    return {layer + outer + part.removeprefix(inner): value}
    return {}


def _config_of(published: Mapping[str, Tensor]) -> Any:
    """Sizes as the tensors have them; what no tensor tells is as in open_clip's ViT-H-14."""
    from transformers import CLIPConfig

    def part(prefix: str, width: int, head: int) -> dict[str, Any]:
        start = f"{prefix}transformer.resblocks."
        numbers = {int(n.removeprefix(start).split(".")[0]) for n in published if n.startswith(start)}
        return {
            "hidden_size": width,
            "intermediate_size": len(published[f"{start}0.mlp.c_fc.weight"]),
            "num_hidden_layers": len(numbers),
            "num_attention_heads": width // head,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        }

    words, patch = published["token_embedding.weight"], published["visual.conv1.weight"]
    places = len(published["visual.positional_embedding"]) - 1
    text = part("", words.shape[1], HEAD_WIDTHS["text"])
    vision = part("visual.", len(patch), HEAD_WIDTHS["vision"])
    # The last two words begin and end a prompt; padding after the end is never looked at.
    text |= {
        "vocab_size": len(words), "max_position_embeddings": len(published["positional_embedding"]),
        "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
    }  # fmt: skip
    vision |= {"image_size": patch.shape[-1] * round(places**0.5), "patch_size": patch.shape[-1]}
    return CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=published["text_projection"].shape[1]
    )
