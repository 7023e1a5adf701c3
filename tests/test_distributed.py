"""Several processes are one: same samples, same weights, one message, one end. Over gloo, on the CPU."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from driftrl.build import build_loop
from driftrl.checks import InputError
from driftrl.config import ModelConfig, dump_config
from driftrl.distributed import ALONE, Team, join, raised_by_all
from driftrl.estimate import Plan
from driftrl.evaluation.evaluate import load_evaluation
from driftrl.pipelines import load_pipeline
from driftrl.policies.pipeline import PipelinePolicy, Sampler
from driftrl.update import Objective, _passes


@pytest.fixture
def train(config, tmp_path, launch):
    """Trains in a folder of the test's, in so many processes, and returns statuses and messages."""

    def run(name, processes, send=(), whom=1, until="", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(config(**changes)))
        return launch(
            tmp_path, processes, "train", path, "--out", name, send=send, whom=whom, until=tmp_path / until
        )

    return run


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, iteration):
    found = load_file(run / f"checkpoints/{iteration:06d}/training.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(found.items()) if k.endswith("/value")])


def assert_same_files(one, two, iteration):
    for name in (f"checkpoints/{iteration:06d}/training.safetensors", "metrics.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


ONE_PASS = {"optimizer__updates": 1, "optimizer__one_pass": True, "optimizer__batch_size": 6}
MEMORY = {
    "global": {"advantage__scale": "global", "selection__strategy": "random", "optimizer__epochs": 2},
    "ddpo": {"advantage__baseline": "running", "advantage__min_history": 6},
    "gardo": {
        "shaping__level": "multiply", "shaping__measure": "nearest", "objective__kl_weight": 0.1,
        "objective__kl_share": 0.3, "objective__reference_every": 3,
    },
    "nft": {"objective__loss": "nft", "objective__timestep_choice": "random", "objective__nft_decay": 0.5},
    "dgpo": {"objective__loss": "dgpo", "objective__timestep_choice": "random", "optimizer__updates": 3},
    "adjoint": {"objective__loss": "adjoint", "objective__adjoint_scale": 30.0, "advantage__scale": "none"},
    "draft": {"objective__loss": "draft", "objective__draft_steps": 2, "optimizer__updates": 3},
    "target": {"shaping__target": 1.5, "shaping__target_rate": 0.5, "prompts__set": ["a cat", "a dog", "a cow", "an ox"]},
    "stepwise": {"shaping__potential": "stepwise", "objective__timestep_choice": "random", "objective__timesteps": 0.7},
}  # fmt: skip


@pytest.mark.parametrize(
    "method", ["drift", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one pass", *MEMORY))]
)
def test_two_processes_train_as_one(train, tmp_path, method):
    """Three prompts, so one process has two. A prompt per batch: then not even rounding tells the samples apart. The
    reward is smooth; one that counts bytes, as JPEG's does, makes a step of a rounding error now and then.
    """
    (tmp_path / "smooth.py").write_text(
        "def reward(images, prompts):\n    return images.mean((1, 2, 3)) * 10\n"
    )
    settings = {
        "iterations": 6,
        "reward": "smooth:reward",
        "sampling__batch_size": 6,
        "evaluation__every": 3,
        "evaluation__prompts": "animals5",
        **(ONE_PASS if method == "one pass" else MEMORY.get(method, {})),
    }
    for name, processes in (("one", 1), ("two", 2)):
        statuses, said = train(name, processes, **settings)
        assert set(statuses) == {0}, said
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one[0]["reward/mean"] == two[0]["reward/mean"]
    assert one[0]["reward/kept_std"] == two[0]["reward/kept_std"]
    pictures = [(tmp_path / name / "images/000001.png").read_bytes() for name in ("one", "two")]
    assert pictures[0] == pictures[1]
    for a, b in zip(one, two, strict=True):
        counted = [name for name in a if name.startswith(("warning", "reference")) or name == "policy/pairs"]
        assert {name: a[name] for name in counted} == {name: b[name] for name in counted}
        for name in ("reward/mean", "diversity/kept_mean", "loss", "loss/kl", "policy/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (name, a["iteration"])
        meanwhile = {name: value for name, value in a.items() if name.startswith("evaluation/")}
        assert len(meanwhile) == (8 if a["iteration"] % 3 == 0 else 0)
        assert {name: b[name] for name in meanwhile} == pytest.approx(meanwhile, rel=1e-3)
    start, last = weights(tmp_path / "one", 0), weights(tmp_path / "one", 6)
    assert (last - start).abs().max() > 5e-3
    torch.testing.assert_close(weights(tmp_path / "two", 6), last, atol=1e-5, rtol=0)


IN_PARTS = {
    "adapter__kind": "full", "adapter__shard": True, "prompts__per_iteration": 4, "optimizer__batch_size": 2,
    "sampling__batch_size": 6, "objective__timestep_choice": "random", "objective__timesteps": 0.7,
    "reward": "smooth:reward", "optimizer__learning_rate": 2e-4,
}  # fmt: skip


@pytest.fixture
def smooth(tmp_path):
    (tmp_path / "smooth.py").write_text(
        "def reward(images, prompts):\n    return images.mean((1, 2, 3)) * 10\n"
    )


@pytest.mark.parametrize(
    ("kl", "resumed"),
    [pytest.param(*each, marks=pytest.mark.slow) for each in ((0.1, False), (0.0, True), (0.1, True))],
)
def test_weights_in_parts_train_as_whole_ones(train, launch, smooth, tmp_path, kl, resumed):
    """Of every weight each of two processes holds a part (FSDP). The steps' pairs are drawn over all samples, so the
    processes have different numbers of micro-batches. Divergence from the reference is asked between them. ``resumed``:
    whole weights go on in parts, and the other way round.
    """
    settings = {"iterations": 3, "objective__kl_weight": kl, **IN_PARTS}
    for name, processes in (("one", 1), ("two", 2)):
        statuses, said = train(name, processes, **settings)
        assert set(statuses) == {0}, said
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["policy/ratio_deviation"] <= 1e-6 and b["policy/ratio_deviation"] <= 1e-6
        for name in ("reward/mean", "loss", "loss/kl", "policy/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (name, a["iteration"])
    assert (one[-1]["loss/kl"] > 0) == (kl > 0)
    start, last = weights(tmp_path / "one", 0), weights(tmp_path / "one", 3)
    assert (last - start).abs().max() > 5e-4
    close_but_for_signs(weights(tmp_path / "two", 3), last)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        files = [tmp_path / run / "checkpoints/000003" / name for run in ("one", "two")]
        if name == "config.json":
            assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())
        else:
            found = [load_file(file) for file in files]
            assert found[0].keys() == found[1].keys()
            close_but_for_signs(*(torch.cat([f[key].flatten() for key in sorted(f)]) for f in found))
    if not resumed:
        return
    statuses, said = launch(tmp_path, 1, "train", "--resume", "two", "--set", "iterations=4")
    assert statuses == [0], said
    statuses, said = launch(tmp_path, 2, "train", "--resume", "one", "--set", "iterations=4")
    assert statuses == [0, 0], said
    close_but_for_signs(weights(tmp_path / "one", 4), weights(tmp_path / "two", 4))


@pytest.mark.slow
def test_what_each_process_holds_of_weights_in_parts(config, launch, tmp_path):
    """In half precision: block by block from where they were loaded, no lowered copies, the reference in place, and only the first
    process with all of a checkpoint.
    """
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config(model__dtype="bfloat16", **IN_PARTS)))
    statuses, said = launch(tmp_path, 2, Path(__file__).with_name("in_parts.py"), path, tmp_path / "saved")
    assert statuses == [0, 0], said


def test_a_network_for_parts_stays_in_main_memory(pipeline_folder):
    """Until its parts are known; the autoencoder goes where the policy computes."""
    pipeline = load_pipeline(ModelConfig(path=str(pipeline_folder)))
    policy = PipelinePolicy(pipeline, Sampler(4, 1.0), torch.device("meta"), in_parts=True)
    assert {p.device.type for p in policy.network.parameters()} == {"cpu"}
    assert {p.device.type for p in pipeline.vae.parameters()} == {"meta"}


@pytest.mark.slow
def test_weights_in_parts_train_as_whole_ones_in_half_precision(train, smooth, tmp_path):
    """As far as its rounding lets them: autocast, which whole weights have, leaves norms in float32. Weights in float32 go
    another way still (a cosine of 0.89).
    """
    settings = {"iterations": 3, "objective__kl_weight": 0.1, "model__dtype": "bfloat16", **IN_PARTS}
    for name, processes in (("one", 1), ("two", 2)):
        statuses, said = train(name, processes, **settings)
        assert set(statuses) == {0}, said
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert b["policy/ratio_deviation"] <= 1e-5
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], rel=1e-2)
        assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=0.5)
    assert torch.equal(weights(tmp_path / "one", 0), weights(tmp_path / "two", 0))
    one, two = (
        (weights(tmp_path / name, 3) - weights(tmp_path / name, 0)).double() for name in ("one", "two")
    )
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.85


def close_but_for_signs(one, two):
    """To 1e-5, but for the few weights whose gradient is so near 0 that rounding has a say in its sign: AdamW moves
    those as far as any, by a learning rate (2e-4) a step.
    """
    apart = (one - two).abs()
    assert (apart > 1e-5).double().mean() < 1e-4
    assert apart.max() < 2e-4


@pytest.mark.slow
def test_weights_in_parts_killed_and_resumed_end_the_same(train, launch, smooth, tmp_path):
    settings = {**IN_PARTS, "model__dtype": "bfloat16", "objective__kl_weight": 0.1}
    statuses, said = train(
        "parts", 2, send=[signal.SIGKILL], until="parts/checkpoints/000002", iterations=500,
        logging__checkpoint_every=2, **settings,
    )  # fmt: skip
    assert statuses[1] == -signal.SIGKILL, said
    done = int(max(p.name for p in (tmp_path / "parts/checkpoints").iterdir()))
    statuses, said = launch(tmp_path, 2, "train", "--resume", "parts", "--set", f"iterations={done + 2}")
    assert statuses == [0, 0], said
    statuses, said = train("whole", 2, iterations=done + 2, **settings)
    assert statuses == [0, 0], said
    assert_same_files(tmp_path / "whole", tmp_path / "parts", done + 2)


def test_parts_must_come_out_even(config, tmp_path):
    with pytest.raises(InputError, match=r"with adapter\.shard expected a multiple of the 2 processes"):
        build_loop(config(adapter__kind="full", adapter__shard=True), tmp_path, Team(0, 2))
    for wrong in ({}, {"adapter__kind": "full", "objective__reference_every": 2}):
        with pytest.raises(InputError, match=r"adapter\.shard"):
            config(adapter__shard=True, **wrong)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ended_in_one_process_and_resumed_ends_the_same(train, launch, tmp_path, number):
    """A signal to the second process ends both: at once, or after the iteration, which both have done then."""
    settings = {"advantage__baseline": "running", "advantage__min_history": 6}
    statuses, said = train(
        "parts", 2, send=[number], until="parts/checkpoints/000002", iterations=500,
        logging__checkpoint_every=2, **settings,
    )  # fmt: skip
    run = tmp_path / "parts"
    if number == signal.SIGTERM:
        # Whichever is gone first, the launcher ends the other, which has nothing left to do.
        assert {143} <= set(statuses) <= {143, -signal.SIGTERM}, said
        assert said.count("go on with: driftrl train --resume parts") == 1
        assert len(metrics(run)) == int(max(p.name for p in (run / "checkpoints").iterdir()))
    else:
        assert statuses[1] == -signal.SIGKILL
        assert statuses[0] not in (0, 1), said
        assert "Traceback" not in said
    done = int(max(p.name for p in (run / "checkpoints").iterdir()))
    statuses, said = launch(tmp_path, 2, "train", "--resume", "parts", "--set", f"iterations={done + 2}")
    assert statuses == [0, 0], said
    statuses, said = train("whole", 2, iterations=done + 2, **settings)
    assert statuses == [0, 0], said
    assert_same_files(tmp_path / "whole", run, done + 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_who_raises_an_error_is_known(monkeypatch, processes):
    """Of one process nobody else does, and one that was not raised together is one's own."""
    team = Team(0, processes)
    monkeypatch.setattr(Team, "texts", lambda self, text: [text] * processes)
    with pytest.raises(InputError) as caught, team.together():
        raise InputError("wrong")
    assert raised_by_all(caught.value) == (processes > 1)
    assert not raised_by_all(InputError("wrong"))


def test_an_error_in_one_process_ends_all_with_one_message(train, tmp_path):
    (tmp_path / "spoilt.py").write_text(
        "import os\ncalls = []\n\ndef reward(images, prompts):\n    calls.append(1)\n"
        "    if len(calls) == 3 and os.environ['RANK'] == '1':\n        raise ConnectionError('gone')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    statuses, said = train(
        "run", 2, iterations=9, reward="spoilt:reward", guards__reward_attempts=1,
        logging__checkpoint_every=100,
    )  # fmt: skip
    assert statuses[0] == 3, said
    assert statuses[1] != 0
    assert said.count("driftrl:") == said.count("the reward failed once for") == 1, said
    assert "Traceback" not in said
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run/checkpoints/000002/training.safetensors").is_file()


def test_what_is_not_finite_in_one_process_is_skipped_by_all(train, tmp_path):
    """The prompt belongs to one process; which one is no matter."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na cow\na fox\n")
    (tmp_path / "moody.py").write_text(
        "import torch\n\ndef reward(images, prompts):\n"
        "    scores = images.mean((1, 2, 3))\n"
        "    scores[[prompt == 'a cow' for prompt in prompts]] = float('nan')\n    return scores\n"
    )
    settings = {
        "iterations": 4, "reward": "moody:reward", "prompts__set": str(prompts), "evaluation__every": 4,
    }  # fmt: skip
    for name, processes in (("one", 1), ("two", 2)):
        statuses, said = train(name, processes, **settings)
        assert set(statuses) == {0}, said
    skipped = [[line["warning/skipped"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert skipped[0] == skipped[1]
    assert set(skipped[0]) == {0, 1}
    assert said.count("a reward is not finite for 'a cow'") == 1
    assert said.count("iteration 4 was not measured: reward") == 1
    assert not any(name.startswith("evaluation/") for name in metrics(tmp_path / "two")[3])
    torch.testing.assert_close(weights(tmp_path / "two", 4), weights(tmp_path / "one", 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_is_the_same(config, launch, tmp_path, processes):
    """Of four processes one has no prompt."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    (tmp_path / "run.yaml").write_text(
        dump_config(config(iterations=1, evaluation__prompts="prompts.txt", evaluation__images=4))
    )
    statuses, said = launch(tmp_path, 1, "train", "run.yaml", "--out", "run")
    assert statuses == [0], said
    found = []
    for name, count in (("one", 1), ("several", processes)):
        statuses, said = launch(tmp_path, count, "evaluate", "run", "--out", name)
        assert set(statuses) == {0}, said
        assert said.count("report.html") == 1
        assert (tmp_path / name / "report.html").is_file()
        assert len(list((tmp_path / name / "images").rglob("*.webp"))) == 6
        found.append(load_evaluation(tmp_path / name))
    one, several = found
    assert one.settings == several.settings
    for a, b in zip(one.points, several.points, strict=True):
        assert a.figures.keys() == b.figures.keys()
        for name in a.figures:
            assert a.figures[name].per_prompt == pytest.approx(b.figures[name].per_prompt, abs=1e-5), name


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        pytest.param(
            ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], marks=pytest.mark.slow
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_launcher_starts_it(train, config, tmp_path, launcher):
    """A whole run as users start it, evaluation at the end included."""
    (tmp_path / "three.txt").write_text("a cat\na dog\na cow\n")
    settings = {
        "evaluation__at_end": True, "evaluation__prompts": "three.txt", "evaluation__images": 2,
        "logging__trackers": ["tensorboard"],
    }  # fmt: skip
    statuses, said = train("forked", 2, **settings)
    assert statuses == [0, 0], said
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "driftrl.cli.main",
        "train",
        "forked.yaml",
        "--out",
        "launched",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: launched") == 1
    assert_same_files(tmp_path / "forked", tmp_path / "launched", 2)
    assert load_evaluation(tmp_path / "launched").points == load_evaluation(tmp_path / "forked").points
    assert len(list((tmp_path / "launched").glob("tensorboard/events*"))) == 1


@pytest.mark.parametrize(("count", "size"), [(8, 1), (8, 2), (7, 3), (3, 3), (2, 4)])
def test_shares_are_all_of_it_and_even(count, size):
    shares = [range(count)[Team(rank, size).share(count)] for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_pair_is_trained_on_by_one_process_in_the_same_step():
    scored, objective = torch.tensor([True, True, True, False]), Objective(updates=3, epochs=2, timesteps=0.7)
    whole = _passes(scored, 10, objective, (0, 5), range(10))
    parts = [_passes(scored, 10, objective, (0, 5), mine) for mine in (range(4), range(4, 10))]
    for steps, *shares in zip(whole, *parts, strict=True):
        for (everything, count), *own in zip(steps, *shares, strict=True):
            assert {n for _, n in own} == {count} == {len(everything.sample)}
            found = [
                pair
                for first, (pairs, _) in zip((0, 4), own, strict=True)
                for pair in zip((pairs.sample + first).tolist(), pairs.step.tolist(), strict=True)
            ]
            assert sorted(found) == sorted(
                zip(everything.sample.tolist(), everything.step.tolist(), strict=True)
            )


@pytest.mark.parametrize("updates", [1, 2, 5, 29, 50, 100, 128, 500])
def test_there_are_as_many_optimiser_steps_as_asked_for(updates):
    """Of sizes that differ by one pair at most; no more than there are pairs. What an estimate counts with is the same."""
    objective = Objective(updates=updates, timesteps=1.0)
    (steps,) = _passes(torch.ones(3, dtype=torch.bool), 64, objective, (0, 0), range(64))
    sizes = [count for _, count in steps]
    assert len(sizes) == min(updates, 192) and sum(sizes) == 192 and max(sizes) - min(sizes) <= 1
    ones = {field.name: 1 for field in fields(Plan)}
    changes = {"trained": 1.0, "prompts": 8, "keep": 8, "scored": 3, "updates": updates, "grouped": False}
    assert Plan(**ones | changes).parts == sizes


@pytest.mark.parametrize("updates", [1, 5, 100])
def test_samples_that_go_together_are_in_one_optimiser_step(updates):
    """All eight of a prompt at each of its steps, one after the other; what an estimate counts with is the same."""
    objective = Objective(updates=updates, timesteps=0.67)
    (steps,) = _passes(torch.ones(3, dtype=torch.bool), 64, objective, (0, 0), range(64), 8)
    sizes = [count for _, count in steps]
    assert len(sizes) == min(updates, 16) and sum(sizes) == 128 and max(sizes) - min(sizes) <= 8
    groups = [
        group
        for pairs, _ in steps
        for group in zip(pairs.sample.view(-1, 8).tolist(), pairs.step.view(-1, 8).tolist(), strict=True)
    ]
    assert all(sample == list(range(sample[0], sample[0] + 8)) for sample, _ in groups)
    assert all(len(set(at)) == 1 for _, at in groups)
    assert len({(sample[0] // 8, at[0]) for sample, at in groups}) == 16
    ones = {field.name: 1 for field in fields(Plan)}
    changes = {"trained": 0.67, "prompts": 8, "keep": 8, "scored": 3, "updates": updates, "grouped": True}
    assert Plan(**ones | changes).parts == sizes


def test_too_few_prompts_are_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"prompts\.per_iteration: expected at least 4"):
        build_loop(config(), tmp_path, Team(0, 4))


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launches_that_shard_weights_are_refused(monkeypatch, what):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    with pytest.raises(InputError, match="shards prompts, not weights"):
        join()


@pytest.fixture(params=[False, True], ids=["first", "after a run in this Python"])
def accelerate_state(request, monkeypatch):
    """accelerate's state of this process: none yet, or the one that an earlier run alone left behind."""
    from accelerate import PartialState

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    PartialState._reset_state()
    if request.param:
        PartialState()
    yield
    PartialState._reset_state()


@pytest.mark.usefixtures("accelerate_state")
def test_processes_that_no_launcher_started_are_refused(monkeypatch):
    """Each would train alone, and think that it is all there is."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, but .*; start them with torchrun or"):
        join()


@pytest.mark.usefixtures("accelerate_state")
def test_a_launch_that_failed_is_not_in_the_way_of_the_next_run(monkeypatch):
    from accelerate import PartialState

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start them with torchrun"):
        join()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() == ALONE
    assert PartialState().is_main_process
