"""The MLX export against the rules of mlx-lm's loader, and against mlx-lm itself where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import Provenance, plan_mlx, read_base, write_mlx
from lora_prefvec.artifact.verify import verify
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.artifact.factors import small_vector

MIX = Provenance(kind="mix", method="exact")


def some(shape: tuple[int, int], rank: int, seed: int = 0) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    )


def export(vector: PreferenceVector, target: Path, base: Path | None = None) -> Path:
    write_mlx(target, vector, plan_mlx(vector, read_base(base) if base else None), MIX)
    return target


def applied(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> the change that mlx-lm applies to its weight (`tuner/lora.py`)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapters.safetensors").items()}
    found = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        product = tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        found[name] = config["lora_parameters"]["scale"] * (product if name.endswith("embed_tokens") else product.T)
    return found


def test_mlx_applies_the_vector(tiny_llama: Path, tmp_path: Path) -> None:
    ranks = small_vector(2, 0) + replace(small_vector(3, 1), deltas=dict(list(small_vector(3, 1).deltas.items())[:2]))
    vector = replace(ranks, deltas={**ranks.deltas, "model.embed_tokens": some((9, 5), 2), "lm_head": some((9, 5), 1)})
    found = applied(export(vector, tmp_path / "a", tiny_llama))
    assert found.keys() == vector.deltas.keys()
    for name, delta in vector.deltas.items():
        torch.testing.assert_close(found[name].float(), delta.dense(), rtol=1e-5, atol=1e-5)


def test_the_folder_holds_what_mlx_asks_for_and_nothing_else(tmp_path: Path) -> None:
    folder = export(small_vector(3, 0), tmp_path / "a")
    assert {path.name for path in folder.iterdir()} == {"adapters.safetensors", "adapter_config.json", "prefvec.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 3, "scale": 1.0, "dropout": 0.0, "keys": sorted(small_vector(3, 0).deltas)},
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "adapters.safetensors").items()}
    assert shapes["model.layers.0.mlp.down_proj.lora_a"] == (7, 3)
    assert shapes["model.layers.0.mlp.down_proj.lora_b"] == (3, 5)


@pytest.mark.parametrize(
    ("family", "module", "why"),
    [
        ("gemma3", "model.embed_tokens", "tied"),
        ("gemma3", "lm_head", "tied"),
        (None, "model.embed_tokens", "--base"),
        (None, "model.layers.0.mlp.experts.gate_up_proj.3", "experts"),
    ],
)
def test_what_mlx_would_apply_otherwise_is_refused(tiny_model: Any, family: str | None, module: str, why: str) -> None:
    base = read_base(tiny_model(family)) if family else None
    with pytest.raises(InputError, match=why):
        plan_mlx(PreferenceVector({module: some((9, 5), 2)}), base)


def test_the_text_part_of_a_multimodal_model_has_another_name_there(tmp_path: Path) -> None:
    module = "model.language_model.layers.0.mlp.up_proj"
    found = applied(export(PreferenceVector({module: some((9, 5), 2)}), tmp_path / "a"))
    assert list(found) == ["language_model.model.layers.0.mlp.up_proj"]


def test_verify_accepts_what_is_exported(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    report = verify(str(export(llama_vector, tmp_path / "a", tiny_llama)), base=str(tiny_llama))
    assert (report.kind, report.findings, report.unchecked, report.rank) == ("MLX folder", [], [], 4)
    with pytest.raises(InputError, match="MLX alone"):
        verify(str(tmp_path / "a"), ["vllm"])


def drop(key: str) -> Any:
    return lambda config: config["lora_parameters"].pop(key, None) or config.pop(key, None)


@pytest.mark.parametrize(
    ("change", "rule", "severity"),
    [
        (drop("num_layers"), "MLX1", "block"),
        (drop("rank"), "MLX1", "block"),
        (drop("dropout"), "MLX1", "block"),
        (lambda config: config["lora_parameters"].update(rank=7), "MLX2", "block"),
        (lambda config: config["lora_parameters"]["keys"].pop(), "MLX2", "block"),
        (lambda config: config["lora_parameters"].update(scale=20.0), "MLX3", "wrong"),
    ],
)
def test_verify_reports_each_trap_of_the_config(tmp_path: Path, change: Any, rule: str, severity: str) -> None:
    folder = export(small_vector(3, 0), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = verify(str(folder))
    assert (rule, {"mlx": severity}) in [(finding.rule, finding.engines) for finding in report.findings]
    assert not report.passes


def test_verify_reports_each_trap_of_the_tensors(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path
) -> None:
    folder = export(llama_vector, tmp_path / "a", tiny_llama)
    sound = load_file(folder / "adapters.safetensors")
    name = "model.layers.0.self_attn.q_proj.lora_a"
    for index, (tensors, rule) in enumerate(
        [
            ({**sound, name: sound[name].T.contiguous()}, "MLX2"),
            ({**sound, name: sound[name][:32].contiguous()}, "MLX2"),
            ({**sound, "model.norm.weight": torch.ones(3)}, "MLX2"),
            ({**sound, name: sound[name] * 2}, "I1"),
        ]
    ):
        save_file(tensors, folder / "adapters.safetensors")
        found = {finding.rule for finding in verify(str(folder), base=str(tiny_llama)).findings}
        assert rule in found, index
    (folder / "adapters.safetensors").write_bytes(b"12")
    assert verify(str(folder)).findings[0].rule == "F5"


def test_mlx_answers_as_transformers_does(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx
    import transformers

    sparse = {name: delta for name, delta in llama_vector.deltas.items() if "layers.1." in name and "mlp" not in name}
    whole = {
        **llama_vector.deltas,
        "model.embed_tokens": some((262, 64), 2, seed=7) * 0.1,
        "lm_head": some((262, 64), 2, seed=8) * 0.02,
    }
    tokens = list(range(1, 17))
    for index, deltas in enumerate([llama_vector.deltas, sparse, whole]):
        vector = replace(llama_vector, deltas=deltas)
        adapter = export(vector, tmp_path / str(index), tiny_llama)
        model, _ = mlx_lm.load(str(tiny_llama), adapter_path=str(adapter))
        found = torch.tensor(model(mx.array([tokens]))[0].tolist())
        reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        with torch.no_grad():
            plain = reference(torch.tensor([tokens])).logits[0]
            for name, delta in deltas.items():
                reference.get_submodule(name).weight.data += delta.dense()
            expected = reference(torch.tensor([tokens])).logits[0]
        assert float((found - expected).abs().max()) < 1e-3
        assert float((plain - expected).abs().max()) > 0.1
