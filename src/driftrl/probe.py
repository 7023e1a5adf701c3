"""Measure what one denoising step, decode, reward, encoding and micro-batch of a run take: with its own objects,
writing nothing. `driftrl.estimate` does the arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl.checks import RunFailedError
from driftrl.estimate import FLOAT, Costs, Phases, Plan, Standing, remedies, stored_bytes
from driftrl.policies.full import FullWeights
from driftrl.policies.pipeline import PipelinePolicy
from driftrl.rollout import latent_features, rollout
from driftrl.trainer import TrainingLoop
from driftrl.types import Conditioning, Rollout, Transition
from driftrl.update import update

REPEATS = 3
"""Each piece of work is timed so often, after a first time that counts for nothing, and the median is taken."""
PATIENCE = 20.0
"""Seconds that one piece of work may take on a CPU: fewer images at once are timed where more would take longer."""


@dataclass(frozen=True)
class Measured:
    """What one piece of work took."""

    count: int
    """Things that it was tried on: fewer than in the run where a CPU would take long."""
    seconds: float
    held: int
    """Bytes that were in use before it, above those before the probe: on a CPU what the allocator kept, as in a run."""
    bytes: int
    """Most bytes in use meanwhile, above those."""

    @property
    def each(self) -> float:
        """Seconds of one thing."""
        return self.seconds / self.count

    def working(self, count: int) -> float:
        """Bytes for ``count`` things: what comes and goes grows with the batch."""
        return self.held + self.bytes * count / self.count


def plan_of(loop: TrainingLoop) -> Plan:
    """What a built run's settings come to."""
    policy, method, objective = _policy(loop), loop.method, loop.objective
    return Plan(
        prompts=loop.prompts_per_iteration,
        candidates=method.candidates,
        keep=method.keep,
        steps=len(policy.timesteps),
        scored=int(policy.scored.sum()),
        trained=objective.timesteps,
        branches=policy.branches,
        rollout_batch=loop.rollout_batch,
        updates=objective.updates,
        epochs=objective.epochs,
        update_batch=objective.batch_size,
        reference=objective.kl_weight > 0,
        rescored=objective.rescore,
        judges=len(loop.judges),
    )


def stored_of(loop: TrainingLoop, plan: Plan) -> int:
    """Bytes of the trajectories, images and prompt noise of one iteration."""
    policy, method = _policy(loop), loop.method
    noise = tuple(loop.conditioning.embeds.shape[1:]) if method.prompt_noise.eta > 0 else ()
    stepwise = method.shaping.potential == "stepwise"
    clean = latent_features(torch.zeros(1, *policy.latent_shape)).numel() if stepwise else 0
    return stored_bytes(plan, policy.latent_shape, policy.image_shape, noise, clean)


def gradients_of(loop: TrainingLoop) -> int:
    """Bytes of the gradients of all trained weights."""
    return FLOAT * sum(p.numel() for p in loop.policy.parameters())


def standing_of(loop: TrainingLoop) -> Standing:
    """What stays in memory; to be asked before anything else was run."""
    policy, conditioning = _policy(loop), loop.conditioning
    on_cpu = policy.device.type == "cpu"
    parts = [policy.network, policy.pipeline.vae]
    if on_cpu:
        parts += [
            m for name in policy.text_encoders if (m := getattr(policy.pipeline, name, None)) is not None
        ]
    model = _bytes(parts)
    if on_cpu and isinstance(policy.weights, FullWeights):
        model += gradients_of(loop)  # the weights that training started from wait in main memory
    rewards = (loop.reward, *loop.judges, loop.encoder, loop.similarity)
    instruments = [m for r in rewards for m in _modules(r) if m not in parts]
    tensors = [conditioning.embeds, conditioning.null_embeds, *conditioning.extra.values()]
    embeddings = sum(t.numel() * t.element_size() for t in tensors)
    known = model + _bytes(instruments) + embeddings
    program = 0
    if on_cpu:
        _read(parts + instruments)  # files that are mapped but not yet read are not in memory
        program = max(0, memory(policy.device) - known)
    return Standing(program, model, _bytes(instruments), embeddings, 2 * gradients_of(loop))


def measure(loop: TrainingLoop, told: Callable[[str], Any] = lambda phase: None) -> Costs:
    """Run a little of each phase; the loop's weights and optimiser are not to be used afterwards.

    Args:
        loop: a run's objects.
        told: called with the name of each phase before it is measured.

    Raises:
        RunFailedError: where memory does not suffice, naming the phase and what to change.
    """
    plan, policy, device = plan_of(loop), _policy(loop), loop.policy.device
    before, brief = memory(device), _Brief(policy)
    one, row = loop.conditioning.rows(torch.zeros(1, dtype=torch.long, device=device)), loop.prompt_set[0]
    stepwise = loop.method.shaping.potential == "stepwise"

    def attempt(phase: str, work: Callable[[int], Any], count: int) -> Measured:
        told(phase)
        try:
            return _measured(work, count, device, before)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunFailedError(_too_large(phase, count, loop, plan, device)) from None

    def draw(count: int) -> Rollout:
        keys = [(loop.seed, 0, 0)]
        return rollout(brief, one, keys, count, count, loop.method.prompt_noise, keep_clean=stepwise)

    at_once, together = min(plan.rollout_batch, plan.images), min(plan.update_batch, max(plan.parts))
    denoising = attempt("denoising", draw, at_once)
    drawn = draw(denoising.count)
    latents = drawn.latents[0, :, -1]
    decoding = attempt("decoding", lambda n: policy.decode(latents[:n]), denoising.count)
    images = policy.decode(latents[: decoding.count])
    rewarding = attempt("reward", lambda n: loop.reward(images[:n], [row] * n), decoding.count)
    encoding = attempt("diversity", lambda n: loop.encoder(images[:n]), min(decoding.count, plan.kept))

    objective = replace(
        loop.objective, updates=1, epochs=1, timesteps=1 / brief.count, timestep_choice="noisiest"
    )
    waiting = _Stopwatch(loop.optimizer, device)

    def learn(count: int) -> None:
        kept = drawn.keep(torch.arange(count, device=device)[None] % denoising.count)
        update(
            brief, loop.optimizer, kept, torch.ones(1, count, device=device), one, objective, (loop.seed, 0),
            loop.method.prompt_noise, reference=lambda: loop.memory.reference_of(policy),
        )  # fmt: skip

    learning = attempt("update", learn, together)
    optimizer = statistics.median(waiting.seconds[1:] or waiting.seconds)
    return Costs(
        step=denoising.each / brief.count,
        decode=decoding.each,
        reward=rewarding.each,
        encode=encoding.each,
        pair=max(0.0, learning.seconds - optimizer) / learning.count,
        optimizer=optimizer,
        working=Phases(
            denoising.working(at_once),
            decoding.working(at_once),
            rewarding.working(rewarding.count),
            encoding.working(encoding.count),
            max(0.0, learning.working(together) - gradients_of(loop)),
        ),
    )


def memory(device: torch.device) -> int:
    """Bytes in use now: of this process on a CPU, of torch's allocator on a GPU; 0 where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if device.type == "cpu" else 0


def peak(device: torch.device) -> int:
    """Most bytes in use since `start_peak`, or since the start where the system does not let it be reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" else 0


def start_peak(device: torch.device) -> None:
    """Forget the most that was in use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def room(device: torch.device) -> int:
    """Bytes that a run may have here: the card's memory, or what is free and what this process has; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), "0")
    return int(free) * 1024 + memory(device)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory does not suffice, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def advice(phase: str, loop: TrainingLoop, plan: Plan) -> list[str]:
    """Settings to change where ``phase`` does not fit."""
    policy = _policy(loop)
    return remedies(
        phase,
        plan,
        checkpointing=bool(getattr(policy.network, "is_gradient_checkpointing", False)),
        slicing=bool(getattr(policy.pipeline.vae, "use_slicing", False)),
        half=policy.dtype != torch.float32,
        full=isinstance(policy.weights, FullWeights),
    )


class _Brief:
    """A policy of one or two denoising steps, that decodes to nothing: enough to time a step."""

    def __init__(self, policy: PipelinePolicy) -> None:
        self._policy, self._which = policy, policy.scored.nonzero()[:2, 0]
        self.count = len(self._which)
        self.timesteps, self.scored = policy.timesteps[self._which], policy.scored[self._which]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        return self._policy.transition(latents, self._which[steps], conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.new_zeros(len(latents), 3, 1, 1)


class _Stopwatch:
    """Times the steps of an optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device, self._start = device, 0.0
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        _wait(self._device)
        self._start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        _wait(self._device)
        self.seconds.append(time.perf_counter() - self._start)


def _measured(work: Callable[[int], Any], count: int, device: torch.device, before: int) -> Measured:
    """``work`` on ``count`` things, or as many as a CPU does in `PATIENCE` seconds."""
    single = _timed(
        work, 1, device
    )  # with what is done only once: kernels chosen, texts embedded, states made
    if device.type == "cpu":
        if single < PATIENCE / 4:
            single = _timed(work, 1, device)
        count = max(1, min(count, int(PATIENCE / max(single, 1e-9))))
    start = memory(device)
    start_peak(device)
    times = [_timed(work, count, device)]
    if times[0] < PATIENCE / 4:
        times = [_timed(work, count, device) for _ in range(REPEATS)]
    return Measured(count, statistics.median(times), max(0, start - before), max(0, peak(device) - start))


def _timed(work: Callable[[int], Any], count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work(count)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _policy(loop: TrainingLoop) -> PipelinePolicy:
    if not isinstance(loop.policy, PipelinePolicy):
        raise TypeError(f"expected a policy of a diffusers pipeline; got {type(loop.policy).__name__}")
    return loop.policy


def _bytes(modules: list[Any]) -> int:
    """Of all parameters and buffers, each counted once."""
    tensors = {
        t.data_ptr(): t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers())
    }
    return sum(tensors.values())


def _read(modules: list[Any]) -> None:
    """Look at every page of the weights."""
    for module in modules:
        for parameter in module.parameters():
            parameter.detach().flatten()[::1024].sum()


def _modules(owner: Any) -> list[nn.Module]:
    """The networks that a reward or an encoder holds, or one that it wraps."""
    held = getattr(owner, "__dict__", {})
    inner = [held[name] for name in ("reward", "tower") if name in held] + list(held.get("rewards", ()))
    own = [value for value in held.values() if isinstance(value, nn.Module)]
    return list(
        {id(module): module for module in (*own, *(m for one in inner for m in _modules(one)))}.values()
    )


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _too_large(phase: str, count: int, loop: TrainingLoop, plan: Plan, device: torch.device) -> str:
    what = f"out of memory in the probe of {phase}, {count} at once, on {device} with {room(device) / 2**30:.1f} GiB"
    changes = advice(phase, loop, plan)
    return what + ("; try --set " + " or --set ".join(changes) if changes else "")
