"""Preference vectors as LoRA adapters: train, mix, and steer language models."""

__version__ = "0.1.0"
