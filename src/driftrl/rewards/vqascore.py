"""VQAScore (Lin et al. 2024, arXiv 2404.01291): a vision-language model is asked whether an image shows its prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.loading import demand_words, load_whole
from driftrl.pictures import pixels, to_pil

QUESTION, ANSWER = 'Does this figure show "{prompt}"? Please answer yes or no.', "Yes"
"""The paper's, and its published code's."""


class VQAScore:
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
        """Load a model of `transformers.AutoModelForImageTextToText`, with its processor and chat template.

        Args:
            folder: where they are, or their hub name. Code that comes with a model is never run.
            device: where the model computes; pictures are prepared on the CPU.
            batch_size: images at once.
            dtype: ``bfloat16`` for weights and computation, as such models are published; the softmax is in float32.
            question: what is asked of an image; ``{prompt}`` stands for its prompt.
            answer: the word whose probability is the score; a single token.

        Raises:
            InputError: if something is missing or does not fit.
            OSError: if there is no such model, or none in safetensors.
        """
        from transformers import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            AutoConfig,
            AutoModelForImageTextToText,
        )

        if "{" in question.replace("{prompt}", ""):
            raise InputError(f"question: expected {{prompt}} where the prompt goes; got {question!r}")
        self.device, self.batch_size, self.question = torch.device(device), batch_size, question
        try:
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                raise InputError(
                    f"reward: {folder}: expected a vision-language model (image-text-to-text); got a {type(config).__name__}"
                )
            self.processor = processor_of(folder, config)
            added = self.processor.tokenizer.added_tokens_decoder.values()
            self._control = [str(token) for token in added if token.special and len(str(token)) > 1]
            self._inputs(torch.full((1, 3, 64, 64), 0.5), ["a cat"])  # what is missing should be said now
        except (InputError, OSError):
            raise
        except Exception as error:
            # Whatever transformers makes of files that are missing, or of another model.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"reward: {folder}: expected an image processor, a tokenizer and a chat template that ask a model about an "
                f"image, and that transformers has the code for (none that comes with a model is run): {reason}"
            ) from error
        self.answer = _tokens_of(answer, self.processor.tokenizer, folder)
        model: Any = load_whole(AutoModelForImageTextToText, folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        # Of 150,000 words at each of hundreds of places only the last place is looked at.
        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.settings = {"use_cache": False} | ({"logits_to_keep": 1} if last else {})

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score N images [N, 3, H, W] in 0..1 against N prompts: float32 [N]."""
        starts = range(0, len(prompts), self.batch_size)
        chunks = zip(images.split(self.batch_size), starts, strict=True)
        return torch.cat([self._score(x, prompts[at : at + self.batch_size]) for x, at in chunks])

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = self._inputs(images, prompts).to(self.device, self.model.dtype)
        logits: Tensor = self.model(**inputs, **self.settings).logits[:, -1]
        return logits.float().softmax(-1)[:, self.answer].sum(-1)

    def _inputs(self, images: Tensor, prompts: Sequence[str]) -> Any:
        """What the model is given: padded on the left, so that the answer comes last in every row."""
        texts = [self._conversation(prompt) for prompt in prompts]
        begin = self.processor.tokenizer.bos_token
        # Some templates write the first token themselves; the tokenizer would add another.
        once = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
        pictures = [[to_pil(image)] for image in pixels(images).cpu()]
        return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt", **once)

    def _conversation(self, prompt: str) -> str:
        """The image and the question as the model's chat template has them, up to where the answer begins."""
        for token in self._control:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")  # a prompt is words, and no more
        content = [{"type": "image"}, {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        # Models that may think first are told to answer at once; the templates of others do not look at that.
        return self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )


def processor_of(folder: Path | str, config: Any) -> Any:
    """What makes a model's inputs of images and text; its tokenizer has the chat template, and pads on the left.

    `AutoProcessor` would load what a model has for video too, which needs torchvision. Pictures go through PIL, so that
    scores do not depend on whether torchvision is there.

    Args:
        folder: where its files are, or their hub name.
        config: the model's configuration.

    Raises:
        InputError: if it needs more than an image processor and a tokenizer.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    words: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    look: Any = transformers.AutoImageProcessor.from_pretrained(
        folder, backend="pil", trust_remote_code=False
    )
    parts = {"image_processor": look, "tokenizer": demand_words(words, folder)}
    settings, _ = transformers.ProcessorMixin.get_processor_dict(folder)
    words.padding_side = "left"
    words.chat_template = settings.get("chat_template") or words.chat_template
    # Where `AutoProcessor` looks, in its order: LLaVA's configuration, say, goes with several processors.
    files = (settings, look.get_image_processor_dict(folder)[0], words.init_kwargs)
    name = next((file["processor_class"] for file in files if file.get("processor_class")), "")
    named = getattr(transformers, name, None)
    kind: Any = named or PROCESSOR_MAPPING[type(config)]
    wanted = [name for name in kind.get_attributes() if name != "video_processor"]
    if more := set(wanted) - set(parts):
        raise InputError(f"reward: {folder}: a {kind.__name__} also needs {', '.join(sorted(more))}")
    still: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: wanted)})
    return still.from_args_and_dict([parts[name] for name in wanted], settings | {"video_processor": None})


def _tokens_of(word: str, tokenizer: Any, folder: Path | str) -> list[int]:
    """The tokens that read as ``word``, with a space before it or without.

    Which of both a model answers with depends on where its chat template ends.
    """
    spelled = [tokenizer(text, add_special_tokens=False).input_ids for text in (word, f" {word}")]
    tokens = sorted({ids[0] for ids in spelled if len(ids) == 1})
    if not tokens:
        raise InputError(f"reward: {folder}: expected a tokenizer with one token for {word!r}; it has none")
    return tokens
