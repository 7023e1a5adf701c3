"""Text in pictures: what tiny vision-language models read, token by token, and what that is worth."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_vqascore import CPU, FAMILIES, WROTE, folder_of, pictures  # noqa: F401 (a fixture)

from conftest import driftrl
from driftrl.build import build_reward
from driftrl.checks import InputError
from driftrl.pictures import to_pil
from driftrl.rewards.calling import ask
from driftrl.rewards.ocr import OCRScore, edit_distance, legibility, wanted_text
from driftrl.types import Prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_the_likeliest_tokens_of_each_image_alone(folder_of, family):  # noqa: F811
    """One after the other, nothing padded, the whole text given anew for each token."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder, images = folder_of(family), pictures(3)
    reward = OCRScore(folder, question="What does it say?", longest=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    expected, tokens = [], set()
    for image in images:
        place, seen = FAMILIES[family][1](folder, to_pil(image))
        prefix, suffix = ("<|endoftext|>", "<think></think>") if family == "llava" else ("", "")
        text = WROTE.format(prefix=prefix, place=place, question="What does it say?", suffix=suffix)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        read = []
        while len(read) < 4:
            if "image_grid_thw" in seen:
                seen["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
            with torch.no_grad():
                read.append(int(model(input_ids=ids, **seen).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([read[-1:]])], 1)
        tokens.add(tuple(read))
        expected.append(tokenizer.decode(read, skip_special_tokens=True))
    assert reward.read(images) == expected
    assert len(tokens) > 1 or family == "idefics3"  # whose random weights read the same everywhere


def test_a_score_is_of_what_was_read_and_of_what_was_asked_for(folder_of, monkeypatch):  # noqa: F811
    reward = build_reward(f"ocr@{folder_of('idefics3')}", CPU)
    reward.batch_size = 2
    readings = iter([["OPEN", "now  open!"], ["opon"]])
    monkeypatch.setattr(reward, "read", lambda images: next(readings))
    prompts = ['a sign that says "Open"', "a \u201copen\u201d door", Prompt("a shop", {"text": "open"})]
    assert ask(reward, pictures(3), prompts).tolist() == [1.0, 1.0, 0.75]
    with pytest.raises(
        InputError, match=r"in double quotes in the prompt or as 'text' in its metadata; got 'a cat'"
    ):
        ask(reward, pictures(1), ["a cat"])


@given(a=st.text("abc", max_size=6), b=st.text("abc", max_size=6))
def test_edit_distance_is_the_shortest_way(a, b):
    """Breadth first over texts that are one edit apart."""
    reached, distance = {a}, 0
    while b not in reached:
        distance += 1
        reached |= set(itertools.chain.from_iterable(_neighbours(text) for text in reached if len(text) <= 7))
        if distance == 2:  # farther it takes too long: bounds then
            break
    found = edit_distance(a, b)
    assert found == edit_distance(b, a) and abs(len(a) - len(b)) <= found <= max(len(a), len(b))
    assert found == distance if b in reached else found > 2


def _neighbours(text):
    for at in range(len(text) + 1):
        yield from (text[:at] + letter + text[at:] for letter in "abc")
        if at < len(text):
            yield text[:at] + text[at + 1 :]
            yield from (text[:at] + letter + text[at + 1 :] for letter in "abc")


def test_what_is_wanted_and_what_it_is_worth():
    assert wanted_text('"A" and "B"') == "A"
    assert legibility("hello world", "HelloWorld") == 1.0
    assert legibility("a very long text of something else", "sign") == 0.0
    assert legibility("sgin", "sign") == 0.5
    for text in ("", "  "):
        with pytest.raises(InputError, match="expected the text"):
            wanted_text("a sign", {"text": text})


def test_a_run_is_trained_on_it(folder_of, config, tmp_path):  # noqa: F811
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"a {kind}", "text": "open"}) + "\n" for kind in ("sign", "door", "shop")
        )
    )
    name = f"ocr@{folder_of('idefics3')}"
    rewards = [{"name": "incompressibility", "normalize": "prompt"}, {"name": name}]
    settings = config(iterations=1, reward=rewards, prompts__set=str(tmp_path / "prompts.jsonl"))
    (tmp_path / "run.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    result = driftrl("train", tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 <= json.loads(line)[f"reward/{name}/mean"] <= 1
