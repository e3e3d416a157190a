"""A DoRA's dense delta and its best low-rank fit, compared with what PEFT merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import approximate, read_adapter
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.errors import InputError
from tests.artifact.models import load
from tests.artifact.peft_made import peft_model, save

Models = Callable[[str], Path]


def dora(base: Path, folder: Path, **options: Any) -> tuple[Path, Any]:
    """A DoRA whose magnitudes moved, and PEFT's model of it."""
    model = peft_model(base, use_dora=True, **options)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    return save(model, folder), model


def dense_deltas(base: Path, model: Any) -> dict[str, torch.Tensor]:
    """Module -> what PEFT adds to its weight, [out, in]."""
    from transformers.pytorch_utils import Conv1D

    before, after = load(base), model.merge_and_unload()
    changed = {}
    for name, module in after.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            difference = module.weight.detach() - before.get_submodule(name).weight.detach()
            if difference.abs().max() > 0:
                changed[name] = difference.T if isinstance(module, Conv1D) else difference
    return changed


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["v_proj", "lm_head"], "use_rslora": True, "rank_pattern": {"lm_head": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_the_fit_is_the_best_of_its_rank(
    tiny_model: Models, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = tiny_model(family)
    folder, model = dora(base, tmp_path / "a", **options)
    dense = dense_deltas(base, model)
    for rank in (None, 1, 10):
        found = approximate(folder, base, rank)
        assert found.adapter.vector.deltas.keys() == dense.keys() == found.errors.keys()
        lost = whole = 0.0
        for name, delta in found.adapter.vector.deltas.items():
            kept = rank or (2 if name == "lm_head" else 3)
            assert delta.rank == kept
            tail = torch.linalg.svdvals(dense[name].double())[kept:].square().sum()
            norm2 = dense[name].double().square().sum()
            assert float((delta.dense() - dense[name]).double().square().sum()) == pytest.approx(float(tail), rel=1e-3)
            assert found.errors[name] == pytest.approx(float((tail / norm2).sqrt()), rel=1e-3)
            lost, whole = lost + float(tail), whole + float(norm2)
        assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    full = approximate(folder, base, 64)
    assert full.error < 1e-3
    for name, delta in full.adapter.vector.deltas.items():
        torch.testing.assert_close(delta.dense(), dense[name], rtol=1e-3, atol=1e-5)


def test_a_dora_is_refused_and_the_way_out_named(tiny_model: Models, tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder, _ = dora(base, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"is a DoRA.*--approximate BASE"):
        read_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(InputError, match=r"is a DoRA \(it holds .*lora_magnitude_vector.*--approximate BASE"):
        read_adapter(folder)
    with pytest.raises(InputError, match="is a DoRA"):
        approximate(folder, base)


def test_what_cannot_be_approximated(tiny_model: Models, tmp_path: Path) -> None:
    base = tiny_model("llama")
    with pytest.raises(InputError, match="is no DoRA"):
        approximate(save(peft_model(base, target_modules=["q_proj"]), tmp_path / "plain"), base)
    folder, _ = dora(base, tmp_path / "e", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match=r"is a DoRA of model\.embed_tokens, which is no linear layer"):
        approximate(folder, base)
    folder, _ = dora(base, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(InputError, match="the base has no linear layer"):
        approximate(folder, tiny_model("gpt2"))
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "magnitude" in name)
    for changed in (None, tensors[name][:5]):
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(others if changed is None else {**others, name: changed.clone()}, folder / WEIGHTS)
        with pytest.raises(InputError, match=r"lacks the 64 magnitudes"):
            approximate(folder, base)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"the magnitudes of model.* do not fit"):
        approximate(folder, base)
