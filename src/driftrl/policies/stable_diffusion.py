"""Stable Diffusion 1.x, 2.x and XL as policies: a DDIM sampler with noise around a UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.policies.pipeline import PipelinePolicy, Sampler
from driftrl.transitions.ddim import PREDICTION_TYPES, ddim_noised, ddim_tables, ddim_transition
from driftrl.types import Conditioning, Transition

SHARPEST = 0.001
"""Steps with a smaller std are taken but not scored: the network's rounding would decide their ratio."""


class StableDiffusionPolicy(PipelinePolicy):
    """`diffusers.StableDiffusionPipeline`: epsilon-, v- or sample-prediction.

    Scheduler constants are looked up once; mean, std and x0 are float32.
    """

    def __init__(self, pipeline: Any, sampler: Sampler, device: torch.device, in_parts: bool = False) -> None:
        """Take over `pipeline`; its scheduler's configuration decides timesteps and prediction type.

        Raises:
            InputError: for a scheduler of another noise process, or whose prediction type DDIM does not know.
        """
        from diffusers import DDIMScheduler

        super().__init__(pipeline, sampler, device, in_parts)
        if "beta_schedule" not in pipeline.scheduler.config:  # DDIM would make one up
            raise InputError(
                f"model.path: its scheduler is a {type(pipeline.scheduler).__name__}, whose noise follows no betas; "
                "expected DDIM, Euler, DPM-Solver or another one of Stable Diffusion's"
            )
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
        self.predicts_noise = self.prediction_type == "epsilon"
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self._set_schedule()

    def _set_schedule(self) -> None:
        scheduler, steps = self.pipeline.scheduler, self.sampler.steps
        if steps > self.num_train_timesteps:
            raise InputError(
                f"sampling.steps: expected at most {self.num_train_timesteps}, which the model was trained on; got "
                f"{steps}"
            )
        scheduler.set_timesteps(steps)
        self.tables = ddim_tables(
            scheduler.alphas_cumprod.to(self.device),
            scheduler.timesteps.to(self.device),
            scheduler.final_alpha_cumprod,
            self.sampler.eta,
            self.prediction_type,
        )

    @property
    def timesteps(self) -> Tensor:
        """[T]: the training timestep of each denoising step."""
        return self.tables.timesteps

    @property
    def durations(self) -> Tensor:
        """float [T]: the time of each denoising step, of all the same: DDIM's timesteps are evenly spaced."""
        return torch.full((len(self.timesteps),), 1 / len(self.timesteps), device=self.device)

    def _with_density(self) -> Tensor:
        return self.tables.scored & (self.tables.std >= SHARPEST)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, null = self.pipeline.encode_prompt(
            list(prompts), self.device, 1, True, negative_prompt=self._negative(prompts)
        )
        return Conditioning(embeds.float(), null[:1].float(), {})

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.network(latents, timesteps, embeds, return_dict=False)[0]
        return output

    def without_prompt(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The network's output for latents [n, C, H, W] at timesteps [n], under the empty prompt."""
        empty = self.encode([""])
        extra = {
            k: empty.extra.get(f"null_{k}", v) for k, v in empty.extra.items() if not k.startswith("null_")
        }

        def run(latents: Tensor, timesteps: Tensor) -> Tensor:
            def rows(value: Tensor) -> Tensor:
                return value.to(latents.dtype).expand(len(latents), *value.shape[1:])

            return self._run(
                latents, timesteps, rows(empty.null_embeds), {k: rows(v) for k, v in extra.items()}
            )

        return run

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        """The policy at latents [n, C, H, W], step numbers [n] and n rows of conditioning."""
        timesteps = self.tables.timesteps[steps]
        output = self._guided(self._run, latents, timesteps, conditioning, self._scale())
        alpha, alpha_prev = self.tables.alpha[steps], self.tables.alpha_prev[steps]

        def move(eta: float) -> Transition:
            return Transition(
                *ddim_transition(output, latents.float(), alpha, alpha_prev, eta, self.prediction_type)
            )

        return self._moved(move, self.sampler.eta, steps)

    def noised(self, x0: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Clean latents [n, C, H, W] with as much of ``noise`` as there is at step numbers [n]."""
        return ddim_noised(x0, noise, self.tables.alpha[steps])


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """`diffusers.StableDiffusionXLPipeline`: two text encoders, pooled embeddings and size conditioning.

    Original and target size are the size that is drawn, without crop. Prompt noise goes onto the token embeddings
    and leaves the pooled one alone.
    """

    text_encoders = ("text_encoder", "text_encoder_2")

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, null, pooled, null_pooled = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=True,
            negative_prompt=self._negative(prompts),
        )  # fmt: skip
        pixels = self.pipeline.vae_scale_factor
        _, height, width = self.latent_shape
        size = (height * pixels, width * pixels)
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
        extra = {
            "pooled": pooled.float(),
            "null_pooled": null_pooled.float(),
            "sizes": sizes.repeat(len(embeds), 1),
        }
        return Conditioning(embeds.float(), null[:1].float(), extra)

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": extra["pooled"], "time_ids": extra["sizes"]}
        output: Tensor = self.network(latents, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return output
