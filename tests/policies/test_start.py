"""Training that goes on from a LoRA: the same pictures at first, whatever its format, rank and scale."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run_command
from driftrl import Trainer, hub
from driftrl.build import build_policy
from driftrl.checks import InputError
from driftrl.evaluation.generate import generate, open_policy
from driftrl.policies.kohya import write_kohya

FEW = {"adapter__rank": 2, "adapter__alpha": 3.0, "adapter__targets": ["to_q", "to_out.0"]}
MORE = {"adapter__rank": 4, "adapter__alpha": 2.0, "adapter__targets": ["to_k", "to_out.0", "to_q", "to_v"]}
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def drawn():
    def images(source):
        policy, _ = open_policy(source, deterministic=True)
        return generate(policy, ["a cat"], 2)

    return images


@pytest.fixture
def first(config, tmp_path):
    return Trainer(config(iterations=1, optimizer__learning_rate=0.03, **FEW), tmp_path / "first").run()


def test_a_lora_is_drawn_with_on_a_model(config, first, drawn, pipeline_folder, tmp_path):
    """Whoever trained it: as the run that it is of, turned down too; its rank and targets are found in it."""
    expected = drawn(first)
    for source in (first, first / "checkpoints" / "000001", first / "checkpoints" / "000001" / LORA):
        policy, noise = open_policy(pipeline_folder, 4, 2.0, deterministic=True, lora=str(source))
        assert noise.eta == 0
        torch.testing.assert_close(generate(policy, ["a cat"], 2), expected, atol=3e-5, rtol=0)
        with policy.reference():
            assert (generate(policy, ["a cat"], 2) - expected).abs().max() > 1e-3
    half, _ = open_policy(first, deterministic=True, lora_scale=0.5)
    policy, _ = open_policy(pipeline_folder, 4, 2.0, deterministic=True, lora=str(first), lora_scale=0.5)
    torch.testing.assert_close(
        generate(policy, ["a cat"], 2), generate(half, ["a cat"], 2), atol=3e-5, rtol=0
    )
    for wrong, message in (
        ({"source": first, "lora": str(first)}, "--lora: expected a model to put it on"),
        (
            {"source": pipeline_folder, "lora": str(tmp_path / "none.safetensors")},
            r"--lora: .*there is no such",
        ),
        ({"source": pipeline_folder, "lora": str(pipeline_folder)}, r"--lora: .*has no"),
    ):
        with pytest.raises(InputError, match=message):
            open_policy(**wrong)


@pytest.mark.parametrize(
    "form", ["run", "kohya", *(pytest.param(form, marks=pytest.mark.slow) for form in ("checkpoint", "file"))]
)
def test_it_begins_as_the_other_ended(config, first, drawn, tmp_path, form):
    checkpoint = first / "checkpoints" / "000001"
    source = {
        "run": first,
        "checkpoint": checkpoint,
        "file": checkpoint / LORA,
        "kohya": tmp_path / "k.safetensors",
    }[form]
    if form == "kohya":
        write_kohya(checkpoint / LORA, source)
    run = Trainer(config(iterations=1, adapter__start=str(source), **MORE), tmp_path / "second").run()
    before = drawn(first / "checkpoints" / "000000")
    ended, begins = drawn(checkpoint), drawn(run / "checkpoints" / "000000")
    torch.testing.assert_close(begins, ended, atol=1e-5, rtol=0)
    assert (ended - before).abs().max() > 1e-3
    assert not torch.equal(drawn(run / "checkpoints" / "000001"), begins)
    tensors = load_file(run / "checkpoints" / "000000" / LORA)
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {4}


def test_what_it_is_compared_with_is_the_model_without_it(config, first):
    policy = build_policy(config(adapter__start=str(first), **FEW), start=True)
    plain = build_policy(config(**FEW))
    with policy.reference():
        assert torch.equal(generate(policy, ["a cat"], 1), generate(plain, ["a cat"], 1))
    assert not torch.equal(generate(policy, ["a cat"], 1), generate(plain, ["a cat"], 1))
    assert [name for name, _ in policy.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(policy.network.peft_config) == ["default"]


def test_it_is_resumed_and_measured_without_what_it_began_with(config, first, tmp_path):
    settings = {"adapter__start": str(first), **MORE}
    whole = Trainer(config(iterations=2, **settings), tmp_path / "whole").run()
    parts = Trainer(config(iterations=1, **settings), tmp_path / "parts").run()
    first.rename(tmp_path / "gone")
    Trainer(config(iterations=2, **settings), parts, resume=True).run()
    same = [load_file(run / "checkpoints" / "000002" / LORA) for run in (whole, parts)]
    assert all(torch.equal(same[1][name], tensor) for name, tensor in same[0].items())
    open_policy(parts)
    with pytest.raises(InputError, match=r"adapter\.start: .*first: there is no such run"):
        Trainer(config(iterations=1, **settings), tmp_path / "third")


def test_what_does_not_fit_is_one_message(config, first, tmp_path, pipeline_folder, monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda: False)

    def refused(**changes):
        with pytest.raises(InputError) as caught:
            build_policy(config(**{"adapter__start": str(first), **MORE} | changes), start=True)
        return str(caught.value)

    assert "has rank 2, and adapter.rank is 1; expected at least as much: --set adapter.rank=2" in refused(
        adapter__rank=1
    )
    told = refused(adapter__targets=["to_q"])
    assert "does not name: to_out.0;" in told and "--set 'adapter.targets=[to_out.0, to_q]'" in told
    assert "has no pytorch_lora_weights.safetensors" in refused(adapter__start=str(tmp_path))
    for name, more in (("nope", ""), ("./runs/nope", ""), ("runs/nope", ", and the hub does not answer")):
        told = refused(adapter__start=name)
        assert f"adapter.start: {name}: there is no such run, checkpoint, folder or file here{more}; " in told
    pickled = tmp_path / "lora.bin"
    torch.save({}, pickled)
    assert "expected a safetensors file" in refused(adapter__start=str(pickled))
    tensors = load_file(first / "checkpoints" / "000001" / LORA)
    other = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(3, 3) for name in tensors}, other)
    assert "cannot be loaded as a LoRA of this model" in refused(adapter__start=str(other))
    save_file({"a": torch.zeros(1)}, other)
    assert "cannot be loaded as a LoRA of this model" in refused(adapter__start=str(other))
    text = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(tensors | text, other)
    assert "expected a LoRA of the unet alone" in refused(adapter__start=str(other))
    status, told = run_command("train", "--set", f"adapter.start={first}", "--set", "adapter.kind=full")
    assert status == 2 and "adapter.kind 'full' trains none" in told
