"""Train the checker: a classifier of animal, style and view, used to check pictures and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from tiny_animals.augment import Pictures, disturb, tint
from tiny_animals.autoencoder import TEST_POSES
from tiny_animals.bank import SIZE, VIEWS, Bank, composite
from tiny_animals.drawings import ANIMALS, STYLE_NAMES
from tiny_animals.encoder import settle
from tiny_animals.training import Training, join_processes, rank

FOLDER = Path(__file__).parent / "checker"
SHAPE = {
    "embedding_size": 48,
    "hidden_sizes": [48, 64, 128, 256],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
HEADS = {"animal": list(ANIMALS), "style": list(STYLE_NAMES), "view": list(VIEWS)}


class Checker(nn.Module):
    """Names a picture's animal, style and view."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNetModel(ResNetConfig(**SHAPE, image_size=SIZE))
        self.heads = nn.ModuleDict(
            {k: nn.Linear(SHAPE["hidden_sizes"][-1], len(v)) for k, v in HEADS.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [n, 45], [n, 9] and [n, 2] of images in 0..1."""
        pooled = self.backbone(images * 2 - 1).pooler_output.flatten(1)
        return {name: head(pooled).float() for name, head in self.heads.items()}


def load(folder: Path = FOLDER) -> Checker:
    """Load the trained checker."""
    described = json.loads((folder / "config.json").read_text())
    if described != {"backbone": SHAPE, "heads": HEADS}:
        raise SystemExit(f"{folder} holds another checker than this code's: train it again")
    model = Checker()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in
                           load_file(folder / "model.safetensors").items()})  # fmt: skip
    return model.eval()


def train(bank: Bank, cache: Path, images: int, batch: int = 128) -> None:
    """Train on disturbed drawings and reconstructions; write `checker/` and report."""
    join_processes()
    torch.manual_seed(3)
    pictures = Pictures(bank, cache)
    labels = {"animal": bank.animal, "style": bank.style, "view": bank.view}
    model = Checker().to(memory_format=torch.channels_last)
    training = Training(model, cache / "checker" / "training", images, batch, lr=2e-3, ema_decay=0.99,
                        weight_decay=0.05, falling=0.5)  # fmt: skip

    def loss(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, which, _ = pictures.draw(n, generator, 0.8)
        x = disturb(tint(x, generator, 0.6), generator, 0.25)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        terms = {
            k: nn.functional.cross_entropy(v, labels[k][which], label_smoothing=0.05)
            for k, v in logits.items()
        }
        right = (logits["animal"].detach().argmax(1) == bank.animal[which]).float().mean()
        return {"loss": terms["animal"] + 0.5 * terms["style"] + 0.3 * terms["view"], "right": right}

    ema = training.run(loss)
    if rank() == 0:
        settle(ema, pictures)
        FOLDER.mkdir(exist_ok=True)
        state = {
            k: v.contiguous().half() if v.is_floating_point() else v for k, v in ema.state_dict().items()
        }
        save_file(state, FOLDER / "model.safetensors")
        (FOLDER / "config.json").write_text(json.dumps({"backbone": SHAPE, "heads": HEADS}, indent=1) + "\n")
        report(bank, cache)


@torch.no_grad()
def report(bank: Bank, cache: Path, n: int = 2048) -> dict[str, float]:
    """Print and return the share of held-out poses, plain and as the autoencoder renders them, named right."""
    from diffusers import AutoencoderKL

    model, figures = load(), {}
    labels = {"animal": bank.animal, "style": bank.style, "view": bank.view}
    generator = torch.Generator().manual_seed(8)
    rgba, which = bank.draw(n, generator, TEST_POSES)
    x, _ = composite(rgba, bank.style[which], generator)
    sets = {"held-out poses": (x, which)}
    if (cache / "autoencoder" / "config.json").is_file():
        vae = AutoencoderKL.from_pretrained(cache / "autoencoder").eval()
        m = 512
        y = torch.cat(
            [vae.decode(vae.encode(p * 2 - 1).latent_dist.mean).sample / 2 + 0.5 for p in x[:m].split(64)]
        )
        sets["the same, reconstructed"] = (y.clamp(0, 1), which[:m])
    for name, (pixels, drawings) in sets.items():
        parts = [model(p) for p in pixels.split(128)]
        for kind, label in labels.items():
            guess = torch.cat([p[kind] for p in parts]).argmax(1)
            figures[f"{kind}, {name}"] = float((guess == label[drawings]).float().mean())
    for name, value in figures.items():
        print(f"{name:40s} {value:.4f}")
    return figures
