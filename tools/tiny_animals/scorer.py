"""Train the scorer: a small CLIP whose image-text similarity is the embedded reward."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from tiny_animals.augment import Pictures, disturb, tint
from tiny_animals.autoencoder import TEST_POSES
from tiny_animals.bank import BACKGROUND_NAMES, SIZE, VIEWS, Bank, article, build, caption, composite
from tiny_animals.drawings import ANIMALS, STYLE_NAMES
from tiny_animals.tokens import LENGTH, save_tokenizer
from tiny_animals.training import Training, join_processes, rank

SCALE = 20.0  # logit_scale: a similarity of 1 is a reward of 20
WIDTH, LAYERS, PATCH = 128, 4, 8
KEPT = 0.5  # the share of patches seen in training: half the work, and an augmentation besides
PLAIN = [article(animal) for animal in ANIMALS]


def new_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained scorer."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=WIDTH // 32,
        image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH,
        logit_scale_init_value=math.log(SCALE),
    )  # fmt: skip
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    return model


def embed_images(model: CLIPModel, images: Tensor, kept: Tensor | None = None) -> Tensor:
    """Unit embeddings [n, d] of images in 0..1; `kept` [n, k] are the patches to look at (all by default)."""
    vision = model.vision_model
    hidden = vision.embeddings((images - 0.5) / 0.5)
    if kept is not None:
        hidden = torch.cat([hidden[:, :1], hidden[torch.arange(len(kept))[:, None], 1 + kept]], 1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    out = model.visual_projection(vision.post_layernorm(hidden[:, 0])).float()
    return torch.nn.functional.normalize(out, dim=-1)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Unit embeddings [n, d] of captions."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pooled = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled).float(), dim=-1)


def attributes(text: str) -> tuple[int, int, int, int]:
    """What a caption of `bank.caption` names: animal, style, view, background (indices; -1 where it is silent)."""
    words = text.split()
    on = re.search(r" on an? (\w+) background$", text)
    style = next((i for i, name in enumerate(STYLE_NAMES) if name in words), -1)
    view = VIEWS.index("face") if "face" in words else VIEWS.index("body") if "whole" in words else -1
    animal = next(i for i, name in enumerate(ANIMALS) if name in words)
    return animal, style, view, BACKGROUND_NAMES.index(on[1]) if on else -1


def contrast(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy of each row's softmax against even shares of its true columns; rows without any are left out."""
    share = true.float()
    rows = share.sum(1) > 0
    share = share[rows] / share[rows].sum(1, keepdim=True)
    return -(share * logits[rows].log_softmax(1)).sum(1).mean()


def train(bank: Bank, cache: Path, out: Path, images: int, batch: int = 96) -> None:
    """Train on disturbed drawings and junk; write the CLIP folder `out` and report."""
    join_processes()
    torch.manual_seed(1)
    folder = cache / "scorer"
    tokenizer = save_tokenizer(folder / "tokenizer")
    model = new_scorer(tokenizer)
    pictures = Pictures(bank, cache)
    training = Training(model, folder / "training", images, batch, lr=1.5e-3, ema_decay=0.99, weight_decay=0.05,
                        falling=0.4, save_minutes=2.0)  # fmt: skip
    print(sum(p.numel() for p in model.parameters()), "weights, reconstructions:", pictures.pool is not None)

    def loss(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        x, which, colour = pictures.draw(n, generator)
        junk = pictures.junk(n // 6, generator)
        x = disturb(tint(torch.cat([x, junk]), generator, 0.6), generator, 0.2)
        facts = torch.stack([bank.animal[which], bank.style[which], bank.view[which], colour], 1)
        texts = [caption(*row, rng, plain=0.1) for row in facts.tolist()]
        # Captions right about the animal and mostly wrong about the rest, so that the rest counts too.
        texts += [
            caption(
                row[0],
                *(int(rng.integers(k)) for k in (len(STYLE_NAMES), 2, len(BACKGROUND_NAMES))),
                rng,
                plain=0,
            )
            for row in facts[::3].tolist()
        ]
        texts = list(dict.fromkeys(texts + PLAIN))
        said = torch.tensor([attributes(text) for text in texts])
        facts = torch.cat([facts, torch.full((len(junk), 4), -2)])
        true = ((said[:, None] == facts[None]) | ((said[:, None] == -1) & (facts[None] != -2))).all(
            2
        )  # [texts, images]
        patches = (SIZE // PATCH) ** 2
        kept = None
        if training.seen < 0.95 * training.images:
            kept = torch.rand(len(x), patches, generator=generator).argsort(1)[:, : int(KEPT * patches)]
        with torch.autocast("cpu", torch.bfloat16):
            seen, read = embed_images(model, x, kept), embed_texts(model, tokenizer, texts)
        logits = SCALE * read @ seen.T
        plain = logits[[texts.index(p) for p in PLAIN], : len(which)].detach().argmax(0)
        return {
            "loss": contrast(logits, true) + contrast(logits.T, true.T),
            "animal": (plain == bank.animal[which]).float().mean(),
        }

    ema = training.run(loss)
    if rank() == 0:
        save(ema, tokenizer, out)
        report(out, bank, cache)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write a stock CLIP folder with float16 weights."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_center_crop": False,
        "do_resize": True, "size": {"height": SIZE, "width": SIZE}, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


@torch.no_grad()
def report(out: Path, bank: Bank, cache: Path, n: int = 1152) -> dict[str, float]:
    """Print and return how well the scorer in folder `out` names animals, and what it thinks of junk and styles."""
    model, tokenizer = CLIPModel.from_pretrained(out).float().eval(), CLIPTokenizer.from_pretrained(out)
    texts = embed_texts(model, tokenizer, PLAIN)
    scale = float(model.logit_scale.exp())
    pictures, generator = Pictures(bank, cache), torch.Generator().manual_seed(5)
    figures: dict[str, float] = {}

    def rewards(images: Tensor) -> Tensor:
        return torch.cat([scale * embed_images(model, x) @ texts.T for x in images.split(128)])

    unseen = build(cache, held_out=True)
    for name, source, poses in (
        ("held-out poses", bank, TEST_POSES),
        ("held-out styles", unseen, slice(0, 32)),
    ):
        rgba, which = source.draw(n, generator, poses)
        x, _ = composite(rgba, source.style[which], generator)
        logits, animal = rewards(x), source.animal[which]
        figures[f"top-1, {name}"] = float((logits.argmax(1) == animal).float().mean())
        if source is unseen:
            for s, style in ((len(STYLE_NAMES), "emojione-v1"), (len(STYLE_NAMES) + 1, "openmoji")):
                these = source.style[which] == s
                figures[f"top-1, {style}"] = float((logits.argmax(1) == animal)[these].float().mean())
            continue
        own = logits[torch.arange(n), animal]
        figures["reward of right pictures"], figures["its std"] = float(own.mean()), float(own.std())
        for s, style in enumerate(STYLE_NAMES):
            figures[f"reward of style {style}"] = float(own[bank.style[which] == s].mean())
        for v, view in enumerate(VIEWS):
            figures[f"reward of view {view}"] = float(own[bank.view[which] == v].mean())
        wrong = logits.masked_fill(torch.nn.functional.one_hot(animal, len(ANIMALS)).bool(), -torch.inf)
        figures["best wrong prompt's reward"] = float(wrong.max(1).values.mean())
        junk = rewards(pictures.junk(512, generator))
        figures["junk: mean reward of any prompt"] = float(junk.mean())
        figures["junk: best prompt's reward"] = float(junk.max(1).values.mean())
        figures["junk above the 10% quantile of right pictures"] = float(
            (junk.max(1).values > own.quantile(0.1)).float().mean()
        )
        drawn = pictures.draw(n, generator)
        logits = rewards(disturb(drawn[0], generator))
        figures["top-1, disturbed"] = float((logits.argmax(1) == bank.animal[drawn[1]]).float().mean())
    for name, value in figures.items():
        print(f"{name:48s} {value:8.3f}")
    return figures
