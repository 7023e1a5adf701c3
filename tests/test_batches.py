"""Batches that do not fit are halved, and what is computed stays the same; sizes are fitted into a budget."""

import gc
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from driftrl import Trainer, probe, trainer
from driftrl.batches import BatchSize, MemoryWarning, in_batches, out_of_memory
from driftrl.build import build_loop
from driftrl.checks import InputError, RunFailedError
from driftrl.config import parse_config
from driftrl.estimate import LADDER, Need
from driftrl.update import update


def short_of_memory(loop, drawing, learning):
    """Let the loop's policy fail as a GPU does, above so many rows at once, without gradient and with."""
    transition, failed = loop.policy.transition, []

    def limited(latents, steps, conditioning):
        most = learning if torch.is_grad_enabled() else drawing
        if len(latents) > most:
            failed.append(len(latents))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return transition(latents, steps, conditioning)

    loop.policy.transition = limited
    return failed


def trained(settings, folder, drawing=None, learning=None, iterations=2):
    loop = build_loop(settings, folder)
    failed = short_of_memory(loop, drawing, learning) if drawing else []
    seen = []
    loop.run(iterations, seen.append)
    return loop, seen, failed


def same(one, two):
    for a, b in zip(one[1], two[1], strict=True):
        assert json.dumps(a.metrics) == json.dumps(b.metrics)
        assert torch.equal(a.images, b.images)
    for p, q in zip(one[0].policy.parameters(), two[0].policy.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"objective__kl_weight": 0.1},
        pytest.param({"model__dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_halves_the_batch_and_changes_no_bit(config, tmp_path, changes):
    """18 images and at most 12 pairs a step: 16 and 12 do not fit, 4 and 3 do."""
    big = config(sampling__batch_size=16, optimizer__batch_size=12, objective__timesteps=1.0, **changes)
    small = config(sampling__batch_size=4, optimizer__batch_size=3, objective__timesteps=1.0, **changes)
    with pytest.warns(MemoryWarning) as told:
        halved = trained(big, tmp_path / "big", drawing=5, learning=5)
    assert sorted(str(w.message).split(":")[0] for w in told) == [
        "memory does not suffice for optimizer.batch_size 12",
        "memory does not suffice for sampling.batch_size 16",
    ]
    assert (halved[0].rollout_batch.now, halved[0].update_batch.now) == (4, 3)
    assert halved[2] == [16, 8, 12, 6], "the second iteration starts with what fits"
    same(halved, trained(small, tmp_path / "small"))


def test_a_later_step_that_does_not_fit_is_taken_with_less(config, tmp_path):
    """AdamW's state comes with the first step, so the second one may fail, when the weights have moved already."""
    settings = config(optimizer__batch_size=12, objective__timesteps=1.0, iterations=1)
    loop, taken = build_loop(settings, tmp_path), []
    loop.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    transition = loop.policy.transition

    def limited(latents, steps, conditioning):
        if torch.is_grad_enabled() and taken and len(latents) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return transition(latents, steps, conditioning)

    loop.policy.transition = limited
    with pytest.warns(MemoryWarning, match=r"optimizer\.batch_size 12: it is 6"):
        loop.run(1, lambda iteration: None)
    whole = trained(settings, tmp_path / "whole", iterations=1)[0]
    assert len(taken) == settings.optimizer.updates
    for p, q in zip(loop.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_what_one_row_does_not_fit_into_ends_the_run_with_a_message(config, tmp_path):
    loop = build_loop(config(), tmp_path)
    short_of_memory(loop, drawing=0, learning=0)
    with pytest.raises(RunFailedError, match=r"sampling\.batch_size is down to 1; driftrl estimate says"):
        loop.run(1, lambda iteration: None)
    assert loop.rollout_batch.now == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(size):
        raise RuntimeError("a fault of the network")

    with pytest.raises(RuntimeError, match="a fault of the network"):
        BatchSize(4, "x").attempt(broken)


def test_a_resumed_run_goes_on_with_the_sizes_it_had(config, tmp_path):
    """Rounding depends on them, so that they are not found out anew."""
    settings = config(iterations=1, sampling__batch_size=16)
    run = Trainer(settings, tmp_path / "run")
    short_of_memory(run.loop, drawing=8, learning=100)
    with pytest.warns(MemoryWarning):
        run.run()
    again = Trainer(config(iterations=2, sampling__batch_size=16), tmp_path / "run", resume=True)
    assert again.loop.rollout_batch.now == 8
    again.run()
    other = Trainer(config(iterations=2, sampling__batch_size=8), tmp_path / "other").run()
    one, two = (load_file(f / "checkpoints/000002/training.safetensors") for f in (tmp_path / "run", other))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.fixture
def rows_as_bytes(monkeypatch):
    """A machine where a row of the network takes 1 MiB, 10 with gradient, and nothing else takes anything."""
    most = [0]
    monkeypatch.setattr(probe, "memory", lambda device: 0)
    monkeypatch.setattr(probe, "peak", lambda device: most[0])
    monkeypatch.setattr(probe, "start_peak", lambda device: most.__setitem__(0, 0))

    def watch(loop):
        def note(module, inputs):
            each = 10 if torch.is_grad_enabled() else 1
            most[0] = max(most[0], each * len(inputs[0]) * 2**20 // loop.policy.branches)

        loop.policy.fast = None  # what would take the network's place, unseen by the hook
        loop.policy.network.register_forward_pre_hook(note)
        return loop

    return watch


@pytest.mark.parametrize(("budget", "expected"), [(1024, (24, 6)), (13.5, (12, 1)), (51, (24, 4))])
def test_sizes_are_the_largest_that_fit(config, tmp_path, rows_as_bytes, budget, expected):
    """The budget in MiB. 18 images and 6 pairs a step are all there is; what an iteration stores is 0.2 MiB."""
    loop = rows_as_bytes(build_loop(config(), tmp_path))
    before = [p.detach().clone() for p in loop.policy.parameters()]
    probe.fit(loop, budget / (1 - probe.SPARE) / 1024, True, True)
    assert (loop.rollout_batch.now, loop.update_batch.now) == expected
    assert all(torch.equal(p, q) for p, q in zip(before, loop.policy.parameters(), strict=True))
    assert not loop.optimizer.state and all(p.grad is None for p in loop.policy.parameters())


def test_fitting_changes_no_bit(config, tmp_path):
    """As large a budget as can be: the sizes are those that there would have been."""
    plain = Trainer(config(), tmp_path / "plain").run()
    fitted = Trainer(config(model__memory_budget=1000.0), tmp_path / "fitted").run()
    assert (plain / "metrics.jsonl").read_bytes() == (fitted / "metrics.jsonl").read_bytes()


def test_a_size_that_was_chosen_is_left_alone(config, tmp_path, rows_as_bytes):
    loop = rows_as_bytes(build_loop(config(sampling__batch_size=17), tmp_path))
    probe.fit(loop, 13.5 / (1 - probe.SPARE) / 1024, False, True)
    assert (loop.rollout_batch.now, loop.update_batch.now) == (17, 1)
    probe.fit(loop, None, True, True)  # a CPU without a budget
    assert loop.rollout_batch.now == 17


def test_a_budget_that_is_too_small_is_said(config, tmp_path, rows_as_bytes):
    loop = rows_as_bytes(build_loop(config(), tmp_path))
    with pytest.warns(MemoryWarning, match=r"sampling\.batch_size is 1, and memory may still not suffice"):
        probe.fit(loop, 1e-6, True, False)
    assert loop.rollout_batch.now == 1


def test_need_is_a_line_and_never_falls():
    need = Need.through((1, 110.0), (4, 140.0))
    assert (need.base, need.row) == (100.0, 10.0)
    assert need.most(100.0 + 10.0 * 33, 128) == 32
    assert need.most(109.0, 128) is None
    flat = Need.through((1, 80.0), (4, 80.0))
    assert (flat.base, flat.row) == (0.0, 20.0)
    assert Need(0.0, 0.0).most(1.0, 10**6) == LADDER[-1]


def test_auto_is_another_word_for_null():
    data = {"sampling": {"batch_size": "auto"}, "optimizer": {"batch_size": "auto"}}
    assert parse_config(data) == parse_config({})
    with pytest.raises(InputError, match=r"sampling\.batch_size: expected .*'automatic'"):
        parse_config({"sampling": {"batch_size": "automatic"}})


def test_candidates_that_were_not_chosen_are_gone_during_the_update(config, tmp_path, monkeypatch):
    """All storages alive are looked through for one as large as the trajectories, log-probabilities, noise and clean
    latents of all candidates, and for the kept ones' images.
    """
    settings = config(
        iterations=1, sampling__candidates=7, sampling__height=24, shaping__potential="stepwise"
    )
    loop = build_loop(settings, tmp_path)
    sizes, found = {}, {}

    def alive():
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of objects that do not like to be asked what they are
            held = {t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}
        return {name for name, size in sizes.items() if size in held}

    def drawn(*arguments, **named):
        result = sample(*arguments, **named)
        for name in ("latents", "log_probs", "prompt_noise", "clean", "images"):
            sizes[name] = getattr(result, name).untyped_storage().nbytes()
        sizes["kept images"] = sizes["images"] * settings.selection.keep // 7
        return result

    def embedded(images):
        found["diversity"] = alive()
        return encode(images)

    def learnt(*arguments, **named):
        found["update"] = alive()
        return update(*arguments, **named)

    sample, encode = trainer.rollout, loop.encoder
    monkeypatch.setattr(trainer, "rollout", drawn)
    monkeypatch.setattr(trainer, "update", learnt)
    loop.encoder = embedded
    loop.run(1, lambda iteration: None)
    assert len(set(sizes.values())) == len(sizes), "or else the sizes tell nothing"
    assert found["diversity"] >= {"images", "kept images"}, "or else the search finds nothing"
    assert found["update"] == {"images"}


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
     "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if", "DefaultCPUAllocator: can't allocate memory: you tried"],
)  # fmt: skip
def test_what_libraries_say_where_memory_does_not_suffice(message):
    assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_rows_come_in_order_whatever_fits():
    seen = []

    def work(rows):
        seen.append(rows.stop - rows.start)
        if seen[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.arange(rows.start, rows.stop)

    size = BatchSize(10, "images at once:")
    with pytest.warns(MemoryWarning, match="images at once: 10: it is 2 from here on"):
        found = in_batches(size, 7, work)
    assert found.tolist() == list(range(7)) and seen == [7, 5, 2, 2, 2, 1]
    assert len(in_batches(size, 0, work)) == 0
