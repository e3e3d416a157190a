"""Tiny models as transformers loads them, what they answer, and whether anybody complains."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.vector import PreferenceVector

TOKENS = torch.arange(24).reshape(2, 12)


def load(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def with_dense(folder: Path, vector: PreferenceVector) -> torch.Tensor:
    """Logits of the base with the dense sum added to its weights."""
    model = load(folder)
    for name, delta in vector.deltas.items():
        model.get_submodule(name).weight.data += delta.dense()
    return logits(model)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@contextmanager
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Any warning, of the module or of a logger, fails."""
    for name in ("transformers", "peft", "huggingface_hub"):
        logging.getLogger(name).propagate = True
    caplog.set_level(logging.WARNING)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        yield
    said = [record.getMessage() for record in caplog.records if "kernels-community" not in record.getMessage()]
    assert said == []
