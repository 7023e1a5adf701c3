"""Tiny models with random weights, of the same classes that users load, saved to folders once per session."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import string
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests are of the CPU wherever they run, but for tests/device/check.py.
if "DRIFTRL_TEST_DEVICE" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import pytest
import torch

from launcher import Launcher

# A machine that is busy with something else is no error.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def save_tokenizer(folder: Path, length: int = 16):
    """A CLIP tokenizer that spells everything out."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_settings(tokenizer, width: int = 16) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": width,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def make_pipeline(folder: Path, prediction_type: str = "v_prediction") -> Path:
    """A Stable Diffusion pipeline with 4 x 8 x 8 latents and random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = save_tokenizer(folder / "tokenizer")
    zero_snr = prediction_type != "epsilon"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer))),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_snr,
            timestep_spacing="trailing" if zero_snr else "leading",
            set_alpha_to_one=zero_snr,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(scope="session")
def epsilon_folder(tmp_path_factory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("models") / "epsilon", "epsilon")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """A small ResNet of transformers."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "encoder"
    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def config(pipeline_folder, encoder_folder):
    """A run that takes a second: 3 prompts at a time, 6 candidates, 4 steps."""
    from driftrl.config import parse_config

    def make(**changes):
        data = {
            "iterations": 2,
            "model": {"path": str(pipeline_folder)},
            "adapter": {"rank": 2, "alpha": 2.0},
            "prompts": {"per_iteration": 3},
            "sampling": {"steps": 4, "candidates": 6, "guidance_scale": 2.0},
            "selection": {"keep": 4},
            "reward": "incompressibility",
            "shaping": {"encoder": str(encoder_folder)},
            "logging": {"trackers": [], "checkpoint_every": 1},
            "evaluation": {"at_end": False},
        }
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            if leaf:
                data.setdefault(section, {})[leaf] = value
            else:
                data[section] = value
        return parse_config(data)

    return make


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("jobs"))
    yield launcher
    launcher.close()


def driftrl(*arguments, cwd=None):
    """The command line's exit status, stdout and stderr, in this process: starting another takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    return subprocess.CompletedProcess(
        arguments, _status(arguments, out, err, cwd), out.getvalue(), err.getvalue()
    )


def run_command(*arguments):
    """Exit status and message of the command line, in this process."""
    out = io.StringIO()
    return _status(arguments, out, out), out.getvalue()


def _status(arguments, out, err, cwd=None):
    from driftrl.cli import main as command_line

    before = sys.argv
    sys.argv = ["driftrl", *map(str, arguments)]
    try:
        with (
            warnings.catch_warnings(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out),
            contextlib.chdir(cwd or "."),
        ):  # fmt: skip
            warnings.simplefilter("default")  # as a user has it
            command_line.main()
        return 0
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
