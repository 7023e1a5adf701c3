"""PickScore, HPSv2, CLIPScore and the aesthetic predictor: real classes, random weights, against their formulas."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import save_tokenizer, text_settings
from driftrl.build import build_reward
from driftrl.checks import InputError

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


def reference(folder, images, texts):
    """Unit embeddings by transformers' own processor and model, through PIL."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = [Image.fromarray(np.uint8((x.permute(1, 2, 0) * 255).round().numpy())) for x in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt"
    )
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels)
    return found.image_embeds, found.text_embeds, found.logits_per_image


@pytest.mark.parametrize("kind", ["pickscore", "hpsv2", "clipscore"])
def test_the_published_formula(folder, kind):
    """At the model's own size; that resizing agrees with transformers is in tests/diversity/test_encoders.py."""
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255
    texts = [("A photo depicts " if kind == "clipscore" else "") + p for p in PROMPTS]
    image, text, logits = reference(folder, images, texts)
    cosine = (image * text).sum(-1)
    expected = {"pickscore": logits.diagonal(), "hpsv2": cosine, "clipscore": 2.5 * cosine.relu()}[kind]
    torch.testing.assert_close(
        build_reward(f"{kind}@{folder}", CPU)(images, PROMPTS), expected, atol=1e-4, rtol=0
    )


def test_the_aesthetic_predictor(folder):
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255
    x, _, _ = reference(folder, images, PROMPTS)
    weights = load_file(folder / "aesthetic.safetensors")
    for number in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    score = build_reward(f"aesthetic@{folder}", CPU)(images, PROMPTS)
    torch.testing.assert_close(score, x[:, 0], atol=1e-4, rtol=1e-4)
    assert score.std() > 1e-3


def test_what_cannot_be_loaded_is_one_message(folder, tmp_path):
    with pytest.raises(InputError, match=r"hpsv2 has no weights on the hub.*hpsv2@FOLDER"):
        build_reward("hpsv2", CPU)
    with pytest.raises(
        InputError, match=r"pickscore cannot be loaded from yuvalkirstain/PickScore_v1.*pickscore@"
    ):
        build_reward("pickscore", CPU)
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
