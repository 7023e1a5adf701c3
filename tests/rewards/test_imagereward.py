"""ImageReward: weights under their published names, converted and scored, against the formula written out."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from driftrl.build import build_reward
from driftrl.checks import InputError
from driftrl.preprocess import CLIP_MEAN, CLIP_STD
from driftrl.rewards.imagereward import convert

CPU = torch.device("cpu")


class Size(NamedTuple):
    image: int = 128
    image_layers: int = 2
    image_inner: int = 96
    text: int = 64
    text_layers: int = 2
    text_inner: int = 80
    patch: int = 8
    side: int = 16
    words: int = 64
    positions: int = 40


SMALL, PUBLISHED = Size(), Size(1024, 24, 4096, 768, 12, 3072, 16, 224, 30524, 512)
SIDE = SMALL.side
PROMPTS = ["a cat", "two zebras on a red sofa", "a cat", "a dog" * 40]


def published(size: Size = SMALL) -> dict[str, torch.Tensor]:
    """A state dict with the names of the authors' code."""
    eye, reader, image, text = "blip.visual_encoder", "blip.text_encoder", size.image, size.text
    shapes = {
        f"{eye}.cls_token": (1, 1, image),
        f"{eye}.pos_embed": (1, 1 + (size.side // size.patch) ** 2, image),
        f"{eye}.patch_embed.proj.weight": (image, 3, size.patch, size.patch),
        f"{eye}.patch_embed.proj.bias": (image,),
        f"{reader}.embeddings.word_embeddings.weight": (size.words, text),
        f"{reader}.embeddings.position_embeddings.weight": (size.positions, text),
        "blip.vision_proj.weight": (16, image),
        "blip.text_proj.weight": (16, text),
    }
    linear = {}
    norms = {f"{eye}.norm": image, f"{reader}.embeddings.LayerNorm": text}
    for block in (f"{eye}.blocks.{k}" for k in range(size.image_layers)):
        linear |= {f"{block}.attn.qkv": (3 * image, image), f"{block}.attn.proj": (image, image)}
        linear |= {
            f"{block}.mlp.fc1": (size.image_inner, image),
            f"{block}.mlp.fc2": (image, size.image_inner),
        }
        norms |= {f"{block}.norm1": image, f"{block}.norm2": image}
    for layer in (f"{reader}.encoder.layer.{k}" for k in range(size.text_layers)):
        for part, width in ((f"{layer}.attention", text), (f"{layer}.crossattention", image)):
            linear |= {f"{part}.self.query": (text, text), f"{part}.output.dense": (text, text)}
            linear |= {f"{part}.self.key": (text, width), f"{part}.self.value": (text, width)}
            norms[f"{part}.output.LayerNorm"] = text
        linear[f"{layer}.intermediate.dense"] = (size.text_inner, text)
        linear[f"{layer}.output.dense"] = (text, size.text_inner)
        norms[f"{layer}.output.LayerNorm"] = text
    for number, (a, b) in zip((0, 2, 4, 6, 7), pairwise((text, 1024, 128, 64, 16, 1)), strict=True):
        linear[f"mlp.layers.{number}"] = (b, a)
    draw = torch.Generator().manual_seed(0)
    state = {name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, (out, inside) in linear.items():
        state[f"{name}.weight"] = torch.randn(out, inside, generator=draw) / inside**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=draw)
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=draw)
    state[f"{reader}.embeddings.position_ids"] = torch.arange(size.positions)[None]
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

    def count(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    eye = "blip.visual_encoder"
    patch = state[f"{eye}.patch_embed.proj.weight"].shape[-1]
    patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
    x = patches @ state[f"{eye}.patch_embed.proj.weight"].flatten(1).T + state[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), 1, -1), x], 1) + state[f"{eye}.pos_embed"]
    for k in range(count(f"{eye}.blocks.")):
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
    for k in range(count(f"{reader}.encoder.layer.")):
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


@pytest.mark.slow
def test_the_published_size(tmp_path):
    """446 million random weights; it takes 6 GB of memory."""
    state = published(PUBLISHED)
    convert(state, tmp_path)
    save_bert_tokenizer(tmp_path)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = formula(state, normalised(images), PROMPTS[:2])
    reward = build_reward(f"imagereward@{tmp_path}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS[:2]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("more", "left"), [(6, 3), (3, 2), (5, 2)])
def test_pictures_that_are_not_square_are_cropped(folder, more, left):
    """From the middle, and where there is none from the even one of two places, as torchvision's CenterCrop does."""
    images = torch.rand(4, 3, SIDE, SIDE + more, generator=torch.Generator().manual_seed(1))
    expected = formula(published(), normalised(images[..., left : left + SIDE]), PROMPTS)
    reward = build_reward(f"imagereward@{folder}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-4, rtol=0)
    tall = reward(images.transpose(-1, -2), PROMPTS)
    expected = formula(published(), normalised(images[..., left : left + SIDE].transpose(-1, -2)), PROMPTS)
    torch.testing.assert_close(tall, expected, atol=1e-4, rtol=0)


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


def test_it_is_differentiable_where_the_images_ask_for_it(folder):
    reward = build_reward(f"imagereward@{folder}", CPU)
    images = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).mul(0.8).add(0.1)
    free = images.clone().requires_grad_()
    scores = reward(free, PROMPTS)
    assert torch.equal(scores.detach(), reward(images, PROMPTS))
    (gradient,) = torch.autograd.grad(scores.sum(), free)
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    change = (reward(images + 1e-3 * way, PROMPTS) - reward(images - 1e-3 * way, PROMPTS)).sum() / 2e-3
    assert float((gradient * way).sum()) == pytest.approx(float(change), rel=0.02, abs=1e-2)
