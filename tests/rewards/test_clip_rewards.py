"""PickScore, HPSv2, CLIPScore and the aesthetic predictor: real classes, random weights, against their formulas."""

import json
import shutil
from itertools import pairwise

import families
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import save_tokenizer, text_settings
from driftrl.build import Towers, build_reward
from driftrl.checks import InputError
from driftrl.files import numbers_in
from driftrl.preprocess import CLIP_MEAN, CLIP_STD
from driftrl.rewards import tower as rewards_tower
from driftrl.rewards.tower import CLIPTower

PROMPTS = ["a cat", "a dog", "a cat", "two zebras"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(2)
    place = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = save_tokenizer(place)
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    text = {**text_settings(tokenizer), "hidden_act": "gelu"}
    text["max_position_embeddings"] = 48
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16,
        "do_center_crop": True, "do_resize": True, "do_normalize": True, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }))  # fmt: skip
    sizes = (12, 1024, 128, 64, 16, 1)
    weights = {}
    for number, (a, b) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        weights[f"layers.{number}.weight"] = torch.randn(b, a) / a**0.5
        weights[f"layers.{number}.bias"] = torch.randn(b)
    save_file(weights, place / "aesthetic.safetensors")
    return place


def clip_model(folder):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder)


def clip_tokens(folder, texts, length=48):
    """Padded as PickScore's model card has it: to the longest only."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )


def reference(folder, images, texts, length=48, crop=None):
    """Unit embeddings by transformers' own processor and model, through PIL."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = [Image.fromarray(np.uint8((x.permute(1, 2, 0) * 255).round().numpy())) for x in images]
    processor = CLIPImageProcessorPil() if crop else CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        found = clip_model(folder)(**clip_tokens(folder, texts, length), pixel_values=pixels)
    return found.image_embeds, found.text_embeds, found.logits_per_image


@pytest.mark.parametrize("kind", ["pickscore", "hpsv2", "clipscore"])
@pytest.mark.parametrize("size", [(16, 16), (40, 40), (28, 41), (41, 28), (9, 12)])
def test_the_published_formula(folder, kind, size):
    """Resized and cropped by transformers' own processor, through PIL."""
    if kind == "hpsv2" and size != (16, 16):
        pytest.skip("HPSv2 is prepared otherwise: test_hpsv2.py")
    images = torch.randint(0, 256, (4, 3, *size), generator=torch.Generator().manual_seed(1)) / 255
    texts = [("A photo depicts " if kind == "clipscore" else "") + p for p in PROMPTS]
    image, text, logits = reference(folder, images, texts)
    cosine = (image * text).sum(-1)
    expected = {"pickscore": logits.diagonal(), "hpsv2": cosine, "clipscore": 2.5 * cosine.relu()}[kind]
    torch.testing.assert_close(
        build_reward(f"{kind}@{folder}", CPU)(images, PROMPTS), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("size", [(16, 16), (28, 41)])
def test_the_aesthetic_predictor(folder, size):
    images = torch.randint(0, 256, (4, 3, *size), generator=torch.Generator().manual_seed(1)) / 255
    x, _, _ = reference(folder, images, PROMPTS)
    weights = load_file(folder / "aesthetic.safetensors")
    for number in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    score = build_reward(f"aesthetic@{folder}", CPU)(images, PROMPTS)
    torch.testing.assert_close(score, x[:, 0], atol=1e-4, rtol=0)
    assert score.std() > 1e-3


@pytest.mark.slow
def test_pickscore_at_the_size_of_clip_h(tmp_path):
    """986 million random weights, pictures of 512 x 512; it takes 6 GB of memory and 4 GB of disk."""
    assert numbers_in(families.make_clip_h(tmp_path / "clip").glob("*.safetensors")) == 986_109_441
    images = torch.randint(0, 256, (2, 3, 512, 512), generator=torch.Generator().manual_seed(1)) / 255
    _, _, logits = reference(tmp_path / "clip", images, PROMPTS[:2], 77, crop=224)
    score = build_reward(f"pickscore@{tmp_path / 'clip'}", CPU)(images, PROMPTS[:2])
    torch.testing.assert_close(score, logits.diagonal(), atol=1e-4, rtol=0)
    shutil.rmtree(tmp_path)  # gigabytes that nobody will look at


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 7), (16, 16)])
def test_hpsv2_pads_pictures_that_are_not_square(folder, size):
    """The longer side to 16, the rest black, as the published code has it; resized here by PIL, in floats."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    height, width = (round(side * 16 / max(size)) for side in size)
    padded = np.zeros((2, 3, 16, 16), np.float32)
    top, left = (16 - height) // 2, (16 - width) // 2
    for picture, image in zip(padded, images, strict=True):
        for channel, values in zip(picture, image, strict=True):
            small = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            channel[top : top + height, left : left + width] = np.asarray(small)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = (torch.from_numpy(padded) - mean) / std
    reward = build_reward(f"hpsv2@{folder}", CPU)
    torch.testing.assert_close(reward.tower.preprocess(images), pixels, atol=2e-5, rtol=0)
    model, tokens = clip_model(folder), clip_tokens(folder, PROMPTS[:2])
    with torch.no_grad():
        found = model(**tokens, pixel_values=pixels)
    expected = (found.image_embeds * found.text_embeds).sum(-1)
    torch.testing.assert_close(reward(images, PROMPTS[:2]), expected, atol=1e-4, rtol=0)
    if height != width:
        cropped = build_reward(f"clipscore@{folder}", CPU).tower.preprocess(images)
        assert cropped.shape == pixels.shape and not torch.allclose(cropped, pixels, atol=0.1)


class Counter:
    """Counts the images that pass through the image encoders of towers."""

    def __init__(self, *towers):
        self.images = self.texts = 0
        for tower in towers:
            tower.model.vision_model.register_forward_hook(self.seen)
            tower.model.text_model.register_forward_hook(self.read)

    def seen(self, module, inputs, output):
        self.images += len(output.pooler_output)

    def read(self, module, inputs, output):
        self.texts += len(output.pooler_output)


def test_an_image_is_embedded_once_for_all_rewards_on_a_folder(folder):
    towers: Towers = {}
    names = [f"{kind}@{folder}" for kind in ("pickscore", "clipscore", "aesthetic")]
    rewards = [build_reward(name, CPU, towers=towers) for name in names]
    alone = [build_reward(name, CPU) for name in names]
    (tower,) = towers.values()
    counter = Counter(tower)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for reward, single in zip(rewards, alone, strict=True):
        assert torch.equal(reward(images, PROMPTS), single(images, PROMPTS))
    assert counter.images == 4
    assert counter.texts == 6  # three prompts, each as it is and behind CLIPScore's prefix
    before = rewards[2](images, PROMPTS)
    images[0].zero_()  # the same tensor, but not the same images
    assert rewards[2](images, PROMPTS)[0] != before[0]
    assert counter.images == 8
    with torch.inference_mode():
        images = torch.rand(4, 3, 16, 16)  # what is written into it is not counted, so nothing is remembered
        assert not torch.equal(rewards[2](images, PROMPTS), rewards[2](images.zero_(), PROMPTS))


def test_prompts_are_embedded_once_and_the_oldest_forgotten(folder, monkeypatch):
    monkeypatch.setattr(rewards_tower, "PROMPTS_KEPT", 3)
    tower = CLIPTower(folder, batch_size=2)
    counter = Counter(tower)
    first = tower.embed_prompts(["a", "b", "a", "c"])
    assert counter.texts == 3
    assert torch.equal(tower.embed_prompts(["c", "a"]), first[[3, 0]])
    assert counter.texts == 3
    five = tower.embed_prompts(["d", "a", "e", "f", "b"])  # more than are kept, b among them
    assert counter.texts == 6
    assert torch.equal(five[[1, 4]], first[:2])
    tower.embed_prompts(["e", "f", "b"])
    assert counter.texts == 6
    tower.embed_prompts(["a"])
    assert counter.texts == 7


@pytest.mark.parametrize("kind", ["pickscore", "hpsv2", "clipscore", "aesthetic"])
def test_in_bfloat16_a_reward_differs_by_rounding(folder, kind):
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    exact = build_reward(f"{kind}@{folder}", CPU)(images, PROMPTS * 2)
    rounded = build_reward(f"{kind}@{folder}", CPU, "bfloat16")(images, PROMPTS * 2)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.std()
    assert torch.equal(build_reward(f"{kind}@{folder}", CPU, "auto")(images, PROMPTS * 2), exact)


def changed(folder, to, *, without=(), drop=()):
    """A copy that lacks files or weights."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*without))
    if drop:
        weights = load_file(to / "model.safetensors")
        save_file(
            {k: v for k, v in weights.items() if k not in drop}, to / "model.safetensors", {"format": "pt"}
        )
    return to


def test_nothing_is_made_up(folder, tmp_path):
    """Where a tokenizer or weights are missing, transformers would go on with none, or with random ones."""
    wordless = changed(folder, tmp_path / "wordless", without=("tokenizer*", "vocab.json", "merges.txt"))
    with pytest.raises(InputError, match=r"wordless has no tokenizer, and that of laion/CLIP-ViT-H-14"):
        build_reward(f"pickscore@{wordless}", CPU)
    assert build_reward(f"aesthetic@{wordless}", CPU)  # which reads nothing
    partial = changed(folder, tmp_path / "partial", drop=("visual_projection.weight",))
    with pytest.raises(InputError, match=r"weights of a CLIPModel; 1 are missing, such as visual_projection"):
        build_reward(f"pickscore@{partial}", CPU)
    torn = changed(folder, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"torn: its weights are no safetensors file, or a part of one"):
        build_reward(f"pickscore@{torn}", CPU)


def test_pickles_are_not_read(folder, tmp_path):
    pickled = changed(folder, tmp_path / "pickled", without=("model.safetensors",))
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        build_reward(f"pickscore@{pickled}", CPU)


def test_what_cannot_be_loaded_is_one_message(folder, tmp_path):
    with pytest.raises(InputError, match=r"hpsv2 has no weights on the hub.*hpsv2@FOLDER"):
        build_reward("hpsv2", CPU)
    with pytest.raises(
        InputError, match=r"pickscore cannot be loaded from yuvalkirstain/PickScore_v1.*pickscore@"
    ):
        build_reward("pickscore", CPU)
    with pytest.raises(
        InputError, match=r"vqascore cannot be loaded from Qwen/Qwen3-VL-2B-Instruct.*vqascore@FOLDER"
    ):
        build_reward("vqascore", CPU)
    for name in (
        "pickscore@nowhere",
        "clipscore@./weights/nowhere",
        "aesthetic@nowhere",
        "imagereward@nowhere",
        "vqascore@nowhere",
    ):
        folder_named = name.partition("@")[2]
        with pytest.raises(
            InputError, match=rf"cannot be loaded from {folder_named}: there is no such folder"
        ):
            build_reward(name, CPU)
    with pytest.raises(InputError, match=r"clipscore cannot be loaded from"):
        build_reward(f"clipscore@{tmp_path}", CPU)
    with pytest.raises(InputError, match=r"has no aesthetic\.safetensors"):
        build_reward(f"aesthetic@{tmp_path}", CPU)
    with pytest.raises(InputError, match=r"did you mean 'pickscore'"):
        build_reward("pikscore", CPU)
    save_file({"layers.0.weight": torch.zeros(1)}, tmp_path / "aesthetic.safetensors")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InputError, match=r"expected the predictor's five linear layers"):
        build_reward(f"aesthetic@{tmp_path}", CPU)


@pytest.mark.parametrize("kind", ["pickscore", "hpsv2", "clipscore", "aesthetic"])
@pytest.mark.parametrize("size", [(16, 16), (28, 41)])
def test_rewards_are_differentiable_where_the_images_ask_for_it(folder, kind, size):
    """By the very scores that training sees; against a difference, where no pixel is rounded."""
    reward = build_reward(f"{kind}@{folder}", CPU)
    images = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(1)).mul(0.8).add(0.1)
    plain = reward(images, PROMPTS)
    free = images.clone().requires_grad_()
    scores = reward(free, PROMPTS)
    assert torch.equal(scores.detach(), plain) and not plain.requires_grad
    (gradient,) = torch.autograd.grad(scores.sum(), free)
    with torch.no_grad():  # nothing is kept then, whoever asks
        assert not reward(free, PROMPTS).requires_grad
    if size == (16, 16):
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
        change = (reward(images + 1e-3 * way, PROMPTS) - reward(images - 1e-3 * way, PROMPTS)).sum() / 2e-3
        assert float((gradient * way).sum()) == pytest.approx(float(change), rel=0.02, abs=1e-2)
    assert torch.equal(gradient.flatten(1).norm(dim=1) > 0, plain != 0)  # CLIPScore is 0 below 0
