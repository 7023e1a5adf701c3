"""ImageReward: weights under their published names, converted and scored, against the formula written out."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from driftrl.build import build_reward
from driftrl.checks import InputError
from driftrl.preprocess import CLIP_MEAN, CLIP_STD
from driftrl.rewards.imagereward import convert

CPU = torch.device("cpu")
IMAGE, TEXT, PATCH, SIDE, WORDS = 128, 64, 8, 16, 64
PROMPTS = ["a cat", "two zebras on a red sofa", "a cat", "a dog" * 40]


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the names of the authors' code: two layers each, heads of width 64."""
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, IMAGE),
        "blip.visual_encoder.pos_embed": (1, 1 + (SIDE // PATCH) ** 2, IMAGE),
        "blip.visual_encoder.patch_embed.proj.weight": (IMAGE, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (IMAGE,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (WORDS, TEXT),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, TEXT),
        "blip.vision_proj.weight": (16, IMAGE),
        "blip.text_proj.weight": (16, TEXT),
    }
    linear = {}
    norms = {"blip.visual_encoder.norm": IMAGE, "blip.text_encoder.embeddings.LayerNorm": TEXT}
    for k in range(2):
        block, layer = f"blip.visual_encoder.blocks.{k}", f"blip.text_encoder.encoder.layer.{k}"
        linear |= {f"{block}.attn.qkv": (3 * IMAGE, IMAGE), f"{block}.attn.proj": (IMAGE, IMAGE)}
        linear |= {f"{block}.mlp.fc1": (96, IMAGE), f"{block}.mlp.fc2": (IMAGE, 96)}
        norms |= {f"{block}.norm1": IMAGE, f"{block}.norm2": IMAGE}
        for name, width in (("attention", TEXT), ("crossattention", IMAGE)):
            linear |= {
                f"{layer}.{name}.self.query": (TEXT, TEXT),
                f"{layer}.{name}.output.dense": (TEXT, TEXT),
            }
            linear |= {f"{layer}.{name}.self.{x}": (TEXT, width) for x in ("key", "value")}
            norms[f"{layer}.{name}.output.LayerNorm"] = TEXT
        linear |= {f"{layer}.intermediate.dense": (80, TEXT), f"{layer}.output.dense": (TEXT, 80)}
        norms[f"{layer}.output.LayerNorm"] = TEXT
    for number, (a, b) in zip((0, 2, 4, 6, 7), pairwise((TEXT, 1024, 128, 64, 16, 1)), strict=True):
        linear[f"mlp.layers.{number}"] = (b, a)
    draw = torch.Generator().manual_seed(seed)
    state = {name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, (out, inside) in linear.items():
        state[f"{name}.weight"] = torch.randn(out, inside, generator=draw) / inside**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=draw)
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=draw)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state


def save_bert_tokenizer(folder):
    """A BERT tokenizer that spells everything out."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "vocab.txt").unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "imagereward"
    convert(published(), place)
    save_bert_tokenizer(place)
    return place


def tokens(prompts):
    """Letter by letter, at most 35 with [CLS] and [SEP], padded to 35: ids and which of them count."""
    ids = torch.zeros(len(prompts), 35, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        spelt = [5 + 26 * (k > 0) + ord(c) - 97 for word in prompt.split() for k, c in enumerate(word)][:33]
        row[: len(spelt) + 2] = torch.tensor([2, *spelt, 3])
    return ids, ids > 0


def formula(state, pixels, prompts):
    """arXiv 2304.05977 on BLIP (arXiv 2201.12086): ViT, then BERT with cross-attention, then linear layers."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(q, k, v, counts=None):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(64)
        if counts is not None:
            scores = scores.masked_fill(~counts[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder"
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ state[f"{eye}.patch_embed.proj.weight"].flatten(1).T + state[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), 1, -1), x], 1) + state[f"{eye}.pos_embed"]
    for k in range(2):
        block = f"{eye}.blocks.{k}"
        q, key, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, key, v), f"{block}.attn.proj")
        x = x + linear(
            F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2"
        )
    seen = norm(x, f"{eye}.norm", 1e-6)

    reader = "blip.text_encoder"
    ids, counts = tokens(prompts)
    h = state[f"{reader}.embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{reader}.embeddings.position_embeddings.weight"][:35]
    h = norm(h, f"{reader}.embeddings.LayerNorm", 1e-12)
    for k in range(2):
        layer = f"{reader}.encoder.layer.{k}"
        for name, source, valid in (("attention", None, counts), ("crossattention", seen, None)):
            part, given = f"{layer}.{name}", h if source is None else source
            q, key, v = linear(h, f"{part}.self.query"), linear(given, f"{part}.self.key"), linear(given, f"{part}.self.value")  # fmt: skip
            h = norm(linear(attend(q, key, v, valid), f"{part}.output.dense") + h, f"{part}.output.LayerNorm", 1e-12)  # fmt: skip
        inner = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(linear(inner, f"{layer}.output.dense") + h, f"{layer}.output.LayerNorm", 1e-12)
    score = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        score = linear(score, f"mlp.layers.{number}")
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def normalised(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def test_the_published_formula(folder):
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = formula(published(), normalised(images), PROMPTS)
    assert expected.std() > 0.1
    reward = build_reward(f"imagereward@{folder}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-4, rtol=0)
    reward.batch_size = 3
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-4, rtol=0)
    # Both the picture and the words are read.
    assert (reward(images.flip(0), PROMPTS) - expected)[1:3].abs().min() > 1e-3
    assert (reward(images, PROMPTS[1:] + PROMPTS[:1]) - expected).abs().min() > 1e-3


def test_wide_pictures_are_cropped(folder):
    images = torch.rand(4, 3, SIDE, SIDE + 6, generator=torch.Generator().manual_seed(1))
    expected = formula(published(), normalised(images[..., 3:-3]), PROMPTS)
    reward = build_reward(f"imagereward@{folder}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-4, rtol=0)


def test_in_bfloat16_it_differs_by_rounding(folder):
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    exact = build_reward(f"imagereward@{folder}", CPU)(images, PROMPTS)
    rounded = build_reward(f"imagereward@{folder}", CPU, "bfloat16")(images, PROMPTS)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.std()


def test_what_cannot_be_used_is_one_message(folder, tmp_path):
    with pytest.raises(InputError, match=r"imagereward has no weights on the hub.*imagereward@FOLDER"):
        build_reward("imagereward", CPU)
    with pytest.raises(InputError, match=r"has no model\.safetensors; docs/rewards\.md"):
        build_reward(f"imagereward@{tmp_path}", CPU)
    lacking = {k: v for k, v in published().items() if not k.endswith("blocks.1.norm2.bias")}
    with pytest.raises(
        InputError, match=r"1 of \d+ tensors.*vision_model\.encoder\.layers\.1\.layer_norm2\.bias"
    ):
        convert(lacking, tmp_path / "new")
    with pytest.raises(InputError, match=r"they lack 'blip\.visual_encoder\.patch_embed\.proj\.weight'"):
        convert({"state_dict": torch.zeros(1)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    from safetensors.torch import save_file

    save_file({"mlp.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"expected ImageReward's weights, converted"):
        build_reward(f"imagereward@{tmp_path}", CPU)
