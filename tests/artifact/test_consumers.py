"""What stock PEFT and transformers make of the folders that we write, and we of those that they write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.artifact import Provenance, read_adapter, write_adapter
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.vector import PreferenceVector
from tests.artifact.models import distance, load, logits, no_complaints, with_dense
from tests.helpers import random_vector

VECTOR = Provenance(kind="preference_vector", preference="helpful", sign=1)


def test_peft_loads_a_mix(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel

    model = load(tiny_llama)
    other = replace(random_vector(model, rank=3, seed=1), identity=llama_vector.identity)
    some = replace(
        other, deltas={n: d for n, d in other.deltas.items() if n.endswith(("1.self_attn.q_proj", "up_proj"))}
    )
    mix = llama_vector * 1.5 - some * 0.7
    for name, vector in (("full", mix), ("part", some)):
        write_adapter(tmp_path / name, vector, VECTOR)
        with no_complaints(caplog):
            adapted = PeftModel.from_pretrained(load(tiny_llama), str(tmp_path / name))
        expected = with_dense(tiny_llama, vector)
        assert distance(logits(adapted), expected) <= 1e-5
        assert distance(logits(load(tiny_llama)), expected) > 1e-2


def test_an_incomplete_folder_would_be_noticed(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "a", llama_vector, VECTOR)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors.popitem()
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises((AssertionError, UserWarning)), no_complaints(caplog):
        PeftModel.from_pretrained(load(tiny_llama), str(tmp_path / "a"))


def test_transformers_loads_it_too(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path / "a", llama_vector, VECTOR)
    model = load(tiny_llama)
    with no_complaints(caplog):
        model.load_adapter(str(tmp_path / "a"))
    assert distance(logits(model), with_dense(tiny_llama, llama_vector)) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 1, "down_proj": 9}},
        {"rank_pattern": {r"layers\.0\..*": 3}, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(gate|up)_proj", "layers_to_transform": None},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_what_peft_saved_is_read_as_peft_means_it(tiny_llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = get_peft_model(load(tiny_llama), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "a")
    found = read_adapter(tmp_path / "a").vector
    assert distance(with_dense(tiny_llama, found), logits(model)) <= 1e-5
    assert distance(logits(load(tiny_llama)), logits(model)) > 1e-3


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral", "phi3"])
def test_other_families(tiny_model: Any, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_model(family)
    vector = random_vector(load(base), rank=3, seed=0)
    write_adapter(tmp_path / "a", vector, VECTOR, base=base)
    expected = with_dense(base, vector)
    assert distance(logits(PeftModel.from_pretrained(load(base), str(tmp_path / "a"))), expected) <= 1e-5
