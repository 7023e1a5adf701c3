"""An adapter turned down: what diffusers draws with it at a scale, from the base model to itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import run_command
from driftrl import Trainer, noise
from driftrl.build import build_policy
from driftrl.checks import InputError
from driftrl.config import load_config
from driftrl.evaluation.comparison import find, write_comparison
from driftrl.evaluation.evaluate import SCALED, evaluate, in_words, load_evaluation
from driftrl.evaluation.generate import EVALUATION, generate, open_policy
from driftrl.evaluation.report import write_picture, write_report
from driftrl.pipelines import load_pipeline
from driftrl.policies.lora import scale_lora


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """An adapter that shows, whose alpha is not its rank."""
    settings = config(optimizer__learning_rate=0.05, adapter__rank=3, adapter__alpha=5.0)
    return Trainer(settings, tmp_path_factory.mktemp("scaled") / "run").run()


def drawn(run, scale):
    policy, _ = open_policy(run, lora_scale=scale)
    return generate(policy, ["a cat"], 3, seed=5)[0]


def test_it_is_diffusers_own_scale(run):
    settings = load_config(run / "config.yaml")
    pipeline = load_pipeline(settings.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run / "checkpoints/000002", adapter_name="tuned")
    whole = drawn(run, 1.0)
    for scale in (0.3, 0.7, 1.5):
        pipeline.set_adapters(["tuned"], [scale])
        keys = [noise.generator(5, EVALUATION, 0, k, "latents") for k in range(3)]
        theirs = pipeline(["a cat"] * 3, num_inference_steps=settings.sampling.steps, guidance_scale=settings.sampling.guidance_scale,
                          eta=settings.sampling.eta, generator=keys, output_type="pt").images  # fmt: skip
        ours = drawn(run, scale)
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)
        assert (ours - whole).abs().max() > 1e-3


def test_zero_is_the_base_model_and_one_what_was_trained(run):
    policy, _ = open_policy(run)
    with policy.reference():
        base = generate(policy, ["a cat"], 3, seed=5)[0]
    torch.testing.assert_close(drawn(run, 0.0), base, atol=1e-6, rtol=0)
    assert torch.equal(drawn(run, 1.0), generate(policy, ["a cat"], 3, seed=5)[0])


def measured(run, **changes):
    told: list[str] = []
    chosen = {"images": 4, "prompts": "animals8"} | changes
    folder = evaluate(run, **chosen, progress=lambda label, *_: told.append(label))
    return load_evaluation(folder), list(dict.fromkeys(told))


def test_one_checkpoint_is_measured_at_each_scale_and_once(run, tmp_path):
    usual, _ = measured(run, out=tmp_path / "usual")
    out = tmp_path / "scaled"
    first, _ = measured(run, lora_scales=[0.5], out=out)
    assert first.name == f"{usual.name}-scaled" and first.settings.scaled
    assert [point.told for point in first.points] == ["base", "scale 0.5", "iteration 2"]
    assert [first.place(point) for point in first.points] == [0.0, 0.5, 1.0]
    assert first.base.figures == usual.base.figures
    assert first.tuned[-1].figures == usual.tuned[-1].figures
    assert first.tuned[0].figures["diversity"] not in (
        usual.base.figures["diversity"],
        usual.tuned[-1].figures["diversity"],
    )

    more, told = measured(run, lora_scales=[0.25, 0.5, 0.0, 1.0], out=out)
    assert told == ["reference", "000002x0.25"]
    assert [point.lora_scale for point in more.tuned] == [0.25, 0.5, 1.0]
    assert more.points[2:] == first.points[1:]
    assert measured(run, lora_scales=[0.25], out=out) == (more, [])

    other, _ = measured(run, lora_scales=[0.5], checkpoints="1", out=out)
    assert {point.iteration for point in other.tuned} == {1} and other.base == more.base


def test_in_a_run_it_is_a_method_of_its_own(run, tmp_path):
    """Beside the run's own evaluation, which stays; compared with it as any two."""
    measured(run, checkpoints="all")
    before = (run / "evaluation.json").read_text()
    status, table = run_command(
        "evaluate", run, "--images", 4, "--prompts", "animals8", "--lora-scale", "0.5,0.75"
    )
    assert status == 0, table
    assert "scale 0.5" in table and "scale 0.75" in table and "scale 1" in table
    assert (run / "evaluation.json").read_text() == before
    folder = run / SCALED
    assert "at several LoRA scales" in (folder / "report.html").read_text("utf-8")
    assert write_picture(folder).stat().st_size > 10_000
    assert "tuned, scale 0.5" in write_report(folder).read_text("utf-8")

    findings = find([run, folder])
    assert [method.name for method in findings.methods] == ["drift", "drift-scaled"]
    assert [row["at"] for row in findings.summary()] == ["", "iteration 2", "scale 1"]
    own, scaled = (method.over_time("reward")[-1].mean for method in findings.methods)
    assert own == scaled
    page = write_comparison([run, folder], tmp_path / "page.html").read_text("utf-8")
    assert "drift-scaled, scale 0.75" in page and "1 seed, scale 1" in page


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_scales": [-0.1]}, r"--lora-scale: expected numbers of at least 0, such as 0\.4 or 0\.4,0\.8; got -0\.1"),
        ({"lora_scales": [math.nan]}, "got nan"),
        ({"lora_scales": [0.5], "checkpoints": "all"}, "one of its checkpoints, such as --checkpoint last; got 2"),
    ],
)  # fmt: skip
def test_refusals(run, tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        evaluate(run, images=2, out=tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::driftrl.build.UnlikelySettingWarning")
def test_what_has_no_adapter_is_refused(config, pipeline_folder, tmp_path):
    with pytest.raises(InputError, match="--lora-scale: expected a run, which has an adapter"):
        open_policy(pipeline_folder, lora_scale=0.5)
    with pytest.raises(InputError, match=r"one of its checkpoints, such as --checkpoint last; got 0"):
        evaluate(pipeline_folder, images=2, lora_scales=[0.5], out=tmp_path / "out")
    whole = Trainer(config(adapter__kind="full", iterations=0), tmp_path / "whole").run()
    with pytest.raises(InputError, match=r"this run trained the whole network \(adapter\.kind: full\)"):
        evaluate(whole, images=2, lora_scales=[0.5])
    assert not (whole / SCALED).exists()
    policy = build_policy(config(adapter__kind="full"))
    with pytest.raises(InputError, match=r"this is a whole network \(adapter\.kind: full\)"):
        scale_lora(dict(policy.named_parameters()), 0.5)
    for text in ("half", "0.5,", "-1"):
        status, said = run_command(
            "evaluate", pipeline_folder, "--lora-scale", text, "--out", tmp_path / "out"
        )
        assert status == 2 and "--lora-scale" in said


def test_older_evaluations_are_known_again(run, tmp_path):
    """They say nothing of scales; nor does the fingerprint that their pictures are found by."""
    before, _ = measured(run, out=tmp_path)
    data = json.loads((tmp_path / "evaluation.json").read_text())
    del data["settings"]["scaled"]
    for point in data["points"]:
        del point["lora_scale"]
    (tmp_path / "evaluation.json").write_text(json.dumps(data))
    assert measured(run, out=tmp_path) == (before, [])


def test_a_lora_from_elsewhere_is_measured(run, pipeline_folder, encoder_folder, tmp_path, monkeypatch):
    """As the run that it is of, under the same settings; what nobody trained it on is not asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    (tmp_path / "mine.safetensors").write_bytes(
        (run / "checkpoints/000002/pytorch_lora_weights.safetensors").read_bytes()
    )
    alike = {"prompts": "two.txt", "images": 3, "encoder": str(encoder_folder)}
    theirs = load_evaluation(evaluate(run, out=tmp_path / "run", lora_scales=[0.5], **alike))
    settings = load_config(run / "config.yaml").sampling
    folder = evaluate(
        str(pipeline_folder), lora="mine.safetensors", lora_scales=[0.5], rewards=["incompressibility"],
        steps=settings.steps, guidance_scale=settings.guidance_scale, **alike,
    )  # fmt: skip
    assert folder == Path("runs/evaluate-mine")
    ours = load_evaluation(folder)
    assert ours.name == ours.settings.lora == "mine" and ours.settings.rewards == ["incompressibility"]
    assert [point.label for point in ours.points] == ["base", "lorax0.5", "lora"]
    for one, two in zip(ours.points, theirs.points, strict=True):
        for figure in ("reward", "diversity", "recall", "vendi"):
            assert one.figures[figure].mean == pytest.approx(two.figures[figure].mean, rel=1e-3, abs=1e-4)
    before = (folder / "evaluation.json").read_bytes()
    evaluate(
        str(pipeline_folder), lora="mine.safetensors", lora_scales=[0.5], rewards=["incompressibility"],
        steps=settings.steps, guidance_scale=settings.guidance_scale, **alike,
    )  # fmt: skip
    assert (folder / "evaluation.json").read_bytes() == before
    assert "with the LoRA mine, beside the model alone" in write_report(folder).read_text()
    assert write_picture(folder).is_file()
    with pytest.raises(InputError, match="--lora: expected a model to put it on"):
        evaluate(run, lora="mine.safetensors", **alike)
    with pytest.raises(InputError, match="is no run folder, so it has no checkpoint 2"):
        evaluate(str(pipeline_folder), lora="mine.safetensors", checkpoints="2", **alike)
    status, told = run_command(
        "evaluate", pipeline_folder, "--lora", "mine.safetensors", "--lora-scale", "0.5", "--prompts", "two.txt",
        "--images", 2, "--encoder", encoder_folder, "--reward", "incompressibility", "--steps", 2, "--out", "typed",
    )  # fmt: skip
    assert status == 0 and "evaluating the LoRA  16/16 images" in told
    assert in_words("lorax0.5") == "the LoRA, scale 0.5"
    assert [point.told for point in ours.points] == ["base", "scale 0.5", "scale 1"]
    assert "scale 1" in told and (tmp_path / "typed/report.html").is_file()
