"""What every diffusers pipeline has in common as a policy: weights, precision, guidance, decoding, saving."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.gradients import on_demand
from driftrl.policies import fast_linear, fast_unet, long_prompts
from driftrl.policies.full import FullWeights
from driftrl.policies.lora import LoRA
from driftrl.policies.start import Start, load_start
from driftrl.types import Conditioning, Transition

RECOMPILED = 64
"""How often torch.compile may compile a kind of block."""
DECODED_PIXELS = 2**20
"""Pixels that the autoencoder decodes at once: 4 images of 512 x 512."""


@dataclass(frozen=True)
class Sampler:
    """How a policy denoises."""

    steps: int
    guidance_scale: float
    eta: float = 1.0
    """Of DDIM, for diffusion models."""
    flow_sampler: str = "sde"
    """For flow models: 'sde', 'dance' or 'cps'."""
    noise_level: float = 0.7
    """Of the flow samplers."""
    height: int | None = None
    """Pixels; None is what the model was made for."""
    width: int | None = None
    negative_prompt: str = ""
    """What guidance leads away from; empty is the model's own empty prompt."""


class PipelinePolicy:
    """A diffusers pipeline seen as pi(x_{t-1} | x_t, prompt) = N(mean, std^2 I).

    Subclasses say how prompts are encoded, how the network is called, and which transition its output makes.
    What is scored is float32, whatever the network computes in. Text encoders visit the device only to encode.
    """

    component = "unet"
    """The pipeline's part that is trained."""
    text_encoders: tuple[str, ...] = ("text_encoder",)
    blocks: tuple[str, ...] = ("BasicTransformerBlock",)
    """Classes of the network's layers that are compiled."""
    dispensable: tuple[str, ...] = ()
    """Text encoders and tokenizers that the model also draws without."""
    longest: int | None = None
    """Tokens of a prompt that are read, where neither tokenizer nor pipeline says it."""
    prompts_at_once = 64
    """Prompts that the text encoders read together: more take memory, and no less time."""
    num_train_timesteps: int
    predicts_noise = False
    """Whether its network predicts the noise, not a velocity."""
    _said_long = False
    """Whether it was said that prompts are too long."""

    def __init__(self, pipeline: Any, sampler: Sampler, device: torch.device, in_parts: bool = False) -> None:
        """Take over ``pipeline`` and freeze it. A network that is to be trained ``in_parts`` may be larger than the device, so it
        stays where it is until `train_in_parts`.

        Raises:
            InputError: for an image size that the model cannot draw, or one for inpainting.
        """
        self.pipeline, self.sampler, self._device = pipeline, sampler, device
        pipeline.set_progress_bar_config(disable=True)
        self.network: Any = getattr(pipeline, self.component)
        self.dtype: torch.dtype = self.network.dtype
        for name in (*self.text_encoders, "vae", self.component):
            module = getattr(pipeline, name, None)
            if module is not None:
                module.requires_grad_(False).eval()
        if getattr(pipeline.vae.config, "force_upcast", False) and pipeline.vae.dtype == torch.float16:
            torch.nn.Module.to(pipeline.vae, torch.float32)  # SDXL's overflows in half precision
        for module in (pipeline.vae,) if in_parts else (self.network, pipeline.vae):
            # Convolutions are faster so: oneDNN and cuDNN need not reorder what comes in and goes out. Of volumes none are.
            flat = all(p.dim() < 5 for p in module.parameters())
            module.to(device, memory_format=torch.channels_last if flat else torch.preserve_format)
        self.weights: LoRA | FullWeights | None = None
        self.fast: fast_unet.FastUNet | None = None
        """What computes the network's output in its place, where that is possible."""
        self.compiled = False
        """Whether the network's blocks go through torch.compile."""
        self._shape = self._latent_shape()
        self._window: Tensor | None = None

    def _latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one latent."""
        own, factor = self._own_size(), self._factor
        asked = (self.sampler.height, self.sampler.width)
        sides = []
        for name, pixels, side in zip(("height", "width"), asked, own, strict=True):
            if pixels is not None and (pixels % (factor * self._patch()) or pixels < 1):
                raise InputError(
                    f"sampling.{name}: expected a multiple of {factor * self._patch()} pixels; got {pixels}"
                )
            sides.append(side if pixels is None else pixels // factor)
        if self._channels() != self._autoencoder_channels():
            raise InputError(
                f"model.path: expected a {self.component} of latents with {self._autoencoder_channels()} "
                f"channels, which the autoencoder has; got {self._channels()} (is it one for inpainting?)"
            )
        return self._channels(), sides[0], sides[1]

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self._device

    def _own_size(self) -> tuple[int, int]:
        """Height and width of the latents that the model was made for."""
        size = self.network.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _channels(self) -> int:
        return int(self.network.config.in_channels)

    def _autoencoder_channels(self) -> int:
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def _factor(self) -> int:
        """Pixels per side of a latent."""
        return int(self.pipeline.vae_scale_factor)

    def _patch(self) -> int:
        """Latents per side that the network takes together."""
        return 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one latent."""
        return self._shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape [3, height, width] of one image."""
        factor = self._factor
        return 3, self._shape[1] * factor, self._shape[2] * factor

    def _scale(self) -> float:
        """Classifier-free guidance of two branches; 1 runs one, and so does less, as in diffusers."""
        return max(1.0, self.sampler.guidance_scale)

    @property
    def branches(self) -> int:
        """Rows that the network computes for each sample: 2 with guidance."""
        return 1 if self._scale() == 1.0 else 2

    @property
    def negative_prompt(self) -> str:
        """What guidance leads away from; empty too where there is no second branch to read it."""
        return self.sampler.negative_prompt if self.branches == 2 else ""

    @property
    def timesteps(self) -> Tensor:
        """[T]: the training timestep of each denoising step."""
        raise NotImplementedError

    def _set_schedule(self) -> None:
        """Look up the constants of as many denoising steps as the sampler has."""
        raise NotImplementedError

    def take_steps(self, count: int) -> None:
        """From now on denoise in so many steps, with noise in all that have some.

        Raises:
            InputError: if the model knows fewer timesteps.
        """
        self.sampler, self._window = replace(self.sampler, steps=count), None
        self._set_schedule()

    @property
    def scored(self) -> Tensor:
        """bool [T]: which steps have a density."""
        scored = self._with_density()
        return scored if self._window is None else scored & self._window

    @property
    def durations(self) -> Tensor:
        """float [T]: the time of each denoising step."""
        raise NotImplementedError

    def _with_density(self) -> Tensor:
        """bool [T]: which steps have one where noise is added in all."""
        raise NotImplementedError

    def add_noise_in(self, steps: range | None) -> None:
        """From now on add noise in these denoising steps only, the others being those of the deterministic sampler; None: in
        all.
        """
        self._window = None
        if steps is not None:
            self._window = torch.zeros_like(self._with_density())
            self._window[steps.start : steps.stop] = True

    def _moved(self, move: Callable[[float], Transition], noise: float, steps: Tensor) -> Transition:
        """What ``move`` makes of the noise that the sampler adds, or of none where the window says so."""
        noisy = move(noise)
        if self._window is None:
            return noisy
        still, on = move(0.0), self._window[steps].view(-1, 1, 1, 1)
        return Transition(torch.where(on, noisy.mean, still.mean), noisy.std * on, noisy.x0)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        raise NotImplementedError

    def _negative(self, prompts: Sequence[str]) -> list[str] | None:
        """The negative prompt as often as there are prompts; None is what the pipeline itself makes of none."""
        return [self.negative_prompt] * len(prompts) if self.negative_prompt else None

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        """The policy at latents [n, C, H, W], step numbers [n] and n rows of conditioning."""
        raise NotImplementedError

    def noised(self, x0: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Clean latents [n, C, H, W] with as much of ``noise`` as there is at step numbers [n]."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], at_once: int | None = None) -> Conditioning:
        """Embed prompts, and the negative or empty one; the text encoders are on the device only meanwhile.

        Args:
            prompts: one or more.
            at_once: how many the text encoders read together; by default what suits them.
        """
        read = [*prompts, self.negative_prompt] if self.negative_prompt else prompts
        if not self._said_long and (
            message := long_prompts.told(self.pipeline, self.text_encoders, read, self.longest)
        ):
            self._said_long = True
            warnings.warn(message, long_prompts.LongPromptWarning, stacklevel=2)
        encoders = [e for e in (getattr(self.pipeline, n, None) for n in self.text_encoders) if e is not None]
        for encoder in encoders:
            encoder.to(self.device)
        size = at_once or self.prompts_at_once
        try:
            with long_prompts.quiet():
                return _joined([self._encode(prompts[at : at + size]) for at in range(0, len(prompts), size)])
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def _guided(
        self, run: Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor], latents: Tensor,
        timesteps: Tensor, conditioning: Conditioning, guidance_scale: float,
    ) -> Tensor:  # fmt: skip
        """The network's output float32 [n, C, H, W], both branches of guidance in one batch.

        ``run(latents, timesteps, embeds, extra)`` calls the network; entries of ``conditioning.extra`` named
        ``null_...`` take the place of their counterparts on the unconditional branch.
        """
        fast = self._fast(latents)
        inputs, embeds = latents.to(self.dtype), conditioning.embeds.to(self.dtype)
        extra = {k: v for k, v in conditioning.extra.items() if not k.startswith("null_")}
        if guidance_scale != 1.0:
            null = conditioning.null_embeds.to(self.dtype).expand_as(embeds)
            if fast is None:
                inputs, timesteps = inputs.repeat(2, 1, 1, 1), timesteps.repeat(2)
            embeds = torch.cat([null, embeds])
            extra = {k: torch.cat([conditioning.extra.get(f"null_{k}", v), v]) for k, v in extra.items()}
        mixed = torch.autocast(
            self.device.type, self.dtype if self.dtype != torch.float32 else None,
            enabled=self._mixed,
        )  # fmt: skip
        with mixed, warnings.catch_warnings():
            # Under autocast with float32 weights: that a fused kernel cannot be had.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            if self.compiled:  # torch.compile looks at everything a tensor has
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            if fast is None:
                # Masks and lengths stay what they are: half precision cannot count.
                extra = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in extra.items()}
                output = run(inputs, timesteps, embeds, extra).float()
            else:
                output = fast(inputs, timesteps, embeds)
        if guidance_scale != 1.0:
            unconditional, conditional = output.chunk(2)
            output = self._combined(unconditional, conditional, guidance_scale)
        return output

    def _combined(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, of outputs float32 [n, C, H, W]."""
        return unconditional + scale * (conditional - unconditional)

    def _fast(self, latents: Tensor) -> fast_unet.FastUNet | None:
        """What computes the network's output for ``latents`` in its place."""
        return self.fast if self.fast is not None and self.fast.fits(latents) else None

    @on_demand
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, C, H, W] as images float32 [n, 3, height, width] in 0..1."""
        scaled = self._unscaled(latents.to(self.pipeline.vae.dtype))
        pixels = latents.shape[-2] * latents.shape[-1] * self._factor**2
        chunk = max(1, DECODED_PIXELS // pixels)
        images = torch.cat([self._decoded(part).float() for part in scaled.split(chunk)])
        return (images / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder has them."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def _decoded(self, latents: Tensor) -> Tensor:
        images: Tensor = self.pipeline.vae.decode(latents, return_dict=False)[0]
        return images

    def add_lora(
        self, rank: int, alpha: float, targets: list[str], seed: int, start: Start | None = None
    ) -> None:
        """Train a LoRA, a fresh one or from ``start`` on.

        Raises:
            InputError: if a target names no layer of the network, or ``start`` does not fit.
        """
        self.weights = LoRA(self.pipeline, self.component, self.network, rank, alpha, targets, seed)
        if start is not None:
            start.put_into(self.network, rank)
        if not self.compiled:
            fast_linear.install(self.network)
            self.fast = fast_unet.build(self.network)

    def start_of(self, source: str) -> Start:
        """A LoRA to start from, a name or folder; to be asked for before anything else is added."""
        return load_start(self.pipeline, self.component, self.network, source)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the network's transformer blocks, each when it is first called; to be asked for before weights are added.

        Raises:
            InputError: if it has none of `blocks`.
        """
        found = [m for m in self.network.modules() if type(m).__name__ in self.blocks]
        if not found:
            raise InputError(f"model.compile: the {self.component} has no {' or '.join(self.blocks)}")
        # One limit for all blocks, of all widths, with and without gradients and adapter.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILED)
        for block in found:
            block.compile(backend=backend, dynamic=True)
        self.compiled = True

    def train_fully(self, seed: int = 0) -> None:
        """Train every weight of the network, in float32; it computes in the precision it was loaded in."""
        self.weights = FullWeights(self.network)

    def train_in_parts(self) -> None:
        """The same, with every process holding a part of each weight (`driftrl.policies.sharded`)."""
        from driftrl.policies.sharded import ShardedWeights

        self.weights = ShardedWeights(self.network, self.device, self.dtype)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The trainable parameters by name, in a fixed order."""
        return ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, in the same order."""
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def has_sample_gradients(self) -> bool:
        """Whether `sample_gradients` can be had: for a LoRA on linear layers only."""
        return isinstance(self.weights, LoRA) and self.weights.by_sample is not None and not self.compiled

    def sample_gradients(self, samples: int) -> AbstractContextManager[Tensor]:
        """Float32 [samples, parameters], zero: within this context backward passes add each sample's gradient to its row,
        in the order of `parameters`, and to no ``.grad``.
        """
        if not isinstance(self.weights, LoRA) or self.weights.by_sample is None:
            raise InputError(
                "this policy has no gradients of single samples: expected a LoRA on linear layers"
            )
        return self.weights.by_sample.collecting(samples)

    @property
    def _mixed(self) -> bool:
        """Whether autocast computes with float32 weights in half precision."""
        weights = self.weights
        return isinstance(weights, FullWeights) and weights.autocast and self.dtype != torch.float32

    def _trained(self) -> LoRA | FullWeights:
        if self.weights is None:
            raise InputError("this policy has no trainable weights: add a LoRA, or train it fully")
        return self.weights

    def reference(self) -> AbstractContextManager[None]:
        """Within this context the policy is the one that training started from."""
        return self._trained().reference()

    def save_adapter(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Write what was trained: a LoRA in diffusers' format, or the whole network as diffusers saves it."""
        self._trained().save(folder, values)


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts; the empty prompt is the same in each."""
    extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
    return Conditioning(torch.cat([part.embeds for part in parts]), parts[0].null_embeds, extra)
