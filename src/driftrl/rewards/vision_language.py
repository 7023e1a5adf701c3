"""A vision-language model as a reward: one of transformers', with its chat template, asked about an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.loading import demand_words, load_whole
from driftrl.pictures import pixels, to_pil


class VisionLanguageReward:
    """Scores images by what a model of `transformers.AutoModelForImageTextToText` answers about each; subclasses say what is asked
    and what the answer is worth.
    """

    def __init__(self, folder: Path | str, device: torch.device | str, batch_size: int, dtype: str) -> None:
        """Load the model with its processor and chat template.

        Args:
            folder: where they are, or their hub name. Code that comes with a model is never run.
            device: where the model computes; pictures are prepared on the CPU.
            batch_size: images at once.
            dtype: ``bfloat16`` for weights and computation, as such models are published.

        Raises:
            InputError: if something is missing or does not fit.
            OSError: if there is no such model, or none in safetensors.
        """
        from transformers import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            AutoConfig,
            AutoModelForImageTextToText,
        )

        self.device, self.batch_size = torch.device(device), batch_size
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
            self._prepare(folder)
        except (InputError, OSError):
            raise
        except Exception as error:
            # Whatever transformers makes of files that are missing, or of another model.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"reward: {folder}: expected an image processor, a tokenizer and a chat template that ask a model about an "
                f"image, and that transformers has the code for (none that comes with a model is run): {reason}"
            ) from error
        model: Any = load_whole(AutoModelForImageTextToText, folder, dtype=getattr(torch, dtype))
        self.model: Any = model.to(self.device).eval().requires_grad_(False)

    def _prepare(self, folder: Path | str) -> None:
        """What else is to be found out before weights are loaded."""

    def _in_batches(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [N] of images [N, 3, H, W] in 0..1."""
        starts = range(0, len(prompts), self.batch_size)
        chunks = zip(images.split(self.batch_size), starts, strict=True)
        return torch.cat([self._score(x, prompts[at : at + self.batch_size]) for x, at in chunks])

    def _question(self, prompt: str) -> str:
        """What is asked of the image of ``prompt``."""
        raise NotImplementedError

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of one batch."""
        raise NotImplementedError

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
        content = [{"type": "image"}, {"type": "text", "text": self._question(prompt)}]
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
