"""HPSv2: weights under their published names, converted and scored, against open_clip's model written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import save_tokenizer
from driftrl.build import build_reward
from driftrl.checks import InputError
from driftrl.preprocess import CLIP_MEAN, CLIP_STD
from driftrl.rewards.hpsv2 import convert

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two zebras", "a dog on a sofa that is far too long to be read to its very end"]
SMALL = {"image": 160, "text": 128, "out": 24, "layers": 2, "side": 16, "patch": 8, "words": 0, "places": 20}
PUBLISHED = {
    "image": 1280, "text": 1024, "out": 1024, "layers": 2, "side": 224, "patch": 14, "words": 0, "places": 77,
}  # fmt: skip
"""Of ViT-H-14, but for its 32 and 24 layers and its words."""


def published(size: dict[str, int], words: int) -> dict[str, torch.Tensor]:
    """A state dict with open_clip's names."""
    draw = torch.Generator().manual_seed(0)
    state = {"logit_scale": torch.tensor(4.6), "attn_mask": torch.zeros(2, 2)}

    def add(name, *shape, scale=1.0):
        state[name] = scale * torch.randn(*shape, generator=draw)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=draw)

    image, text = size["image"], size["text"]
    add("visual.class_embedding", image)
    add("visual.positional_embedding", 1 + (size["side"] // size["patch"]) ** 2, image)
    add("visual.conv1.weight", image, 3, size["patch"], size["patch"], scale=0.1)
    add("visual.proj", image, size["out"], scale=image**-0.5)
    add("positional_embedding", size["places"], text)
    add("token_embedding.weight", words, text)
    add("text_projection", text, size["out"], scale=text**-0.5)
    for name, width in (("visual.ln_pre", image), ("visual.ln_post", image), ("ln_final", text)):
        norm(name, width)
    for start, width in (("visual.transformer", image), ("transformer", text)):
        for number in range(size["layers"]):
            block = f"{start}.resblocks.{number}"
            norm(f"{block}.ln_1", width)
            norm(f"{block}.ln_2", width)
            linear = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width),
                      "mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width)}  # fmt: skip
            for name, (out, inside) in linear.items():
                add(f"{block}.{name}weight", out, inside, scale=inside**-0.5)
                add(f"{block}.{name}bias", out, scale=0.1)
    return state


def formula(state, pixels, ids):
    """Cosines by open_clip's ViT and text transformer (pre-norm, exact GELU), arXiv 2306.09341 leaves the scale out."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x, start, head, mask=None):
        for number in range(sum(n.startswith(start) and n.endswith("ln_1.bias") for n in state)):
            block = f"{start}.resblocks.{number}"
            h = norm(x, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].T
            h = h + state[f"{block}.attn.in_proj_bias"]
            q, k, v = (part.unflatten(-1, (-1, head)).transpose(1, 2) for part in h.chunk(3, -1))
            scores = q @ k.transpose(-1, -2) / head**0.5
            scores = scores if mask is None else scores + mask
            h = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + h @ state[f"{block}.attn.out_proj.weight"].T + state[f"{block}.attn.out_proj.bias"]
            h = (
                norm(x, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T
                + state[f"{block}.mlp.c_fc.bias"]
            )
            x = x + F.gelu(h) @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
        return x

    kernel = state["visual.conv1.weight"]
    patches = (
        F.unfold(pixels, kernel.shape[-1], stride=kernel.shape[-1]).transpose(1, 2) @ kernel.flatten(1).T
    )
    x = torch.cat([state["visual.class_embedding"].expand(len(patches), 1, -1), patches], 1)
    x = blocks(norm(x + state["visual.positional_embedding"], "visual.ln_pre"), "visual.transformer", 80)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    length = ids.shape[1]
    causal = torch.full((length, length), -torch.inf).triu(1)
    t = blocks(
        state["token_embedding.weight"][ids] + state["positional_embedding"], "transformer", 64, causal
    )
    text = norm(t, "ln_final")[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def spelt(tokenizer, prompts, places):
    """As open_clip's tokenizer: start, letters, end, cut so that the end stays, zeros behind it."""
    ids = torch.zeros(len(prompts), places, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        letters = [
            tokenizer.convert_tokens_to_ids(c + ("</w>" if k == len(word) - 1 else ""))
            for word in prompt.split() for k, c in enumerate(word)
        ]  # fmt: skip
        code = [tokenizer.bos_token_id, *letters[: places - 2], tokenizer.eos_token_id]
        row[: len(code)] = torch.tensor(code)
    return ids


def padded(images, side):
    """The longer side to ``side``, black around it; resized by PIL in floats, as torchvision does tensors."""
    height, width = (round(s * side / max(images.shape[-2:])) for s in images.shape[-2:])
    out = np.zeros((len(images), 3, side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    for picture, image in zip(out, images, strict=True):
        for channel, values in zip(picture, image, strict=True):
            small = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            channel[top : top + height, left : left + width] = np.asarray(small)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(out) - mean) / std


@pytest.mark.parametrize("shape", [(16, 16), (40, 24), (7, 12)])
def test_the_published_formula(tmp_path, shape):
    tokenizer = save_tokenizer(tmp_path / "hpsv2", SMALL["places"])
    state = published(SMALL, len(tokenizer))
    convert(state, tmp_path / "hpsv2")
    images = torch.randint(0, 256, (3, 3, *shape), generator=torch.Generator().manual_seed(1)) / 255
    expected = formula(state, padded(images, SMALL["side"]), spelt(tokenizer, PROMPTS, SMALL["places"]))
    reward = build_reward(f"hpsv2@{tmp_path / 'hpsv2'}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=0)
    assert (reward(images, PROMPTS[::-1]) - expected)[[0, 2]].abs().min() > 1e-3


def test_two_layers_of_the_published_width(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "hpsv2", 77)
    state = published(PUBLISHED, len(tokenizer))
    convert(state, tmp_path / "hpsv2")
    images = torch.rand(2, 3, 200, 300, generator=torch.Generator().manual_seed(1))
    expected = formula(state, padded(images, 224), spelt(tokenizer, PROMPTS[:2], 77))
    reward = build_reward(f"hpsv2@{tmp_path / 'hpsv2'}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS[:2]), expected, atol=1e-4, rtol=0)


def test_what_cannot_be_used_is_one_message(tmp_path):
    state = published(SMALL, 40)
    lacking = {k: v for k, v in state.items() if k != "visual.transformer.resblocks.1.ln_2.bias"}
    with pytest.raises(
        InputError, match=r"1 of \d+ tensors.*vision_model\.encoder\.layers\.1\.layer_norm2\.bias"
    ):
        convert(lacking, tmp_path / "new")
    with pytest.raises(InputError, match=r"lacks 'token_embedding\.weight'"):
        convert({"state_dict": torch.zeros(1)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        InputError, match=r"hpsv2 cannot be loaded from weights/hpsv2: there is no such folder"
    ):
        build_reward("hpsv2@weights/hpsv2", CPU)
