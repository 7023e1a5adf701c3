"""Flow-matching models as policies: SD3, FLUX.1, FLUX.2, SANA, Qwen-Image and Z-Image, with the SDE of Flow-GRPO or DanceGRPO, or the steps of CPS."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from driftrl.checks import InputError, one_of
from driftrl.policies.pipeline import PipelinePolicy, Sampler
from driftrl.transitions.flow_sde import (
    cps_transition,
    dance_sde_transition,
    flow_noised,
    flow_sde_transition,
)
from driftrl.types import Conditioning, Transition

SHARPEST = 0.01
"""Steps with a smaller std are taken but not scored: the network's rounding would decide their ratio."""
FLOW_SAMPLERS = {"sde": flow_sde_transition, "dance": dance_sde_transition, "cps": cps_transition}


class FlowPolicy(PipelinePolicy):
    """A velocity-predicting transformer between noise (t = 1) and image (t = 0), made stochastic."""

    component = "transformer"
    prompts_at_once = 16  # T5 is large, and reads hundreds of tokens of each
    num_train_timesteps = 1000

    def __init__(self, pipeline: Any, sampler: Sampler, device: torch.device, in_parts: bool = False) -> None:
        """Take over `pipeline`; its scheduler decides the times, resolution-dependent shift included.

        Raises:
            InputError: for a scheduler that has no plain list of times, or a sampler that does not exist.
        """
        super().__init__(pipeline, sampler, device, in_parts)
        if not self._has_times(pipeline.scheduler):
            kind = type(pipeline.scheduler).__name__
            raise InputError(
                f"model.path: its scheduler is a {kind}; expected a FlowMatchEulerDiscreteScheduler, which the model was "
                "published with"
            )
        one_of("sampling.flow_sampler", sampler.flow_sampler, tuple(FLOW_SAMPLERS))
        self.num_train_timesteps = int(pipeline.scheduler.config.num_train_timesteps)
        self._set_schedule()

    def _has_times(self, scheduler: Any) -> bool:
        """Whether the scheduler's sigmas are the times between noise and image that the model was made for."""
        return type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"

    def _sigmas(self, steps: int) -> list[float] | None:
        """The times before shifting, where the pipeline does not leave them to its scheduler."""
        return None

    def _set_schedule(self) -> None:
        sampler = self.sampler
        self._set_timesteps()
        self.times = self.pipeline.scheduler.sigmas.float().to(self.device)
        now, after = self.times[:-1], self.times[1:]
        still = torch.zeros(len(now), 1, device=self.device)
        _, std, _ = FLOW_SAMPLERS[sampler.flow_sampler](still, still, now, after, sampler.noise_level)
        self._scored = std[:, 0] >= SHARPEST

    def _set_timesteps(self) -> None:
        scheduler, steps = self.pipeline.scheduler, self.sampler.steps
        sigmas = self._sigmas(steps)
        arguments: dict[str, Any] = {} if sigmas is None else {"sigmas": sigmas}
        if scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = self._shift()
        scheduler.set_timesteps(steps, **arguments)

    def _shift(self) -> float:
        """How far a scheduler that shifts its times by the image's size is to shift them."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config, (_, height, width) = self.pipeline.scheduler.config, self.latent_shape
        shift: float = calculate_shift(
            (height // 2) * (width // 2), config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096), config.get("base_shift", 0.5), config.get("max_shift", 1.15),
        )  # fmt: skip
        return shift

    def _patch(self) -> int:
        return 2

    @property
    def timesteps(self) -> Tensor:
        """float [T]: the training timestep of each denoising step."""
        return self.times[:-1] * self.num_train_timesteps

    @property
    def durations(self) -> Tensor:
        """float [T]: the time of each denoising step."""
        return self.times[:-1] - self.times[1:]

    def _with_density(self) -> Tensor:
        return self._scored

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        """The policy at latents [n, C, H, W], step numbers [n] and n rows of conditioning."""
        velocity = self._guided(self._run, latents, self.timesteps[steps], conditioning, self._scale())
        sampler = FLOW_SAMPLERS[self.sampler.flow_sampler]
        now, after = self.times[steps], self.times[steps + 1]

        def move(noise_level: float) -> Transition:
            return Transition(*sampler(velocity, latents.float(), now, after, noise_level))

        return self._moved(move, self.sampler.noise_level, steps)

    def noised(self, x0: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Clean latents [n, C, H, W] with as much of ``noise`` as there is at step numbers [n]."""
        return flow_noised(x0, noise, self.times[steps])


class StableDiffusion3Policy(FlowPolicy):
    """`diffusers.StableDiffusion3Pipeline`: SD3 and SD3.5, with or without the T5 encoder."""

    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    blocks = ("JointTransformerBlock",)
    dispensable = ("text_encoder_3", "tokenizer_3")

    def _patch(self) -> int:
        return int(self.network.config.patch_size)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, null, pooled, null_pooled = self.pipeline.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=True,
            negative_prompt=self._negative(prompts),
        )  # fmt: skip
        extra = {"pooled": pooled.float(), "null_pooled": null_pooled.float()}
        return Conditioning(embeds.float(), null[:1].float(), extra)

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.network(
            hidden_states=latents, timestep=timesteps, encoder_hidden_states=embeds,
            pooled_projections=extra["pooled"], return_dict=False,
        )[0]  # fmt: skip
        return output


class PackedPolicy(FlowPolicy):
    """A network that is given tokens of 2 x 2 latents, packed by its pipeline, which knows the model's own size."""

    def _own_size(self) -> tuple[int, int]:
        return self.pipeline.default_sample_size, self.pipeline.default_sample_size

    def _channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    def _sigmas(self, steps: int) -> list[float] | None:
        return _even(steps)

    def _packed(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    def _unpacked(self, tokens: Tensor, like: Tensor) -> Tensor:
        factor = self.pipeline.vae_scale_factor
        height, width = like.shape[-2:]
        unpacked: Tensor = self.pipeline._unpack_latents(tokens, height * factor, width * factor, factor)
        return unpacked


class FluxPolicy(PackedPolicy):
    """`diffusers.FluxPipeline`: FLUX.1.

    The guidance scale goes in as an embedding where the model was distilled for it (dev); where it was not
    (schnell), a scale above 1 is classifier-free guidance of two branches. Prompt noise goes onto the T5
    embeddings.
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def _sigmas(self, steps: int) -> list[float] | None:
        return None if self.pipeline.scheduler.config.get("use_flow_sigmas") else super()._sigmas(steps)

    def _scale(self) -> float:
        return 1.0 if self.network.config.guidance_embeds else super()._scale()

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        negative = [self.negative_prompt]
        null, null_pooled, _ = self.pipeline.encode_prompt(negative, device=self.device)
        extra = {"pooled": pooled.float(), "null_pooled": null_pooled.float().repeat(len(embeds), 1)}
        return Conditioning(embeds.float(), null.float(), extra)

    @cached_property
    def _image_ids(self) -> Tensor:
        """The places of an image's tokens, made once: diffusers makes them on the host."""
        _, height, width = self.latent_shape
        ids: Tensor = self.pipeline._prepare_latent_image_ids(
            1, height // 2, width // 2, self.device, self.dtype
        )
        return ids

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        device, dtype = latents.device, latents.dtype
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.sampler.guidance_scale, device=device)
        output = self.network(
            hidden_states=self._packed(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=extra["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return self._unpacked(output, latents)


class Flux2Policy(FlowPolicy):
    """`diffusers.Flux2KleinPipeline` and `diffusers.Flux2Pipeline`: FLUX.2 [klein] and [dev].

    A latent here is a token of the network: 2 x 2 of the autoencoder's, normalised by the statistics of its batch norm.
    Guidance of klein is of two branches, unless it was distilled to few steps, and its pipeline ignores the scale; dev's
    scale goes in as an embedding. Prompts stand in a chat template, padded to 512 tokens, and the network attends to all of it; noise
    goes onto the prompt's own words.
    """

    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    prompts_at_once = 8

    def __init__(self, pipeline: Any, sampler: Sampler, device: torch.device, in_parts: bool = False) -> None:
        """Take over `pipeline`; its scheduler decides the times, shifted by image size and number of steps.

        Raises:
            InputError: for another scheduler, or a sampler that does not exist.
        """
        super().__init__(pipeline, sampler, device, in_parts)
        if self._embedded:  # its instruction is read before each prompt
            words = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
            self.longest = pipeline.tokenizer_max_length - len(words(pipeline.system_message).input_ids)

    @property
    def _embedded(self) -> bool:
        """Whether the guidance scale goes into the network."""
        return type(self.pipeline).__name__ == "Flux2Pipeline"

    def _scale(self) -> float:
        return 1.0 if self._embedded or self.pipeline.config.is_distilled else super()._scale()

    @property
    def _factor(self) -> int:
        return 2 * super()._factor

    def _patch(self) -> int:
        return 1

    def _own_size(self) -> tuple[int, int]:
        return self.pipeline.default_sample_size // 2, self.pipeline.default_sample_size // 2

    def _autoencoder_channels(self) -> int:
        return 4 * super()._autoencoder_channels()

    def _sigmas(self, steps: int) -> list[float] | None:
        return None if self.pipeline.scheduler.config.get("use_flow_sigmas") else _even(steps)

    def _shift(self) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        _, height, width = self.latent_shape
        shift: float = compute_empirical_mu(height * width, self.sampler.steps)
        return shift

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, numbers, shown = self._read(list(prompts))
        null, *empty = self._read([self.negative_prompt])
        template, there = self._read([""])[1:] if self.negative_prompt else empty
        words = _words(numbers, shown, template[there].tolist())
        return Conditioning(embeds, null, {"tokens": words.to(embeds.device)})

    def _read(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings float32 [n, L, D]; the numbers of the tokens [n, L] and which of them are no padding, bool [n, L]."""
        with _asked(self.pipeline.text_encoder) as asked:
            embeds, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        return embeds.float(), asked[0]["input_ids"].cpu(), asked[0]["attention_mask"].bool().cpu()

    @cached_property
    def _image_ids(self) -> Tensor:
        """The places of an image's tokens [h w, 4], made once: diffusers makes them on the host."""
        ids: Tensor = self.pipeline._prepare_latent_ids(torch.empty(1, *self.latent_shape))
        return ids[0].to(self.device)

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        guidance = None
        if self._embedded:
            guidance = torch.full((len(latents),), self.sampler.guidance_scale, device=latents.device)
        output: Tensor = self.network(
            hidden_states=self.pipeline._pack_latents(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=F.pad(torch.arange(embeds.shape[1], device=latents.device)[:, None], (3, 0)),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, latents.shape[-2:])

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        centre, spread = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        centre, spread = (part.to(latents).view(-1, 1, 1) for part in (centre, spread))
        return F.pixel_shuffle(latents * spread + centre, 2)


class SanaPolicy(FlowPolicy):
    """`diffusers.SanaPipeline`: SANA and SANA 1.5, whose latents are a thirty-second of the image's sides.

    Prompts get the instruction that the pipeline puts before them, the negative one does not. Of the instruction the network sees
    the first token, which says that a text begins, and whose activations are huge in some encoders; it gets no noise, nor does
    padding, attention to which is masked. It is published with a DPM-Solver, whose times are kept, and the whole
    numbers that its network is told of them; without noise a step is that solver's of first order.
    """

    blocks = ("SanaTransformerBlock",)

    def _has_times(self, scheduler: Any) -> bool:
        config = scheduler.config
        solver = type(scheduler).__name__ == "DPMSolverMultistepScheduler" and (
            config.use_flow_sigmas and config.prediction_type == "flow_prediction"
        )
        return solver or super()._has_times(scheduler)

    def _set_schedule(self) -> None:
        super()._set_schedule()
        self._told = self.pipeline.scheduler.timesteps.float().to(self.device)

    @property
    def timesteps(self) -> Tensor:
        """float [T]: the training timestep of each denoising step."""
        return self._told

    def _patch(self) -> int:
        return int(self.network.config.patch_size)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        usual = inspect.signature(type(self.pipeline).__call__).parameters
        embeds, mask, null, null_mask = self.pipeline.encode_prompt(
            list(prompts), negative_prompt=self.negative_prompt, device=self.device,
            complex_human_instruction=usual["complex_human_instruction"].default,
        )  # fmt: skip
        own = mask.bool().clone()  # the mask itself still has the first token
        own[:, 0] = False
        extra = {"mask": mask.long(), "null_mask": null_mask.long(), "tokens": own}
        return Conditioning(embeds.float(), null[:1].float(), extra)

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.network(
            latents, encoder_hidden_states=embeds, encoder_attention_mask=extra["mask"],
            timestep=timesteps * self.network.config.timestep_scale, return_dict=False,
        )[0]  # fmt: skip
        return output


class QwenImagePolicy(PackedPolicy):
    """`diffusers.QwenImagePipeline`: Qwen-Image.

    Guidance keeps the length that each token has on the branch with the prompt, as the pipeline does. The other branch's
    prompt is a space, as in the model's own examples, unless one is given. Prompts are padded, for their embeddings must be equally long, and
    attention to padding is masked, so noise on it does nothing.
    """

    blocks = ("QwenImageTransformerBlock",)
    prompts_at_once = 8
    longest = 256
    _null_prompt = " "

    def _autoencoder_channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, mask = self._padded(list(prompts))
        null, null_mask = self._padded([self.negative_prompt or self._null_prompt])
        return Conditioning(embeds, null, {"mask": mask, "null_mask": null_mask.repeat(len(embeds), 1)})

    def _padded(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings float32 [n, `longest`, D] and which tokens are the prompt's, bool [n, `longest`]."""
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.longest
        )
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        mask = mask.bool()
        missing = self.longest - embeds.shape[1]
        return F.pad(embeds.float(), (0, 0, 0, missing)), F.pad(mask, (0, missing))

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        height, width = latents.shape[-2:]
        output = self.network(
            hidden_states=self._packed(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=extra["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return self._unpacked(output, latents)[:, :, 0]

    def _combined(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        guided = super()._combined(unconditional, conditional, scale)
        return guided * (_token_norms(conditional) / _token_norms(guided))

    def _unscaled(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        centre, spread = (
            torch.tensor(values, dtype=latents.dtype, device=latents.device).view(-1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return latents * spread + centre

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents.unsqueeze(2))[:, :, 0]


class ZImagePolicy(FlowPolicy):
    """`diffusers.ZImagePipeline`: Z-Image and Z-Image-Turbo.

    The guidance scale is the pipeline's: what goes beyond the branch with the prompt, so 0 is no guidance and 1 is what
    others call 2. The network wants prompts without padding, each of its own length, in a chat template; noise goes onto the prompt's own
    words.
    """

    blocks = ("ZImageTransformerBlock",)
    prompts_at_once = 16
    longest = 256

    def _own_size(self) -> tuple[int, int]:
        return 1024 // self.pipeline.vae_scale_factor, 1024 // self.pipeline.vae_scale_factor

    def _scale(self) -> float:
        return 1.0 + max(0.0, self.sampler.guidance_scale)

    def _sigmas(self, steps: int) -> list[float] | None:
        return _even(steps)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        (found, numbers), (null, empty) = self._read(list(prompts)), self._read([self.negative_prompt])
        (template,) = self._read([""])[1] if self.negative_prompt else empty
        lengths = [torch.tensor([len(own) for own in one], device=self.device) for one in (found, null)]
        said = torch.stack([F.pad(own, (0, self.longest - len(own))) for own in numbers])
        shown = torch.arange(self.longest) < lengths[0].cpu()[:, None]
        extra = {
            "length": lengths[0],
            "null_length": lengths[1].repeat(len(found)),
            "tokens": _words(said, shown, template.tolist()).to(self.device),
        }
        return Conditioning(self._padded(found), self._padded(null), extra)

    def _read(self, prompts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each prompt the embeddings [length, D], and the numbers of the tokens [length]."""
        with _asked(self.pipeline.text_encoder) as asked:
            found, _ = self.pipeline.encode_prompt(
                prompts,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.longest,
            )
        numbers, shown = asked[0]["input_ids"].cpu(), asked[0]["attention_mask"].bool().cpu()
        return list(found), [own[there] for own, there in zip(numbers, shown, strict=True)]

    def _padded(self, found: list[Tensor]) -> Tensor:
        """Embeddings float32 [n, `longest`, D], with zeros where a prompt has ended."""
        return torch.stack([F.pad(one.float(), (0, 0, 0, self.longest - len(one))) for one in found])

    def _run(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, extra: dict[str, Tensor]) -> Tensor:
        lengths = extra["length"].tolist()  # the host waits here, once for a batch
        output = self.network(
            list(latents.unsqueeze(2)),
            1 - timesteps / 1000,
            [own[:length] for own, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(output)[:, :, 0]


@contextmanager
def _asked(text_encoder: Any) -> Iterator[list[dict[str, Tensor]]]:
    """What the text encoder is asked within this context, a dictionary of each call: which tokens there are, the pipeline tells nobody
    else.
    """
    calls: list[dict[str, Tensor]] = []
    hook = text_encoder.register_forward_pre_hook(
        lambda module, inputs, named: calls.append(named), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def _words(numbers: Tensor, shown: Tensor, template: list[int]) -> Tensor:
    """Which tokens are a prompt's own words, bool [n, L]: no padding, and not of the chat template, which is ``template`` around nothing.

    Args:
        numbers: int64 [n, L], of the tokens.
        shown: bool [n, L]: which are no padding.
        template: the numbers of the template's tokens.
    """
    own = torch.zeros_like(shown)
    for row, there in enumerate(shown):
        places, said = there.nonzero()[:, 0], numbers[row, there].tolist()
        before = _alike(said, template)
        after = _alike(said[before:][::-1], template[before:][::-1])
        own[row, places[before : len(places) - after]] = True
    return own


def _alike(one: list[int], two: list[int]) -> int:
    """How many numbers two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _even(steps: int) -> list[float]:
    """Times from 1 down to one over ``steps``."""
    times: list[float] = np.linspace(1.0, 1 / steps, steps).tolist()
    return times


def _token_norms(latents: Tensor) -> Tensor:
    """The length of each token of 2 x 2 latents, at each of its places: [n, C, H, W] to [n, 1, H, W]."""
    squares = 4 * F.avg_pool2d(latents.square().sum(1, keepdim=True), 2)
    return F.interpolate(squares.sqrt(), scale_factor=2.0)
