"""A CLIP tokenizer small enough for the captions: whole words where captions have them, letters elsewhere."""

from __future__ import annotations

import json
import string
from pathlib import Path

from transformers import CLIPTokenizer

from tiny_animals.bank import BACKGROUND_NAMES
from tiny_animals.drawings import ANIMALS, STYLE_NAMES

LENGTH = 16
WORDS = (
    *ANIMALS, *STYLE_NAMES, *BACKGROUND_NAMES, "a", "an", "the", "and", "with", "of", "in", "on", "style", "face",
    "whole", "background", "drawing", "picture", "emoji", "photo", "two", "three", "animal",
)  # fmt: skip


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt whose merges spell out every caption word, and return the tokenizer."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*letters, *(f"{c}</w>" for c in letters)]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        # Each word is merged from its end, so that no word's merges disturb another's.
        while len(pieces) > 1:
            left, right = pieces[-2:]
            merges[(left, right)] = None
            pieces[-2:] = [left + right]
            vocabulary.append(left + right)
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
