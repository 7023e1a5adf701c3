"""The command line as a stranger would misuse it: one message, exit status 2, nothing written."""

import re
import subprocess
import sys

import pytest

from driftrl.config import dump_config


def driftrl(*arguments, cwd=None, timeout=120):
    command = [sys.executable, "-m", "driftrl.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False)


@pytest.fixture
def settings(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(iterations=1)))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.stratgy=top", "did you mean 'strategy'"),
        ("optimiser.learning_rate=1", "did you mean 'optimizer'"),
        ("iterations=many", "expected a valid integer"),
        ("selection.keep=9", "at most sampling.candidates (6)"),
        ("prompts.set=nowhere.txt", "nowhere.txt"),
        ("prompts.set=EMPTY", "holds no prompts"),
        ("model.path=EMPTY_FOLDER", "no model_index.json"),
        ("model.path=./missing", "is none"),
        ("reward=tiny-animal", "did you mean 'tiny-animals'"),
        ("reward=no_such_module:reward", "cannot be imported"),
        ("adapter.targets=[to_k, to_z]", "to_z"),
        ("prompts.per_iteration=1000", "at most the 45 prompts"),
        ("sampling.eta=0", "more than 0"),
        ("iterations", "key=value"),
    ],
)
def test_bad_input(settings, tmp_path, override, message):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "folder").mkdir()
    override = override.replace("EMPTY_FOLDER", str(tmp_path / "folder")).replace(
        "EMPTY", str(tmp_path / "empty.txt")
    )
    result = driftrl("train", settings, "--set", override, "--out", tmp_path / "run")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_train_sample_and_refusals(settings, tmp_path):
    run = tmp_path / "run"
    result = driftrl("train", settings, "--out", run)
    assert result.returncode == 0, result.stderr
    assert (run / "checkpoints/000001/pytorch_lora_weights.safetensors").is_file()
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    again = driftrl("train", settings, "--out", run)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    changed = driftrl("train", "--resume", run, "--set", "seed=4")
    assert changed.returncode == 2
    assert "seed" in changed.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before
    more = driftrl("train", "--resume", run, "--set", "iterations=2")
    assert more.returncode == 0, more.stderr
    assert (run / "checkpoints/000002").is_dir()
    drawn = driftrl("sample", run, "--prompt", "a cat", "-n", 2, "--base", "--out", tmp_path / "grid.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "grid.png").stat().st_size > 500


@pytest.mark.parametrize(
    "content", ["{", "- a list", "reward: [", "seed: 1\n\tx: 2", "\x00", "iterations: .inf"]
)
def test_broken_configuration_files(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    result = driftrl("train", path, "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("driftrl: ")


def test_missing_configuration_file(tmp_path):
    result = driftrl("train", tmp_path / "none.yaml")
    assert result.returncode == 2
    assert "none.yaml" in result.stderr


def test_help_shows_examples():
    assert "driftrl train --resume" in driftrl("train", "--help").stdout


def test_doctor_measures_the_ratio_of_an_untouched_policy(pipeline_folder, tmp_path):
    result = driftrl("doctor", "--model", pipeline_folder, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for dtype in ("float32", "bfloat16", "float16"):
        assert re.search(
            rf"replay in {dtype} +max \|log-ratio\| \d\.\de[+-]\d\d over 12 samples", result.stdout
        )
    result = driftrl("doctor", "--model", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert "'nowhere' is none" in result.stderr
