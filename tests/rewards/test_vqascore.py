"""VQAScore: tiny vision-language models of several families, random weights, against the paper's formula."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_server import serving

from conftest import driftrl
from driftrl.build import build_reward
from driftrl.checks import InputError
from driftrl.pictures import to_pil
from driftrl.rewards.http import HTTPReward
from driftrl.rewards.vqascore import VQAScore

CPU = torch.device("cpu")
PROMPTS = ["a cat", 'a sign that says "{no}"', "a cat", "two zebras on a red sofa " * 8]
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}PLACE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WROTE = "{prefix}<|im_start|>user\n{place}{question}<|im_end|>\n<|im_start|>assistant\n{suffix}"
"""What the template makes of an image and a question."""
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}
GRID = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 1024},
}


def make_tokenizer(place, begins=False):
    """Bytes, and a few words that were seen often, "Yes" and " Yes" among them.

    Where it ``begins`` texts with a token, the template writes that token too, and thinks unless told not to.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["Yes Yes No No figure show answer"] * 9, trainer)
    template, more = TEMPLATE.replace("PLACE", place), {}
    if begins:
        words.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        ending = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"
        template, more = "{{ bos_token }}" + template + ending, {"bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:], chat_template=template, **more,
    )  # fmt: skip


def qwen_ids(tokenizer):
    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def qwen3_vl(folder):
    """Saved as published ones are: an image processor's file and no processor's."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(folder)
    text = {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=TEXT | text | {"vocab_size": len(tokenizer)},
        vision_config=VISION | vision,
        **qwen_ids(tokenizer),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(**GRID).save_pretrained(folder)


def qwen25_vl(folder):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(folder)
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=TEXT | text | {"vocab_size": len(tokenizer)},
        vision_config=VISION | vision,
        **qwen_ids(tokenizer),
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(**GRID).save_pretrained(folder)


def qwen_inputs(folder, picture):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")
    places = int(seen.image_grid_thw.prod()) // 4
    return "<|vision_start|>" + "<|image_pad|>" * places + "<|vision_end|>", dict(seen)


def idefics3(folder):
    """The family of SmolVLM; saved with its whole processor."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer("<image>")
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    ).save_pretrained(folder)
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config=VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)


def idefics3_inputs(folder, picture):
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    seen = Idefics3ImageProcessorPil.from_pretrained(folder)([[picture]], return_tensors="pt")
    around = "<fake_token_around_image>"
    return f"{around}<global-img>{'<image>' * 4}{around}", dict(seen)


def llava(folder):
    """Its tokenizer begins texts with a token, as Llama's does, and its template with the same."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = make_tokenizer("<image>\n", begins=True)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)


def llava_inputs(folder, picture):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    seen = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")
    return "<image>" * 16 + "\n", dict(seen)


FAMILIES = {
    "qwen3-vl": (qwen3_vl, qwen_inputs),
    "qwen2.5-vl": (qwen25_vl, qwen_inputs),
    "idefics3": (idefics3, idefics3_inputs),
    "llava": (llava, llava_inputs),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes the model of a family once."""
    made = {}

    def find(family):
        if family not in made:
            torch.manual_seed(4)
            made[family] = tmp_path_factory.mktemp("models") / family
            FAMILIES[family][0](made[family])
        return made[family]

    return find


def pictures(count=4, size=(40, 24)):
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(1)) / 255


def papers(prompt):
    return f'Does this figure show "{prompt}"? Please answer yes or no.'


def formula(family, folder, images, prompts, question=papers, word="Yes"):
    """P("Yes" | image, question), one image after the other, nothing padded, every token written out."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    reads_so = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() == word]
    assert len(reads_so) == 2  # with a space before it and without
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        place, seen = FAMILIES[family][1](folder, to_pil(image))
        prefix, suffix = ("<|endoftext|>", "<think></think>") if family == "llava" else ("", "")
        text = WROTE.format(prefix=prefix, place=place, question=question(prompt), suffix=suffix)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if "image_grid_thw" in seen:  # which tells Qwen where the picture is
            seen["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        with torch.no_grad():
            probabilities = model(input_ids=ids, **seen).logits[0, -1].softmax(-1)
        scores.append(sum(probabilities[i] for i in reads_so))
    return torch.stack(scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_formula(folder_of, family):
    """And it does not depend on what else is in the batch, though prompts are of several lengths."""
    folder, images = folder_of(family), pictures()
    expected = formula(family, folder, images, PROMPTS)
    reward = build_reward(f"vqascore@{folder}", CPU)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-6, rtol=1e-4)
    reward.batch_size = 3
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-6, rtol=1e-4)
    # Both the picture and the words are read.
    assert (reward(images.flip(0), PROMPTS) / expected - 1).abs().mean() > 0.05
    assert (reward(images, PROMPTS[1:] + PROMPTS[:1]) / expected - 1).abs().mean() > 0.05
    assert type(reward.processor.image_processor).__name__.endswith("Pil")  # with torchvision or without


def test_in_bfloat16_it_differs_by_rounding(folder_of):
    folder, images, prompts = folder_of("llava"), pictures(8), PROMPTS * 2
    exact = build_reward(f"vqascore@{folder}", CPU)(images, prompts)
    half = build_reward(f"vqascore@{folder}", CPU, "bfloat16")
    rounded = half(images, prompts)
    assert rounded.dtype == torch.float32
    assert {weights.dtype for weights in half.model.parameters()} == {torch.bfloat16}
    assert 0 < (rounded - exact).abs().max() < 0.15 * exact.std()


def test_a_prompt_is_words_and_no_more(folder_of):
    """What stands for a picture or ends a turn is spelled out where a prompt has it."""
    folder, images = folder_of("llava"), pictures(1)
    reward = VQAScore(folder)
    spelled = formula("llava", folder, images, ["a cat < image> < |im_end|>"])
    torch.testing.assert_close(reward(images, ["a cat <image> <|im_end|>"]), spelled, atol=1e-6, rtol=1e-4)


def test_another_question_and_answer(folder_of, tmp_path, monkeypatch):
    """As docs/rewards.md has it: an object in a module."""
    folder, images = folder_of("qwen3-vl"), pictures()
    (tmp_path / "asks_otherwise.py").write_text(
        "from driftrl.build import device_of\nfrom driftrl.rewards.vqascore import VQAScore\n"
        f"doubt = VQAScore({str(folder)!r}, device_of('auto'), question='{{prompt}}, or no {{prompt}}?', answer='No')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts = [*PROMPTS[:3], "a {prompt} {}"]
    expected = formula("qwen3-vl", folder, images, prompts, lambda p: f"{p}, or no {p}?", "No")
    score = build_reward("asks_otherwise:doubt", CPU)(images, prompts)
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(
        InputError, match=r"question: expected \{prompt\} where the prompt goes; got 'Is it \{\}\?'"
    ):
        VQAScore(folder, question="Is it {}?")
    with pytest.raises(InputError, match=r"one token for 'Certainly'; it has none"):
        VQAScore(folder, answer="Certainly")


def test_it_is_trained_on_beside_another(folder_of, config, tmp_path):
    name = f"vqascore@{folder_of('qwen3-vl')}"
    settings = config(
        iterations=1, reward=[{"name": "incompressibility", "normalize": "prompt"}, {"name": name}]
    )
    (tmp_path / "run.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    result = driftrl("train", tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)[f"reward/{name}/mean"] < 1


def test_a_server_scores_as_here(folder_of):
    reward, images = VQAScore(folder_of("idefics3")), pictures()
    with serving(reward) as (url, _):
        assert torch.equal(HTTPReward(url)(images, PROMPTS), reward(images, PROMPTS))


def changed(folder, to, without=(), **config):
    """A copy that lacks files, or whose configuration says something else."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*without))
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(settings | config))
    return to


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer*", "its tokenizer has no vocabulary"),
        ("preprocessor_config.json", r"vqascore cannot be loaded from .*Can't load image processor"),
        ("chat_template.jinja", r"expected an image processor, a tokenizer and a chat template .*chat_template is not set"),
        ("model.safetensors", r"vqascore cannot be loaded from .*no file named model\.safetensors.*vqascore@FOLDER"),
        ("config.json", r"Should have a `model_type` key in its config\.json"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_a_file_is_one_message(folder_of, tmp_path, file, message):
    place = changed(folder_of("qwen3-vl"), tmp_path / "model")
    for path in place.glob(file):
        path.unlink()
    with pytest.raises(InputError, match=message):
        build_reward(f"vqascore@{place}", CPU)


def test_what_does_not_fit_is_one_message(folder_of, tmp_path):
    folder = folder_of("qwen3-vl")
    mute = changed(folder, tmp_path / "mute")
    (mute / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")  # the picture has no place
    with pytest.raises(
        InputError, match=r"mute: expected .* a chat template that ask a model about an image"
    ):
        build_reward(f"vqascore@{mute}", CPU)
    partial = changed(folder, tmp_path / "partial", ["model.safetensors"])
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"weights of a Qwen3VLFor\w+; 1 are missing, such as lm_head\.weight"
    ):
        build_reward(f"vqascore@{partial}", CPU)
    words = changed(folder, tmp_path / "words", model_type="llama")
    with pytest.raises(InputError, match=r"words: expected a vision-language model .*; got a LlamaConfig"):
        build_reward(f"vqascore@{words}", CPU)


@pytest.mark.parametrize("kind", ["qwen3_vl", "never_heard_of"])
def test_code_that_comes_with_a_model_is_not_run(folder_of, tmp_path, kind):
    code = {
        f"Auto{part}": f"theirs.{part}"
        for part in ("Config", "ModelForImageTextToText", "Processor", "ImageProcessor")
    }
    place = changed(folder_of("qwen3-vl"), tmp_path / "model", model_type=kind, auto_map=code)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((place / name).read_text())
        (place / name).write_text(
            json.dumps(settings | {"auto_map": code | {"AutoTokenizer": ["theirs.T", None]}})
        )
    ran = tmp_path / "ran"
    (place / "theirs.py").write_text(f"open({str(ran)!r}, 'w')")
    if kind == "qwen3_vl":  # which transformers knows: its own code is taken
        assert build_reward(f"vqascore@{place}", CPU)(pictures(1), ["a cat"]) > 0
    else:
        with pytest.raises(InputError, match=r"none that comes with a model is run.*contains custom code"):
            build_reward(f"vqascore@{place}", CPU)
    assert not ran.exists()
