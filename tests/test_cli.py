"""The command line as a stranger would misuse it: one message, exit status 2, nothing written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from conftest import driftrl, run_command
from driftrl import TrainConfig, Trainer, __version__
from driftrl.build import unlikely_settings
from driftrl.checks import InputError
from driftrl.cli.sample import heading, sample
from driftrl.cli.typed import as_typed
from driftrl.config import dump_config, flat, parse_config

DOCS = Path(__file__).resolve().parents[1] / "docs"


def apart(*arguments, timeout=120):
    """In a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "driftrl.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


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
        ("optimizer.lr=1", "did you mean 'optimizer.learning_rate'"),
        ("shaping.lambda=1", "did you mean 'shaping.ratio'"),
        ("lora_rank=4", "did you mean 'adapter.rank'"),
        ("truncated_backprop_timestep=9", "did you mean 'objective.draft_steps'"),
        ("method=grpo", "no such key; methods are files: driftrl train experiments/methods/grpo.yaml"),
        ("objective.loss=grpo", "Methods are files: driftrl train experiments/methods/grpo.yaml"),
        ("model=somewhere", "such as model.path"),
        ("learning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("learningrate=1", "did you mean 'optimizer.learning_rate'"),
        ("batch_size=1", "did you mean 'sampling.batch_size' or 'optimizer.batch_size'"),
        ("model.path=tiny-animal", "did you mean 'tiny-animals'"),
        ("shaping.encoder=dreamsm", "did you mean 'dreamsim'"),
        ("prompt_noise.similarity=pickscor", "did you mean 'pickscore'"),
        ("iterations=many", "expected a valid integer"),
        ("selection.keep=9", "at most sampling.candidates (6)"),
        ("prompts.set=nowhere.txt", "nowhere.txt"),
        ("prompts.set=EMPTY", "holds no prompts"),
        ("model.path=EMPTY_FOLDER", "no model_index.json"),
        ("model.path=EMPTY", "no safetensors file"),
        ("model.path=./missing", "is none"),
        ("train_learning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("optimizer.schedule=cosin", "did you mean 'cosine'"),
        ("optimizer.ema_decay=1", "less than 1"),
        ("reward=tiny-animal", "did you mean 'tiny-animals'"),
        ("reward=no_such_module:reward", "cannot be imported"),
        ("adapter.targets=[to_k, to_z]", "to_z"),
        ("prompts.per_iteration=1000", "at most 45, the prompts of animals"),
        ("sampling.eta=0", "more than 0"),
        ("model.dtype=fp16", "did you mean 'float16'"),
        ("optimizer.learning_rate=2", "less than or equal to 1"),
        ("prompts.set=EMPTY_FOLDER", "which is a folder"),
        ("iterations", "key=value"),
    ],
)
def test_bad_input(settings, tmp_path, override, message):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "folder").mkdir()
    override = override.replace("EMPTY_FOLDER", str(tmp_path / "folder")).replace(
        "EMPTY", str(tmp_path / "empty.txt")
    )
    status, told = run_command("train", settings, "--set", override, "--out", tmp_path / "run")
    assert status == 2, told
    assert message in told
    assert not (tmp_path / "run").exists()


def test_train_sample_and_refusals(settings, tmp_path):
    run = tmp_path / "run"
    result = apart("train", settings, "--out", run)
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
    more = driftrl("train", "--resume", run, "--set", "iterations=3")
    assert more.returncode == 0, more.stderr
    assert (run / "checkpoints/000003").is_dir()
    begun, _, now = (
        json.loads(line)["reward/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    assert f"iteration 3/3  reward {now:.3f} ({now - begun:+.3f})" in more.stderr  # since the run's beginning
    lines = [line for line in more.stderr.splitlines() if line.startswith("iteration")]
    assert [bool(re.search(r"  [0-9.]+ (ms|s|min) left$", line)) for line in lines] == [True, False]
    (run / "evaluation.json").write_text("measured")
    finished = driftrl("train", "--resume", run)
    assert (
        finished.returncode == 0
        and "is finished: 3 iterations, measured too; to go farther" in finished.stderr
    )
    assert (run / "evaluation.json").read_text() == "measured"
    (run / "evaluation.json").unlink()
    drawn = driftrl("sample", run, "--prompt", "a cat", "-n", 2, "--base", "--out", tmp_path / "grid.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "grid.png").stat().st_size > 500
    (run / "checkpoints/000003/pytorch_lora_weights.safetensors").write_bytes(b"")
    drawn = apart("sample", run, "--prompt", "a cat", "-n", 1, "--out", tmp_path / "older.png")
    assert drawn.returncode == 0 and re.match(r"CheckpointWarning: .*000003 is passed over", drawn.stderr)
    assert ".py" not in drawn.stderr


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
    (tmp_path / "one.yaml").write_text("iterations: 1")
    result = driftrl("train", tmp_path / "one")
    assert result.returncode == 2
    assert re.search(r"there is no such file; did you mean \S*one.yaml\?", result.stderr)


COMMANDS = (
    "train",
    "settings",
    "estimate",
    "sample",
    "evaluate",
    "compare",
    "export",
    "judge",
    "experiment",
    "serve-reward",
    "doctor",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command):
    text = driftrl(command, "--help").stdout
    examples = text.partition("Examples:")[2]
    assert f"   driftrl {command}" in examples  # set off from the text


def test_help_names_every_command():
    text = apart("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_version():
    assert apart("--version").stdout == f"driftrl {__version__}\n"


def refused(*arguments, cwd=None):
    result = driftrl(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(re.sub("[\u2500-\u257f]", " ", result.stderr).split())


def test_a_setting_given_as_an_option_is_explained():
    assert "--set optimizer.learning_rate=VALUE" in refused("train", "--learning-rate", "1e-3")
    assert "--set iterations=VALUE" in refused("estimate", "--iterations", "3")
    assert "--set optimizer.learning_rate=VALUE" in refused("train", "--lr", "1e-3")
    assert "--set" not in refused("train", "--nonsense").partition("No such option")[2]
    assert "prompts.set" not in refused("train", "--set")


def test_a_setting_without_its_option_is_explained(tmp_path):
    assert "given as --set iterations=3" in refused("train", "iterations=3", cwd=tmp_path)


def test_an_equals_sign_that_was_forgotten():
    assert "expected key=value" in refused("train", "--set", "iterations", "3")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["train", "--set", "foo=1"], 2), (["settings", "lambda"], 0)],
)
def test_a_typing_mistake_does_not_wait_for_torch(arguments, status):
    asked = (
        "import sys\nfrom driftrl.cli.main import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", asked, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == f"{status} False", result.stdout + result.stderr


def test_ctrl_c_in_the_first_imports_ends_it_without_a_traceback():
    """Where the installed command begins; the imports are interrupted at a place that is the same every time."""
    interrupted = (
        "import sys\nclass CtrlC:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, CtrlC())\nfrom driftrl.__main__ import main\nmain()"
    )
    command = [sys.executable, "-c", interrupted, "train"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (130, "")
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        assert tomllib.loads(project.read_text())["project"]["scripts"] == {
            "driftrl": "driftrl.__main__:main"
        }


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "driftrl", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout == (
        f"driftrl {__version__}\n"
    )


def test_every_setting_is_listed_and_found(config):
    """Each key of a run's config.yaml, with its default; a word finds it by name or by meaning."""
    listed = driftrl("settings").stdout
    for key in flat(config()):
        assert re.search(rf"^  {re.escape(key)} = ", listed, re.MULTILINE), key
    assert "shaping.ratio = 0.5" in driftrl("settings", "Lambda").stdout
    assert "adapter.rank" in refused("settings", "lora_rank")


@pytest.mark.skipif(not DOCS.is_dir(), reason="no docs beside the tests")
def test_the_documentation_lists_the_settings():
    made = driftrl("settings", "--markdown").stdout
    assert made == (DOCS / "settings.md").read_text(), "driftrl settings --markdown > docs/settings.md"


def test_a_plan_is_no_configuration_and_the_other_way_round(settings, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("name: both\nmethods: []\n")
    assert f"driftrl experiment {plan}" in refused("train", plan)
    assert f"driftrl train {settings}" in refused("experiment", settings, "--dry-run")


def test_runs_and_their_parts_taken_for_each_other(settings, tmp_path):
    run = tmp_path / "runs" / "mine"
    checkpoint = run / "checkpoints" / "000001"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(settings.read_text())
    assert f"--resume {run}" in refused("train", run)
    assert f"--resume {run}" in refused("train", "--resume", checkpoint)
    for command in (["sample", "--prompt", "a cat"], ["evaluate"]):
        assert "did you mean 'mine'" in refused(*command, "runs/mien", cwd=tmp_path)
        assert "are the runs mine" in refused(*command, "runs", cwd=tmp_path)
    assert list(tmp_path.rglob("*.png")) == []


def test_of_many_runs_the_nearest_ten_are_named_and_no_far_off_one_is_guessed(tmp_path):
    for name in ("pe", *(f"grpo-{k}" for k in range(20)), *(f"drift-seed{k}" for k in range(9))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    told = refused("sample", "runs/drift-seed", "-p", "a cat", cwd=tmp_path)
    named = told.partition("are the runs ")[2].partition(";")[0]
    assert named.endswith(" and 20 more") and len(named.split(", ")) == 10
    assert all(f"drift-seed{k}" in named for k in range(9)) and "did you mean 'drift-seed" in told
    assert "did you mean" not in refused("sample", "runs/nope", "-p", "a cat", cwd=tmp_path)
    assert "and 20 more" in refused("sample", "runs", "-p", "a cat", cwd=tmp_path)


@pytest.mark.parametrize("out", ["grid.jpg", "file.txt/grid.png", "file.txt/grid"])
def test_a_picture_that_cannot_be_written(tmp_path, pipeline_folder, out):
    (tmp_path / "file.txt").write_text("")
    told = refused(
        "sample", pipeline_folder, "-p", "a cat", "-n", 1, "--steps", 2, "--out", out, cwd=tmp_path
    )
    assert f"--out: {out}" in told or f"got {out}" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_what_used_to_end_in_a_traceback(settings, tmp_path, pipeline_folder):
    long, half = "a" * 300, tmp_path / "half.jsonl"
    half.write_text('"\\ud800"\n')
    assert "File name too long" in refused("train", settings, "--out", tmp_path / long)
    assert "'privateuseone' is not available" in refused(
        "train", settings, "--set", "model.device=privateuseone"
    )
    assert "half of a surrogate pair" in refused("train", settings, "--set", f"prompts.set={half}")
    infinite = ("-p", "a cat", "--guidance-scale", "inf", "--out", tmp_path / "grid.png")
    assert "expected a finite number" in refused("sample", pipeline_folder, *infinite)
    unread = (
        "-p",
        "a cat",
        "--negative-prompt",
        "blurry",
        "--guidance-scale",
        "1",
        "--out",
        tmp_path / "grid.png",
    )
    assert "--negative-prompt: got 'blurry'; expected guidance of two branches" in refused(
        "sample", pipeline_folder, *unread
    )
    odd = ("-p", "a\udcffcat", "--out", tmp_path / "grid.png")  # as Python reads a byte that is not UTF-8
    assert "expected text in UTF-8; got 'a\\udcffcat'" in refused("sample", pipeline_folder, *odd)
    told = refused("evaluate", pipeline_folder, "--images", 2, "--steps", 2, "--out", half)
    assert f"--out: {half} cannot be written" in told
    assert "evaluating" not in told  # before anything was drawn


def test_messages_name_the_option_that_was_typed(tmp_path, pipeline_folder):
    """And the key, where it is a setting of the run."""
    (tmp_path / "two.txt").write_text("a cat\na fox\n")
    evaluated = ("evaluate", pipeline_folder, "--prompts", "two.txt", "--out", "e")
    few = ("--images", 2, "--steps", 2)
    for arguments, told in (
        ((*evaluated, *few, "--encoder", "nope"), "driftrl: --encoder: expected"),
        ((*evaluated, *few, "--reward", "nope"), "driftrl: --reward: expected one of"),
        ((*evaluated, "--images", 1), "driftrl: --images: expected at least 2"),
        ((*evaluated, "--steps", 5000), "driftrl: --steps: expected at most 1000"),
        (("evaluate", pipeline_folder, "--prompts", "nope.txt"), "driftrl: --prompts: expected a prompt set"),
        (("evaluate", "nope"), "driftrl: RUN_OR_MODEL: expected 'tiny-animals', a pipeline folder, a safetensors file or a hub name"),
        (("sample", pipeline_folder, "--prompts", "nope.txt"), "driftrl: --prompts: expected a prompt set"),
        (("sample", pipeline_folder, "-p", "a", "--steps", 5000), "driftrl: --steps: expected at most 1000"),
        (("sample", "nope", "-p", "a"), "driftrl: RUN_OR_MODEL: expected 'tiny-animals', a pipeline folder, a safetensors file or a hub name"),
        (("doctor", "--model", "nope"), "driftrl: --model: expected 'tiny-animals'"),
    ):  # fmt: skip
        assert told in refused(*arguments, cwd=tmp_path), arguments
    error = InputError("reward: expected one of tiny-animals; got 'mine'; take --set reward=tiny-animals")
    for given, told in ((["mine"], "--reward: expected one of tiny-animals; got 'mine'; take --reward tiny-animals"),
                        (["other"], str(error)), (None, str(error))):  # fmt: skip
        with pytest.raises(InputError) as raised, as_typed({"reward": ("--reward", given)}):
            raise InputError(str(error))
        assert str(raised.value) == told


def test_a_sheet_says_which_checkpoint_it_is_of_and_at_what_scale():
    told = [
        heading("runs/mine/checkpoints/000002", 0.5),
        heading("runs/mine", 0.5),
        heading("runs/mine", 1.0),
    ]
    assert told == ["iteration 2, scale 0.5", "mine, scale 0.5", "mine"]


def test_a_prompt_set_into_a_folder_with_every_image(tmp_path, pipeline_folder):
    prompts, out, model = tmp_path / "two.txt", tmp_path / "v1.0", str(pipeline_folder)
    prompts.write_text("a cat\na fox, red\n")
    sample(model, [], str(prompts), 2, 0, out, base=True, steps=2, guidance_scale=None)
    files = sorted(str(path.relative_to(out)) for path in tmp_path.rglob("*.png"))
    folders = [f"{side}/{name}" for side in ("base", "tuned") for name in ("000-a-cat", "001-a-fox-red")]
    assert files == sorted([*(f"{folder}/{k:03d}.png" for folder in folders for k in range(2)), "grid.png"])
    with pytest.raises(InputError, match="expected --prompt TEXT or --prompts FILE"):
        sample(model, [], None, 2, 0, out, base=False, steps=2, guidance_scale=None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_an_interrupt_leaves_is_said(settings, tmp_path, pipeline_folder, monkeypatch, number):
    def interrupt(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(5)  # where the signal comes

    run = tmp_path / "run"
    assert driftrl("train", settings, "--out", run).returncode == 0
    monkeypatch.setattr("driftrl.rollout._denoise", interrupt)
    grid = tmp_path / "grid.png"
    stopped = driftrl("sample", pipeline_folder, "-p", "a cat", "--out", grid)
    assert (stopped.returncode, grid.exists()) == (128 + number, False)
    assert "stopped; nothing was written" in stopped.stderr
    stopped = driftrl("evaluate", run, "--images", 2)
    assert stopped.returncode == 128 + number
    told = f"models that were measured are kept; go on with: driftrl evaluate {run} and the same options"
    assert told in stopped.stderr
    monkeypatch.setattr("driftrl.run.build_loop", interrupt)
    for arguments, told in (
        ((settings, "--out", tmp_path / "new"), "nothing was trained yet"),
        (("--resume", run), "the run is as it was"),
    ):
        stopped = driftrl("train", *arguments)
        assert stopped.returncode == 128 + number
        assert f"stopped; {told}" in stopped.stderr
    assert not (tmp_path / "new").exists()


def test_quiet_evaluation_says_where_the_report_is(tmp_path, pipeline_folder):
    result = driftrl(
        "evaluate",
        pipeline_folder,
        "--images",
        2,
        "--steps",
        2,
        "--prompts",
        "animals5",
        "-q",
        "--out",
        tmp_path / "e",
    )
    assert (result.returncode, result.stderr) == (0, f"{tmp_path / 'e' / 'report.html'}\n")


def test_the_package_lists_what_it_has():
    import driftrl as package

    assert set(package.__all__) <= set(dir(package))
    assert all(hasattr(package, name) for name in package.__all__)


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


def test_a_whole_network_is_loaded_as_one(config, tmp_path):
    """What is said at the end works with stock diffusers, and the LoRA's learning rate is warned of."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(iterations=1, adapter__kind="full")))
    status, told = run_command("train", path, "--out", tmp_path / "run")
    assert status == 0 and "UnlikelySettingWarning" in told and "optimizer.learning_rate=1e-5" in told
    (said,) = re.findall(r"network for diffusers: pipe\.unet = (\w+)\.from_pretrained\('(.*)'\)", told)
    assert said[0] == "UNet2DConditionModel" and UNet2DConditionModel.from_pretrained(said[1])
    assert "load_lora_weights" not in told


def test_the_embedded_reward_of_another_model_is_warned_of(config):
    assert unlikely_settings(config()) == []
    (told,) = unlikely_settings(config(reward=[{"name": "tiny-animals"}], shaping__encoder="tiny-animals"))
    assert "--set reward=pickscore --set shaping.encoder=dreamsim" in told
    (told,) = unlikely_settings(config(shaping__encoder="tiny-animals"))
    assert told.startswith("shaping.encoder: ") and "pickscore" not in told
    assert unlikely_settings(TrainConfig()) == []
    (told,) = unlikely_settings(
        parse_config({"adapter": {"kind": "full"}, "optimizer": {"learning_rate": 2e-4}})
    )
    assert told.startswith("optimizer.learning_rate: 0.0002")


def test_a_run_in_which_nothing_was_learned_has_failed(config, tmp_path, monkeypatch):
    (tmp_path / "my_nan.py").write_text(
        "import torch\n\ndef never(images, prompts):\n    return torch.full((len(images),), torch.nan)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(iterations=2, reward="my_nan:never")))
    status, told = run_command("train", path, "--out", tmp_path / "run")
    assert status == 3 and "nothing was learned" in told
    assert "2 of 2 iterations skipped" in told and "done:" not in told
    sys.modules.pop("my_nan")


def test_where_a_run_may_go(settings, tmp_path, monkeypatch):
    """Said before any model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("driftrl.run.build_loop", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("x")
    for out, expected in {
        "file": "file is a file; choose another --out",
        "file/run": f"cannot be written to: {tmp_path / 'file'} is a file",
        "taken": "taken exists and is not empty; choose another --out",
    }.items():
        status, told = run_command("train", settings, "--out", out)
        assert status == 2 and expected in told and "--resume" not in told


def test_a_run_beside_one_of_its_name_is_said_to_be_new(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is there already" not in run_command("train", settings)[1]
    status, told = run_command("train", settings)
    assert status == 0 and Path("runs/drift-seed0-2/checkpoints/000001").is_dir()
    assert (
        "runs/drift-seed0 is there already: to go on with it, driftrl train --resume runs/drift-seed0" in told
    )
    told = run_command("train", "--resume", "runs/drift-seed0", "--set", "iterations=2")[1]
    assert "is there already" not in told
    before = Path("runs/drift-seed0/config.yaml").read_text()
    status, told = run_command("train", "--resume", "runs/drift-seed0", "--set", "iterations=1")
    assert status == 2 and "iterations: expected at least the 2 that runs/drift-seed0 has had; got 1" in told
    assert Path("runs/drift-seed0/config.yaml").read_text() == before


def test_a_folder_of_samples_is_of_one_call(pipeline_folder, tmp_path):
    """What an earlier call has left is not mixed with it; every picture says what it is."""
    drawing = ["sample", pipeline_folder, "-p", "a cat", "--steps", 2, "--seed", 3, "--out", tmp_path / "out"]
    assert run_command(*drawing, "-n", 2)[0] == 0
    assert run_command(*drawing, "-n", 2)[0] == 0  # the same again
    first, second = sorted((tmp_path / "out").glob("*/*.png"))
    with Image.open(second) as image:
        assert image.text["prompt"] == "a cat" and image.text["seed"] == "3" and image.text["image"] == "1"
        assert image.text["model"] == pipeline_folder.name and image.text["steps"] == "2"
        assert str(tmp_path) not in str(image.text)
    status, told = run_command(*drawing, "-n", 1)
    assert status == 2 and "1 picture of something else, such as 000-a-cat/001.png" in told
    assert first.is_file() and second.is_file()


def test_a_checkpoint_by_its_number(config, tmp_path):
    run = Trainer(config(iterations=2, optimizer__learning_rate=0.03), tmp_path / "run").run()
    grids = []
    for name in (
        [run, "--checkpoint", 1],
        [run / "checkpoints/000001"],
        [run],
    ):
        assert run_command("sample", *name, "-p", "a cat", "-n", 1, "--out", tmp_path / "g.png")[0] == 0
        with Image.open(tmp_path / "g.png") as image:
            grids.append(image.tobytes())
    assert grids[0] == grids[1] != grids[2]
    for wrong in ([run, "--checkpoint", 7], [run / "checkpoints/000007"]):
        status, told = run_command("sample", *wrong, "-p", "a cat", "--out", tmp_path / "g.png")
        assert status == 2 and "has no checkpoint" in told and "there are 0, 1, 2" in told
