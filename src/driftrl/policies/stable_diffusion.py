"""Stable Diffusion as a policy: a DDIM sampler with noise around a UNet, guidance in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.policies.lora import load_lora, save_lora, switched_off, trainable
from driftrl.transitions.ddim import PREDICTION_TYPES, ddim_tables, ddim_transition
from driftrl.types import Conditioning, Transition


class StableDiffusionPolicy:
    """A `diffusers.StableDiffusionPipeline` seen as pi(x_{t-1} | x_t, prompt) = N(mean, std^2 I).

    Scheduler constants are looked up once; the UNet runs the unconditional and the conditional branch in one
    batch where guidance is on; mean, std and x0 are float32.
    """

    component = "unet"

    def __init__(
        self, pipeline: Any, steps: int, guidance_scale: float, eta: float, device: torch.device
    ) -> None:
        """Take over `pipeline`; its scheduler's configuration decides timesteps and prediction type.

        Raises:
            InputError: for a scheduler whose prediction type DDIM does not know.
        """
        from diffusers import DDIMScheduler

        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.network = pipeline.unet
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            module.requires_grad_(False).eval()
        scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, thresholding=False
        )
        self.pipeline.scheduler = scheduler
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"model.path: its scheduler predicts '{self.prediction_type}'; expected one of "
                + ", ".join(PREDICTION_TYPES)
            )
        self.guidance_scale, self.eta = guidance_scale, eta
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(steps)
        self.tables = ddim_tables(
            scheduler.alphas_cumprod.to(device),
            scheduler.timesteps.to(device),
            scheduler.final_alpha_cumprod,
            eta,
            self.prediction_type,
        )

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return next(self.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one latent."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.network.config.in_channels, height, width

    @property
    def timesteps(self) -> Tensor:
        """[T]: the training timestep of each denoising step."""
        return self.tables.timesteps

    @property
    def scored(self) -> Tensor:
        """bool [T]: which steps have a density."""
        return self.tables.scored

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts, and the empty one."""
        embeds, null = self.pipeline.encode_prompt(list(prompts), self.device, 1, True)
        return Conditioning(embeds.float(), null[:1].float(), {})

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        """The policy at latents [n, C, H, W], step numbers [n] and n rows of conditioning."""
        timesteps, dtype = self.tables.timesteps[steps], self.network.dtype
        inputs, embeds = latents.to(dtype), conditioning.embeds.to(dtype)
        guided = self.guidance_scale != 1.0
        if guided:
            null = conditioning.null_embeds.to(dtype).expand_as(embeds)
            inputs, timesteps, embeds = (
                inputs.repeat(2, 1, 1, 1),
                timesteps.repeat(2),
                torch.cat([null, embeds]),
            )
        output = self.network(inputs, timesteps, embeds, return_dict=False)[0].float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self.guidance_scale * (conditional - unconditional)
        alpha, alpha_prev = self.tables.alpha[steps], self.tables.alpha_prev[steps]
        return Transition(
            *ddim_transition(output, latents.float(), alpha, alpha_prev, self.eta, self.prediction_type)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, C, H, W] as images float32 [n, 3, height, width] in 0..1."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters by name, in a fixed order."""
        return trainable(self.network)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, in the same order."""
        return [parameter for _, parameter in self.named_parameters()]

    def reference(self) -> AbstractContextManager[None]:
        """Within this context the policy is the one that training started from."""
        return switched_off(self.network)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in diffusers' LoRA format."""
        save_lora(self.pipeline, self.component, self.network, folder)

    def load_adapter(self, folder: Path) -> None:
        """Read what `save_adapter` wrote."""
        load_lora(self.component, self.network, folder)
