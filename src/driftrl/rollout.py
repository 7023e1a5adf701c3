"""Draw candidates: denoise from noise to image, keeping what replay will score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from driftrl import noise
from driftrl.conditioning import annealed_noise
from driftrl.transitions import gaussian
from driftrl.types import Conditioning, Policy, Rollout, Transition


@dataclass(frozen=True)
class PromptNoise:
    """Noise-conditioned prompting (design 2.3): strength and schedule."""

    eta: float = 0.0
    schedule: str = "linear"


NO_NOISE = PromptNoise()


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
        noised = annealed_noise(
            conditioning.embeds,
            eps,
            policy.timesteps[steps],
            spec.eta,
            spec.schedule,
            policy.num_train_timesteps,
        )
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
    batch_size: int,
    prompt_noise: PromptNoise = NO_NOISE,
    progress: Callable[[int], None] | None = None,
    keep_clean: bool = False,
) -> Rollout:
    """Draw ``candidates`` images for each of P prompts.

    Args:
        policy: what is sampled from.
        conditioning: P rows.
        keys: P triples (seed, iteration, prompt index) for the keyed generators of `driftrl.noise`.
        candidates: N.
        batch_size: candidates denoised at once; no sample depends on it.
        prompt_noise: the noise on the prompt embedding.
        progress: called with the number of images finished after each batch.
        keep_clean: keep features of the predicted clean latents, for stepwise potentials.

    Returns:
        Trajectories, log-probabilities and images of all P x N candidates.
    """
    prompts, steps = len(conditioning.embeds), len(policy.timesteps)
    device, shape = policy.device, policy.latent_shape
    scored = policy.scored.tolist()
    embed_shape = conditioning.embeds.shape[1:]
    latents, log_probs, images, noises, cleans = [], [], [], [], []
    flat = [(p, n) for p in range(prompts) for n in range(candidates)]
    for start in range(0, len(flat), batch_size):
        chunk = flat[start : start + batch_size]
        rows = conditioning.rows(torch.tensor([p for p, _ in chunk], device=device))
        draws = [noise.generator(*keys[p], n, "latents") for p, n in chunk]
        eps = None
        if prompt_noise.eta > 0:
            own = [noise.generator(*keys[p], n, "prompt") for p, n in chunk]
            eps = noise.normal(own, embed_shape).to(device)
            noises.append(eps)
        x = noise.normal(draws, shape).to(device)
        path, scores, clean = [x], [], []
        for step in range(steps):
            at = torch.full((len(chunk),), step, device=device)
            move = score_step(policy, x, at, rows, eps, prompt_noise)
            if keep_clean:
                clean.append(latent_features(move.x0))
            # Drawn even where nothing is added, as diffusers' scheduler does, so that both draw alike.
            x = gaussian.sample(move.mean, move.std, noise.normal(draws, shape).to(device))
            scores.append(
                gaussian.log_prob(x, move.mean, move.std)
                if scored[step]
                else torch.zeros(len(chunk), device=device)
            )
            path.append(x)
        latents.append(torch.stack(path, 1))
        log_probs.append(torch.stack(scores, 1))
        images.append(policy.decode(x))
        if keep_clean:
            cleans.append(torch.stack([*clean, latent_features(x)], 1))
        if progress is not None:
            progress(len(chunk))

    def grouped(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).unflatten(0, (prompts, candidates))

    def maybe(parts: list[Tensor]) -> Tensor | None:
        return grouped(parts) if parts else None

    return Rollout(grouped(latents), grouped(log_probs), grouped(images), maybe(noises), maybe(cleans))
