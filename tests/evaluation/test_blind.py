"""The page for raters: complete, blind, repeatable, from whatever images there are; what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from made import PROMPTS, make_run
from PIL import Image

from driftrl.checks import InputError
from driftrl.evaluation.blind import write_blind
from driftrl.evaluation.evaluate import evaluate, load_evaluation

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def paint(run, colour):
    """Give the last checkpoint of a run sheets of one colour, so that its images tell where they come from."""
    evaluation = load_evaluation(run)
    for place in range(len(PROMPTS)):
        Image.new("RGB", (32, 8), COLOURS[colour]).save(
            evaluation.sheet(run, evaluation.points[-1], place), lossless=True
        )
    return run


def pair(folder, names=("zeta", "omicron")):
    return [paint(make_run(folder / name, name), colour) for name, colour in zip(names, COLOURS, strict=True)]


def pictures(page):
    """For each pair the two images, left and right, and the prompt, as the page shows them."""
    text = page.read_text()
    found = []
    for article in re.findall(r"<article.*?</article>", text, re.DOTALL):
        files = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", article)]
        assert len(files) == 2
        found.append((re.search(r"<h2[^>]*>(.*?)</h2>", article).group(1), files))
    return found


def colour_of(file):
    red, _, blue = Image.open(io.BytesIO(file)).convert("RGB").getpixel((2, 2))
    return "red" if red > blue else "blue"


def is_red(file):
    red, green, blue = Image.open(io.BytesIO(file)).convert("RGB").getpixel((2, 2))
    return red > 150 and green < 100 and blue < 100


def nearly_equal(a, b):
    """Whether two pictures are the same up to what WebP loses twice; those of two models are not."""
    x, y = (np.asarray(Image.open(io.BytesIO(file)).convert("RGBA"), float) for file in (a, b))
    return x.shape == y.shape and np.abs(x - y)[x[..., 3] > 0].mean() < 8


def test_the_key_names_what_each_side_shows(tmp_path):
    page = write_blind(pair(tmp_path), tmp_path / "kit", seed=1)
    key = json.loads((tmp_path / "kit/key.json").read_text())
    assert [(s["method"], s["run"], s["checkpoint"]) for s in key["shown"]] == [
        ("zeta", "zeta", "000020"),
        ("omicron", "omicron", "000020"),
    ]
    assert sorted(trial["prompt"] for trial in key["trials"]) == sorted(PROMPTS)
    shown = {"zeta": "red", "omicron": "blue"}
    for trial, (prompt, (left, right)) in zip(key["trials"], pictures(page), strict=True):
        assert prompt == trial["prompt"].replace("<", "&lt;").replace(">", "&gt;")
        assert [colour_of(left), colour_of(right)] == [shown[trial["left"]], shown[trial["right"]]]
    lefts = [trial["left"] for trial in key["trials"]]
    assert abs(lefts.count("zeta") - lefts.count("omicron")) == 1  # of three


def test_the_page_is_the_same_whatever_the_methods_are_called(tmp_path):
    one = write_blind(pair(tmp_path / "first"), tmp_path / "first/kit", seed=5)
    two = write_blind(pair(tmp_path / "other", ("drift", "grpo-42")), tmp_path / "other/kit", seed=5)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in (tmp_path / "first/kit").iterdir()) == ["index.html", "key.json"]


def test_the_page_stands_alone_and_every_image_has_words(tmp_path):
    page = write_blind(pair(tmp_path), tmp_path / "kit").read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page
    assert len(re.findall(r'<img src="data:image/webp;base64,[^"]+" alt="[^"]+"', page)) == 6
    assert "<script>alert" not in page


def test_a_seed_repeats_the_page_and_without_one_it_is_new(tmp_path):
    runs = pair(tmp_path)
    first = write_blind(runs, tmp_path / "a", seed=7)
    assert write_blind(runs, tmp_path / "b", seed=7).read_bytes() == first.read_bytes()
    orders, sides, seeds = set(), set(), set()
    for number in range(12):
        write_blind(runs, tmp_path / f"c{number}")
        key = json.loads((tmp_path / f"c{number}/key.json").read_text())
        orders.add(tuple(trial["prompt"] for trial in key["trials"]))
        sides.add(tuple(trial["left"] for trial in key["trials"]))
        seeds.add(key["seed"])
    assert len(seeds) == 12 and len(orders) > 1 and len(sides) > 1


def test_refuses_what_cannot_be_judged(tmp_path):
    zeta, omicron = pair(tmp_path)
    out = tmp_path / "kit"
    other = make_run(tmp_path / "other", "other", seed=3, images=8)
    for runs, message in (
        ([zeta, omicron, other], "two runs"),
        ([zeta, zeta], "nothing to choose"),
        ([zeta, other], r"differ in images \(4 and 8\)"),
        ([zeta, tmp_path / "nowhere"], "there is no such run"),
        ([zeta, tmp_path], "driftrl evaluate"),
    ):
        with pytest.raises(InputError, match=message):
            write_blind(runs, out)
    late = omicron / "checkpoints/000050"
    late.mkdir(parents=True)
    (late / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="checkpoint 000050 was not measured"):
        write_blind([zeta, late], out)
    assert not out.exists()
    page = write_blind([zeta, omicron], out)
    before = page.read_bytes()
    with pytest.raises(InputError, match="is taken"):
        write_blind([zeta, omicron], out)
    assert page.read_bytes() == before


def test_a_checkpoint_may_be_chosen(tmp_path):
    zeta, omicron = pair(tmp_path)
    early = omicron / "checkpoints/000010"
    early.mkdir(parents=True)
    (early / "manifest.json").write_text("{}")
    write_blind([zeta, early], tmp_path / "kit")
    key = json.loads((tmp_path / "kit/key.json").read_text())
    assert [shown["checkpoint"] for shown in key["shown"]] == ["000020", "000010"]


def test_one_run_stands_beside_its_base_model(tmp_path):
    run = paint(make_run(tmp_path / "zeta", "zeta"), "red")
    page = write_blind([run], tmp_path / "kit", seed=2)
    key = json.loads((tmp_path / "kit/key.json").read_text())
    assert [(s["method"], s["checkpoint"]) for s in key["shown"]] == [
        ("base model", "base"),
        ("zeta", "000020"),
    ]
    for trial, (_, sides) in zip(key["trials"], pictures(page), strict=True):
        reds = [trial[side] for side, file in zip(("left", "right"), sides, strict=True) if is_red(file)]
        assert reds == ["zeta"]


def test_seeds_and_checkpoints_of_one_method_are_told_apart(tmp_path):
    first, other = make_run(tmp_path / "a", "zeta"), make_run(tmp_path / "b", "zeta", seed=1)
    early = first / "checkpoints/000010"
    early.mkdir(parents=True)
    (early / "manifest.json").write_text("{}")
    for sources, names in (
        ([first, other], ["zeta, seed 0", "zeta, seed 1"]),
        ([early, first], ["zeta, 000010", "zeta, 000020"]),
    ):
        kit = tmp_path / f"kit-{names[1][-1]}"
        write_blind(sources, kit)
        assert [s["method"] for s in json.loads((kit / "key.json").read_text())["shown"]] == names


def test_kept_images_and_images_drawn_again_are_the_same(config, tmp_path):
    from driftrl import Trainer

    prompts = tmp_path / "two.txt"
    prompts.write_text("a cat\na dog\n")
    runs = []
    for name in ("zeta", "omicron"):
        rate = 0.02 if name == "zeta" else 0.05
        run = Trainer(config(name=name, iterations=1, optimizer__learning_rate=rate), tmp_path / name).run()
        runs.append(evaluate(run, prompts=str(prompts), images=3, keep_images=True))
    kept = write_blind(runs, tmp_path / "kept", seed=0)
    assert all(left != right for _, (left, right) in pictures(kept))
    next(runs[0].glob("images/evaluation-*/000001/000-*/000.png")).write_bytes(b"torn")
    sheets = write_blind(runs, tmp_path / "sheets", seed=0)  # of both, though only one lost its files
    assert all(
        a != b
        for (_, x), (_, y) in zip(pictures(kept), pictures(sheets), strict=True)
        for a, b in zip(x, y, strict=True)
    )
    beside_base = write_blind(runs[:1], tmp_path / "base-sheets", seed=0)
    for run in runs:
        shutil.rmtree(run / "images")
    alone = write_blind(runs[:1], tmp_path / "base-drawn", seed=0)
    for (_, x), (_, y) in zip(pictures(beside_base), pictures(alone), strict=True):
        assert all(nearly_equal(a, b) for a, b in zip(x, y, strict=True))
    assert write_blind(runs, tmp_path / "drawn", seed=0).read_bytes() == kept.read_bytes()
    (runs[1] / "checkpoints/000001/manifest.json").write_text("{}")
    with pytest.raises(InputError, match="not there as it was"):
        write_blind(runs, tmp_path / "gone", seed=0)
