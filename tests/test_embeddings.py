"""Embeddings of prompt sets that do not fit: the same rows, whatever they are drawn with, and the same runs."""

import pytest
import torch
from families import make_flux, make_sd3, make_sdxl

from driftrl import Trainer, embeddings
from driftrl.build import build_policy
from driftrl.checkpoint import damage
from driftrl.config import parse_config
from driftrl.embeddings import Embeddings, nbytes

PROMPTS = tuple(
    f"a {animal}" for animal in ["cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird"]
)


@pytest.fixture
def small_rooms(monkeypatch):
    """No set fits."""
    monkeypatch.setattr(embeddings, "FEW", 0)
    monkeypatch.setattr(Embeddings.__init__, "__defaults__", (0, embeddings.HOST_ROOM))


def tensors(rows):
    return {"embeds": rows.embeds, "null": rows.null_embeds, **rows.extra}


def assert_same(a, b, **how):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **how)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_rows_are_the_same_whatever_they_are_drawn_with(family, pipeline_folder, tmp_path, small_rooms):
    makers = {"sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
    folder = makers[family](tmp_path / family) if family in makers else pipeline_folder
    policy = build_policy(parse_config({"model": {"path": str(folder)}}), adapter=False)
    whole, lazy, other = policy.encode(PROMPTS), Embeddings(policy, PROMPTS), Embeddings(policy, PROMPTS)
    drawn = lazy.rows([5, 2, 5])
    assert_same(drawn, whole.rows(torch.tensor([5, 2, 5])), rtol=1e-5, atol=1e-5)
    other.rows([0, 5, 7, 1])
    assert_same(other.rows(torch.tensor([5, 2, 5])), drawn, rtol=0, atol=0)
    assert_same(lazy.first, whole.rows(torch.tensor([0])), rtol=1e-5, atol=1e-5)


def test_what_fits_is_embedded_once_and_what_does_not_when_it_is_drawn(pipeline_folder, monkeypatch):
    policy = build_policy(parse_config({"model": {"path": str(pipeline_folder)}}), adapter=False)
    encode, asked = policy.encode, []

    def counted(prompts, at_once=None):
        asked.append(len(prompts))
        return encode(prompts, at_once)

    monkeypatch.setattr(policy, "encode", counted)
    monkeypatch.setattr(embeddings, "FEW", 4)
    each = nbytes(Embeddings(policy, PROMPTS[:4]).first)
    assert asked == [4]
    fits = Embeddings(policy, PROMPTS, room=8 * each)
    fits.rows([1, 2])
    assert asked == [4, 1, 8] and fits.held(2) == 8 * each + each
    lazy = Embeddings(policy, PROMPTS, room=8 * each - 1, host_room=2 * each)
    for rows in ([1, 2, 2], [2, 1], [1, 3, 4], [3]):  # two are kept, and the others embedded each time
        lazy.rows(rows)
    assert asked == [4, 1, 8, 1, 2, 2, 1] and lazy.held(2) == 2 * each + 2 * each + each


def test_what_main_memory_holds_is_embedded_once_at_the_start(pipeline_folder, monkeypatch):
    """Each on its own, a few at a time; and half precision takes half of the room, and loses nothing."""
    monkeypatch.setattr(embeddings, "FEW", 4)
    settings = {"model": {"path": str(pipeline_folder), "dtype": "bfloat16"}}
    policy = build_policy(parse_config(settings), adapter=False)
    encode, asked = policy.encode, []
    monkeypatch.setattr(
        policy, "encode", lambda p, at_once=None: asked.append((len(p), at_once)) or encode(p, at_once)
    )
    each = nbytes(encode(PROMPTS[:1]))
    held = Embeddings(policy, PROMPTS, room=3 * each, host_room=4 * each)
    assert asked == [(1, None), (3, 1), (3, 1), (2, 1)]
    rows = held.rows([7, 0, 7, 3])
    assert len(asked) == 4 and rows.embeds.dtype == torch.float32
    assert_same(rows, encode([PROMPTS[n] for n in (7, 0, 7, 3)], 1), rtol=0, atol=0)
    lazy = Embeddings(policy, PROMPTS, room=3 * each, host_room=4 * each - 1)
    assert asked[4:] == [(1, None)]
    assert_same(lazy.rows([7, 0, 7, 3]), rows, rtol=0, atol=0)


def test_a_run_whose_prompts_do_not_fit_learns_the_same_and_resumes_to_the_bit(config, tmp_path, small_rooms):
    once = Trainer(config(iterations=4), tmp_path / "once").run()
    Trainer(config(iterations=2), tmp_path / "parts").run()
    parts = Trainer(config(iterations=4), tmp_path / "parts", resume=True).run()
    for run in (once, parts):
        assert damage(run / "checkpoints/000004") is None
    files = ("training.safetensors", "pytorch_lora_weights.safetensors")
    for file in files:
        one, two = (run / "checkpoints/000004" / file for run in (once, parts))
        assert one.read_bytes() == two.read_bytes()
    assert (once / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_a_set_that_fits_gives_the_same_run_up_to_rounding(config, tmp_path, monkeypatch):
    first = Trainer(config(iterations=1), tmp_path / "fits")
    monkeypatch.setattr(embeddings, "FEW", 0)
    monkeypatch.setattr(Embeddings.__init__, "__defaults__", (0, 0))
    second = Trainer(config(iterations=1), tmp_path / "not")
    one, two = (trainer.loop.iterate().metrics for trainer in (first, second))
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
