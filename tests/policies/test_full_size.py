"""Models at their full size, with random weights, through the command line."""

import json
import resource
import shutil

import families
import pytest
from safetensors import safe_open

from driftrl.files import numbers_in
from test_cli import apart

PUBLISHED_XL = {"unet": 2_567_463_684, "text_encoder_2": 694_659_840}
"""Of Stable Diffusion XL."""
PUBLISHED = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
"""Weights of Stable Diffusion 1.5, counted in the published files."""


def weights_in(folder):
    """How many numbers the safetensors files of a folder hold."""
    return numbers_in(folder.glob("*.safetensors"))


def trained(settings, run):
    """The metrics of the one iteration that ``driftrl train`` does with ``settings``."""
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    result = apart("train", *overrides, "--out", run, timeout=3000)
    assert result.returncode == 0, result.stderr
    return json.loads((run / "metrics.jsonl").read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stable_diffusion_15_trains_one_iteration(tmp_path, encoder_folder, capsys):
    """G = 2 of 4, 4 steps, one prompt, guidance, 256 x 256 pixels, float32. Needs 5 GB of disk."""
    folder = families.make_sd15(tmp_path / "sd15")
    assert {part: weights_in(folder / part) for part in PUBLISHED} == PUBLISHED
    settings = {
        "iterations": 1, "model.path": folder, "model.device": "cpu",
        "prompts.per_iteration": 1, "sampling.steps": 4, "sampling.candidates": 4, "sampling.guidance_scale": 5.0,
        "sampling.height": 256, "sampling.width": 256, "sampling.batch_size": 4, "selection.keep": 2,
        "reward": "incompressibility", "shaping.encoder": encoder_folder, "optimizer.batch_size": 1,
        "evaluation.at_end": "false", "logging.trackers": "[]",
    }  # fmt: skip
    run = tmp_path / "run"
    metrics = trained(settings, run)
    assert metrics["policy/ratio_deviation"] <= 1e-6
    assert metrics["policy/grad_norm"] > 0
    assert metrics["policy/pairs"] == 2
    adapter = run / "checkpoints/000001/pytorch_lora_weights.safetensors"
    with safe_open(adapter, "pt") as file:
        assert len(list(file.keys())) == 2 * 128  # 16 transformer blocks, 2 attentions of 4 projections each
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    with capsys.disabled():
        timings = json.loads((run / "timings.jsonl").read_text())
        print(
            f"\nSD 1.5: {sum(v for k, v in timings.items() if k != 'iteration'):.0f} s, {gigabytes:.1f} GiB",
            timings,
        )
    assert gigabytes < 24
    shutil.rmtree(tmp_path)  # gigabytes that nobody will look at


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stable_diffusion_xl_trains_one_iteration(tmp_path, encoder_folder, capsys):
    """2 of 3, 2 steps, 256 x 256 pixels, bfloat16, gradient checkpointing. Needs 7 GB of disk and 12 GB of memory."""
    folder = families.make_full_sdxl(tmp_path / "sdxl")
    assert {part: weights_in(folder / part) for part in PUBLISHED_XL} == PUBLISHED_XL
    settings = {
        "iterations": 1, "model.path": folder, "model.device": "cpu", "model.dtype": "bfloat16",
        "model.gradient_checkpointing": "true", "prompts.per_iteration": 1, "sampling.steps": 2,
        "sampling.candidates": 3, "sampling.guidance_scale": 1.5, "sampling.height": 256, "sampling.width": 256,
        "sampling.batch_size": 3, "selection.keep": 2, "reward": "incompressibility",
        "shaping.encoder": encoder_folder, "optimizer.batch_size": 1, "evaluation.at_end": "false",
        "logging.trackers": "[]",
    }  # fmt: skip
    run = tmp_path / "run"
    metrics = trained(settings, run)
    with capsys.disabled():
        print("\nSDXL:", {k: v for k, v in metrics.items() if k.startswith("policy/")})
    assert metrics["policy/ratio_deviation"] < 1e-5
    assert metrics["policy/grad_norm"] > 0
    with safe_open(run / "checkpoints/000001/pytorch_lora_weights.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * 560  # 70 transformer blocks, 2 attentions of 4 projections each
    shutil.rmtree(tmp_path)
