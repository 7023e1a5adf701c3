"""How a reward is called, and what its answer is taken for: functions written for other trainers do as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from driftrl.checks import InputError
from driftrl.gradients import on_demand
from driftrl.types import Prompt, Reward


def with_metadata(
    reward: Callable[..., object], metadata: object
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What ``reward`` is given beside images and prompts: ``metadata`` by its name, or in the third place, where ddpo-pytorch and
    TRL have it whatever it is called; nothing where there is no such argument.
    """
    called = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        arguments = inspect.signature(called).parameters
    except (TypeError, ValueError):  # compiled functions do not say what they take
        return (), {}
    if "metadata" in arguments:
        return (), {"metadata": metadata}
    placed = [a for a in arguments.values() if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    third = next(iter(placed[2:3]), None)
    if third is not None and (third.default is third.empty or "meta" in third.name):
        return (metadata,), {}
    return (), {}


def asks_for_metadata(reward: Callable[..., object]) -> bool:
    """Whether ``reward`` has an argument for metadata, as rewards of other trainers do."""
    return any(with_metadata(reward, None))


def metadata_of(prompts: Sequence[str]) -> list[dict[str, object]]:
    """Of each prompt, the object that its line in a JSONL file is; {} where it is words alone."""
    return [dict(prompt.metadata) if isinstance(prompt, Prompt) else {} for prompt in prompts]


@on_demand
def ask(reward: Reward, images: Tensor, prompts: Sequence[str]) -> object:
    """What a reward gives, with its prompts' metadata if it asks for them.

    Without gradients, unless the images have one coming: a user's function around a network would else keep all that a backward pass needs.
    """
    given: Callable[..., object] = reward
    placed, named = with_metadata(given, metadata_of(prompts))
    return given(images, prompts, *placed, **named)


def scores_of(answer: object, count: int, title: str, followed: bool = False) -> Tensor:
    """A reward's answer as a tensor [count] of its own dtype, detached unless its gradient is to be ``followed``.

    A tensor, NumPy's or a list of as many numbers will do, [count, 1] too, truth values, which count as 0 and 1, and a pair of one of these and a dictionary of
    anything, which is left out: what DDPO's and Flow-GRPO's rewards return.

    Raises:
        InputError: if it is none of these.
    """
    wanted = f"{title}: expected a tensor of {count} numbers, one per image"
    values = answer
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], dict):
        values = values[0]
    if not isinstance(values, Tensor):
        if not hasattr(values, "__array__") and not isinstance(values, list | tuple):
            raise InputError(f"{wanted}; got {type(answer).__name__}")
        try:
            values = torch.stack(scalars) if (scalars := _scalars(values)) else torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(f"{wanted}; got a {type(answer).__name__} of something else") from None
    values = values if followed else values.detach()
    if values.dtype == torch.bool:  # whether an answer is right, say
        values = values.to(torch.float32)
    if values.shape == (count, 1):
        values = values[:, 0]
    if values.shape != (count,) or values.is_complex():
        raise InputError(f"{wanted}; got shape {list(values.shape)}, {values.dtype}")
    return values


def _scalars(values: object) -> list[Tensor]:
    """The list itself, if it is one of tensors of a single number each, which stacked keep their gradient; else none."""
    given = list(values) if isinstance(values, list | tuple) else []
    found = [v for v in given if isinstance(v, Tensor) and v.dim() == 0]
    return found if len(found) == len(given) else []
