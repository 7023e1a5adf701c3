"""The UNet of Stable Diffusion 1.x and 2.x on a CPU, for fine-tuning of its transformer blocks by a LoRA.

The numbers of diffusers' own `forward` up to rounding, with less work: what lies before the first text cross-attention
is computed once for both branches of guidance, frozen layers as in `policies/frozen.py`, linear layers as in
`policies/fast_linear.py`, and nothing changes its memory layout on the way. Measurements: docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from driftrl.policies import fast_linear
from driftrl.policies.frozen import (
    Convolution,
    Doubling,
    Gated,
    Norm,
    NormConvolution,
    Residual,
    ResidualLayers,
    doubling_weight,
)
from driftrl.policies.winograd import Plain, convolution

CLOSE = 1e-3
"""How far an output may be from diffusers', relative to its largest value: a hundred times what rounding makes of it,
and far below what a layer that is computed wrongly would."""
SMALL = 2**24
"""Weights of a network up to which memory for transformed ones is taken, several times theirs."""


class UnknownLayerError(Exception):
    """The network has something that this module does not compute."""


def build(network: Any) -> FastUNet | None:
    """The fast form of a diffusers model, or None where there is none: another class, other layers, a GPU, half precision.

    It is compared with the model itself on one input before it is handed out, and follows later changes of the
    adapter's weights, but none of the network's own.
    """
    from diffusers import UNet2DConditionModel

    if not fast_linear.available(network) or type(network) is not UNet2DConditionModel:
        return None
    try:
        fast = FastUNet(network)
        return fast if fast.agrees() else None
    except UnknownLayerError:
        return None


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UnknownLayerError(what)


class FastUNet:
    """Computes what ``network`` does, one set of latents for all branches of guidance."""

    def __init__(self, network: Any) -> None:
        """Look the layers up.

        Raises:
            UnknownLayerError: if one is unknown, or trained outside of a transformer block.
        """
        config = network.config
        _require(config.addition_embed_type is None and config.class_embed_type is None, "more conditioning")
        _require(network.encoder_hid_proj is None and network.class_embedding is None, "more conditioning")
        _require(network.time_embed_act is None and not config.center_input_sample, "another input")
        _require(type(network.conv_norm_out) is nn.GroupNorm, "another output")
        for part in (network.conv_in, network.conv_out, network.conv_norm_out, network.time_embedding):
            _require(not fast_linear.trained(part), "trained outside of the transformer blocks")
        self.network = network
        self.first, self.last_norm = network.conv_in, Norm(network.conv_norm_out)
        self.last = Plain(_convolution(network.conv_out, 3))
        small = sum(p.numel() for p in network.parameters()) <= SMALL
        self.down = [_Block(block, small) for block in network.down_blocks]
        self.middle = _Middle(network.mid_block, small)
        self.up = [_Block(block, small) for block in network.up_blocks]
        self.factor = 2 ** (len(self.down) - 1)
        self.checkpointing = [m for m in network.modules() if hasattr(m, "gradient_checkpointing")]

    def fits(self, latents: Tensor) -> bool:
        """Whether latents [n, C, H, W] can be halved and doubled as often as the network does, and every layer's activations
        are kept for the backward pass.
        """
        sizes = latents.shape[2] % self.factor == 0 and latents.shape[3] % self.factor == 0
        return sizes and not any(m.gradient_checkpointing for m in self.checkpointing)

    def __call__(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The network's output [b n, C, H, W].

        Args:
            latents: float32 [n, C, H, W].
            timesteps: [n].
            embeds: float32 [b n, L, D]: prompt embeddings, branch after branch.
        """
        network = self.network
        time = F.silu(network.time_embedding(network.get_time_embed(latents, timesteps)))
        # n rows, which the branches share, until these part at the first cross-attention.
        x = self.first(latents.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down:
            for residual, transformer in block.layers:
                x = transformer(residual(x, None, time), embeds)
                skips.append(x)
            if block.resize is not None:
                x = block.resize(x)
                skips.append(x)
        x = self.middle(x, time, embeds)
        for block in self.up:
            for residual, transformer in block.layers:
                x = transformer(residual(x, skips.pop(), time), embeds)
            if block.resize is not None:
                x = block.resize(x)
        x = x if len(x) == len(embeds) else x.repeat(len(embeds) // len(x), 1, 1, 1)
        out: Tensor = NormConvolution.apply(x, self.last_norm, self.last)
        return out

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether the network itself computes the same from a random input."""
        network, draw = self.network, torch.Generator().manual_seed(0)
        side = 2 * self.factor
        shapes = (2, network.config.in_channels, side, side), (4, 3, network.config.cross_attention_dim)
        latents, embeds = (torch.randn(shape, generator=draw, dtype=torch.float32) for shape in shapes)
        times = torch.tensor([17, 503])
        stock = network(latents.repeat(2, 1, 1, 1), times.repeat(2), embeds, return_dict=False)[0]
        return bool((self(latents, times, embeds) - stock).abs().max() <= CLOSE * stock.abs().max())


class _Block:
    """A down or up block: residual blocks, transformers where it has them, and a change of resolution."""

    KNOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")

    def __init__(self, block: Any, small: bool) -> None:
        _require(type(block).__name__ in self.KNOWN, type(block).__name__)
        transformers = getattr(block, "attentions", [None] * len(block.resnets))
        self.layers = [
            (_Residual(r, small), _Transformer(t)) for r, t in zip(block.resnets, transformers, strict=True)
        ]
        resizers = list(getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or [])
        _require(len(resizers) <= 1, "several changes of resolution")
        self.resize = _Resize(resizers[0]) if resizers else None


class _Middle:
    """The block between down and up."""

    def __init__(self, block: Any, small: bool) -> None:
        _require(type(block).__name__ == "UNetMidBlock2DCrossAttn", type(block).__name__)
        self.first, *rest = (_Residual(r, small) for r in block.resnets)
        self.rest = [(_Transformer(t), r) for t, r in zip(block.attentions, rest, strict=True)]

    def __call__(self, x: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
        x = self.first(x, None, time)
        for transformer, residual in self.rest:
            x = residual(transformer(x, embeds), None, time)
        return x


class _Resize:
    """A strided convolution, or nearest-neighbour upsampling and a convolution."""

    def __init__(self, layer: Any) -> None:
        _require(type(layer).__name__ in {"Downsample2D", "Upsample2D"}, type(layer).__name__)
        _require(layer.norm is None and layer.use_conv, "another change of resolution")
        self.up = type(layer).__name__ == "Upsample2D"
        self.conv = Plain(_convolution(layer.conv, 3, stride=1 if self.up else 2))
        self.kernel = None
        if self.up:
            _require(layer.interpolate and not layer.use_conv_transpose, "another upsampling")
            self.kernel = doubling_weight(self.conv.layer.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return Doubling.apply(x, self.kernel, self.conv.layer.bias)
        return Convolution.apply(x, self.conv)


def _convolution(layer: Any, size: int, stride: int = 1) -> nn.Conv2d:
    plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.bias is not None
    _require(plain and not fast_linear.trained(layer), "another convolution")
    asked = ((size, size), (stride, stride), (size // 2, size // 2), (1, 1), "zeros")
    given = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    _require(given == asked, "another convolution")
    result: nn.Conv2d = layer
    return result


def _norm(layer: Any) -> Norm:
    _require(type(layer) is nn.GroupNorm and not fast_linear.trained(layer), "another normalisation")
    return Norm(layer)


class _Residual:
    """A residual block; `Residual` computes it."""

    def __init__(self, block: Any, small: bool) -> None:
        _require(type(block).__name__ == "ResnetBlock2D", type(block).__name__)
        _require(block.upsample is None and block.downsample is None, "a change of resolution")
        _require(block.time_embedding_norm == "default" and not block.skip_time_act, "another time embedding")
        _require(type(block.nonlinearity) is nn.SiLU and block.output_scale_factor == 1, "another activation")
        _require(block.dropout.p == 0 and type(block.time_emb_proj) is nn.Linear, "another residual block")
        _require(not fast_linear.trained(block), "trained outside of the transformer blocks")
        self.time = block.time_emb_proj
        short = block.conv_shortcut
        first, second = (convolution(_convolution(c, 3), small) for c in (block.conv1, block.conv2))
        self.layers = ResidualLayers(
            _norm(block.norm1), first, _norm(block.norm2), second,
            None if short is None else Plain(_convolution(short, 1)),
        )  # fmt: skip

    def __call__(self, x: Tensor, skip: Tensor | None, time: Tensor) -> Tensor:
        time = self.time(time)
        time = time.repeat(len(x) // len(time), 1)
        return Residual.apply(x, skip, time, self.layers)


class _Transformer:
    """A transformer over the pixels; the branches of guidance part at its first cross-attention."""

    def __init__(self, module: Any) -> None:
        self.module = module
        if module is None:
            return
        _require(
            type(module).__name__ == "Transformer2DModel" and module.is_input_continuous, "a transformer"
        )
        for end in (module.proj_in, module.proj_out):
            if isinstance(end, nn.Conv2d):
                _convolution(end, 1)
            else:
                _require(fast_linear.fast(end), "another projection")
        for block in module.transformer_blocks:
            self._check(block)

    def _check(self, block: Any) -> None:
        _require(
            type(block).__name__ == "BasicTransformerBlock" and block.norm_type == "layer_norm", "a block"
        )
        _require(block.pos_embed is None and block.attn2 is not None, "another block")
        _require(not block.only_cross_attention and not hasattr(block, "fuser"), "another block")
        for attention in (block.attn1, block.attn2):
            _require(type(attention.processor).__name__ == "AttnProcessor2_0", "another attention")
            other = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k)
            _require(
                all(part is None for part in other) and attention.norm_cross is None, "another attention"
            )
            _require(
                not attention.residual_connection and attention.rescale_output_factor == 1,
                "another attention",
            )
        gate = block.ff.net[0]
        _require(type(gate).__name__ == "GEGLU" and len(block.ff.net) == 3, "another feed-forward block")

    def __call__(self, x: Tensor, embeds: Tensor) -> Tensor:
        module = self.module
        if module is None:
            return x
        _, _, height, width = x.shape
        # Two-dimensional, [rows * pixels, C], so that a layer's result is not a view and can be added to in place.
        tokens = _project(module.proj_in, module.norm(x).permute(0, 2, 3, 1).flatten(0, 2), len(x))
        rows, words = len(x), embeds.flatten(0, 1)
        for block in module.transformer_blocks:
            normal = block.norm1(tokens)
            tokens = _attended(block.attn1, normal, normal, rows).add_(tokens)
            if rows < len(embeds):
                tokens, rows = tokens.repeat(len(embeds) // rows, 1), len(embeds)
            tokens = _attended(block.attn2, block.norm2(tokens), words, rows).add_(tokens)
            tokens = _fed_forward(block.ff.net, block.norm3(tokens), rows).add_(tokens)
        out = _project(module.proj_out, tokens, rows).unflatten(0, (rows, height, width)).permute(0, 3, 1, 2)
        return out + (x if len(x) == rows else x.repeat(rows // len(x), 1, 1, 1))


def _linear(layer: Any, tokens: Tensor, rows: int) -> Tensor:
    """A linear layer's output for tokens [rows * S, C]."""
    if fast_linear.fast(layer):
        return layer(tokens, rows=rows)
    return layer(tokens)


def _project(layer: Any, tokens: Tensor, rows: int) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return fast_linear.Frozen.apply(tokens, layer.weight.flatten(1), layer.bias)
    return _linear(layer, tokens, rows)


def _fed_forward(layers: Any, tokens: Tensor, rows: int) -> Tensor:
    gate, dropout, out = layers
    if type(gate.proj) is nn.Linear and not fast_linear.trained(gate.proj):
        hidden = Gated.apply(tokens, gate.proj.weight, gate.proj.bias)
    else:
        value, gated = _linear(gate.proj, tokens, rows).chunk(2, dim=-1)
        hidden = value * gate.gelu(gated)
    return _linear(out, dropout(hidden), rows)


def _attended(attention: Any, tokens: Tensor, seen: Tensor, rows: int) -> Tensor:
    """Attention of tokens [rows * S, C] to [rows * K, D]."""
    parts = (
        _linear(attention.to_q, tokens, rows),
        _linear(attention.to_k, seen, rows),
        _linear(attention.to_v, seen, rows),
    )
    query, key, value = (
        part.view(rows, -1, attention.heads, part.shape[-1] // attention.heads).transpose(1, 2)
        for part in parts
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    last, dropout = attention.to_out
    out: Tensor = dropout(_linear(last, mixed.transpose(1, 2).flatten(2).flatten(0, 1), rows))
    return out
