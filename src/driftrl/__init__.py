"""Reinforcement fine-tuning of text-to-image models without losing their variety."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["InputError", "TrainConfig", "Trainer", "evaluate", "load_config"]

if TYPE_CHECKING:
    from driftrl.checks import InputError
    from driftrl.config import TrainConfig, load_config
    from driftrl.evaluation.report import evaluate
    from driftrl.run import Trainer

_HOMES = {
    "InputError": "checks",
    "TrainConfig": "config",
    "load_config": "config",
    "Trainer": "run",
    "evaluate": "evaluation.report",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``driftrl --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'driftrl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"driftrl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
