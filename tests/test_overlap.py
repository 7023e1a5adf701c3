"""Rewards of one batch while the next is drawn: the same numbers, the same errors; and nothing waits for the device."""

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from driftrl import Trainer, rollout, update
from driftrl.batches import BatchSize
from driftrl.build import build_loop, overlaps
from driftrl.checks import InputError, RunFailedError
from driftrl.config import parse_config
from driftrl.rewards.guarded import GuardedReward
from driftrl.trainer import NotFiniteWarning

BATCHES = {
    "sampling__batch_size": 5
}  # 18 images: batches of 5, 5, 5 and 3, which end within a prompt's candidates
SEVERAL = {
    "reward": [
        {"name": "incompressibility", "weight": 1.0, "normalize": "prompt"},
        {"name": "compressibility", "weight": 0.3, "normalize": "batch"},
    ]
}
JUDGES = {
    "objective__kl_weight": 0.1, "objective__kl_share": 0.3,
    "objective__kl_judges": ["mirrored", "compressibility"],
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, SEVERAL, JUDGES], ids=["one", "several", "judges"])
def test_it_changes_no_bit(config, tmp_path, changes):
    runs = [
        Trainer(config(sampling__overlap_reward=overlap, **BATCHES, **changes), tmp_path / str(overlap)).run()
        for overlap in (True, False)
    ]
    for name in ("metrics.jsonl", "checkpoints/000002/training.safetensors", "images/000001.png"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name


@pytest.mark.parametrize("overlap", [True, False])
def test_a_slow_reward_is_asked_while_the_next_batch_is_drawn(config, tmp_path, overlap):
    """By the order of events: the first answer is held back until the second batch is begun."""
    loop = build_loop(config(sampling__overlap_reward=overlap, **BATCHES), tmp_path)
    transition, begun, asked = loop.policy.transition, threading.Event(), []
    batches = []

    def noted(latents, steps, conditioning):
        if not torch.is_grad_enabled() and int(steps[0]) == 0:
            batches.append(len(latents))
            if len(batches) == 2:
                begun.set()
        return transition(latents, steps, conditioning)

    def slow(images, prompts):
        asked.append((len(images), len(batches), list(prompts)))
        assert begun.wait(60)
        return images.mean((1, 2, 3))

    loop.policy.transition, loop.reward = noted, slow
    seen = []
    loop.run(1, seen.append)
    assert batches == [5, 5, 5, 3]
    prompts = [prompt for prompt in seen[0].prompts for _ in range(6)]
    if overlap:
        assert [count for count, _, _ in asked] == batches
        assert asked[0][1] < 4, "the first is asked for before the last is drawn"
        assert [p for _, _, part in asked for p in part] == prompts
    else:
        assert asked == [(18, 4, prompts)]
    assert threading.active_count() < 5


def test_a_batch_is_one_call_with_its_own_attempts(config, tmp_path):
    """The second batch fails at first; then the fourth fails for good: one message, and nobody is asked after it."""
    loop, calls = build_loop(config(sampling__overlap_reward=True, sampling__batch_size=3), tmp_path), []

    def moody(images, prompts):
        calls.append(list(prompts))
        if len(calls) == 2 or len(calls) >= 5:
            raise ConnectionError("gone")
        return images.mean((1, 2, 3))

    loop.reward = GuardedReward(moody, attempts=2, pause=0.0)
    with pytest.raises(RunFailedError, match=r"the reward failed 2 times for '[a-z ]+'; .* gone"):
        loop.run(1, lambda iteration: None)
    assert [len(prompts) for prompts in calls] == [3] * 6
    assert calls[1] == calls[2] and calls[4] == calls[5]


def test_a_timeout_is_of_one_batch(config, tmp_path):
    loop, calls, never = (
        build_loop(config(sampling__overlap_reward=True, **BATCHES), tmp_path),
        [],
        threading.Event(),
    )

    def hangs(images, prompts):
        calls.append(len(images))
        if len(calls) == 2:
            never.wait(30)
        return images.mean((1, 2, 3))

    loop.reward = GuardedReward(hangs, attempts=1, timeout=0.5)
    with pytest.raises(RunFailedError, match=r"failed once .*no answer within 0\.5 s"):
        loop.run(1, lambda iteration: None)
    never.set()
    assert calls == [5, 5]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_reward_that_lies_is_refused_alike(config, tmp_path, overlap):
    loop = build_loop(config(sampling__overlap_reward=overlap, **BATCHES), tmp_path)
    loop.reward = GuardedReward(lambda images, prompts: torch.ones(len(images) + 1))
    with pytest.raises(InputError, match=r"expected a tensor of \d+ numbers, one per image; got shape"):
        loop.run(1, lambda iteration: None)


@pytest.mark.parametrize("overlap", [True, False])
def test_images_that_are_not_finite_reach_no_reward(config, tmp_path, overlap):
    loop = build_loop(config(iterations=1, sampling__overlap_reward=overlap, **BATCHES), tmp_path)
    transition, spoilt = loop.policy.transition, []

    def broken(latents, steps, conditioning):
        move = transition(latents, steps, conditioning)
        if not spoilt:
            spoilt.append(move.mean[2].fill_(torch.nan))
        return move

    def strict(images, prompts):
        assert torch.isfinite(images).all()
        return images.mean((1, 2, 3))

    loop.policy.transition, loop.reward = broken, strict
    with pytest.warns(NotFiniteWarning, match="a latent is not finite for '.*', candidate 2, denoising step"):
        loop.run(1, lambda iteration: None)


def test_when_it_pays():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    served = {"reward": [{"name": "tiny-animals"}, {"name": "http://127.0.0.1:1"}]}
    assert [overlaps(parse_config(data), cpu) for data in ({}, served)] == [False, True]
    jpeg = {"reward": "compressibility"}
    assert [overlaps(parse_config(data), cuda) for data in ({}, served, jpeg)] == [False, True, True]
    assert not overlaps(parse_config(jpeg), cpu)
    for asked in (True, False):
        settings = parse_config({"sampling": {"overlap_reward": asked}})
        assert overlaps(settings, cpu) is overlaps(settings, cuda) is asked
    with pytest.raises(InputError, match=r"sampling\.overlap_reward"):
        parse_config({"sampling": {"overlap_reward": "always"}})


class Operations(TorchDispatchMode):
    """Counts the kernels whose result the host must wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "item")

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        places = args[1] if name.startswith("index") and len(args) > 1 else ()
        masked = isinstance(places, (list, tuple)) and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in places
        )
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        self.found[name] += name in self.NAMES or masked or counted
        return function(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts what the host must wait for, until a device has caught up: also what a CPU tensor does without a kernel."""

    NAMES = ("tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.operations = Operations(self.found)

    def __enter__(self):
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *arguments):
        super().__exit__(*arguments)
        self.operations.__exit__(*arguments)
        self.found = Counter({name: count for name, count in self.found.items() if count})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.found[name] += name in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x[0]), lambda x: x[x > 1], lambda x: x.tolist(), lambda x: bool((x > 1).any()), lambda x: x[0].item(),
        lambda x: x.nonzero(), lambda x: x[torch.tensor(1)], lambda x: x.cpu(), lambda x: x.numpy(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 1])), lambda x: range(x.to(int)[2]),
    ],
)  # fmt: skip
def test_what_counts_as_waiting(read):
    """Or else the tests below prove nothing."""
    x = torch.arange(4.0)
    with Waits() as waits:
        read(x)
    assert waits.found
    with Waits() as waits:
        x[torch.tensor([1, 2])], x + 1, torch.where(x > 1, x, 0), x.gather(0, torch.tensor([2]))
    assert not waits.found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shaping__potential": "stepwise"},
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ({"prompt_noise__eta": 0.0}, {"sampling__guidance_scale": 1.0})
        ),
    ],
    ids=["drift", "stepwise", "clean", "unguided"],
)
@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
def test_rollout_waits_for_nothing(config, tmp_path, changes):
    """Not per step and not per batch. Which steps are scored is read once, before anything is begun."""
    for steps, size in ((2, 18), (8, 18), (8, 3)):
        loop = build_loop(config(sampling__steps=steps, sampling__batch_size=size, **changes), tmp_path)
        with Waits() as waits:
            _sample(loop)
        assert waits.found == {"tolist": 1}


def _sample(loop):
    rows = loop.conditioning.rows(torch.tensor([0, 1, 2]))
    noise, stepwise = loop.method.prompt_noise, loop.method.shaping.potential == "stepwise"
    keys = [(0, 0, prompt) for prompt in range(3)]
    return rollout.rollout(loop.policy, rows, keys, 6, loop.rollout_batch, noise, keep_clean=stepwise)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),  # the next one has all of it
        {"objective__kl_weight": 0.1, "objective__kl_schedule": "early"},
        pytest.param({"model__dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"objective__loss": "nft"},
    ],
    ids=["drift", "kl", "half", "nft"],
)
def test_an_update_waits_once_a_step(config, tmp_path, changes):
    """However many micro-batches a step has: for which pairs there are, and whether the gradient is finite."""
    loop = build_loop(config(objective__timesteps=1.0, optimizer__updates=2, **changes), tmp_path)
    drawn = _sample(loop)
    kept = drawn.keep(torch.arange(4).expand(3, 4)).path()
    rows = loop.conditioning.rows(torch.tensor([0, 1, 2]))
    counts = []
    for size in (36, 2):
        with Waits() as waits:
            update.update(
                loop.policy, loop.optimizer, kept, torch.randn(3, 4), rows, loop.objective, (0, 0),
                loop.method.prompt_noise, batch=BatchSize(size, "optimizer.batch_size"),
            )  # fmt: skip
        counts.append(waits.found)
    assert counts[0] == counts[1]


SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=SLOW)])
def test_another_device(which):
    """In a process of its own, for torch never forgets a device."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", which]
    file = Path(__file__).with_name("device") / "check.py"
    found = subprocess.run([*command, file], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
