"""VQAScore (Lin et al. 2024, arXiv 2404.01291): a vision-language model is asked whether an image shows its prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.rewards.vision_language import VisionLanguageReward

QUESTION, ANSWER = 'Does this figure show "{prompt}"? Please answer yes or no.', "Yes"
"""The paper's, and its published code's."""


class VQAScore(VisionLanguageReward):
    """The probability that a vision-language model answers "Yes" when asked whether an image shows its prompt: 0 to 1."""

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        dtype: str = "float32",
        question: str = QUESTION,
        answer: str = ANSWER,
    ) -> None:
        """Load a model, as `VisionLanguageReward` does; the softmax is in float32 whatever ``dtype`` is.

        Args:
            folder: where it is, or its hub name.
            device: where the model computes.
            batch_size: images at once.
            dtype: of weights and computation.
            question: what is asked of an image; ``{prompt}`` stands for its prompt.
            answer: the word whose probability is the score; a single token.

        Raises:
            InputError: if something is missing or does not fit.
            OSError: if there is no such model, or none in safetensors.
        """
        if "{" in question.replace("{prompt}", ""):
            raise InputError(f"question: expected {{prompt}} where the prompt goes; got {question!r}")
        self.question = question
        self._word = answer
        super().__init__(folder, device, batch_size, dtype)
        # Of 150,000 words at each of hundreds of places only the last place is looked at.
        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.settings = {"use_cache": False} | ({"logits_to_keep": 1} if last else {})

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1 against N prompts: float32 [N]."""
        return self._in_batches(images, prompts)

    def _prepare(self, folder: Path | str) -> None:
        self.answer = _tokens_of(self._word, self.processor.tokenizer, folder)

    def _question(self, prompt: str) -> str:
        return self.question.replace("{prompt}", prompt)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = self._inputs(images, prompts).to(self.device, self.model.dtype)
        logits: Tensor = self.model(**inputs, **self.settings).logits[:, -1]
        return logits.float().softmax(-1)[:, self.answer].sum(-1)


def _tokens_of(word: str, tokenizer: Any, folder: Path | str) -> list[int]:
    """The tokens that read as ``word``, with a space before it or without.

    Which of both a model answers with depends on where its chat template ends.
    """
    spelled = [tokenizer(text, add_special_tokens=False).input_ids for text in (word, f" {word}")]
    tokens = sorted({ids[0] for ids in spelled if len(ids) == 1})
    if not tokens:
        raise InputError(f"reward: {folder}: expected a tokenizer with one token for {word!r}; it has none")
    return tokens
