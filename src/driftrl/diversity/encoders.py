"""Image encoders behind one interface: images [N, 3, H, W] in 0..1 to features [N, D]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.gradients import on_demand
from driftrl.loading import load_whole
from driftrl.preprocess import preprocessing_of, resized

DREAMSIM = {"dreamsim": "ensemble"} | {
    f"dreamsim:{branch}": branch
    for branch in ("dino_vitb16", "clip_vitb32", "open_clip_vitb32", "dinov2_vitb14")
}
"""The variants of the published package: its ensemble and its single branches."""

PIXELS_AT_ONCE = 2**20
"""Pixels that an autoencoder encodes at once, as many as a policy decodes: 4 images of 512 x 512."""


class TransformersEncoder:
    """Features of an image model that `transformers.AutoModel` loads: CLIP, SigLIP, DINOv2, ResNet and their like.

    CLIP gives its projected image embeddings, SigLIP its pooled ones, DINOv2 its normalised class token.
    """

    def __init__(self, folder: Path | str, device: torch.device | str = "cpu", batch_size: int = 128) -> None:
        """Load the model from a folder or the hub, in float32.

        Raises:
            InputError: if it is no model of images, or weights of its image part are missing.
        """
        from transformers import AutoConfig, AutoModel

        both = hasattr(
            AutoConfig.from_pretrained(folder), "vision_config"
        )  # and a text part, which is not used
        model: Any = load_whole(AutoModel, folder, ("vision_model", "visual_projection") if both else ("",))
        self.projection: Any = getattr(model, "visual_projection", None)
        self.model = getattr(model, "vision_model", model)
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            raise InputError(f"{folder}: expected a model of images; got {type(model).__name__}")
        for module in (self.model, self.projection):
            if module is not None:
                module.to(device).eval().requires_grad_(False)
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", None)
        self.device, self.batch_size = torch.device(device), batch_size
        self.preprocess = preprocessing_of(folder, int(size) if isinstance(size, int) else None)

    @on_demand
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, D]."""
        return _in_batches(images, self.batch_size, self._encode)

    def _encode(self, images: Tensor) -> Tensor:
        pooled = self.model(pixel_values=self.preprocess(images.to(self.device))).pooler_output.flatten(1)
        return (pooled if self.projection is None else self.projection(pooled)).float()


class DreamSimEncoder:
    """DreamSim (Fu et al. 2023, arXiv 2306.09344) from the package of that name: the paper's diversity encoder."""

    def __init__(
        self, variant: str = "ensemble", device: torch.device | str = "cpu", batch_size: int = 64
    ) -> None:
        """Load a variant; the package downloads its weights when first used, into torch's folder of such (``TORCH_HOME``).

        Raises:
            InputError: if the package is not installed or cannot load the variant.
        """
        from filelock import FileLock

        try:
            from dreamsim import dreamsim  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise InputError(
                f"the dreamsim encoder needs the extra: pip install '.[dreamsim]' in driftrl's folder (it brings torchvision): {error}"
            ) from error
        cache = Path(torch.hub.get_dir()) / "dreamsim"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Processes that download and unpack the same files at once read each other's halves.
            with FileLock(cache / "lock"):
                self.model: Any = dreamsim(
                    pretrained=True, device=str(device), dreamsim_type=variant, cache_dir=str(cache)
                )[0]
        except Exception as error:  # of several packages, on whatever their files hold
            raise InputError(
                f"dreamsim ({variant}) cannot be loaded: {error}; its weights come from the network, into {cache}, the first time"
            ) from error
        self.model.eval().requires_grad_(False)
        self.device, self.batch_size = torch.device(device), batch_size

    @on_demand
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, D]; the package normalises by itself, and wants 224 x 224 pixels in 0..1."""
        return _in_batches(images, self.batch_size, self._encode)

    def _encode(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        if x.shape[-2:] != (224, 224):
            x = resized(x, (224, 224))
        features: Tensor = self.model.embed(x)
        return features.flatten(1).float()


class LatentEncoder:
    """The policy's own autoencoder: mean latents, flattened (the paper's open question 1)."""

    def __init__(self, vae: Any, batch_size: int = 64, side: int | None = None) -> None:
        """Take a diffusers autoencoder, which stays as it is; with ``side`` latents are averaged down to that size."""
        self.vae, self.batch_size, self.side = vae, batch_size, side

    @on_demand
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, C * h * w], h and w at most ``side``."""
        return _in_batches(images, self.batch_size, self._encode)

    def _encode(self, images: Tensor) -> Tensor:
        latents = encode_latents(self.vae, images)
        if self.side is not None:
            height, width = latents.shape[-2:]
            latents = torch.nn.functional.adaptive_avg_pool2d(
                latents, (min(height, self.side), min(width, self.side))
            )
        return latents.flatten(1)


class MidBlockEncoder:
    """The base policy's UNet as an image encoder: mid-block features at a lightly noised latent, averaged over places.

    The noise is one fixed draw, so equal images have equal features. The adapter is off, so training does not move
    the measure.
    """

    def __init__(
        self,
        vae: Any,
        unet: Any,
        run: Callable[[Tensor, Tensor], Any],
        alpha: float,
        timestep: int,
        reference: Callable[[], Any],
        batch_size: int = 64,
    ) -> None:
        """Take the policy's networks.

        Args:
            vae: its autoencoder.
            unet: its `UNet2DConditionModel`.
            run: calls it with latents [n, C, h, w] and timesteps [n], under the empty prompt.
            alpha: cumulative alpha at ``timestep``: the signal's share of the variance.
            timestep: what the UNet is told.
            reference: a context within which the adapter is off.
            batch_size: images at once.
        """
        self.vae, self.unet, self.run, self.reference = vae, unet, run, reference
        self.alpha, self.timestep, self.batch_size = alpha, timestep, batch_size

    @on_demand
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [N, C]."""
        return _in_batches(images, self.batch_size, self._encode)

    def _encode(self, images: Tensor) -> Tensor:
        z = encode_latents(self.vae, images)
        noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0)).to(z)
        x = (self.alpha**0.5 * z + (1 - self.alpha) ** 0.5 * noise).to(self.unet.dtype)
        found: list[Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            with self.reference():
                self.run(x, torch.full((len(x),), self.timestep, device=x.device))
        finally:
            hook.remove()
        return found[0].float().mean((2, 3))


def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Scaled mean latents float32 [N, C, h, w] of images [N, 3, H, W] in 0..1; some autoencoders have no others."""
    chunk = max(1, PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
    return _in_batches(images, chunk, lambda part: _encoded(vae, part))


def _encoded(vae: Any, images: Tensor) -> Tensor:
    parameter = next(vae.parameters())
    x = (images * 2 - 1).to(parameter.device, parameter.dtype)
    if hasattr(vae.config, "z_dim"):  # an autoencoder of films, whose channels are scaled one by one
        scales = (vae.config.latents_mean, vae.config.latents_std)
        centre, spread = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in scales)
        still: Tensor = vae.encode(x.unsqueeze(2)).latent_dist.mode()[:, :, 0].float()
        return (still - centre) / spread
    if hasattr(vae, "bn"):  # FLUX.2's: 2 x 2 latents are one, normalised by the statistics of a batch norm
        centre, var = (part.float().view(-1, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        tokens = torch.nn.functional.pixel_unshuffle(vae.encode(x).latent_dist.mode().float(), 2)
        return (tokens - centre) / (var + vae.config.batch_norm_eps).sqrt()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    found = vae.encode(x)
    mean: Tensor = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent
    return (mean.float() - shift) * vae.config.scaling_factor


def _in_batches(images: Tensor, size: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([encode(chunk) for chunk in images.split(size)])
