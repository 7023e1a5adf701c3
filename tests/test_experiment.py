"""Experiments: what a plan expands to, that its processes are looked after, and a small one from start to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from driftrl import checkpoint
from driftrl.checks import InputError
from driftrl.cli.experiment import experiment
from driftrl.config import dump_config, load_config, parse
from driftrl.evaluation.compare import compare, hypervolumes, load_methods
from driftrl.evaluation.comparison import write_comparison
from driftrl.evaluation.results import load_result
from driftrl.experiment.plan import Plan, differing, expand, load_plan, nested
from driftrl.experiment.pool import Pool, Task, slots
from driftrl.experiment.standing import Standing, standing

PLANS = Path(__file__).parents[1] / "experiments/plans"
METHODS = PLANS.parent / "methods"
EXAMPLE = {
    "name": "example",
    "base": str(METHODS / "base.yaml"),
    "methods": [
        str(METHODS / "drift.yaml"),
        {"label": "top", "set": {"selection.strategy": "top"}, "seeds": [7]},
        {"label": "plain", "grid": {}},
    ],
    "grid": {
        "shaping.ratio": [0.25, 1.0],
        "group": {4: {"selection.keep": 4, "sampling.candidates": 8}, 8: {"selection": {"keep": 8}}},
    },
    "seeds": [0, 1],
    "set": {"iterations": 60, "optimizer.learning_rate": 2e-3},
}


def expanded(**changes):
    data = EXAMPLE | changes
    return expand(parse(Plan, data, "plan"), Path("plan.yaml"))


def test_methods_grid_and_seeds_are_crossed():
    runs = {run.name: run.config for run in expanded()}
    assert len(runs) == 4 * 2 + 4 * 1 + 2
    assert "drift-ratio=0.25-group=4-seed1" in runs and "top-ratio=1-group=8-seed7" in runs
    assert {"plain-seed0", "plain-seed1"} < set(runs)
    drift, top = runs["drift-ratio=0.25-group=4-seed1"], runs["top-ratio=1-group=8-seed7"]
    assert (drift.name, drift.seed) == ("drift-ratio=0.25-group=4", 1)
    assert (drift.selection.keep, drift.sampling.candidates, drift.shaping.ratio) == (4, 8, 0.25)
    assert (drift.selection.strategy, drift.prompt_noise.where) == ("nearest_neighbor", "train")
    assert (top.selection.strategy, top.prompt_noise.where, top.selection.keep) == ("top", "neither", 8)
    assert runs["plain-seed0"].shaping.ratio == load_config(METHODS / "base.yaml").shaping.ratio
    for config in runs.values():
        assert (config.iterations, config.optimizer.learning_rate) == (60, 2e-3)
        assert not config.evaluation.at_end


def test_a_run_is_what_train_makes_of_the_same_settings():
    (run,) = expanded(methods=[str(METHODS / "drift.yaml")], grid={"shaping.ratio": [0.25]}, seeds=[3])
    asked = ["iterations=60", "optimizer.learning_rate=2e-3", "shaping.ratio=0.25", "seed=3"]
    own = {"name", "logging", "evaluation"}
    same = load_config(METHODS / "drift.yaml", asked).model_dump(exclude=own)
    assert run.config.model_dump(exclude=own) == same


@pytest.mark.parametrize(
    ("iterations", "count", "wanted"),
    [
        (64, 8, (8, 16, 24, 32, 40, 48, 56, 64)),
        (60, 3, (20, 40, 60)),
        (7, 3, (2, 4, 7)),
        (10, 1, (10,)),
        (21, 4, (5, 10, 15, 21)),
        (25, "all", (10, 20, 25)),
    ],
)
def test_checkpoints_are_evenly_spaced(iterations, count, wanted):
    plan = {"evaluation": {"checkpoints": count}, "set": {"iterations": iterations}}
    for run in expanded(**plan):
        assert run.checkpoints == wanted
        every = run.config.logging.checkpoint_every
        assert all(k % every == 0 or k == iterations for k in wanted)


def test_a_fast_method_is_measured_where_it_is_fast():
    """At iterations of its own, of which there are checkpoints."""
    slow, fast = expanded(
        methods=[{"label": "slow"}, {"label": "fast", "checkpoints": [4, 8, 16, 60]}],
        evaluation={"checkpoints": 3}, set={"iterations": 60}, grid={}, seeds=[0],
    )  # fmt: skip
    assert (slow.checkpoints, slow.config.logging.checkpoint_every) == ((20, 40, 60), 20)
    assert (fast.checkpoints, fast.config.logging.checkpoint_every) == ((4, 8, 16, 60), 4)
    (every,) = expanded(
        methods=[{"checkpoints": "all"}], evaluation={"checkpoints": 3}, set={"iterations": 20}, grid={}, seeds=[0]
    )  # fmt: skip
    assert every.checkpoints == (10, 20)


def test_settings_that_differ():
    rows = differing(expanded())
    assert {"shaping.ratio", "selection.keep", "selection.strategy"} < set(rows[0])
    assert not {"name", "seed", "iterations", "optimizer.learning_rate"} & set(rows[0])
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}


def test_rewards_with_weights_are_one_value():
    """Their names may have dots, and one mapping takes the place of another."""
    (run,) = expanded(
        methods=[{"set": {"reward": {"mine.rewards:score": 1, "hpsv2@v2.1": 0.5}}}],
        set={"iterations": 8, "reward": {"pickscore": 1}},
        grid={},
        seeds=[0],
    )
    assert [(part.name, part.weight) for part in run.config.reward] == [
        ("mine.rewards:score", 1.0),
        ("hpsv2@v2.1", 0.5),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": []}, "method: no such key; did you mean 'methods'"),
        ({"evaluation": {"image": 4}}, "evaluation.image: no such key; did you mean 'images'"),
        ({"methods": [{"lable": "x"}]}, "methods.0.lable: no such key; did you mean 'label'"),
        ({"methods": ["nowhere.yaml"]}, "nowhere.yaml: cannot be read"),
        ({"methods": [{"label": "a/b"}]}, "methods.0.label"),
        ({"methods": [{}, {}]}, "two runs are called grpo-ratio=0.25-group=4-seed0"),
        ({"set": {"shaping.rati": 1}}, "shaping.rati: no such key; did you mean 'ratio'"),
        ({"grid": {"shaping.rati": [1]}}, "shaping.rati: no such key"),
        ({"grid": {"shaping.ratio": 1}}, "grid: shaping.ratio: expected a list of values"),
        ({"grid": {"group": {"4": 4}}}, "grid: group: expected settings below each label"),
        ({"grid": {"selection.keep": [8, 99]}}, "at most sampling.candidates (16)"),
        ({"seeds": [1, 1]}, "seeds: expected each once"),
        ({"seeds": ["a"]}, "seeds.0: expected a valid integer"),
        ({"evaluation": {"checkpoints": "some"}}, "evaluation.checkpoints: expected a count"),
        ({"evaluation": {"checkpoints": 0}}, "evaluation.checkpoints: expected a count"),
        ({"evaluation": {"checkpoints": [8, 4]}}, "evaluation.checkpoints: expected a count of at least 1, iterations that rise"),
        ({"methods": [{"checkpoints": []}]}, "evaluation.checkpoints: expected a count"),
        ({"methods": [{"checkpoints": [7], "set": {"logging.checkpoint_every": 5}}]}, "got 7 among them"),
        ({"methods": [{"checkpoints": [50, 100]}]}, "got 100 among them"),
        ({"evaluation": {"prompts": "animals4"}}, "did you mean 'animals"),
        ({"set": {"prompts.per_iteration": 9}}, "at most 8, the prompts of animals8"),
        ({"methods": []}, "methods: expected at least one; got []"),
        ({"seeds": []}, "seeds: expected at least one; got []"),
        ({"grid": {"reward": ["tiny-animals", "compressibility"]}}, "reward: expected the same in all runs"),
        ({"set": {"logging.keep_last": 2}}, "logging.keep_last"),
        ({"set": {"logging.checkpoint_every": 30}}, "at most the 2 that 60"),
        ({"set": {"iterations": 0}}, "iterations: expected at least 1"),
        ({"set": {"seed": 5}}, "set: expected no seed"),
        ({"methods": [{"set": {"seed": 5}}]}, "a method's set: expected no seed"),
    ],
)  # fmt: skip
def test_bad_plans_are_named(changes, message):
    changes = {"set": EXAMPLE["set"] | changes.pop("set", {})} | changes
    with pytest.raises(InputError) as caught:
        expanded(**changes)
    assert message in str(caught.value)


def test_files_of_prompts_are_found_beside_the_plan(tmp_path, monkeypatch):
    """As configurations are; those that are not there are looked up in the current folder."""
    plans, here = tmp_path / "plans", tmp_path / "here"
    for folder, names in ((tmp_path, ["two"]), (plans, ["own"]), (here, ["own", "elsewhere"])):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / f"{name}.txt").write_text(f"a cat in {folder.name}\na dog\n")
    monkeypatch.chdir(here)
    small = {"prompts.per_iteration": 2, "iterations": 8}

    def files(evaluation, **changes):
        data = {"name": "x", "set": small | changes, "evaluation": evaluation}
        (run,) = expand(parse(Plan, data, "plan"), Path("../plans/plan.yaml"))
        return run, run.config.prompts.set, run.config.evaluation.prompts

    run, trained, measured = files({"prompts": "own.txt"}, **{"prompts.set": "../two.txt"})
    assert (trained, measured) == ("../plans/../two.txt", "../plans/own.txt")
    assert run.prompts_evaluated() == ("a cat in plans", "a dog")
    assert files({"prompts": "elsewhere.txt"})[2] == "elsewhere.txt"
    assert files({"prompts": str(here / "own.txt")})[2] == str(here / "own.txt")
    assert files({"prompts": "animals8"})[2] == "animals8"
    with pytest.raises(InputError, match=r"there is no .*nowhere\.txt"):
        files({}, **{"prompts.set": "nowhere.txt"})


def test_own_prompts_are_what_the_runs_of_a_plan_are_measured_on(tmp_path, capsys):
    """As `driftrl train` does, unless the plan, or a configuration, says otherwise."""
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    path = tmp_path / "plan.yaml"
    text = (
        "name: x\nset: {prompts: {set: two.txt, per_iteration: 2}, iterations: 2, sampling.candidates: 8}\n"
    )
    path.write_text(f"{text}evaluation: {{images: 2, checkpoints: 1}}\n")
    (run,) = expand(load_plan(path), path)
    assert run.prompts_evaluated() == ("a cat", "a dog")
    experiment(path, None, None, 1, dry_run=True, quiet=False)
    assert "32 in training, 12 in evaluation" in capsys.readouterr().out
    (ours,) = expand(parse(Plan, {"name": "x", "set": {"iterations": 8}}, "plan"), path)
    assert len(ours.prompts_evaluated()) == 40
    (said,) = expand(parse(Plan, {"name": "x", "set": {"evaluation.prompts": "animals8"}}, "plan"), path)
    assert len(said.prompts_evaluated()) == 8
    (tmp_path / "other.txt").write_text("a cow\na horse\n")
    grid = {"grid": {"prompts.set": ["two.txt", "other.txt"]}}
    data = {"name": "x", "set": {"iterations": 8, "prompts.per_iteration": 2}, **grid}
    with pytest.raises(InputError, match=r"evaluation\.prompts: expected the same in all runs"):
        expand(parse(Plan, data, "plan"), path)
    assert len(expand(parse(Plan, data | {"evaluation": {"prompts": "eval40"}}, "plan"), path)) == 2


def test_the_shipped_plans_say_what_their_runs_are_measured_on():
    assert all(load_plan(path).evaluation.prompts is not None for path in PLANS.glob("*.yaml"))


def command_line(*arguments, **options):
    command = [sys.executable, "-m", "driftrl.cli.main", "experiment", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def test_a_bad_plan_is_one_message_and_status_2(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("nam: x\n")
    result = command_line(path, "--out", tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "name: is missing" in result.stderr and "did you mean 'name'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_reward_that_is_not_there_is_said_before_any_run(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("name: x\nset: {reward: 'no_such_module:score', iterations: 8}\n")
    for dry in (True, False):
        with pytest.raises(InputError, match="'no_such_module:score' cannot be imported"):
            experiment(path, tmp_path / "out", 1, 1, dry, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_plan(path, capsys):
    runs = expand(load_plan(path), path)
    assert load_plan(path).name == path.stem
    text = path.read_text()
    assert f"# {len(runs)} runs, about " in text and text.startswith("# ")
    experiment(path, None, None, 1, dry_run=True, quiet=False)
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[:-1]] == [run.name for run in runs]
    assert listed[-1].startswith(f"{len(runs)} runs, ")


def test_the_plans_are_all_there():
    names = {path.stem for path in PLANS.glob("*.yaml")}
    assert {name[:8] for name in names if name.startswith("paper-")} == {
        f"paper-{k:02d}" for k in range(1, 11)
    }
    files = {path.stem for path in METHODS.glob("*.yaml")} - {"base"}
    for name in ("main", "learning-rate"):
        runs = expand(load_plan(PLANS / f"{name}.yaml"), PLANS / f"{name}.yaml")
        assert {run.config.name.partition("-learning_rate")[0] for run in runs} == files


def python(code):
    return [sys.executable, "-c", code]


def test_a_failing_task_is_tried_again_and_the_others_finish(tmp_path):
    events, log = [], tmp_path / "log"
    flaky = f"import pathlib as p; f = p.Path({str(tmp_path / 'tried')!r}); t = f.exists(); f.touch(); exit(not t)"
    tasks = [
        Task("bad", [python("print('one\\ntwo'); exit(3)")], log / "bad"),
        Task("flaky", [python("print(1)"), python(flaky)], log / "flaky"),
        Task("refused", [python("print('no'); exit(2)")], log / "refused"),
        Task(
            "good",
            [python("print(1)"), python("import os; print(os.environ['OMP_NUM_THREADS'])")],
            log / "good",
        ),
    ]
    failures = Pool(
        tasks, slots(2, 5, gpus=False), 1, lambda event, task: events.append((task.name, event))
    ).run()
    assert {(f.task.name, f.status, f.reason) for f in failures} == {("bad", 3, "two"), ("refused", 2, "no")}
    assert (log / "bad").read_text() == "one\ntwo\n" * 2 and (log / "refused").read_text() == "no\n"
    assert (log / "flaky").read_text() == "1\n"  # the command that had ended well is not run again
    assert (log / "good").read_text() == "1\n5\n"
    assert [e for n, e in events if n == "bad"] == ["started", "again", "failed"]
    assert [e for n, e in events if n == "flaky"] == ["started", "again", "done"]


def test_no_more_at_a_time_than_slots(tmp_path):
    most = []
    tasks = [Task(str(k), [python("import time; time.sleep(0.1)")], tmp_path / str(k)) for k in range(5)]
    assert not Pool(tasks, slots(2, 1, gpus=False), look=lambda running: most.append(len(running))).run()
    assert max(most) == 2


SAVES = """
import signal, sys, time
def end(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def test_stopping_lets_every_process_save_and_starts_no_other(tmp_path):
    logs = [tmp_path / name for name in ("a", "b", "c")]
    events = []

    def look(running):
        if all(log.exists() and "ready" in log.read_text() for log in logs[:2]):
            pool.stop()

    pool = Pool(
        [Task(log.name, [python(SAVES)], log) for log in logs],
        slots(2, 1, gpus=False),
        tell=lambda event, task: events.append((task.name, event)),
        look=look,
    )
    assert pool.run() == []
    assert [log.exists() and log.read_text() for log in logs] == ["ready\nsaved\n"] * 2 + [False]
    assert {e for e in events if e[1] != "started"} == {("a", "stopped"), ("b", "stopped")}


def test_an_exception_leaves_no_process_behind(tmp_path):
    log = tmp_path / "log"

    def look(running):
        if log.exists() and "ready" in log.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pool([Task("a", [python(SAVES)], log)], slots(1, 1, gpus=False), look=look).run()
    assert log.read_text() == "ready\nsaved\n"


def test_slots(monkeypatch):
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert slots() == [{"OMP_NUM_THREADS": "1"}] * 12
    assert slots(5) == [{"OMP_NUM_THREADS": "2"}] * 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-x")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(3)] == ["3", "GPU-x", "3"]
    assert slots(threads=4) == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": card} for card in ("3", "GPU-x")
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots()] == ["0", "1"]
    assert slots(gpus=False) == [{"OMP_NUM_THREADS": "1"}] * 12


@pytest.fixture
def tiny(config, encoder_folder, tmp_path):
    """Writes a plan of two runs of seconds."""

    def write(**changes):
        (tmp_path / "base.yaml").write_text(dump_config(config()))
        (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
        plan = {
            "name": "tiny", "base": "base.yaml", "jobs": 2,
            "methods": [{"label": "one"}, {"label": "two", "set": {"shaping.ratio": 0.0}}],
            "evaluation": {
                "prompts": str(tmp_path / "prompts.txt"), "images": 3, "checkpoints": 2, "encoder": str(encoder_folder),
            },
        } | changes  # fmt: skip
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
        return tmp_path / "plan.yaml"

    return write


def test_a_plan_from_start_to_end(tiny, tmp_path, capsys):
    out, plan = tmp_path / "out", tiny()
    experiment(plan, out, None, 0, dry_run=False, quiet=False)
    told = capsys.readouterr().err
    assert "2 of 2 runs to do, 2 at a time" in told and "two-seed0: done iteration 2/2" in told
    folders, files = (
        [out / kind / f"{n}-seed0{end}" for n in ("one", "two")]
        for kind, end in (("runs", ""), ("results", ".json"))
    )
    assert "two" in (out / "report.html").read_text()
    for folder, file in zip(folders, files, strict=True):
        result = load_result(file)
        assert [point.iteration for point in result.evaluation.points] == [0, 1, 2]
        assert result.config == load_config(folder / "config.yaml")
        assert result.training.iterations == 2 and result.training.curves["iteration"] == [1, 2]
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        means = [line["reward/mean"] for line in log]
        assert result.training.curves["reward/mean"] == pytest.approx(means, rel=1e-5)

    # What is compared from the small files is what is compared from the runs.
    whole, small = load_methods(folders), load_methods([out / "results"])
    assert [m.name for m in small] == [m.name for m in whole] == ["one", "two"]
    a, b = (hypervolumes(methods, "diversity") for methods in (whole, small))
    assert all(a[name].mean == pytest.approx(b[name].mean, abs=1e-4, rel=1e-4) for name in a)
    assert len(compare(small, ["diversity"])) == 1
    page = write_comparison([files[1], folders[0]], tmp_path / "small.html").read_text()
    assert "one" in page and "two" in page

    # Finished, it is skipped; evaluated under other settings, it is not trained again.
    def written():
        return {path: path.stat().st_mtime_ns for path in (*out.glob("logs/*"), *out.glob("runs/*/*"))}

    before = written()
    experiment(plan, out, None, 0, dry_run=False, quiet=False)
    assert written() == before and "runs to do" not in capsys.readouterr().err

    with pytest.raises(
        InputError, match=r"one-seed0 holds a run of other settings.*shaping.ratio: 0.5 -> 0.3"
    ):
        experiment(tiny(set={"shaping.ratio": 0.3}), out, None, 0, dry_run=False, quiet=False)
    with pytest.raises(InputError, match="iterations: 2 -> 1"):
        changed = {
            "set": {"iterations": 1},
            "evaluation": yaml.safe_load(plan.read_text())["evaluation"] | {"checkpoints": 1},
        }
        experiment(tiny(**changed), out, None, 0, dry_run=False, quiet=False)
    assert written() == before

    # More iterations are gone on to, where the checkpoints to be evaluated are there.
    longer = load_plan(tiny(set={"iterations": 4}))
    runs = expand(longer, plan)
    assert standing(runs[0], folders[0], longer.evaluation) == Standing(2, 1, trained=False, evaluated=False)
    shutil.rmtree(folders[0] / "checkpoints/000002")
    shutil.copytree(folders[0] / "checkpoints/000001", folders[0] / "checkpoints/000003")
    with pytest.raises(InputError, match="iterations: 2 -> 4"):
        standing(runs[0], folders[0], longer.evaluation)
    shutil.rmtree(folders[0] / "checkpoints")
    assert standing(runs[0], folders[0], longer.evaluation) == Standing(0, 0, trained=False, evaluated=False)


SLOW = """
import os, time
def reward(images, prompts):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_failed_tried_again_and_finished(tiny, tmp_path, number):
    (tmp_path / "slowly.py").write_text(SLOW)
    out, plan = tmp_path / "out", tiny(set={"iterations": 6, "reward": "slowly:reward"})
    one, two = (out / "runs" / f"{name}-seed0" for name in ("one", "two"))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "SLOW": "1"}
    command = [sys.executable, "-m", "driftrl.cli.main", "experiment", str(plan), "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not all((folder / "metrics.jsonl").is_file() for folder in (one, two)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    second = command_line(plan, "--out", out, env=environment)
    assert second.returncode == 2 and "another process" in second.stderr
    process.send_signal(number)
    told = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + number
    assert f"go on with: driftrl experiment {plan} --out {out}" in told
    assert "two-seed0: stopped" in told and not (out / "report.html").exists()
    reached = {folder: checkpoint.newest(folder / "checkpoints") for folder in (one, two)}
    assert all(path is not None and 0 < int(path.name) < 6 for path in reached.values())

    # The second run cannot write its next checkpoint: it is tried again and listed, and the first one is finished.
    environment["SLOW"] = "0"
    obstacle = two / f"checkpoints/.{int(reached[two].name) + 1:06d}.tmp"
    obstacle.write_text("in the way")
    failed = command_line(plan, "--out", out, env=environment)
    assert failed.returncode == 3 and "Traceback" not in failed.stderr
    log = out / "logs/two-seed0.log"
    assert "1 of 2 runs failed" in failed.stderr and f"    {log}" in failed.stderr
    last = log.read_text().splitlines()[-1]
    assert "a checkpoint cannot be written" in last and f"two-seed0: status 3: {last}" in failed.stderr
    assert log.read_text().count("a checkpoint cannot be written") == 2
    assert f"from iteration {int(reached[one].name)}" in (out / "logs/one-seed0.log").read_text()
    assert [file.name for file in (out / "results").iterdir()] == ["one-seed0.json"]

    # Once it can, it goes on where it was.
    obstacle.unlink()
    before = (out / "logs/one-seed0.log").stat().st_mtime_ns
    last = command_line(plan, "--out", out, env=environment)
    assert last.returncode == 0 and (out / "report.html").is_file()
    assert f"from iteration {int(reached[two].name)}" in log.read_text()
    assert (out / "logs/one-seed0.log").stat().st_mtime_ns == before
    lines = [json.loads(line)["iteration"] for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]
