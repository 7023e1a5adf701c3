"""Frozen records that travel from one part to the next, and the protocols of what can be swapped.

Shapes: P prompts, N candidates of each, G of them kept, T denoising steps, [C, H, W] latents, L tokens of
width D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Prompt(str):
    """A prompt that has more than words: a string to everyone but rewards that ask for ``metadata``."""

    metadata: Mapping[str, Any]
    """The object that stands for it in a JSONL file: its "prompt", and whatever else."""

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> Prompt:
        """The words, and what goes with them."""
        prompt = super().__new__(cls, text)
        prompt.metadata = dict(metadata or {})
        return prompt


@dataclass(frozen=True)
class Conditioning:
    """What a policy is conditioned on, one row per prompt (or per candidate, after `rows`)."""

    embeds: Tensor
    """[P, L, D]: prompt embeddings."""
    null_embeds: Tensor
    """[1, L, D]: embeddings of the empty prompt, for classifier-free guidance."""
    extra: dict[str, Tensor]
    """More per-prompt tensors [P, ...] that some models want (pooled embeddings, sizes). ``tokens``, bool [P, L]: which
    embeddings are the prompt's, where those of padding are not all zeros; no others get prompt noise."""

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of the rows ``index`` [n]."""
        return Conditioning(
            self.embeds[index], self.null_embeds, {name: value[index] for name, value in self.extra.items()}
        )

    def with_embeds(self, embeds: Tensor) -> Conditioning:
        """The same with other prompt embeddings."""
        return replace(self, embeds=embeds)


class Transition(NamedTuple):
    """One denoising step of a policy, N(mean, std^2 I), for n samples at once."""

    mean: Tensor
    """float32 [n, C, H, W]."""
    std: Tensor
    """float32 [n, 1, 1, 1]; 0 where the step is deterministic."""
    x0: Tensor
    """float32 [n, C, H, W]: the clean latent that the policy predicts."""


@dataclass(frozen=True)
class Rollout:
    """Trajectories of N candidates for each of P prompts."""

    latents: Tensor
    """[P, N, T + 1, C, H, W], from x_T to x_0, as they were stored: what replay scores; or x_0 alone, [P, N, 1, C, H, W],
    where nothing is replayed."""
    log_probs: Tensor
    """float32 [P, N, T]: mean over latent dimensions; 0 at steps that are never scored."""
    images: Tensor
    """float32 [P, N, 3, height, width] in 0..1."""
    prompt_noise: Tensor | None = None
    """[P, N, L, D], or None without noise-conditioned prompting."""
    clean: Tensor | None = None
    """float32 [P, N, T + 1, F]: features of the predicted clean latent at x_T, ..., x_1, and of x_0 itself; None
    unless asked for."""
    means: Tensor | None = None
    """float32 [P, N, T, C, H, W]: of each transition; None unless asked for."""
    gradients: Tensor | None = None
    """float32 [P, N, W]: of each candidate, the gradient of its log-probabilities in the policy's W parameters; None
    unless asked for (`driftrl.one_pass`)."""

    def keep(self, indices: Tensor) -> Rollout:
        """Only the candidates ``indices`` [P, G] of each prompt."""
        p = torch.arange(len(indices), device=indices.device)[:, None]
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {k: None if part is None else part[p, indices] for k, part in parts.items()}
        return Rollout(**kept)

    def path(self) -> Rollout:
        """What replay needs: without images [0] and clean latents."""
        return replace(self, images=self.images.new_empty(0), clean=None)


@dataclass(frozen=True)
class UpdateStats:
    """What one update did, averaged over its (sample, timestep) pairs."""

    loss: float
    surrogate: float
    kl: float
    """Closed-form divergence from the reference, mean over dimensions and, as they are weighed, over the pairs it
    applies to; 0 where it is not part of the objective."""
    approx_kl: float
    clip_fraction: float
    ratio_deviation: float
    """max |ratio - 1| over the pairs of the first optimiser step: 0 up to rounding, for the policy is still
    the one that drew the samples."""
    rescored_by: float
    """max |change of a log-probability| where samples were scored again in the update's batches; 0 where not."""
    grad_norm: float
    pairs: int


Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""(images float32 [N, 3, H, W] in 0..1, N prompts) -> rewards [N], or [N, R] of R at once (`driftrl.mixture`). One with an
argument ``metadata`` gets a list of N dictionaries by that name."""

Encoder = Callable[[Tensor], Tensor]
"""images float32 [N, 3, H, W] in 0..1 -> features [N, D]."""


class Policy(Protocol):
    """A text-to-image model seen as a stochastic policy: what rollout, update and checkpoint know of it."""

    num_train_timesteps: int
    predicts_noise: bool
    """Whether its network predicts the noise, not a velocity. Asked for only by the objective ``dgpo``."""

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one latent."""
        ...

    @property
    def timesteps(self) -> Tensor:
        """[T]: the training timestep of each denoising step, from noise to image."""
        ...

    @property
    def scored(self) -> Tensor:
        """bool [T]: which steps have a density."""
        ...

    @property
    def durations(self) -> Tensor:
        """float [T]: the time of each denoising step; all of them are 1. Asked for only by the normalised surrogate."""
        ...

    def add_noise_in(self, steps: range | None) -> None:
        """From now on add noise in these denoising steps only, and score no others; None: in all. Asked for only with a
        window.
        """
        ...

    def encode(self, prompts: Sequence[str], at_once: int | None = None) -> Conditioning:
        """Embed prompts, ``at_once`` of them together; None is as many as the policy likes."""
        ...

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        """The policy at latents [n, C, H, W], step numbers [n] and n rows of conditioning."""
        ...

    def noised(self, x0: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Clean latents [n, C, H, W] with as much of ``noise`` as there is at step numbers [n]. Asked for only by the
        objectives that learn from drawn images noised anew.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, C, H, W] as images float32 [n, 3, height, width] in 0..1."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters by name, in the same order."""
        ...

    def sample_gradients(self, samples: int) -> AbstractContextManager[Tensor]:
        """Float32 [samples, W], zero: within this context a backward pass adds each sample's gradient to its row, in the
        order of `parameters`, and to no ``.grad``. Asked for only by `driftrl.one_pass`.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within this context, the policy is the one that training started from."""
        ...

    def save_adapter(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Write what was trained, in diffusers' LoRA format; ``values`` are all of the trainable parameters, by name."""
        ...
