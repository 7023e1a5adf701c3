"""Measure what one denoising step, decode, reward, encoding and micro-batch of a run take: with its own objects,
writing nothing. `driftrl.estimate` does the arithmetic.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from driftrl import one_pass
from driftrl.batches import BatchSize, MemoryWarning, out_of_memory
from driftrl.checks import RunFailedError
from driftrl.distributed import own
from driftrl.estimate import FLOAT, Costs, Need, Phases, Plan, Standing, picture_bytes, remedies, stored_bytes
from driftrl.pathwise import Worth, gradient_of_images
from driftrl.policies.full import FullWeights
from driftrl.policies.pipeline import PipelinePolicy
from driftrl.rollout import ScoreGradients, latent_features, rollout
from driftrl.trainer import TrainingLoop
from driftrl.types import Conditioning, Rollout, Transition
from driftrl.update import noisiest_steps, update

REPEATS = 3
"""Each piece of work is timed so often, after a first time that counts for nothing, and the median is taken."""
PROBED = 4
"""Rows that `fit` tries; what more of them take is extrapolated."""
RESERVE = 2**30
"""Bytes of a GPU that `fit` leaves alone: for work space of kernels, and gaps between blocks."""
SPARE = 1 / 8
"""Share of a budget that `fit` leaves alone on a CPU, whose allocator holds more than is in use."""
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
        scored=int(objective.trainable(policy.scored).sum()),
        trained=objective.timesteps,
        branches=policy.branches,
        rollout_batch=(loop.update_batch if loop.in_one_pass else loop.rollout_batch).now,
        updates=objective.updates,
        epochs=objective.epochs,
        update_batch=loop.update_batch.now,
        reference=(objective.kl_weight > 0)
        + (objective.denoising is not None)
        + (objective.anchor_kept > 0)
        + 2 * objective.in_groups,
        rescored=objective.rescore,
        judges=len(loop.judges),
        backward=int(noisiest_steps(policy.scored, objective.timesteps).sum()) if loop.in_one_pass else 0,
        path=loop.replays,
        means=loop.objective.asks_for_means,
        grouped=objective.in_groups,
        spared=objective.denoising is not None and objective.denoising.own_behavior,
        all_embedded=method.shaping.target is not None,
        carried=_carried(loop),
        at_once=loop.follows_at_once,
        adjoints=0
        if objective.pathwise is None
        else int(objective.followed(policy.scored).sum()) * (1 + objective.pathwise.by_reference),
    )


def _carried(loop: TrainingLoop) -> int:
    """Denoising steps from the first one that is learned from to the image, for a loss that carries a gradient back; without that one where
    its mean is not wanted.
    """
    loss = loop.objective.pathwise
    if loss is None:
        return 0
    wanted = loop.objective.followed(loop.policy.scored)
    return len(wanted) - int(wanted.int().argmax()) - (not loss.by_reference)


def stored_of(loop: TrainingLoop, plan: Plan) -> int:
    """Bytes of the trajectories, images and prompt noise of one iteration."""
    policy, method = _policy(loop), loop.method
    noise = tuple(loop.conditioning.first.embeds.shape[1:]) if method.prompt_noise.eta > 0 else ()
    stepwise = method.shaping.potential == "stepwise"
    clean = latent_features(torch.zeros(1, *policy.latent_shape)).numel() if stepwise else 0
    gradients = sum(p.numel() for p in policy.parameters()) if plan.backward else 0
    return stored_bytes(plan, policy.latent_shape, policy.image_shape, noise, clean, gradients)


def pictures_of(loop: TrainingLoop, plan: Plan) -> int:
    """Bytes of the images among them."""
    return picture_bytes(plan, _policy(loop).image_shape)


def gradients_of(loop: TrainingLoop) -> int:
    """Bytes of the gradients of all trained weights, as far as this process has them."""
    return FLOAT * sum(own(p).numel() for p in loop.policy.parameters())


def standing_of(loop: TrainingLoop) -> Standing:
    """What stays in memory; to be asked before anything else was run."""
    policy = _policy(loop)
    on_cpu = policy.device.type == "cpu"
    parts = [policy.network, policy.pipeline.vae]
    if on_cpu:
        parts += [
            m for name in policy.text_encoders if (m := getattr(policy.pipeline, name, None)) is not None
        ]
    model = _bytes(parts)
    if on_cpu and isinstance(policy.weights, FullWeights):
        model += gradients_of(loop)  # the weights that training started from wait in main memory
    # Copies of what is trained: a reference that moves, one that draws, averages.
    kept = loop.memory
    copies = sum(copy is not None for copy in (kept.behavior, kept.average, kept.anchor))
    model += (copies + loop.method.anchor.moves) * gradients_of(loop)
    rewards = (loop.reward, *loop.judges, loop.encoder, loop.similarity)
    instruments = [m for r in rewards for m in _modules(r) if m not in parts]
    embeddings = loop.conditioning.held(loop.prompts_per_iteration)
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
    before, work = memory(device), _Work(loop)
    row = loop.prompt_set[0]

    def attempt(phase: str, work: Callable[[int], Any], count: int) -> Measured:
        told(phase)
        try:
            return _measured(work, count, device, before)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunFailedError(_too_large(phase, count, loop, plan, device)) from None

    at_once, together = min(plan.rollout_batch, plan.images), min(plan.update_batch, max(plan.parts))
    denoising = attempt("denoising", work.draw, at_once)
    with_gradients = (
        attempt("denoising", work.draw_with_gradients, denoising.count) if plan.backward else None
    )
    drawn = work.draw_with_gradients(denoising.count) if plan.backward else work.draw(denoising.count)
    latents = drawn.latents[0, :, -1]
    decoding = attempt("decoding", lambda n: policy.decode(latents[:n]), denoising.count)
    images = policy.decode(latents[: decoding.count])
    rewarding = attempt("reward", lambda n: loop.reward(images[:n], [row] * n), decoding.count)
    encoding = attempt("diversity", lambda n: loop.encoder(images[:n]), min(decoding.count, plan.kept))

    together_followed = min(loop.gradient_batch.now, plan.kept)
    following = (
        attempt("decoding" if plan.at_once else "update", work.follow, together_followed)
        if plan.adjoints
        else None
    )
    followed = 0.0 if following is None else following.working(together_followed)
    waiting = _Stopwatch(loop.optimizer, device)
    learning = attempt("update", lambda n: work.learn(drawn, n, loop.optimizer), together)
    optimizer = statistics.median(waiting.seconds[1:] or waiting.seconds)
    return Costs(
        step=denoising.each / work.policy.count,
        decode=decoding.each,
        reward=rewarding.each,
        encode=encoding.each,
        pair=max(0.0, learning.seconds - optimizer) / learning.count / (1 + work.carried),
        optimizer=optimizer,
        working=Phases(
            (with_gradients or denoising).working(at_once),
            followed if plan.at_once else decoding.working(at_once),
            rewarding.working(rewarding.count),
            encoding.working(encoding.count),
            max(
                0.0,
                learning.working(together) - gradients_of(loop),
                0.0 if plan.at_once else followed,
            ),
        ),
        backward=0.0 if with_gradients is None else with_gradients.each / work.policy.count,
        followed=0.0 if following is None else following.each,
    )


def fit(loop: TrainingLoop, budget: float | None, rollout: bool, update: bool) -> None:
    """Choose batch sizes that memory suffices for, at most those that the loop was built with, which are what pays.

    On a CPU only where a budget is given. Leaves the loop otherwise as it was.

    Args:
        loop: a run's objects.
        budget: GiB for this process; None is what a GPU has free, less `RESERVE`.
        rollout: whether the rollout's size is to be chosen.
        update: whether the update's is.

    Raises:
        RunFailedError: where memory does not suffice to try a single row.
    """
    device = loop.policy.device
    allowed = _allowed(device, budget)
    if allowed is None or not (rollout or update):
        return
    plan, work, gradients = plan_of(loop), _Work(loop), gradients_of(loop)
    stored, pictures = stored_of(loop, plan), pictures_of(loop, plan)
    standing_of(loop)  # reads what is not yet in memory
    before = memory(device)
    stays = before + 2 * gradients
    kept = pictures + (stored - pictures) * plan.keep / plan.candidates
    drawn = work.draw(1)

    def draw(count: int) -> None:
        loop.policy.decode(work.draw(count).latents[0, :, -1])

    def learn(count: int) -> None:
        if plan.backward:
            loop.policy.decode(work.draw_with_gradients(count).latents[0, :, -1])
        else:
            work.learn(drawn, count, _Still(loop.policy.parameters(), {}))

    held_then, pairs = (stored, plan.images) if plan.backward else (kept, max(plan.parts))
    for phase, size, wanted, held, useful, work_of in (
        ("denoising", loop.rollout_batch, rollout, stored, plan.images, draw),
        ("update", loop.update_batch, update, held_then, pairs, learn),
    ):
        if wanted:
            try:
                need = _need(work_of, min(PROBED, useful), device, before)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise RunFailedError(_too_large(phase, 1, loop, plan, device)) from None
            size.now = _size(need, allowed - stays - held, min(size.now, useful), size.setting, allowed)


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


def room(device: torch.device, budget: float | None = None) -> int:
    """Bytes that a run may have here: ``budget`` GiB, or the card's memory, or what is free and what this process has;
    0 if unknown.
    """
    if budget is not None:
        return int(budget * 2**30)
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


def _allowed(device: torch.device, budget: float | None) -> float | None:
    """Bytes that this process may have in use, if there is a limit that is known."""
    found = [] if budget is None else [budget * 2**30 * (1 - SPARE if device.type == "cpu" else 1)]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        found.append(free + torch.cuda.memory_reserved(device) - RESERVE)
    return min(found, default=None)


def _need(work: Callable[[int], Any], most: int, device: torch.device, before: int) -> Need:
    """What ``work`` takes for n rows, by a line through one row and ``most`` of them."""
    work(1)  # with what is made only once
    points = []
    for count in sorted({1, most}):
        start_peak(device)
        try:
            work(count)
        except RuntimeError as error:
            if count == 1 or not out_of_memory(error):
                raise
            break  # so the size follows from the first point, and is halved where that was too good a guess
        _wait(device)
        points.append((count, float(max(0, peak(device) - before))))
    return Need.through(points[0], points[-1])


def _size(need: Need, room: float, useful: int, setting: str, allowed: float) -> int:
    size = need.most(room, useful)
    if size is None:
        missing = (need.base + need.row - room + allowed) / 2**30
        warnings.warn(
            f"{setting} is 1, and memory may still not suffice: about {missing:.1f} GiB are needed, and there are "
            f"{allowed / 2**30:.1f}; driftrl estimate says what takes it and what to change",
            MemoryWarning,
            stacklevel=3,
        )
    return size or 1


class _Work:
    """A little of a loop's rollout and update: one prompt, one or two denoising steps, as many rows as asked for."""

    def __init__(self, loop: TrainingLoop) -> None:
        self.policy = _Brief(_policy(loop), loop.objective.trainable(loop.policy.scored))
        self._loop = loop
        self._one = loop.conditioning.first
        self._objective = replace(
            loop.objective,
            updates=1,
            epochs=1,
            timesteps=1 / self.policy.count,
            timestep_choice="noisiest",
        )

    @property
    def carried(self) -> int:
        """Passes of each pair of `learn` that carry a gradient back."""
        loss = self._objective.pathwise
        return 0 if loss is None else self.policy.count - (not loss.by_reference)

    def follow(self, count: int) -> None:
        """The gradient of the reward, and of diversity where it is shaped, of so many images."""
        loop, whole = self._loop, _policy(self._loop)
        shaping = loop.method.shaping
        draw = torch.Generator().manual_seed(0)
        clean = torch.randn(1, count, *whole.latent_shape, generator=draw).to(whole.device)
        images = torch.rand(1, count, *whole.image_shape, generator=draw).to(whole.device)
        rewards = torch.ones(1, count, len(loop.method.rewards) or 1, device=whole.device)
        # Two images at least have a diversity.
        weigh = Worth(rewards, torch.full((1,), float(count > 1 and shaping.on), device=whole.device))
        gradient_of_images(
            clean, images, loop.prompt_set[:1], whole, loop.reward, loop.encoder, shaping, weigh, _firm(count)
        )

    def draw(self, count: int, score_gradients: ScoreGradients | None = None) -> Rollout:
        """``count`` candidates in one batch."""
        loop = self._loop
        return rollout(
            self.policy, self._one, [(loop.seed, 0, 0)], count, _firm(count), loop.method.prompt_noise,
            keep_clean=loop.method.shaping.potential == "stepwise", score_gradients=score_gradients,
            keep_means=self._objective.asks_for_means,
        )  # fmt: skip

    def draw_with_gradients(self, count: int) -> Rollout:
        """The same, with gradients of every step."""
        return self.draw(count, ScoreGradients((True,) * self.policy.count, 1.0))

    def learn(self, drawn: Rollout, count: int, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser step on ``count`` of the pairs of ``drawn``, over and over if there are fewer, in one batch; or on
        all of ``drawn``, where it has gradients.
        """
        loop, device, there = self._loop, self._loop.policy.device, drawn.log_probs.shape[1]
        if drawn.gradients is not None:
            advantages = torch.ones(drawn.log_probs.shape[:2], device=device)
            one_pass.update_from(drawn, self.policy, optimizer, advantages, self._objective)
            return
        kept = drawn.keep(torch.arange(count, device=device)[None] % there).path()
        update(
            self.policy, optimizer, kept, torch.ones(1, count, device=device), self._one, self._objective,
            (loop.seed, 0), loop.method.prompt_noise,
            reference=lambda: loop.memory.reference_of(loop.policy), batch=_firm(count),
            gradient=torch.ones_like(kept.latents[:, :, -1]),
        )  # fmt: skip


def _firm(count: int) -> BatchSize:
    """Whoever measures wants to know that a batch does not fit."""
    return BatchSize(count, "", firm=True)


class _Still(torch.optim.Optimizer):
    """Leaves the weights as they are."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class _Brief:
    """A policy of one or two denoising steps, that decodes to nothing: enough to time a step."""

    def __init__(self, policy: PipelinePolicy, trainable: Tensor) -> None:
        self._policy, self._which = policy, trainable.nonzero()[:2, 0]
        self.count = len(self._which)
        self.timesteps, self.scored = policy.timesteps[self._which], policy.scored[self._which]
        self.durations = policy.durations[self._which]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        return self._policy.transition(latents, self._which[steps], conditioning)

    def noised(self, x0: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return self._policy.noised(x0, noise, self._which[steps])

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
        t.data_ptr(): t.numel() * t.element_size()
        for m in modules
        for t in map(own, (*m.parameters(), *m.buffers()))
    }
    return sum(tensors.values())


def _read(modules: list[Any]) -> None:
    """Look at every page of the weights."""
    for module in modules:
        for parameter in module.parameters():
            own(parameter).flatten()[::1024].sum()


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
