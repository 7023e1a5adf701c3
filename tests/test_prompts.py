"""Prompt sets and the order in which prompts are drawn."""

import json
import warnings
from copy import deepcopy as copy_of
from itertools import pairwise

import pytest

from driftrl.build import build_loop
from driftrl.checks import InputError
from driftrl.config import TrainConfig, dump_config, load_config
from driftrl.files import write_json
from driftrl.prompts import (
    PromptWarning,
    as_json,
    draw,
    earlier,
    evaluated,
    load_prompts,
    prompt_sets,
    trained,
    warn_of_doubles,
)
from driftrl.types import Prompt


def test_the_package_has_its_sets():
    assert set(prompt_sets()) >= {"animals", "animals8", "eval40", "attributes", "compositions"}
    assert len(load_prompts("animals")) == 45
    assert len(load_prompts("eval40")) == 40
    nested = [load_prompts(name) for name in ("animals5", "animals8", "animals10", "animals")]
    assert [len(set(prompts)) for prompts in nested] == [5, 8, 10, 45]
    assert all(set(a) < set(b) for a, b in pairwise(nested))
    assert "an ant" in load_prompts("animals")


def test_files(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("# a comment\n\n a cat \na dog\n")
    assert load_prompts(str(text)) == ("a cat", "a dog")
    lines = tmp_path / "mine.jsonl"
    lines.write_text('"a cat"\n{"prompt": "a dog", "weight": 2}\n')
    assert load_prompts(str(lines)) == ("a cat", "a dog")


def test_prompts_themselves(tmp_path):
    """In YAML, by --set and in Python a list will do."""
    words = (" a cat on 3 legs", "猫")
    config = load_config(None, ["prompts.set=[' a cat on 3 legs', 猫]", "prompts.per_iteration=2"])
    assert config.prompts.set == ["a cat on 3 legs", "猫"]
    assert config == TrainConfig(prompts={"set": words, "per_iteration": 2})
    (tmp_path / "config.yaml").write_text(dump_config(config), "utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    assert build_loop(config, tmp_path).prompt_set == load_prompts(words) == trained(words, tmp_path)
    assert (
        evaluated(None, words) == evaluated(words, "animals") == ("a list of 2 prompts", load_prompts(words))
    )


@pytest.mark.parametrize("given", ["[]", "[a cat, '']", "[3]", "3", "{a: b}"])
def test_a_list_that_has_no_prompts_is_refused(given):
    with pytest.raises(
        InputError, match=r"--set prompts\.set: expected a prompt set, .*or a list of prompts"
    ):
        load_config(None, [f"prompts.set={given}"])


def test_a_list_has_no_metadata():
    """It would be lost, and a reward that asks for it would see none."""
    with pytest.raises(InputError, match=r"prompts\.set: expected the name of the JSONL file"):
        TrainConfig(prompts={"set": [Prompt("a cat", {"count": 2})]})


def test_a_prompt_in_place_of_a_list_is_told_how():
    with pytest.raises(InputError, match=r"a list in a configuration: --set 'prompts.set=\[a red cat\]'"):
        load_prompts("a red cat")
    with pytest.raises(InputError, match="expected text in UTF-8; got 3"):
        load_prompts(["a cat", 3])


def test_files_of_other_systems_and_scripts(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_bytes('\ufeffa "big" cat\r\n猫 🐈\r\n'.encode())
    assert load_prompts(str(text)) == ('a "big" cat', "猫 🐈")
    lines = tmp_path / "mine.jsonl"
    lines.write_text('"a cat\u2028on a mat"\r\n{"prompt": "a dog"}\n', "utf-8")
    assert load_prompts(str(lines)) == ("a cat\u2028on a mat", "a dog")


def test_a_file_that_is_not_there_is_named_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"there is no {tmp_path}/mine.txt"):
        load_prompts("mine.txt")
    with pytest.raises(InputError, match=r"got 'animal'; did you mean 'animals'"):
        load_prompts("animal")


@pytest.mark.parametrize("name", ["mine.json", "mine.csv"])
def test_a_file_whose_lines_are_no_prompts_is_refused(tmp_path, name):
    (tmp_path / name).write_text('["a cat", "a dog"]\n')
    with pytest.raises(InputError, match=rf"JSONL; got .*{name}"):
        load_prompts(str(tmp_path / name))


def test_what_a_line_has_beside_its_prompt_is_kept(tmp_path):
    """GenEval's files say which objects a picture should show."""
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": " a cat ", "include": [{"class": "cat", "count": 1}]}, "a dog", {"prompt": "an owl"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_prompts(str(path))
    assert found == ("a cat", "a dog", "an owl")
    assert found[0].metadata == lines[0]
    lines[0]["prompt"] = "a cat"
    assert [type(prompt) for prompt in found] == [Prompt, str, str]
    copy = tmp_path / "run" / "prompts.json"
    copy.parent.mkdir()
    write_json(copy, as_json(found))
    (copy.parent / "config.yaml").write_text("")
    again = trained("gone.jsonl", copy.parent)
    assert again == found
    assert as_json(again) == as_json(found) == [lines[0], "a dog", "an owl"]
    assert copy_of(again[0]).metadata == lines[0]


@pytest.mark.parametrize(
    "line",
    ["{", '{"prompt": "a cat", "share": NaN}', '{"text": "a cat"}', "3", '{"prompt": ""}', "[" * 100_000],
)
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'"a cat"\n{line}\n')
    with pytest.raises(InputError, match="line 2"):
        load_prompts(str(path))


def test_every_prompt_comes_once_per_pass_in_an_order_of_its_own():
    drawn = [i for iteration in range(6) for i in draw(9, 3, 0, iteration)]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))
    assert drawn[:9] != drawn[9:]
    assert draw(9, 3, 0, 4) == draw(9, 3, 0, 4)
    assert [draw(45, 8, 0, i) for i in range(3)] != [draw(45, 8, 1, i) for i in range(3)]


def test_what_came_before_in_an_iteration_is_counted():
    which = draw(5, 4, 0, 1)  # places 4 to 7 of passes of five
    assert len(which) == 4
    assert earlier(which) == [which[:place].count(prompt) for place, prompt in enumerate(which)]
    assert earlier([3, 3, 1, 3]) == [0, 1, 0, 2]


def test_a_users_own_prompts_are_what_the_run_is_measured_on(tmp_path):
    assert evaluated(None, "animals8") == ("eval40", load_prompts("eval40"))
    assert evaluated("animals5", str(tmp_path / "gone.txt")) == ("animals5", load_prompts("animals5"))
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text("a\nb\n")
    many.write_text("".join(f"{k}\n" for k in range(400)))
    assert evaluated(None, str(few)) == (str(few), ("a", "b"))
    assert evaluated(None, str(many))[1] == tuple(str(10 * k) for k in range(40))
    (tmp_path / "prompts.json").write_text('["x", "y"]')  # a run's own copy, whatever became of the file
    assert evaluated(None, "gone.txt", tmp_path) == ("gone.txt", ("x", "y"))
    (tmp_path / "prompts.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="damaged"):
        evaluated(None, "gone.txt", tmp_path)
    with pytest.raises(InputError, match="gone"):
        evaluated(None, "gone.txt", tmp_path / "other")


def test_prompts_that_are_there_twice_are_warned_of_once(config, tmp_path):
    """Nothing else changes: each line is a prompt of its own, as it may be meant."""
    path = tmp_path / "twice.txt"
    path.write_text("a cat\na dog\na cat\na cow\n")
    settings = config(prompts__set=str(path), prompts__per_iteration=2)
    with pytest.warns(PromptWarning) as caught:
        loop = build_loop(settings, tmp_path / "run")
    assert len([each for each in caught if each.category is PromptWarning]) == 1
    assert f'prompts.set: {path} has "a cat" more than once' in str(caught[0].message)
    assert list(loop.prompt_set) == ["a cat", "a dog", "a cat", "a cow"]


def test_prompts_that_differ_in_metadata_are_not_the_same(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "a cat", "n": 1}\n{"prompt": "a cat", "n": 2}\n"a cat"\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_doubles(load_prompts(str(path)), "some")
        for name in prompt_sets():
            warn_of_doubles(load_prompts(name), name)
    many = [f"{k} é" for k in range(5)] * 2
    with pytest.warns(PromptWarning, match='has "0 é", "1 é", "2 é" and 2 more more than once'):
        warn_of_doubles(many, "some")
