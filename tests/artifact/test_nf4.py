"""NF4 as training sees it, below a delta and above it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.artifact import Provenance, fold, identity_of, plan_fold, read_provenance
from lora_prefvec.artifact.kinds import is_conv1d
from lora_prefvec.errors import InputError
from lora_prefvec.inference import load_base
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.artifact.models import distance, load, logits, no_complaints
from tests.artifact.test_fold import moe
from tests.helpers import random_vector, tiny_tokenizer

MIX = Provenance(kind="fold", method="exact")
FAMILIES = ["llama", "gpt2", "gemma3", "phi3"]


def dequantised(model: Any) -> dict[str, torch.Tensor]:
    """Module -> weight [out, in] of every layer in 4 bits, as its forward pass has it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def tiny_delta(base: Path) -> PreferenceVector:
    """A delta of zeros on one layer: a fold of it shows the base."""
    model = load(base)
    name, delta = next(iter(random_vector(model, rank=1, seed=0).deltas.items()))
    return PreferenceVector({name: delta * 0.0})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe", "mixtral"])
def test_the_base_that_training_saw_is_rebuilt_bit_for_bit(
    tiny_model: Any, family: str, dtype: Any, tmp_path: Path
) -> None:
    if family in FAMILIES:
        base = tiny_model(family)
    else:
        base = moe(family, tmp_path / "base")
        tiny_tokenizer().save_pretrained(base)
    kind = getattr(torch, dtype)
    seen = load_base(base, device="cpu", compute_dtype=dtype).model
    vector = tiny_delta(base)
    fold(plan_fold(base, vector, kind, onto="nf4", training_dtype=kind), vector, tmp_path / "f", MIX)
    folded = load(tmp_path / "f")
    rounded = dequantised(seen)
    assert len(rounded) >= 4
    for name, weight in folded.named_parameters():
        module = name.removesuffix(".weight")
        if module in rounded:
            assert torch.equal(weight.T if is_conv1d(module) else weight, rounded[module]), name
        else:
            assert torch.equal(weight, seen.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_onto_nf4_is_the_rounded_base_plus_delta_and_tells_the_distance(
    tiny_model: Any, family: str, tmp_path: Path
) -> None:
    base = tiny_model(family)
    original = load(base)
    vector = random_vector(original, rank=3, seed=0)
    facts = fold(plan_fold(base, vector, onto="nf4", training_dtype=torch.float32), vector, tmp_path / "f", MIX)
    rounded = dequantised(load_base(base, device="cpu", compute_dtype="float32").model)
    folded = load(tmp_path / "f")
    far = whole = 0.0
    for name, delta in vector.deltas.items():
        turn = torch.t if is_conv1d(name) else torch.Tensor.contiguous
        after, before = (turn(model.get_submodule(name).weight.detach()) for model in (folded, original))
        torch.testing.assert_close(after, rounded[name] + delta.dense(), rtol=0, atol=1e-6)
        apart, norm = float((rounded[name] - before).norm()), float(delta.dense().norm())
        assert facts.modules[name].distance == pytest.approx(apart / norm, rel=1e-4)
        far, whole = far + apart**2, whole + norm**2
    assert facts.distance == pytest.approx((far / whole) ** 0.5, rel=1e-4)
    assert facts.onto == "nf4"
    told = read_provenance(tmp_path / "f")
    assert told is not None
    assert told.fold == facts
    assert told.metrics["base_distance"] == facts.distance


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_vector_of_4_bit_training_tells_how_far_the_original_base_is(
    tiny_model: Any, family: str, tmp_path: Path
) -> None:
    base = tiny_model(family)
    vector = replace(random_vector(load(base), rank=3, seed=0), identity=identity_of(base, quantization="nf4"))
    measured = fold(plan_fold(base, vector, onto="nf4"), vector, tmp_path / "nf4", MIX)
    estimated = fold(plan_fold(base, vector), vector, tmp_path / "original", MIX)
    assert estimated.onto == "original"
    assert measured.distance is not None
    assert estimated.distance == pytest.approx(measured.distance, rel=0.05)
    known = replace(vector, identity=identity_of(base, quantization="none"))
    assert fold(plan_fold(base, known), known, tmp_path / "known", MIX).distance is None


@pytest.mark.parametrize("onto", ["original", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_4_bit_checkpoint_loads_as_it_was_written(
    tiny_model: Any, family: str, onto: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_model(family)
    vector = random_vector(load(base), rank=3, seed=0, scale=5.0)
    plan = plan_fold(base, vector, onto=onto, to_nf4=True, training_dtype=torch.float32)
    facts = fold(plan, vector, tmp_path / "q", MIX, accept_loss=True)
    dense = fold(plan_fold(base, vector, onto=onto, training_dtype=torch.float32), vector, tmp_path / "dense", MIX)
    assert dense.kept > facts.kept
    with no_complaints(caplog):
        packed = load(tmp_path / "q")
    assert packed.is_loaded_in_4bit
    twin = load(tmp_path / "dense")
    found = dequantised(packed)
    assert found.keys() == vector.deltas.keys()
    # What is stored is the dense fold, rounded once, as loading the dense fold in 4 bits would round it.
    again = dequantised(load_base(tmp_path / "dense", device="cpu", compute_dtype="float32").model)
    for name, weight in found.items():
        assert torch.equal(weight, again[name]), name
        twin.get_submodule(name).weight.data = weight.T.clone() if is_conv1d(name) else weight
    from lora_prefvec.inference.base import keep_weights_as_loaded

    keep_weights_as_loaded(packed)
    assert distance(logits(packed), logits(twin)) <= 1e-5
    size = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert plan.size < size < plan.size + 20_000


def test_the_part_that_survives_4_bits_is_that_of_two_4_bit_models(tiny_llama: Path, tmp_path: Path) -> None:
    vector = random_vector(load(tiny_llama), rank=3, seed=0)
    facts = fold(plan_fold(tiny_llama, vector, to_nf4=True), vector, tmp_path / "q", MIX, accept_loss=True)
    plain = dequantised(load_base(tiny_llama, device="cpu", compute_dtype="float32").model)
    for name, weight in dequantised(load(tmp_path / "q")).items():
        dense = vector.deltas[name].dense()
        error = float((weight - plain[name] - dense).norm() / dense.norm())
        assert facts.modules[name].kept == pytest.approx(max(0.0, 1 - error), abs=1e-4)


def test_a_4_bit_fold_that_loses_the_delta_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    small = random_vector(load(tiny_llama), rank=3, seed=0) * 0.1
    plan = plan_fold(tiny_llama, small, to_nf4=True)
    with pytest.raises(InputError, match=r"rounding to 4 bits would leave \d+\.\d% of the delta.*--accept-loss"):
        fold(plan, small, tmp_path / "q", MIX)
    assert list(tmp_path.iterdir()) == []
    assert fold(plan, small, tmp_path / "q", MIX, accept_loss=True).kept < 0.8
    large = small * 500
    assert fold(plan_fold(tiny_llama, large, to_nf4=True), large, tmp_path / "l", MIX).kept > 0.8


def test_a_head_that_is_no_longer_tied_stays_out_of_4_bits(tiny_gemma3: Path, tmp_path: Path) -> None:
    base = load(tiny_gemma3)
    rows, columns = base.lm_head.weight.shape
    vector = PreferenceVector({"lm_head": LowRankDelta(torch.randn(2, columns), torch.randn(rows, 2))})
    facts = fold(plan_fold(tiny_gemma3, vector, to_nf4=True), vector, tmp_path / "q", MIX)
    assert facts.kept > 0.999  # nothing that it changed was rounded
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"
    packed = load(tmp_path / "q")
    expected = base.lm_head.weight + vector.deltas["lm_head"].dense()
    torch.testing.assert_close(packed.lm_head.weight, expected, rtol=0, atol=1e-5)
    assert torch.equal(packed.model.embed_tokens.weight, base.model.embed_tokens.weight)
