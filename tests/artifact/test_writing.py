"""Writing: the canonical folder, and that it says the same as the vector."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_prefvec.artifact import Parent, Provenance, Written, plan_adapter, read_adapter, write_adapter
from lora_prefvec.artifact.canonical import grid
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector
from tests.artifact.factors import assert_same, small_vector

VECTOR = Provenance(kind="preference_vector", preference="helpful", sign=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    return found


def test_the_folder_is_canonical(tmp_path: Path, vector: PreferenceVector) -> None:
    vector = replace(vector, identity=BaseIdentity("owner/base", "c0ffee"))
    written = write_adapter(tmp_path / "a", vector, VECTOR, recipe="a: 1\n")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["README.md", "adapter_config.json", WEIGHTS, "prefvec.json", "recipe.yaml"]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert type(config["lora_alpha"]) is int
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "c0ffee")
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    found = tensors(tmp_path / "a")
    assert len(found) == 2 * written.modules == 16
    for name, tensor in found.items():
        assert name.startswith("base_model.model.model.layers.")
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.dtype == torch.float32
        assert tensor.shape[0 if "lora_A" in name else 1] == 8
    assert (tmp_path / "a" / WEIGHTS).stat().st_size > written.size == sum(t.numel() * 4 for t in found.values())


def test_the_same_vector_gives_the_same_bytes(tmp_path: Path, vector: PreferenceVector) -> None:
    for name in "ab":
        write_adapter(tmp_path / name, vector, VECTOR)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@settings(max_examples=25)
@given(rank=st.integers(1, 20), seed=st.integers(0, 2**16), exponent=st.integers(-30, 30))
def test_reading_gives_the_vector_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, rank: int, seed: int, exponent: int
) -> None:
    folder = tmp_path_factory.mktemp("law") / "a"
    vector = small_vector(rank, seed, scale=2.0**exponent)
    write_adapter(folder, vector, VECTOR)
    found = read_adapter(folder).vector
    assert found.rank == rank
    for name, delta in vector.deltas.items():
        back = found.deltas[name]
        # balancing multiplies by powers of two: every product of an A and a B entry is the same number
        for k in range(rank):
            assert torch.equal(torch.outer(back.B[:, k], back.A[k]), torch.outer(delta.B[:, k], delta.A[k]))
        norms = back.B.norm(dim=0) / back.A.norm(dim=1)
        assert bool(((norms > 0.49) & (norms < 2.04)).all())


def test_writing_what_was_read_changes_no_byte(tmp_path: Path, vector: PreferenceVector) -> None:
    write_adapter(tmp_path / "a", vector, VECTOR)
    write_adapter(tmp_path / "b", read_adapter(tmp_path / "a").vector, VECTOR)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("rank", "written"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 48), (64, 64)])
def test_the_rank_is_one_that_engines_pad_to(rank: int, written: int) -> None:
    assert grid(small_vector(rank, 0)).rank == written


def only(vector: PreferenceVector, *modules: str) -> PreferenceVector:
    return replace(vector, deltas={name: delta for name, delta in vector.deltas.items() if name.endswith(modules)})


def test_the_grid_is_full(tmp_path: Path, vector: PreferenceVector) -> None:
    part = only(vector, "0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.down_proj")
    written = grid(part)
    leaves = ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert sorted(written.shapes) == [f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in leaves]
    assert written.shapes["model.layers.0.self_attn.k_proj"] == (4, 5)
    assert written.incomplete == []
    write_adapter(tmp_path / "a", part, VECTOR)
    assert_same(read_adapter(tmp_path / "a").vector, part)
    assert not tensors(tmp_path / "a")["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].any()


def test_a_shape_that_nobody_knows_is_reported(vector: PreferenceVector) -> None:
    written = grid(only(vector, "v_proj"))
    assert {name.rpartition(".")[2] for name in written.shapes} == {"k_proj", "v_proj"}
    assert written.incomplete == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def test_layers_are_in_the_order_of_depth() -> None:
    delta = LowRankDelta(torch.ones(1, 2), torch.ones(2, 1))
    written = grid(PreferenceVector({f"model.layers.{n}.mlp.down_proj": delta for n in (10, 9, 2)}))
    assert list(written.shapes) == [f"model.layers.{n}.mlp.down_proj" for n in (2, 9, 10)]


def test_the_base_knows_the_rest(tiny_llama: Path, llama_vector: PreferenceVector) -> None:
    written = grid(only(llama_vector, "1.self_attn.v_proj", "1.mlp.up_proj"), tiny_llama)
    leaves = ["mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert list(written.shapes) == [f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in leaves]
    assert written.shapes["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert written.incomplete == []


def test_a_vector_of_another_shape_is_not_written_for_a_base(
    tiny_llama: Path, vector: PreferenceVector, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"\[64, 64\] in the base and \[6, 5\]"):
        write_adapter(tmp_path / "a", only(vector, "0.self_attn.q_proj"), VECTOR, base=tiny_llama)


def test_full_paths_where_a_leaf_lies_elsewhere_too(tmp_path: Path, vector: PreferenceVector) -> None:
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    weights = {f"{name}.weight": torch.ones(delta.shape) for name, delta in vector.deltas.items()}
    save_file({**weights, "vision.layers.0.q_proj.weight": torch.ones(3, 3)}, tmp_path / "base" / "model.safetensors")
    assert grid(vector, tmp_path / "base").target_modules == sorted(vector.deltas)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-4, 6e-3), (torch.float16, 1e-5, 1e-3)])
def test_the_error_of_a_cast_is_told(
    tmp_path: Path, vector: PreferenceVector, dtype: torch.dtype, least: float, most: float
) -> None:
    written = write_adapter(tmp_path / "a", vector, VECTOR, dtype=dtype)
    assert all(tensor.dtype == dtype for tensor in tensors(tmp_path / "a").values())
    back = read_adapter(tmp_path / "a").vector
    lost = sum(float((back.deltas[n].dense() - d.dense()).norm()) ** 2 for n, d in vector.deltas.items()) ** 0.5
    assert least < written.cast_error < most
    assert written.cast_error == pytest.approx(lost / vector.norm(), rel=1e-3)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="overflows float16"):
        write_adapter(tmp_path / "a", small_vector(2, 0, scale=1e12), VECTOR, dtype=torch.float16)
    assert not (tmp_path / "a").exists()


def test_a_plan_says_what_is_written(tmp_path: Path, vector: PreferenceVector) -> None:
    plan = plan_adapter(vector, dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []
    assert (
        write_adapter(tmp_path / "a", vector, VECTOR, dtype=torch.bfloat16)
        == plan
        == Written(8, 8, plan.size, plan.cast_error, [], True)
    )


def test_an_empty_vector_and_an_existing_folder_are_refused(tmp_path: Path, vector: PreferenceVector) -> None:
    with pytest.raises(InputError, match="changes no module"):
        write_adapter(tmp_path / "a", PreferenceVector({}), VECTOR)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="exists"):
        write_adapter(tmp_path / "a", vector, VECTOR)


def test_another_vector_is_not_touched(tmp_path: Path, vector: PreferenceVector) -> None:
    write_adapter(tmp_path / "a", vector, VECTOR)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "a").iterdir()}
    parents = [Parent(name="helpful", sha256=read_adapter(tmp_path / "a").sha256)]
    write_adapter(tmp_path / "b", vector * 2, VECTOR.model_copy(update={"kind": "mix", "parents": parents}))
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "a").iterdir()}


def test_a_full_disk_leaves_nothing(tmp_path: Path, vector: PreferenceVector, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_prefvec.artifact import weights

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.SafetensorsWriter, "write", full)
    with pytest.raises(InputError, match="no space left"):
        write_adapter(tmp_path / "a", vector, VECTOR)
    assert list(tmp_path.iterdir()) == []
