"""Text in pictures: how much of the words that a prompt asks for a vision-language model reads in the image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.rewards.vision_language import VisionLanguageReward

QUESTION = (
    "Transcribe all text in this image. Answer with the text alone; if there is none, answer with nothing."
)
LONGEST = 64
"""Tokens of an answer that are read."""


class OCRScore(VisionLanguageReward):
    """One less the edit distance of what is read in an image from what its prompt asks for, relative to the latter: 0 to 1."""

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        question: str = QUESTION,
        longest: int = LONGEST,
    ) -> None:
        """Load a model, as `VisionLanguageReward` does.

        Args:
            folder: where it is, or its hub name.
            device: where the model computes.
            batch_size: images at once.
            dtype: of weights and computation.
            question: what is asked of every image.
            longest: tokens of an answer, at most.

        Raises:
            InputError: if something is missing or does not fit.
            OSError: if there is no such model, or none in safetensors.
        """
        self.question = question
        super().__init__(folder, device, batch_size, dtype)
        words = self.processor.tokenizer
        padding = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
        # The likeliest tokens, whatever sampling the model was published with.
        plain = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
        self.settings = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": padding} | plain

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] = ()
    ) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1: float32 [N].

        Args:
            images: as above.
            prompts: N prompts, each with the text in double quotes.
            metadata: of each prompt, where ``text`` takes the place of what it quotes.

        Raises:
            InputError: if a prompt asks for no text.
        """
        more = [*metadata] or [{}] * len(prompts)
        texts = [wanted_text(prompt, one) for prompt, one in zip(prompts, more, strict=True)]
        return self._in_batches(images, texts)

    def read(self, images: Tensor) -> list[str]:
        """What the model reads in N images [N, 3, H, W]."""
        inputs = self._inputs(images, [""] * len(images)).to(self.device, self.model.dtype)
        tokens = self.model.generate(**inputs, **self.settings)[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def _question(self, prompt: str) -> str:
        return self.question

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(self.read(images), prompts, strict=True)
        return torch.tensor([legibility(found, text) for found, text in pairs])


def wanted_text(prompt: str, metadata: Mapping[str, object] | None = None) -> str:
    """The text that an image of ``prompt`` should show: ``metadata["text"]``, or what stands between its first double quotes.

    Raises:
        InputError: if there is neither.

    Example:
        >>> from driftrl.rewards.ocr import wanted_text
        >>> wanted_text('a sign that says "open", by night'), wanted_text("a sign", {"text": "closed"})
        ('open', 'closed')
    """
    text = (metadata or {}).get("text")
    if text is None:
        quoted = re.search('["\u201c\u201e]([^"\u201c\u201d]+)["\u201c\u201d]', prompt)
        text = quoted[1] if quoted else ""
    if not isinstance(text, str) or not _letters(text):
        raise InputError(
            f"reward: ocr: expected the text that the picture should show, in double quotes in the prompt or as 'text' in its "
            f"metadata; got {prompt!r}"
        )
    return text


def legibility(found: str, text: str) -> float:
    """``1 - min(d, n) / n`` with d the edit distance of what was ``found`` from the ``text`` of n characters; 1 where the text stands
    within it. Case and spaces do not count.

    Source: the OCR reward of Flow-GRPO's code (arXiv 2505.05470, section 5), which reads by PaddleOCR.

    Example:
        >>> from driftrl.rewards.ocr import legibility
        >>> legibility("OPEN today", "open"), legibility("opon", "open"), legibility("", "open")
        (1.0, 0.75, 0.0)
    """
    read, target = _letters(found), _letters(text)
    return 1.0 if target in read else 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of a character that make one text the other (Levenshtein).

    Example:
        >>> from driftrl.rewards.ocr import edit_distance
        >>> edit_distance("kitten", "sitting")
        3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _letters(text: str) -> str:
    return "".join(text.split()).lower()
