"""Nothing lost: guards, faults at every write, kills at any moment, damaged folders. docs/reliability.md lists them."""

import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import driftrl, run_command
from driftrl import Trainer, checkpoint, terms
from driftrl.batches import MemoryWarning
from driftrl.checks import InputError, NotFiniteError, RunFailedError
from driftrl.config import TrainConfig, dump_config, load_config, parse_config
from driftrl.files import sha256, sort_header, write_json
from driftrl.rewards.guarded import GuardedReward
from driftrl.trainer import NotFiniteWarning


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.loop.policy.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Spoilt:
    """A reward that is not finite in the calls named."""

    def __init__(self, *bad):
        self.bad, self.calls = bad, 0

    def __call__(self, images, prompts):
        self.calls += 1
        scores = images.mean((1, 2, 3))
        if self.calls in self.bad:
            scores[1] = float("nan")
        return scores


def test_a_reward_that_is_not_finite_skips_the_iteration(config, tmp_path):
    trainer = Trainer(config(iterations=2), tmp_path / "run")
    trainer.loop.reward = Spoilt(1)
    before = weights(trainer)
    with pytest.warns(
        NotFiniteWarning, match=r"iteration 1 was skipped: a reward is not finite for 'a.*candidate 1"
    ):
        skipped = trainer.loop.attempt()
    assert skipped.metrics["warning/skipped"] == 1
    assert same(before, weights(trainer))
    assert trainer.loop.position.failures == 1
    trainer.loop.attempt()
    assert trainer.loop.position.failures == 0
    assert not same(before, weights(trainer))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_weights(config, tmp_path, monkeypatch, what):
    trainer = Trainer(config(), tmp_path / "run")
    before = weights(trainer)
    real = terms.clipped_surrogate

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.nan

    def broken(log_prob, *rest):
        return real(log_prob * torch.nan if what == "loss" else Break.apply(log_prob), *rest)

    monkeypatch.setattr(terms, "clipped_surrogate", broken)
    expected = (
        r"the loss is not finite for 'a.*denoising step \d"
        if what == "loss"
        else "the gradient is not finite"
    )
    with pytest.warns(NotFiniteWarning, match=expected):
        trainer.loop.attempt()
    assert same(before, weights(trainer))
    assert not trainer.loop.optimizer.state


def test_a_latent_that_is_not_finite_names_prompt_and_step(config, tmp_path, monkeypatch):
    trainer = Trainer(config(), tmp_path / "run")
    real = trainer.loop.policy.transition

    def broken(latents, steps, conditioning):
        move = real(latents, steps, conditioning)
        return move._replace(mean=torch.where((steps == 2)[:, None, None, None], torch.nan, move.mean))

    monkeypatch.setattr(trainer.loop.policy, "transition", broken)
    with pytest.raises(
        NotFiniteError, match=r"a latent is not finite for 'a.*', candidate 0, denoising step 3"
    ):
        trainer.loop.iterate()


def test_too_many_failures_end_the_run_and_lose_nothing(config, tmp_path):
    trainer = Trainer(config(iterations=9), tmp_path / "run")
    trainer.loop.reward = Spoilt(*range(2, 99))
    with pytest.warns(NotFiniteWarning), pytest.raises(RunFailedError, match="3 iterations in a row"):
        trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["warning/skipped"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["reward/mean"] is None
    one, last = tmp_path / "run/checkpoints/000001", checkpoint.newest(tmp_path / "run/checkpoints")
    assert last is not None and last.name == "000004"
    assert same(load_file(one / "training.safetensors"), load_file(last / "training.safetensors"))


def test_a_reward_that_fails_is_retried_and_then_reported(config, tmp_path):
    calls = []

    def flaky(images, prompts):
        calls.append(len(prompts))
        if len(calls) % 3:
            raise ConnectionError("gone")
        return images.mean((1, 2, 3))

    guarded = GuardedReward(flaky, attempts=3, pause=0)
    assert guarded(torch.rand(4, 3, 8, 8), ["a cat"] * 4).shape == (4,)
    assert len(calls) == 3
    dead = GuardedReward(flaky, attempts=2, pause=0)
    with pytest.raises(
        RunFailedError, match=r"failed 2 times for 'a cat'; the last time: ConnectionError: gone"
    ):
        dead(torch.rand(4, 3, 8, 8), ["a cat"] * 4)
    trainer = Trainer(config(iterations=3), tmp_path / "run")
    trainer.loop.iterate()
    trainer.loop.reward = dead
    calls.clear()
    with pytest.raises(RunFailedError):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000001"


def test_a_reward_that_fails_says_where():
    def score(images, prompts):
        return {}[prompts[0]]

    line = score.__code__.co_firstlineno + 1
    with pytest.raises(RunFailedError, match=rf"KeyError: 'a cat' \(.*test_reliability\.py, line {line}\)"):
        GuardedReward(score, attempts=1)(torch.zeros(1, 3, 2, 2), ["a cat"])


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_reward_that_exits_has_failed(timeout):
    def score(images, prompts):
        sys.exit(5)

    line = score.__code__.co_firstlineno + 1
    told = (
        rf"failed 2 times for 'a cat'; the last time: SystemExit: 5 \(.*test_reliability\.py, line {line}\)"
    )
    with pytest.raises(RunFailedError, match=told):
        GuardedReward(score, attempts=2, pause=0, timeout=timeout)(torch.zeros(1, 3, 2, 2), ["a cat"])


def test_a_reward_that_exits_ends_the_program_with_status_3(config, tmp_path):
    (tmp_path / "leaving.py").write_text("import sys\ndef score(images, prompts):\n    sys.exit(5)\n")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(iterations=1, reward="leaving:score", guards={"reward_attempts": 1})))
    result = driftrl("train", path, "--out", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert re.search(r"the last time: SystemExit: 5 \(.*leaving\.py, line 3\)", result.stderr)


def test_a_reward_that_writes_into_the_images_is_refused():
    """Diversity, pictures and all that comes after would be of what it left."""
    images = torch.ones(1, 3, 2, 2)
    with pytest.raises(InputError, match="changed the images that it was given"):
        GuardedReward(lambda images, prompts: images.sub_(0.5).mean((1, 2, 3)))(images, ["a cat"])
    with torch.inference_mode():
        assert (
            GuardedReward(lambda x, prompts: x.mean((1, 2, 3)))(torch.ones(1, 3, 2, 2), ["a cat"]).item() == 1
        )


def test_writes_that_pytorch_does_not_count_are_seen_on_a_cpu():
    def score(images, prompts):
        pixels = images.numpy()
        pixels *= 255
        return images.mean((1, 2, 3))

    with pytest.raises(InputError, match="changed the images that it was given"):
        GuardedReward(score)(torch.ones(1, 3, 2, 2), ["a cat"])


def test_a_reward_that_hangs_is_given_up():
    slow = GuardedReward(lambda images, prompts: time.sleep(30), attempts=1, timeout=0.05)
    start = time.monotonic()
    with pytest.raises(RunFailedError, match=r"no answer within 0\.05 s"):
        slow(torch.rand(2, 3, 8, 8), ["a cat"] * 2)
    assert time.monotonic() - start < 10


def test_a_reward_keeps_nothing_for_a_backward_pass():
    """A user's function around a network would keep every activation of every image."""
    weight = torch.ones(3, requires_grad=True)

    def score(images, prompts):
        assert not torch.is_grad_enabled()
        return (images.mean((2, 3)) * weight).sum(1)

    for timeout in (None, 10.0):
        GuardedReward(score, attempts=1, timeout=timeout)(torch.rand(2, 3, 8, 8), ["a cat"] * 2)


def test_a_reward_that_runs_out_of_memory_gets_fewer_images_at_once():
    asked = []

    def score(images, prompts):
        assert len(images) == len(prompts)
        asked.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return images.mean((1, 2, 3))

    reward, images = GuardedReward(score, attempts=1), torch.rand(10, 3, 8, 8)
    with pytest.warns(MemoryWarning, match="images at once, 10: it is 2 from here on"):
        assert torch.equal(reward(images, ["a cat"] * 10), images.mean((1, 2, 3)))
    assert asked == [10, 5, 2, 2, 2, 2, 2]
    reward(images[:3], ["a cat"] * 3)
    assert asked[7:] == [2, 1]

    def never(images, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunFailedError, match="out of memory, though"):
        GuardedReward(never, attempts=1)(images, ["a cat"] * 10)


@pytest.mark.parametrize(
    "lie", [torch.zeros(3), torch.zeros(2, 2), None, [0.0], torch.zeros(2, dtype=torch.complex64)]
)
def test_a_reward_that_lies_is_refused(lie):
    calls = []
    reward = GuardedReward(lambda images, prompts: calls.append(1) or lie, pause=0)
    with pytest.raises(InputError, match="expected a tensor of 2 numbers"):
        reward(torch.rand(2, 3, 8, 8), ["a cat"] * 2)
    assert len(calls) == 1


class Fault:
    """Fails the n-th write, flush or rename; as a full disk does, or as a power cut does, without any clean-up."""

    def __init__(self, monkeypatch, number, cut):
        self.left, self.cut, self.struck = number, cut, False
        import safetensors.torch

        for owner, name in (
            (os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "write_text"), (Path, "mkdir"),
            (safetensors.torch, "save_file"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name), name))
        if cut:
            rmtree = shutil.rmtree
            monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None if self.struck else rmtree(*a, **k))

    def wrap(self, real, name):
        def call(*arguments, **keywords):
            self.left -= 1
            if self.left == 0:
                self.struck = True
                if name == "write_text":  # half of it arrives
                    Path(arguments[0]).write_bytes(arguments[1][: len(arguments[1]) // 2].encode())
                raise KeyboardInterrupt if self.cut else OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **keywords)

        return call


@pytest.mark.parametrize("cut", [False, True], ids=["disk full", "power cut"])
def test_a_fault_at_any_write_leaves_the_last_checkpoint(config, tmp_path, cut):
    trainer = Trainer(config(), tmp_path / "run")
    for number in range(1, 60):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        trainer.loop.position = checkpoint.Position(1)
        trainer.loop.save()
        trainer.loop.position = checkpoint.Position(2)
        with pytest.MonkeyPatch.context() as patched:
            fault = Fault(patched, number, cut)
            try:
                trainer.loop.save()
            except (OSError, KeyboardInterrupt):
                assert fault.struck
        last = checkpoint.newest(tmp_path / "run/checkpoints")
        assert last is not None, number
        assert last.name in ("000001", "000002")
        checkpoint.load(last, trainer.loop.policy, trainer.loop.optimizer)
        if not fault.struck:
            assert last.name == "000002"
            break
        trainer.loop.save()  # and the next attempt works, whatever the fault left behind
        assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000002"
    else:
        pytest.fail("never without a fault")
    assert number > 8


def test_a_full_disk_ends_the_run_with_a_message(config, tmp_path, monkeypatch):
    trainer = Trainer(config(iterations=3), tmp_path / "run")
    real = checkpoint.save

    def full(folder, policy, optimizer, position, *more):
        if position.iteration == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, policy, optimizer, position, *more)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunFailedError, match=r"No space left on device.*000001 is whole"):
        trainer.run()


def test_logs_that_cannot_be_written_do_not_stop_training(config, tmp_path):
    (tmp_path / "run").mkdir()
    trainer = Trainer(config(iterations=2), tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").mkdir()
    (tmp_path / "run/images").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000002"


class Tracker:
    """What accelerate's trackers are, as far as a run knows them."""

    def __init__(self, project, **settings):
        self.name, self.settings, self.logged, self.shown = project, settings, [], []

    def log(self, values, step):
        self.logged.append((step, values))

    def log_images(self, values, step):
        self.shown.append((step, values))

    def finish(self):
        pass


class Failing(Tracker):
    def log(self, values, step):
        raise ConnectionError("the network is down")

    def finish(self):
        raise ConnectionError("the network is down")


def test_a_tracker_that_fails_does_not_stop_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", Failing)
    trainer = Trainer(config(iterations=2, logging__trackers=["tensorboard"]), tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="a tracker failed"):
        trainer.run()
    assert checkpoint.newest(tmp_path / "run/checkpoints").name == "000002"


def test_a_tracker_that_is_not_installed_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("driftrl.run.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb"):
        Trainer(config(logging__trackers=["tensorboard", "wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_wandb_is_named_after_the_folder_and_goes_on_when_resumed(config, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("driftrl.run.find_spec", lambda name: name)
    monkeypatch.setattr(
        "accelerate.tracking.WandBTracker", lambda *a, **k: made.append(Tracker(*a, **k)) or made[-1]
    )
    settings = {"logging__trackers": ["wandb"]}
    Trainer(config(iterations=1, **settings), tmp_path / "run").run()
    Trainer(config(iterations=2, **settings), tmp_path / "run", resume=True).run()
    first, second = made
    assert first.settings["name"] == "run" and first.settings["config"]["selection.keep"] == 4
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"
    assert [step for step, _ in first.logged + second.logged] == [1, 2]
    assert "reward/mean" in first.logged[0][1]
    (step, pictures), *more = first.shown + second.shown  # of the first iteration, every tenth and the last
    assert step == 1 and [step for step, _ in more] == [2]
    count, height, width, channels = pictures["candidates"].shape
    assert (count, channels) == (1, 3) and max(height, width) <= 2048


def test_tensorboard_gets_the_pictures_of_the_run(config, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Trainer(config(iterations=2, logging__trackers=["tensorboard"]), tmp_path / "run").run()
    found = events.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    (name,) = found.Tags()["images"]
    picture, last = found.Images(name)
    assert name.startswith("candidates") and last.step == 2
    with Image.open(run / "images/000001.png") as drawn:
        assert (picture.step, picture.width, picture.height) == (1, *drawn.size)
    assert [event.step for event in found.Scalars("reward/mean")] == [1, 2]


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_over_itself(config, tmp_path):
    run = Trainer(config(iterations=2), tmp_path / "run").run()
    for path in checkpoint.listing(run / "checkpoints"):
        (path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    before = (run / "metrics.jsonl").read_text()
    with (
        pytest.warns(checkpoint.CheckpointWarning),
        pytest.raises(InputError, match="none of its checkpoints is whole"),
    ):
        Trainer(config(iterations=2), run, resume=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="its checkpoints are gone; start anew"):
        Trainer(config(iterations=2), run, resume=True)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_run_is_resumed_by_its_folder_alone(config, tmp_path):
    run = Trainer(config(iterations=1, seed=3), tmp_path / "run").run()
    trainer = Trainer(out=run, resume=True)
    assert trainer.config == config(iterations=1, seed=3)
    assert trainer.loop.position.iteration == 1


def test_a_run_is_resumed_by_the_name_of_its_folder_in_place_of_true(config, tmp_path):
    """In Python as by --resume; with settings that may change, or without any."""
    short = config(iterations=1)
    run = Trainer(short, tmp_path / "run").run()
    longer = short.model_copy(update={"iterations": 2})
    for folder, asked in ((str(run), longer), (run, None)):
        trainer = Trainer(asked, resume=folder)
        assert trainer.folder == run
        assert trainer.resumed_from == checkpoint.newest(run / "checkpoints")
        trainer.run()
        assert checkpoint.newest(run / "checkpoints").name == "000002"
    with pytest.raises(InputError, match="these settings differ and would change the run: seed: "):
        Trainer(short.model_copy(update={"seed": short.seed + 1}), resume=run)
    with pytest.raises(InputError, match="no run folder, for it has no config"):
        Trainer(short, resume=tmp_path / "nowhere")
    with pytest.raises(InputError, match="resume: expected no out beside the run folder"):
        Trainer(short, tmp_path / "other", resume=run)
    with pytest.raises(InputError, match="resume: expected a run folder, or True"):
        Trainer(short, run, resume=1)


def test_evaluation_prompts_that_are_not_there_are_refused_at_the_start(config, tmp_path, monkeypatch):
    """Whenever they are measured on: before a model is loaded, and before anything is written."""
    monkeypatch.setattr("driftrl.run.build_loop", lambda *_, **__: pytest.fail("a model was loaded"))
    settings = config(iterations=1, evaluation={"prompts": "nowhere.txt", "at_end": False})
    with pytest.raises(InputError, match=r"evaluation\.prompts: expected a prompt set .*nowhere\.txt"):
        Trainer(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keep_last_and_keep_every(config, tmp_path):
    run = Trainer(config(iterations=5, logging__keep_last=1, logging__keep_every=2), tmp_path / "run").run()
    assert [p.name for p in checkpoint.listing(run / "checkpoints")] == [
        "000000",
        "000002",
        "000004",
        "000005",
    ]


def test_whole_checkpoints_are_read_again_only_where_they_changed(config, tmp_path, monkeypatch):
    run = Trainer(config(iterations=3), tmp_path / "run").run()
    folder, read = run / "checkpoints", []
    monkeypatch.setattr(checkpoint, "sha256", lambda path: read.append(path.parent.name) or sha256(path))
    checkpoint.prune(folder, 3)
    assert set(read) == {"000001", "000002", "000003"}
    read.clear()
    checkpoint.prune(folder, 3)
    assert not read
    (folder / "000003/training.safetensors").write_bytes(b"damaged")
    checkpoint.prune(folder, 1)
    assert set(read) == {"000003"}
    assert [p.name for p in checkpoint.listing(folder)] == ["000002", "000003"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_may_be_read_by_whom_new_files_may(config, tmp_path, umask, mode):
    """safetensors writes for the owner alone, whatever the umask."""
    before = os.umask(umask)
    try:
        run = Trainer(config(iterations=1), tmp_path / "run").run()
    finally:
        os.umask(before)
    files = list((run / "checkpoints/000001").iterdir())
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {file.name: mode for file in files}


def test_a_header_is_sorted_where_it_stands(tmp_path):
    """Beside the tensors of a large model there is no memory for a copy of them."""
    names = [f"{k:03d} \u00e9 layer" for k in torch.randperm(64).tolist()]
    tensors = {name: torch.full((k + 1,), float(k)) for k, name in enumerate(names)}
    save_file(tensors, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    sort_header(tmp_path / "a.safetensors")
    after = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(after[:8], "little")
    assert len(after) == len(before) and after[start:] == before[start:]
    assert list(json.loads(after[8:start])) == sorted(names)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_second_process_is_refused(config, tmp_path):
    first = Trainer(config(iterations=1), tmp_path / "run")

    def intrude(iteration):
        with pytest.raises(InputError, match="another process"):
            Trainer(config(iterations=1), tmp_path / "run", resume=True).run()

    first.run(intrude)


def test_other_prompts_in_the_same_file_are_refused(config, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a cat\na dog\na cow\n")
    settings = config(iterations=1, prompts__set=str(prompts))
    Trainer(settings, tmp_path / "run").run()
    longer = settings.model_copy(update={"iterations": 2})
    prompts.write_text("a cat\na dog\na fox\n")
    with pytest.raises(InputError, match=r"the prompts of .*mine\.txt are others than it began with"):
        Trainer(longer, tmp_path / "run", resume=True)
    prompts.write_text("# the same\na cat\na dog\na cow\n")
    Trainer(longer, tmp_path / "run", resume=True).run()


def test_a_file_of_prompts_that_is_gone_is_not_missed(config, tmp_path, monkeypatch):
    """Or is not there by this name, for the run goes on from another folder."""
    (tmp_path / "mine.txt").write_text("a cat\na dog\na cow\n")
    monkeypatch.chdir(tmp_path)
    settings = config(iterations=1, prompts__set="mine.txt")
    Trainer(settings, tmp_path / "run").run()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    longer = settings.model_copy(update={"iterations": 2})
    resumed = Trainer(longer, tmp_path / "run", resume=True)
    assert resumed.loop.prompt_set == ("a cat", "a dog", "a cow")
    with pytest.raises(InputError, match=r"there is no .*mine\.txt"):
        Trainer(longer, tmp_path / "new")


def test_a_changed_configuration_is_refused_even_if_the_file_was_edited(config, tmp_path):
    run = Trainer(config(iterations=1), tmp_path / "run").run()
    edited = config(iterations=1, optimizer__learning_rate=0.5)
    (run / "config.yaml").write_text(dump_config(edited))
    with pytest.raises(InputError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.5"):
        Trainer(edited, run, resume=True)


def test_less_at_once_is_no_other_run(config, tmp_path):
    run = Trainer(config(iterations=1, sampling__batch_size=8), tmp_path / "run").run()
    smaller = config(iterations=2, sampling__batch_size=2)
    with pytest.warns(RuntimeWarning, match=r"sampling\.batch_size: 8 -> 2: this rounds otherwise"):
        resumed = Trainer(smaller, run, resume=True)
    assert resumed.loop.rollout_batch.now == 2
    resumed.run()
    whole = Trainer(config(iterations=2, sampling__batch_size=8), tmp_path / "whole").run()
    a, b = (
        load_file(folder / "checkpoints/000002/pytorch_lora_weights.safetensors") for folder in (run, whole)
    )
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=1e-4, atol=1e-5)
    assert Trainer(smaller, run, resume=True).loop.rollout_batch.now == 2  # now it is as the checkpoint says


def test_a_run_that_learned_nothing_is_not_in_the_way(config, tmp_path):
    def fails(images, prompts):
        raise RuntimeError("the server is down")

    trainer = Trainer(config(iterations=1), tmp_path / "run")
    trainer.loop.reward = fails
    with pytest.raises(RuntimeError, match="the server is down"):
        trainer.run()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000000"]
    run = Trainer(config(iterations=1, optimizer__learning_rate=0.5), tmp_path / "run").run()
    assert load_config(run / "config.yaml").optimizer.learning_rate == 0.5
    assert checkpoint.configuration(run / "checkpoints/000000")["optimizer"]["learning_rate"] == 0.5
    with pytest.raises(InputError, match="is not empty"):  # this one has
        Trainer(config(iterations=1), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("somebody's own")
    with pytest.raises(InputError, match="is not empty"):
        Trainer(config(iterations=1), tmp_path / "mine")


def test_the_last_iteration_has_its_picture(config, tmp_path):
    run = Trainer(config(iterations=3, logging__images_every=100), tmp_path / "run").run()
    assert sorted(path.name for path in (run / "images").glob("*.png")) == ["000001.png", "000003.png"]


def test_a_folder_in_the_place_of_a_file_is_one_message(config, tmp_path):
    run = Trainer(config(iterations=1), tmp_path / "run").run()
    (run / "prompts.json").unlink()
    (run / "prompts.json").mkdir()
    with pytest.raises(InputError, match=r"prompts\.json: expected a file"):
        Trainer(config(iterations=2), run, resume=True)
    trainer = Trainer(config(iterations=1), tmp_path / "new")
    (tmp_path / "new/prompts.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"prompts\.json: cannot be written to: Is a directory"):
        trainer.run()
    assert not list((tmp_path / "new").glob(".*.tmp"))


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_planted_pickle_is_not_run(config, tmp_path, pipeline_folder):
    run = Trainer(config(iterations=1), tmp_path / "run").run()
    evil, struck = pickle.dumps(Planted(tmp_path / "struck")), tmp_path / "struck"
    pickle.loads(evil)
    assert struck.exists()  # it would work
    struck.unlink()
    last = run / "checkpoints/000001"
    for name in (
        "training.safetensors",
        "state.json",
        "pytorch_lora_weights.safetensors",
        "optimizer.pt",
        "pytorch_lora_weights.bin",
    ):
        (last / name).write_bytes(evil)
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"] = {name: sha256(last / name) for name in manifest["files"]}
    write_json(last / "manifest.json", manifest)  # an attacker can write checksums too
    trainer = Trainer(config(iterations=1), tmp_path / "other")
    with pytest.raises(InputError):
        checkpoint.load(last, trainer.loop.policy, trainer.loop.optimizer)
    model = tmp_path / "model"
    shutil.copytree(pipeline_folder, model)
    for file in (model / "unet").glob("*.safetensors"):
        file.unlink()
        (model / "unet/diffusion_pytorch_model.bin").write_bytes(evil)
    with pytest.raises(InputError):
        Trainer(config(model__path=str(model)), tmp_path / "third")
    assert not struck.exists()


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), st.text(max_size=8),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


@st.composite
def configurations(draw):
    """The default configuration with one to three keys replaced, added or misspelt."""
    data = TrainConfig().model_dump(mode="json")
    for _ in range(draw(st.integers(1, 3))):
        place = data
        if draw(st.booleans()):
            section = draw(
                st.sampled_from([k for k, v in TrainConfig().model_dump().items() if isinstance(v, dict)])
            )
            if isinstance(data[section], dict):
                place = data[section]
        names = st.text(min_size=1, max_size=8)
        key = draw(st.one_of(st.sampled_from(sorted(place)), names) if place else names)
        place[key] = draw(JUNK)
    return data


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations())
@example({"<name>": None})
@example({"reward": [{"name": "tiny-animals", "<name>": 1}]})
@example({"reward": [{"<parts>": 1}]})
def test_malformed_configurations(data):
    try:
        config = parse_config(data)
    except InputError as error:
        assert str(error)
        return
    assert load_config(None, []) is not None
    assert parse_config(config.model_dump(mode="json")) == config


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_as_configuration_or_prompts(tmp_path_factory, content):
    from driftrl.prompts import load_prompts

    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("config.yaml", "prompts.txt", "prompts.jsonl"):
        (folder / name).write_bytes(content)
    with contextlib.suppress(InputError):
        load_config(folder / "config.yaml")
    for name in ("prompts.txt", "prompts.jsonl"):
        with contextlib.suppress(InputError):
            assert all(load_prompts(str(folder / name)))


def spoil(folder, rng):
    """Damage a run folder somewhere."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    how = rng.choice(["cut", "flip", "delete", "append", "empty", "folder"])
    if how == "cut":
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif how == "flip" and content:
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif how == "append":
        file.write_bytes(bytes(content) + rng.randbytes(20))
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
    return f"{how} {file.name}"


def snapshot(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def damaged_folders(run, tmp_path, count):
    refused = 0
    for number in range(count):
        rng = random.Random(number)
        copy = tmp_path / f"copy{number}"
        shutil.copytree(run, copy)
        what = [spoil(copy, rng) for _ in range(rng.randint(1, 3))]
        before = snapshot(copy)
        status, message = run_command("train", "--resume", copy, "--quiet")
        assert status in (0, 2), (what, message)
        assert "Traceback" not in message, what
        if status == 2:
            refused += 1
            assert message.count("driftrl:") == 1, (what, message)
            assert snapshot(copy) == before, what
        shutil.rmtree(copy)
    return refused


def test_damaged_run_folders(config, tmp_path):
    run = Trainer(config(iterations=2), tmp_path / "run").run()
    assert 0 < damaged_folders(run, tmp_path, 25) < 25


@pytest.mark.slow
def test_two_hundred_damaged_run_folders(config, tmp_path):
    run = Trainer(config(iterations=2), tmp_path / "run").run()
    damaged_folders(run, tmp_path, 200)


KILLER = """
import os, random, signal, sys, time, warnings
import torch
torch.set_num_threads(1)
from pathlib import Path
import driftrl
from driftrl import checkpoint
from driftrl.config import load_config

run, wanted, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = load_config(Path(sys.argv[4]))
warnings.simplefilter("ignore")  # a torn checkpoint is passed over with a warning
driftrl.Trainer(config, run.with_name("warm")).loop  # everything is imported before the forks
rng, kills, longest = random.Random(seed), 0, 0.4
while True:
    child = os.fork()
    if child == 0:
        resume = (run / "config.yaml").exists()
        if not resume and run.exists():
            import shutil
            shutil.rmtree(run)
        driftrl.Trainer(config, run, resume=resume).run()
        os._exit(0)
    if kills < wanted:
        time.sleep(rng.uniform(0.02, longest))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        kills += 1
        done = len(checkpoint.listing(run / "checkpoints"))
        longest = min(3.0, longest * (1.15 if done <= 1 else 1.0))  # a slow machine must get somewhere
    elif os.WEXITSTATUS(status):
        sys.exit(f"resuming failed after {kills} kills")
    elif kills >= wanted:
        break
    else:
        kills_left = wanted - kills
        print("finished early with", kills_left, "kills to go")
        break
print("kills", kills)
"""


def killed_and_whole(config, tmp_path, kills, iterations):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(iterations=iterations)))
    whole = Trainer(config(iterations=iterations), tmp_path / "whole").run()
    done = 0
    for attempt in range(20):
        run = tmp_path / f"killed{attempt}"
        command = [sys.executable, "-c", KILLER, run, kills - done, attempt, path]
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=1500, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]
        done += int(result.stdout.rsplit("kills", 1)[1])
        shutil.rmtree(tmp_path / "warm", ignore_errors=True)
        last = f"checkpoints/{iterations:06d}"
        for name in ("training.safetensors", "pytorch_lora_weights.safetensors"):
            assert (run / last / name).read_bytes() == (whole / last / name).read_bytes()
        assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        if done >= kills:
            return
    pytest.fail(f"only {done} kills")


def test_killed_at_any_moment_and_resumed_ends_the_same(config, tmp_path):
    killed_and_whole(config, tmp_path, kills=4, iterations=4)


@pytest.mark.slow
def test_killed_fifty_times(config, tmp_path):
    killed_and_whole(config, tmp_path, kills=50, iterations=25)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(config, launch, tmp_path, number):
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(dump_config(config(iterations=500, logging__checkpoint_every=1000)))
    begun = run / "metrics.jsonl"
    statuses, message = launch(tmp_path, 1, "train", path, "--out", run, send=[number], whom=0, until=begun)
    assert statuses == [128 + number], message
    assert f"driftrl train --resume {run}" in message.replace("\n", "")
    last = checkpoint.newest(run / "checkpoints")
    assert int(last.name) == len(begun.read_text().splitlines()) > 0


@pytest.mark.slow
def test_memory_stays_flat(config, tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    sizes = {}
    trainer = Trainer(config(iterations=300, logging__checkpoint_every=50), tmp_path / "run")
    trainer.loop.reward = Spoilt()
    trainer.run(lambda iteration: sizes.update({iteration.number: resident()}))
    assert sizes[300] <= 1.05 * sizes[30], (sizes[30], sizes[300])


def test_a_second_interrupt_stops_at_once(config, launch, tmp_path):
    """After the first it finishes the iteration, for all it knows, which would take two minutes; the launcher makes sure that
    it is still there for the second.
    """
    (tmp_path / "stuck.py").write_text(
        "import time\ncalls = []\n\ndef reward(images, prompts):\n    calls.append(1)\n"
        "    time.sleep(0 if len(calls) < 2 else 120)\n    return images.mean((1, 2, 3))\n"
    )
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(dump_config(config(iterations=9, reward="stuck:reward")))
    start = time.monotonic()
    statuses, message = launch(
        tmp_path, 1, "train", path, "--out", run, send=[signal.SIGINT, signal.SIGINT], whom=0,
        until=run / "checkpoints/000001",
    )  # fmt: skip
    assert time.monotonic() - start < 100
    assert statuses == [130], message
    assert "Traceback" not in message
    assert f"from its last checkpoint it goes on with: driftrl train --resume {run}" in message
    assert checkpoint.newest(run / "checkpoints").name == "000001"
