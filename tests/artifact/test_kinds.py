"""Every kind of adapter: made by PEFT, read by us, compared with what PEFT computes, and given back to PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import Provenance, plan_adapter, read_adapter, write_adapter
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.artifact.kinds import expert_of, experts_transposed, is_canonical, is_conv1d, is_embedding
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.artifact.models import distance, load, logits
from tests.artifact.peft_made import peft_model, save, shake

Models = Callable[[str], Path]
VECTOR = Provenance(kind="preference_vector", preference="helpful", sign=1)


def with_dense(base: Path, vector: PreferenceVector) -> torch.Tensor:
    """Logits of the base with the dense deltas added where the names say, each kind as its weight is stored."""
    from transformers.pytorch_utils import Conv1D

    model = load(base)
    if model.config.tie_word_embeddings and any("lm_head" in name or is_embedding(name) for name in vector.deltas):
        head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.lm_head.weight = head  # PEFT changes one side of a tied pair alone
    for name, delta in vector.deltas.items():
        if found := expert_of(name):
            parameter = model.get_parameter(found[0])
            dense = delta.dense().T if experts_transposed(model.config.model_type) else delta.dense()
            parameter.data[found[1]] += dense
        else:
            module = model.get_submodule(name)
            module.weight.data += delta.dense().T if isinstance(module, Conv1D) else delta.dense()
    return logits(model)


def loads_in_peft(base: Path, folder: Path) -> torch.Tensor:
    """Logits of the base with a folder that PEFT loads without a missing or an unexpected tensor."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(base), str(folder))
    inside = {key for key in adapted.state_dict() if "lora_" in key}
    result = adapted.load_adapter(str(folder), adapter_name="again")
    assert [key for key in result.missing_keys if "again" in key] == []
    assert list(result.unexpected_keys) == []
    assert len(inside) == len(load_file(folder / WEIGHTS))
    adapted.set_adapter("default")
    return logits(adapted.eval())


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["lm_head", "q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["embed_tokens", "up_proj"], "use_rslora": True}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 2}}),
    ("gemma3", {"target_modules": ["embed_tokens", "q_proj"], "alpha_pattern": {"embed_tokens": 2}}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "wte", "wpe"]}),
    ("gpt2", {"target_modules": r".*\.h\.1\.mlp\.c_proj"}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}),
    ("qwen3_moe", {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}),
    ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj", "v_proj"]}),
    ("qwen3_moe", {"target_modules": ["q_proj", "gate"], "alpha_pattern": {"gate.weight": 9}}),
    ("mixtral", {"target_modules": ["w1", "w2", "w3"], "r": 2}),
    ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
]


@pytest.mark.parametrize(("family", "options"), KINDS)
def test_a_kind_is_read_as_peft_means_it_and_given_back(
    tiny_model: Models, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = tiny_model(family)
    model = peft_model(base, **options)
    expected = logits(model)
    read = read_adapter(save(model, tmp_path / "a"))
    assert distance(with_dense(base, read.vector), expected) <= 1e-5
    assert distance(logits(load(base)), expected) > 1e-3
    for name, known in (("b", None), ("c", base)):
        written = write_adapter(tmp_path / name, read.vector, VECTOR, base=known)
        assert plan_adapter(read.vector, base=known) == written
        assert written.canonical == all(is_canonical(module) for module in read.vector.deltas)
        assert distance(loads_in_peft(base, tmp_path / name), expected) <= 1e-5
        back = read_adapter(tmp_path / name).vector
        for module, delta in read.vector.deltas.items():
            torch.testing.assert_close(back.deltas[module].dense(), delta.dense())


def test_experts_are_peft_s_delta_weights(tiny_model: Models, tmp_path: Path) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    for family in ("qwen3_moe", "gpt_oss"):
        model = peft_model(tiny_model(family), target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
        vector = read_adapter(save(model, tmp_path / family)).vector
        compared = 0
        for path, module in model.named_modules():
            if isinstance(module, ParamWrapper):
                experts = path.removeprefix("base_model.model.").removesuffix(".base_layer")
                for index, slice_ in enumerate(module.get_delta_weight("default")):
                    dense = vector.deltas[f"{experts}.{module.parameter_name}.{index}"].dense()
                    torch.testing.assert_close(dense.T if experts_transposed(family) else dense, slice_)
                    compared += 1
        assert compared == len(vector.deltas) == 2 * 2 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_of_special_kinds(tiny_model: Models, tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_model("llama")
    model = peft_model(base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    folder = save(model, tmp_path / "a", save_embedding_layers=False)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    vector = read_adapter(folder).vector
    A, B = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{part}"].float() for part in "AB")
    torch.testing.assert_close(vector.deltas["model.embed_tokens"].dense(), 2 * (B @ A).T)
    written = write_adapter(tmp_path / "b", vector, VECTOR, dtype=dtype)
    assert written.cast_error == 0.0  # the scale is a power of two, and so is what balances the factors
    for name, delta in read_adapter(tmp_path / "b").vector.deltas.items():
        torch.testing.assert_close(delta.dense(), vector.deltas[name].dense())


def test_a_linear_part_keeps_its_grid_beside_a_head(tiny_model: Models, tmp_path: Path) -> None:
    model = peft_model(tiny_model("llama"), target_modules=["lm_head", "v_proj"], layers_to_transform=None)
    vector = read_adapter(save(model, tmp_path / "a")).vector
    part = PreferenceVector({name: delta for name, delta in vector.deltas.items() if "layers.1" not in name})
    written = write_adapter(tmp_path / "b", part, VECTOR, base=tiny_model("llama"))
    modules = {
        name.split(".lora_")[0].removeprefix("base_model.model.") for name in load_file(tmp_path / "b" / WEIGHTS)
    }
    assert modules == {"lm_head"} | {f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 1) for x in "qkv"}
    assert not written.canonical
    linear = PreferenceVector({name: delta for name, delta in part.deltas.items() if name != "lm_head"})
    assert plan_adapter(linear, base=tiny_model("llama")).canonical


def test_names_of_single_experts(tiny_model: Models, tmp_path: Path) -> None:
    """The form before transformers fused experts: PEFT still loads it, and it is read as the linear layers it names."""
    base, shapes = tiny_model("qwen3_moe"), {"gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in range(4):
            for leaf, (rows, columns) in shapes.items():
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(3, columns, generator=generator) * 0.2
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 3, generator=generator) * 0.2
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "target_modules": sorted(shapes)}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    vector = read_adapter(tmp_path / "a").vector
    assert len(vector.deltas) == 2 * 4 * 3

    def folded(deltas: Mapping[str, LowRankDelta]) -> torch.Tensor:
        model = load(base)
        for name, delta in deltas.items():
            _, _, layer, _, _, expert, leaf = name.split(".")
            experts = model.model.layers[int(layer)].mlp.experts
            if leaf == "down_proj":
                experts.down_proj.data[int(expert)] += delta.dense()
            else:
                experts.gate_up_proj.data[int(expert)][slice(24) if leaf == "gate_proj" else slice(24, 48)] += (
                    delta.dense()
                )
        return logits(model)

    expected = folded(vector.deltas)
    from peft import PeftModel

    assert distance(logits(PeftModel.from_pretrained(load(base), str(tmp_path / "a")).eval()), expected) <= 1e-5
    # Without the last expert and without one `up_proj`: PEFT needs them all, so zeros are written.
    some = {n: d for n, d in vector.deltas.items() if ".3." not in n and "0.mlp.experts.1.up_proj" not in n}
    written = write_adapter(tmp_path / "b", PreferenceVector(some), VECTOR, base=base)
    assert not written.canonical
    adapted = PeftModel.from_pretrained(load(base), str(tmp_path / "b")).eval()
    merged = read_adapter(tmp_path / "b").vector
    assert merged.deltas.keys() == vector.deltas.keys()
    assert all(merged.deltas[n].norm() == 0 for n in vector.deltas.keys() - some.keys())
    assert distance(logits(adapted), folded(some)) <= 1e-5
    assert distance(logits(adapted), expected) > 1e-3


def test_fused_experts_that_are_missing_are_zeros(tiny_model: Models, tmp_path: Path) -> None:
    base = tiny_model("qwen3_moe")
    model = peft_model(base, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    vector = read_adapter(save(model, tmp_path / "a")).vector
    some = PreferenceVector(
        {name: delta for name, delta in vector.deltas.items() if ".3" not in name and "1.mlp.experts.down" not in name}
    )
    write_adapter(tmp_path / "b", some, VECTOR, base=base)
    assert distance(loads_in_peft(base, tmp_path / "b"), with_dense(base, some)) <= 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_start_is_read(tiny_model: Models, tmp_path: Path, start: str) -> None:
    base = tiny_model("llama")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=start, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(base), config).eval()
    model.peft_config["default"].init_lora_weights = True
    save(model, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = logits(model)
    with pytest.raises(InputError, match=rf"{start}.*path_initial_model_for_weight_conversion"):
        read_adapter(save(model, tmp_path / "raw"))
    save(model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert distance(with_dense(base, read_adapter(tmp_path / "converted").vector), expected) <= 1e-4


def test_several_named_adapters(tiny_model: Models, tmp_path: Path) -> None:
    from peft import LoraConfig

    base = tiny_model("llama")
    model = peft_model(base, "helpful", target_modules=["q_proj"])
    model.add_adapter("honest", LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj", "lm_head"]))
    shake(model)
    save(model, tmp_path / "a")
    with pytest.raises(InputError, match=r"holds no adapter_config.json. Did you mean .*/helpful or .*/honest?"):
        read_adapter(tmp_path / "a")
    for name, rank in (("helpful", 3), ("honest", 2)):
        model.set_adapter(name)
        vector = read_adapter(tmp_path / "a" / name).vector
        assert vector.rank == rank
        assert distance(with_dense(base, vector), logits(model)) <= 1e-5
    tensors = load_file(tmp_path / "a" / "honest" / WEIGHTS)
    named = {
        name.replace(".weight", ".honest.weight") if "lora_" in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(named, tmp_path / "a" / "honest" / WEIGHTS)
    assert distance(with_dense(base, read_adapter(tmp_path / "a" / "honest").vector), logits(model)) <= 1e-5
    others = {name.replace(".honest.", ".other.").replace("v_proj", "k_proj"): t.clone() for name, t in named.items()}
    save_file({**named, **others}, tmp_path / "a" / "honest" / WEIGHTS)
    with pytest.raises(InputError, match="several adapters: honest, other"):
        read_adapter(tmp_path / "a" / "honest")


def test_an_embedding_with_an_infix(tiny_model: Models, tmp_path: Path) -> None:
    folder = save(peft_model(tiny_model("llama"), target_modules=["embed_tokens"]), tmp_path / "a")
    before = read_adapter(folder).vector
    tensors = {
        f"{name}.helpful" if "lora_embedding" in name else name: t for name, t in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(
        read_adapter(folder).vector.deltas["model.embed_tokens"].dense(), before.deltas["model.embed_tokens"].dense()
    )


def test_a_whole_embedding_must_be_the_base_s_own(tiny_model: Models, tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = save(peft_model(base, target_modules=["embed_tokens", "lm_head"]), tmp_path / "a")
    copies = {name for name in load_file(folder / WEIGHTS) if name.endswith("base_layer.weight")}
    assert len(copies) == 2
    assert set(read_adapter(folder).vector.deltas) == {"model.embed_tokens", "lm_head"}
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t.bfloat16() if n in copies else t for n, t in tensors.items()}, folder / WEIGHTS)
    read_adapter(folder)  # rounded, and still the base's own
    changed = {n: t.clone() for n, t in tensors.items()}
    changed[sorted(copies)[0]][100, 7] += 1e-6
    save_file(changed, folder / WEIGHTS)
    with pytest.raises(InputError, match="holds all of lm_head, which is not the weight of its base"):
        read_adapter(folder)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/unknown"}))
    with pytest.raises(InputError, match=r"without its base owner/unknown .*hf download owner/unknown"):
        read_adapter(folder)


def test_a_resized_vocabulary_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = load(tiny_model("llama"))
    base.resize_token_embeddings(270)
    for name, targets in (("targeted", ["embed_tokens"]), ("beside", ["q_proj"])):
        model = get_peft_model(base, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
        save(model, tmp_path / name)
        model.unload()
        with pytest.raises(InputError, match="which is not the weight of its base"):
            read_adapter(tmp_path / name)


def test_tied_embeddings_adapted_together(tiny_model: Models, tmp_path: Path) -> None:
    base = tiny_model("gemma3")
    model = peft_model(base, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    expected = logits(model)
    read = read_adapter(save(model, tmp_path / "a"))
    assert set(read.vector.deltas) == {"model.embed_tokens", "lm_head"}
    assert distance(with_dense(base, read.vector), expected) <= 1e-5


def test_conv1d_is_known_by_name_and_model() -> None:
    assert is_conv1d("transformer.h.0.attn.c_attn")
    assert is_conv1d("transformer.h.0.attn.c_attn", "gpt2")
    assert not is_conv1d("transformer.h.0.attn.c_attn", "gpt_bigcode")
    assert not is_conv1d("model.layers.0.mlp.c_proj")
