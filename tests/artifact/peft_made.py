"""Adapters that PEFT makes and saves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.artifact.models import load


def peft_model(base: Path, name: str = "default", **options: Any) -> Any:
    """The base with a LoRA of rank 3 whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), config, adapter_name=name).eval()
    shake(model)
    return model


def shake(model: Any) -> None:
    """Fill the factors with random numbers."""
    for key, parameter in model.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            torch.nn.init.normal_(parameter, std=0.2)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """The folder that PEFT writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder
