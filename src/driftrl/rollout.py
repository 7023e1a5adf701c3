"""Draw candidates: denoise from noise to image, keeping what replay will score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl import noise
from driftrl.batches import BatchSize
from driftrl.conditioning import annealed_noise
from driftrl.transitions import gaussian
from driftrl.types import Conditioning, Policy, Rollout, Transition


@dataclass(frozen=True)
class PromptNoise:
    """Noise-conditioned prompting (design 2.3): strength and schedule."""

    eta: float = 0.0
    schedule: str = "linear"


NO_NOISE = PromptNoise()


@dataclass(frozen=True)
class Window:
    """The denoising steps that have noise in training, where not all have (MixGRPO, arXiv 2507.21802)."""

    size: int
    every: int | None = None
    """Iterations after which it moves on by a step, and from the end back to the start; None leaves it at the start."""
    anywhere: bool = False
    """Whether each iteration draws a place for it (Flow-GRPO-Fast)."""
    within: int | None = None
    """So many of the first steps it stays in; None: all."""

    def at(self, iteration: int, steps: int, seed: int = 0) -> range:
        """Those of an iteration, counted from 0, among the first ``steps``, which have a density; ``seed`` is the run's, for a place
        that is drawn.

        Example:
            >>> from driftrl.rollout import Window
            >>> [Window(2, every=5).at(i, 4) for i in (0, 5, 10, 15)]
            [range(0, 2), range(1, 3), range(2, 4), range(0, 2)]
        """
        places = min(steps, self.within or steps) - self.size + 1
        start = 0 if self.every is None else iteration // self.every % places
        if self.anywhere:
            draw = noise.generator(seed, iteration, 0, 0, "window")
            start = int(torch.randint(places, (), generator=draw))
        return range(start, start + self.size)


@dataclass(frozen=True)
class ScoreGradients:
    """Gradients to take while the candidates are drawn."""

    steps: tuple[bool, ...]
    """[T]: of which denoising steps."""
    scale: float
    """What the log-probabilities are multiplied by."""


def score_step(
    policy: Policy,
    latents: Tensor,
    steps: Tensor,
    conditioning: Conditioning,
    eps: Tensor | None,
    spec: PromptNoise,
) -> Transition:
    """The policy's transition under a noised prompt: the one kernel of rollout, replay and sampling.

    Args:
        policy: what is sampled from or scored.
        latents: [n, C, H, W].
        steps: int64 [n], numbers of denoising steps.
        conditioning: n rows, clean.
        eps: the prompt noise [n, L, D] of each row, or None.
        spec: how it enters.
    """
    if eps is not None and spec.eta > 0:
        clean, tokens = conditioning.embeds, conditioning.extra.get("tokens")
        noised = annealed_noise(
            clean if tokens is None else clean * tokens[..., None],  # all zeros is padding there
            eps,
            policy.timesteps[steps],
            spec.eta,
            spec.schedule,
            policy.num_train_timesteps,
        )
        if tokens is not None:
            noised = torch.where(tokens[..., None], noised, clean)
        conditioning = conditioning.with_embeds(noised)
    return policy.transition(latents, steps, conditioning)


def latent_features(latents: Tensor, side: int = 8) -> Tensor:
    """What stands for a clean latent in distances: averaged down to at most ``side`` x ``side`` places, flattened.

    Small enough to keep for every step (1 KiB a step for four channels), and blind to fine detail, which a
    prediction from much noise does not have.

    Args:
        latents: [n, C, H, W].
        side: of the grid.

    Returns:
        float32 [n, C * min(H, side) * min(W, side)].
    """
    height, width = latents.shape[-2:]
    size = (min(height, side), min(width, side))
    return torch.nn.functional.adaptive_avg_pool2d(latents.float(), size).flatten(1)


@torch.no_grad()
def rollout(
    policy: Policy,
    conditioning: Conditioning,
    keys: Sequence[tuple[int, int, int]],
    candidates: int,
    batch_size: int | BatchSize,
    prompt_noise: PromptNoise = NO_NOISE,
    progress: Callable[[int], None] | None = None,
    keep_clean: bool = False,
    finished: Callable[[Tensor], None] | None = None,
    score_gradients: ScoreGradients | None = None,
    first: Sequence[int] | None = None,
    keep_path: bool = True,
    keep_means: bool = False,
    same_latent: bool = False,
    decode: Callable[[Tensor, int], Tensor] | None = None,
) -> Rollout:
    """Draw ``candidates`` images for each of P prompts.

    Nothing in it waits for the device, so the host is ahead of it throughout; but Z-Image's and Qwen-Image's networks want to know how long prompts
    are.

    Args:
        policy: what is sampled from.
        conditioning: P rows.
        keys: P triples (seed, iteration, prompt index) for the keyed generators of `driftrl.noise`.
        candidates: N.
        batch_size: candidates denoised at once, fewer where memory does not suffice; no sample depends on it.
        prompt_noise: the noise on the prompt embedding.
        progress: called with the number of images finished after each batch.
        keep_clean: keep features of the predicted clean latents, for stepwise potentials.
        finished: called with the images [n, 3, height, width] of each batch, in order.
        score_gradients: gradients of log-probabilities to take on the way.
        first: P numbers of the first candidate, 0 by default: what tells rows with the same key apart.
        keep_path: keep the latents of every step, which replay wants; else x_0 alone, a T-th of the memory.
        keep_means: keep every transition's mean too, for trust regions that ask how far it has moved.
        same_latent: begin all candidates of a row at one initial latent.
        decode: what makes images [n, 3, height, width] of clean latents [n, C, H, W], given the number of the first of these candidates;
            `Policy.decode` by default. Asked again for the same ones where a batch did not fit.

    Returns:
        Trajectories, log-probabilities and images of all P x N candidates.
    """
    prompts = len(conditioning.embeds)
    batch = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size, "sampling.batch_size")
    scored = policy.scored.tolist()
    start = [0] * prompts if first is None else first
    flat = [(*keys[p], start[p] + n) for p in range(prompts) for n in range(candidates)]
    origins = (
        [(*keys[p], start[p]) for p in range(prompts) for _ in range(candidates)] if same_latent else None
    )
    decoded = decode or (lambda clean, _: policy.decode(clean))
    kept: dict[str, Tensor] = {}
    done = 0

    def draw(size: int) -> Tensor:
        """The next batch, put where it belongs."""
        chunk = flat[done : done + size]
        own = torch.arange(done, done + len(chunk), device=policy.device) // candidates
        parts = _denoise(
            policy,
            conditioning.rows(own),
            chunk,
            scored,
            prompt_noise,
            keep_clean,
            score_gradients,
            keep_path,
            keep_means,
            None if origins is None else origins[done : done + len(chunk)],
            lambda clean: decoded(clean, done),
        )
        for name, part in parts.items():
            if len(part) == len(flat):
                kept[name] = part
                continue
            if (
                name not in kept
            ):  # once for all, for joining the batches in the end would take twice the memory
                kept[name] = part.new_empty(len(flat), *part.shape[1:])
            kept[name][done : done + len(chunk)] = part
        return parts["images"]

    while done < len(flat):
        images = batch.attempt(draw)
        done += len(images)
        if finished is not None:
            finished(images)
        if progress is not None:
            progress(len(images))
    return Rollout(**{name: part.unflatten(0, (prompts, candidates)) for name, part in kept.items()})


def _denoise(
    policy: Policy,
    rows: Conditioning,
    keys: Sequence[tuple[int, int, int, int]],
    scored: Sequence[bool],
    prompt_noise: PromptNoise,
    keep_clean: bool,
    score_gradients: ScoreGradients | None,
    keep_path: bool,
    keep_means: bool,
    origins: Sequence[tuple[int, int, int, int]] | None,
    decode: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """One batch of n candidates, from noise to image: the fields of a `Rollout`, each [n, ...]."""
    device, shape = policy.device, policy.latent_shape
    draws = [noise.generator(*key, "latents") for key in keys]
    eps = None
    if prompt_noise.eta > 0:
        own = [noise.generator(*key, "prompt") for key in keys]
        eps = noise.placed(noise.normal(own, rows.embeds.shape[1:]), device)
    begin = draws if origins is None else [noise.generator(*key, "initial") for key in origins]
    x = noise.placed(noise.normal(begin, shape), device)
    # In place, for stacking them in the end would take twice the memory.
    path = x.new_empty(len(keys), len(scored) + 1 if keep_path else 1, *shape)
    path[:, 0] = x
    means = x.new_empty(len(keys), len(scored), *shape) if keep_means else None
    scores, clean = [], []
    with nullcontext() if score_gradients is None else policy.sample_gradients(len(keys)) as gradients:
        for step, counts in enumerate(scored):
            at = torch.full((len(keys),), step, device=device)
            scale = (
                score_gradients.scale if score_gradients is not None and score_gradients.steps[step] else None
            )
            with torch.set_grad_enabled(scale is not None):
                move = score_step(policy, x, at, rows, eps, prompt_noise)
            # Drawn even where nothing is added, as diffusers' scheduler does, so that both draw alike.
            drawn = noise.placed(noise.normal(draws, shape), device)
            x = gaussian.sample(move.mean, move.std, drawn)
            with torch.set_grad_enabled(scale is not None):
                score = gaussian.log_prob(x, move.mean, move.std) if counts else x.new_zeros(len(keys))
                if scale is not None:
                    (scale * score.sum()).backward()
            if means is not None:
                means[:, step] = move.mean
            if keep_clean:
                clean.append(latent_features(move.x0))
            scores.append(score.detach())
            path[:, step + 1 if keep_path else 0] = x
    parts = {
        "latents": path,
        "log_probs": torch.stack(scores, 1),
        "images": decode(x).contiguous(),
    }
    if eps is not None:
        parts["prompt_noise"] = eps
    if means is not None:
        parts["means"] = means
    if gradients is not None:
        parts["gradients"] = gradients
    if keep_clean:
        parts["clean"] = torch.stack([*clean, latent_features(x)], 1)
    return parts
