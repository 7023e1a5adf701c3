"""Train the image encoder for diversity: self-supervised, so that it knows neither animals nor captions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, ResNetConfig, ResNetModel

from tiny_animals.augment import Pictures, disturb, move, tint
from tiny_animals.autoencoder import TEST_POSES
from tiny_animals.bank import SIZE, Bank, composite
from tiny_animals.training import Training, join_processes, rank

WIDTHS, DEPTHS = [32, 64, 128, 192], [1, 1, 2, 1]
TEMPERATURE = 0.15


def new_backbone() -> ResNetModel:
    """Return an untrained small ResNet; pixels in -1..1, pooled output [n, 192, 1, 1]."""
    return ResNetModel(
        ResNetConfig(
            embedding_size=32, hidden_sizes=WIDTHS, depths=DEPTHS, layer_type="basic", image_size=SIZE
        )
    )


class Projected(nn.Module):
    """The backbone and the head that only training uses (SimCLR: Chen et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = new_backbone()
        self.head = nn.Sequential(nn.Linear(WIDTHS[-1], 256), nn.ReLU(), nn.Linear(256, 96))

    def forward(self, images: Tensor) -> Tensor:
        """Unit projections [n, 96] of images in 0..1."""
        pooled = self.backbone(images * 2 - 1).pooler_output.flatten(1)
        return nn.functional.normalize(self.head(pooled).float(), dim=-1)


@torch.no_grad()
def settle(model: nn.Module, pictures: Pictures, batches: int = 40) -> None:
    """Set the running statistics of batch normalisation (which an average of weights does not have) afresh."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    generator = torch.Generator().manual_seed(3)
    for _ in range(batches):
        model(disturb(pictures.draw(128, generator, 0.5)[0], generator, 0.1))
    model.eval()


def train(bank: Bank, cache: Path, out: Path, images: int, batch: int = 160) -> None:
    """Train on two views of each picture; write the ResNet folder `out` and report.

    The two views differ in a small change of pose, colours and blur, and half of them in the background, which else
    would count for more than what is drawn on it; colours, drawing style, animal and pose at large are the picture's
    own, so all of them keep counting as differences.
    """
    join_processes()
    torch.manual_seed(2)
    pictures = Pictures(bank, cache)
    model = Projected().to(memory_format=torch.channels_last)
    training = Training(
        model, cache / "encoder" / "training", images, batch, lr=2e-3, ema_decay=0.99, falling=0.5
    )

    def loss(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, other, which = pictures.draw_twice(n, generator, 0.5)
        views = [
            disturb(tint(move(view, generator, 0.5, border=True), generator, 0.5), generator, 0.2)
            for view in (x, other)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            z = model(torch.cat(views).contiguous(memory_format=torch.channels_last))
        logits = z @ z.T / TEMPERATURE
        same = which[:, None] == which  # the same drawing is no difference to learn: never a negative
        own = torch.arange(n)
        partner = torch.cat([own + n, own])
        mask = same.repeat(2, 2)
        mask[torch.arange(2 * n), partner] = False
        logits = logits.masked_fill(mask, -torch.inf)
        term = nn.functional.cross_entropy(logits, partner)
        return {"loss": term, "found": (logits.detach().argmax(1) == partner).float().mean()}

    ema = training.run(loss)
    if rank() == 0:
        settle(ema, pictures)
        save(ema.backbone.to(memory_format=torch.contiguous_format), out)
        report(out, bank)


def save(backbone: ResNetModel, out: Path) -> None:
    """Write a stock ResNet folder with float16 weights."""
    backbone.half().save_pretrained(out)
    preprocessing = {
        "image_processor_type": "ConvNextImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE},
        "crop_pct": 1.0, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


@torch.no_grad()
def report(out: Path, bank: Bank, n: int = 1536) -> dict[str, float]:
    """Print and return mean distances (1 - cosine) between pictures in poses that training did not see."""
    model = AutoModel.from_pretrained(out).float().eval()
    generator = torch.Generator().manual_seed(6)
    rgba, which = bank.draw(n, generator, TEST_POSES)
    x, colour = composite(rgba, bank.style[which], generator)
    z = torch.cat([model(part * 2 - 1).pooler_output.flatten(1) for part in x.split(128)])
    z = nn.functional.normalize(z, dim=-1)
    distance = 1 - z @ z.T
    other = ~torch.eye(n, dtype=torch.bool)

    def same(values: Tensor) -> Tensor:
        return values[:, None] == values

    drawing, ground = same(which), same(colour)
    animal, style, view = same(bank.animal[which]), same(bank.style[which]), same(bank.view[which])
    kinds = {
        "same drawing, same background, other pose": drawing & ground & other,
        "same drawing, other background": drawing & ~ground,
        "same animal, other style, same background": animal & ~style & ground,
        "same animal and style, other view, same background": animal & style & ~view & ground,
        "same animal, other style, other background": animal & ~style & ~ground,
        "other animal, same style, same background": ~animal & style & ground,
        "other animal, other style, same background": ~animal & ~style & ground,
        "other animal, other style, other background": ~animal & ~style & ~ground,
    }
    figures = {name: float(distance[mask].mean()) for name, mask in kinds.items()}
    for name, value in figures.items():
        print(f"{name:52s} {value:.3f}")
    return figures
