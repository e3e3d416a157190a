from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_prefvec.artifact import identity_of
from lora_prefvec.vector import PreferenceVector
from tests.artifact.factors import MODULES, PLAIN, small_vector


@pytest.fixture
def vector() -> PreferenceVector:
    return small_vector(rank=3, seed=0)


@pytest.fixture
def plain_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plain PEFT folder of rank 4: `config` changes a sound one, so do `tensors` (None drops one)."""

    def write(config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "plain"
        folder.mkdir()
        sound: dict[str, Any] = {}
        for seed, (module, (rows, columns)) in enumerate(MODULES.items()):
            generator = torch.Generator().manual_seed(seed)
            sound[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            sound[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
        kept = {key: value for key, value in {**sound, **(tensors or {})}.items() if value is not None}
        save_file(kept, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **(config or {})}))
        return folder

    return write


@pytest.fixture
def llama_vector(tiny_llama: Path) -> PreferenceVector:
    """A vector over all linear layers of the tiny Llama, big enough to be seen in the logits."""
    import transformers

    from tests.helpers import random_vector

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    return replace(random_vector(model, rank=4, seed=0), identity=identity_of(tiny_llama))
