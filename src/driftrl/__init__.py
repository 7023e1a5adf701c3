"""Reinforcement fine-tuning of text-to-image models without losing their variety."""

__version__ = "0.1.0"
