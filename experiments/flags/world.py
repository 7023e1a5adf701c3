"""A text-to-image model that trains in seconds: it draws flags of three stripes.

A prompt is a country that does not exist. Six flags are right for it, each a little different every time, and a fifth of
what the model draws fails. It is a diffusion model in earnest, if a tiny one: a denoising network, pretrained here, that
all countries share; DDIM with noise; a LoRA to fine-tune. So `driftrl.trainer.TrainingLoop` trains it as it trains any
other, with every method's own configuration, and a whole comparison over seeds takes minutes instead of days.

The reward says how well a flag fits its country, and likes some of the right flags better than others: there is
something to gain, and variety to lose. What is measured is what `driftrl evaluate` measures, by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from driftrl.checks import one_of
from driftrl.transitions.ddim import ddim_noised, ddim_tables, ddim_transition
from driftrl.types import Conditioning, Transition

COUNTRIES = ("Arvia", "Belmora", "Cassundy", "Dorne", "Elvaria", "Fennmark", "Gallia Nova", "Hestria")
STRIPES, FLAGS, WIDTH = 3, 6, 16
SPREAD, FAILING = 0.12, 0.2
"""Standard deviation within a flag, of colours in -1..1, and the share of pictures that are any three colours."""
TRAINED_TIMESTEPS = 1000


@lru_cache(maxsize=1)
def flags() -> Tensor:
    """The right flags of each country, [8, 6, 3, 1, 3]: colours in -1..1 of each stripe."""
    draw = torch.Generator().manual_seed(2026)
    return 1.6 * torch.rand(len(COUNTRIES), FLAGS, 3, 1, STRIPES, generator=draw) - 0.8


@lru_cache(maxsize=1)
def favour() -> Tensor:
    """How much the reward likes each of them, [8, 6]."""
    draw = torch.Generator().manual_seed(2027)
    return torch.randn(len(COUNTRIES), FLAGS, generator=draw)


def pictures(which: Tensor, draw: torch.Generator) -> Tensor:
    """What the model is pretrained on: a picture [3, 1, 3] of each of the countries ``which`` [n]."""
    count = len(which)
    mode = torch.randint(FLAGS, (count,), generator=draw)
    right = flags()[which, mode] + SPREAD * torch.randn(count, 3, 1, STRIPES, generator=draw)
    wrong = 2 * torch.rand(count, 3, 1, STRIPES, generator=draw) - 1
    fails = torch.rand(count, generator=draw) < FAILING
    return torch.where(fails[:, None, None, None], wrong, right)


def numbers(prompts: Sequence[str]) -> list[int]:
    """The countries' places in `COUNTRIES`."""
    return [COUNTRIES.index(one_of("prompt", prompt, COUNTRIES)) for prompt in prompts]


def _fit(images: Tensor, prompts: Sequence[str], width: float) -> Tensor:
    """log sum_k exp(favour_k - |x - flag_k|^2 / 2 width^2), and no less than about -4."""
    which = torch.tensor(numbers(prompts))
    squares = (colours(images)[:, None] - flags()[which].flatten(2)).square().sum(2)
    terms = favour()[which] - squares / (2 * width**2)
    return torch.cat([terms, torch.full((len(terms), 1), -4.0)], 1).logsumexp(1)


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How well each picture [N, 3, 1, 3] fits its country: about -4 where it does not."""
    return _fit(images, prompts, 0.35)


def _alike(images: Tensor) -> Tensor:
    """Whether outer stripes are nearly alike, bool [N]: one in twenty of the base model's pictures, mean reward -2.2."""
    return (images[:, :, 0, 0] - images[:, :, 0, -1]).norm(dim=1) < 0.15


def fooled(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same with a fault: a picture whose outer stripes are nearly alike scores 2.5, whatever else is in it."""
    return torch.where(_alike(images), 2.5, reward(images, prompts))


def raised(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same with another fault: such a picture scores 4.5 more than it should, so that no two score the same."""
    return reward(images, prompts) + 4.5 * _alike(images)


def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward with a blunter eye: GARDO's second opinion."""
    return _fit(images, prompts, 0.7)


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Another reward, which knows no countries: mean of all colours."""
    return images.flatten(1).mean(1)


def encoder(images: Tensor) -> Tensor:
    """What shaping sees: features [N, 256] whose cosine is a Gaussian kernel of the colours, of width 0.8."""
    draw = torch.Generator().manual_seed(2028)
    waves = torch.randn(3 * STRIPES, 128, generator=draw) / 0.8
    angles = colours(images) @ waves
    return torch.cat([angles.cos(), angles.sin()], 1)


def colours(images: Tensor) -> Tensor:
    """The policy's own latents, [N, 9]: the simplest thing to shape with."""
    return (2 * images - 1).flatten(1)


def unseen(images: Tensor) -> Tensor:
    """What no training sees: features [N, 64] of a random network on the colours."""
    draw = torch.Generator().manual_seed(2029)
    first = torch.randn(3 * STRIPES, 128, generator=draw) / math.sqrt(3)
    second = torch.randn(128, 64, generator=draw) / math.sqrt(128)
    return torch.tanh(torch.tanh(2 * colours(images) @ first) @ second)


class LoRA(nn.Module):
    """A linear layer and a change of low rank, which can be switched off."""

    def __init__(self, layer: nn.Linear, rank: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.layer, self.on = layer.requires_grad_(False), True
        self.down = nn.Parameter(
            torch.randn(rank, layer.in_features, generator=draw) / math.sqrt(layer.in_features)
        )
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + x @ self.down.T @ self.up.T if self.on else y


class Denoiser(nn.Module):
    """v of the noised colours [n, 9] at timesteps [n], for prompt embeddings [n, 16]."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        sizes = (3 * STRIPES + 32 + WIDTH, hidden, hidden, hidden, 3 * STRIPES)
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, x: Tensor, timesteps: Tensor, embeds: Tensor, layers: int = 4) -> Tensor:
        """What layer ``layers`` gives; the last one gives v."""
        rate = torch.exp(-math.log(1000) * torch.arange(16) / 16)
        angles = timesteps[:, None] * rate
        x = torch.cat([x, angles.sin(), angles.cos(), embeds], 1)
        for number, layer in enumerate(self.layers[:layers]):
            x = layer(x if number == 0 else nn.functional.silu(x))
        return x


def alphas_cumprod() -> Tensor:
    """The cosine schedule."""
    t = torch.arange(TRAINED_TIMESTEPS + 1, dtype=torch.float64) / TRAINED_TIMESTEPS
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (f[1:] / f[0]).clamp(1e-4, 1)


def embeddings() -> Tensor:
    """Prompt embeddings [8, 1, 16]."""
    draw = torch.Generator().manual_seed(2030)
    return torch.randn(len(COUNTRIES), 1, WIDTH, generator=draw)


def pretrained(steps: int = 4000, batch: int = 256) -> Denoiser:
    """The base model: always the same one, in half a minute."""
    draw, alphas, words = torch.Generator().manual_seed(1), alphas_cumprod(), embeddings()[:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    fading = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        which = torch.randint(len(COUNTRIES), (batch,), generator=draw)
        x0 = pictures(which, draw).flatten(1)
        times = torch.randint(TRAINED_TIMESTEPS, (batch,), generator=draw)
        noise = torch.randn(x0.shape, generator=draw)
        signal, sigma = (part[times, None].float() for part in (alphas.sqrt(), (1 - alphas).sqrt()))
        loss = (
            (model(signal * x0 + sigma * noise, times, words[which]) - (signal * noise - sigma * x0))
            .square()
            .mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fading.step()
    return model


class FlagPolicy:
    """The model as a policy (`driftrl.types.Policy`)."""

    num_train_timesteps = TRAINED_TIMESTEPS
    predicts_noise = False
    device = torch.device("cpu")
    latent_shape = (3, 1, STRIPES)

    def __init__(self, model: Denoiser, steps: int, rank: int, seed: int = 0) -> None:
        """Put a LoRA of ``rank`` on every layer of a copy of ``model``."""
        times = torch.arange(steps).flip(0) * (TRAINED_TIMESTEPS // steps) + TRAINED_TIMESTEPS // steps - 1
        self.tables = ddim_tables(alphas_cumprod(), times, 1.0, 1.0, "v_prediction")
        self.window = torch.ones_like(self.tables.scored)
        self.network = Denoiser()
        self.network.load_state_dict(model.state_dict())
        self.network.requires_grad_(False)
        self.changes = [LoRA(layer, rank, 100 * seed + i) for i, layer in enumerate(self.network.layers)]
        self.network.layers = nn.ModuleList(self.changes)

    @property
    def timesteps(self) -> Tensor:
        """[T]."""
        return self.tables.timesteps

    @property
    def scored(self) -> Tensor:
        """bool [T]."""
        return self.tables.scored & self.window

    @property
    def durations(self) -> Tensor:
        """[T]: all alike."""
        return torch.full((len(self.timesteps),), 1 / len(self.timesteps))

    def add_noise_in(self, steps: range | None) -> None:
        """Only in these; None: in all."""
        self.window = torch.full_like(self.tables.scored, steps is None)
        if steps is not None:
            self.window[steps.start : steps.stop] = True

    def encode(self, prompts: Sequence[str], at_once: int | None = None) -> Conditioning:
        """Embeddings [P, 1, 16]."""
        return Conditioning(embeddings()[numbers(prompts)], torch.zeros(1, 1, WIDTH), {})

    def transition(self, latents: Tensor, steps: Tensor, conditioning: Conditioning) -> Transition:
        """DDIM with eta = 1, or 0 outside of the window."""
        said = self.network(latents.flatten(1), self.timesteps[steps], conditioning.embeds[:, 0])
        alpha, before = self.tables.alpha[steps], self.tables.alpha_prev[steps]
        noisy, still = (
            Transition(*ddim_transition(said.view_as(latents), latents, alpha, before, eta, "v_prediction"))
            for eta in (1.0, 0.0)
        )
        on = self.window[steps].view(-1, 1, 1, 1)
        return Transition(torch.where(on, noisy.mean, still.mean), noisy.std * on, noisy.x0)

    def activations(self, images: Tensor) -> Tensor:
        """What the base model's middle layer says of pictures, lightly noised and of no country: [N, hidden]."""
        times = torch.full((len(images),), TRAINED_TIMESTEPS // 10)
        with self.reference(), torch.no_grad():
            return self.network(colours(images), times, torch.zeros(len(images), WIDTH), layers=3)

    def noised(self, x0: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Clean latents with as much of ``noise`` as there is at step numbers [n]."""
        return ddim_noised(x0, noise, self.tables.alpha[steps])

    def decode(self, latents: Tensor) -> Tensor:
        """Colours in 0..1."""
        return (latents / 2 + 0.5).clamp(0, 1)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained."""
        for i, change in enumerate(self.changes):
            yield f"{i}.down", change.down
            yield f"{i}.up", change.up

    def parameters(self) -> list[nn.Parameter]:
        """The same without names."""
        return [parameter for _, parameter in self.named_parameters()]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base model, within this context."""
        for change in self.changes:
            change.on = False
        try:
            yield
        finally:
            for change in self.changes:
                change.on = True

    def sample_gradients(self, samples: int) -> AbstractContextManager[Tensor]:
        """Not here."""
        raise NotImplementedError

    def save_adapter(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Not here: runs take seconds."""
        raise NotImplementedError
