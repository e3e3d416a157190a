"""Folding: the sum is exact, of every kind, in every type, and transformers loads what comes out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import Provenance, fold, plan_fold, read_provenance, write_adapter
from lora_prefvec.artifact.kinds import is_conv1d
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.artifact.models import distance, load, logits, no_complaints
from tests.helpers import CONFIGS, random_vector

MIX = Provenance(kind="fold", method="exact")


def random_delta(rows: int, columns: int, seed: int = 0, scale: float = 0.1) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(3, columns, generator=generator) / columns**0.5, torch.randn(rows, 3, generator=generator) * scale
    )


def whole_vector(model: Any, seed: int = 0) -> PreferenceVector:
    """A vector over all linear layers, the input embeddings and the head."""
    rest = {}
    for number, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Embedding) or name == "lm_head":
            rest[name] = random_delta(*module.weight.shape, seed=100 + number)
    return PreferenceVector({**random_vector(model, rank=3, seed=seed).deltas, **rest})


def sharded(folder: Path, target: Path) -> Path:
    """The same model in several files."""
    import transformers

    load(folder).save_pretrained(target, max_shard_size="100kB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    assert len(list(target.glob("*.safetensors"))) > 1
    return target


def assert_adds(base: Any, folded: Any, vector: PreferenceVector) -> None:
    """Every weight is the base's plus the dense delta."""
    before = dict(base.named_parameters(remove_duplicate=False))
    for name, weight in folded.named_parameters(remove_duplicate=False):
        expected, module = before[name].detach(), name.removesuffix(".weight")
        if module in vector.deltas:
            dense = vector.deltas[module].dense()
            expected = expected + (dense.T if is_conv1d(module) else dense)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("shards", [False, True])
def test_every_family_gets_base_plus_delta_and_loads_in_silence(
    tiny_model: Any, family: str, shards: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    base = sharded(tiny_model(family), tmp_path / "base") if shards else tiny_model(family)
    model = load(base)
    vector = whole_vector(model)
    steps: list[int] = []
    plan = plan_fold(base, vector)
    facts = fold(plan, vector, tmp_path / "f", MIX, advance=lambda: steps.append(1))
    assert facts.kept > 0.9999
    assert len(steps) == plan.tensors
    with no_complaints(caplog):
        folded = load(tmp_path / "f")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "f")
    assert tokenizer.chat_template
    assert_adds(model, folded, vector)
    assert facts.untied == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert folded.lm_head.weight is not folded.get_input_embeddings().weight
    files = list((tmp_path / "f").glob("*.safetensors"))
    tensors = {name: weight for file in files for name, weight in load_file(file).items()}
    assert plan.size == sum(weight.numel() * weight.element_size() for weight in tensors.values())
    if shards:
        index = json.loads((tmp_path / "f" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == plan.size
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def moe(family: str, folder: Path) -> Path:
    """A tiny mixture of experts: stored expert by expert (Qwen3, Mixtral) or fused and transposed (GPT-OSS)."""
    import transformers

    shape = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    configs = {
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**shape, moe_intermediate_size=24, num_experts=4),
        "mixtral": lambda: transformers.MixtralConfig(**shape, num_local_experts=4),
        "gpt_oss": lambda: transformers.GptOssConfig(**shape, num_local_experts=4),
    }
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(configs[family]()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_fused_experts_get_their_deltas_however_they_are_stored(family: str, tmp_path: Path) -> None:
    base = moe(family, tmp_path / "base")
    model = load(base)
    turned = family == "gpt_oss"
    parameters = {
        name: weight.detach() for name, weight in model.named_parameters() if name.endswith(("_up_proj", "down_proj"))
    }
    deltas = {}
    for name, weight in parameters.items():
        for expert in (0, 3):
            rows, columns = weight.shape[:0:-1] if turned else weight.shape[1:]
            deltas[f"{name}.{expert}"] = random_delta(rows, columns, seed=expert)
    vector = PreferenceVector(deltas)
    facts = fold(plan_fold(base, vector), vector, tmp_path / "f", MIX)
    assert facts.modules.keys() == deltas.keys()
    assert len(parameters) == 2
    folded = load(tmp_path / "f")
    for name, weight in parameters.items():
        expected = weight.clone()
        for expert in (0, 3):
            dense = deltas[f"{name}.{expert}"].dense()
            expected[expert] += dense.T if turned else dense
        torch.testing.assert_close(folded.get_parameter(name).detach(), expected, rtol=0, atol=1e-6)
    others = dict(model.named_parameters()).keys() - parameters.keys()
    assert all(torch.equal(folded.get_parameter(name), model.get_parameter(name)) for name in others)
    wrong = PreferenceVector({f"{next(iter(parameters))}.9": next(iter(deltas.values()))})
    with pytest.raises(InputError, match=r"experts"):
        plan_fold(base, wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_fold_is_what_peft_merges(tiny_model: Any, family: str, tmp_path: Path) -> None:
    """Two vectors in one pass, against the composed adapter in PEFT."""
    from peft import PeftModel

    base = tiny_model(family)
    vector = random_vector(load(base), rank=3, seed=0) - 0.5 * random_vector(load(base), rank=2, seed=1)
    write_adapter(tmp_path / "a", vector, Provenance(kind="mix"), base=base)
    fold(plan_fold(base, vector), vector, tmp_path / "f", MIX)
    merged = PeftModel.from_pretrained(load(base), str(tmp_path / "a")).merge_and_unload()
    assert distance(logits(load(tmp_path / "f")), logits(merged)) <= 1e-5
    assert distance(logits(load(base)), logits(merged)) > 1e-2


def test_all_but_the_weights_is_carried_over(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    for name in ("LICENSE.txt", "NOTICE", "special.json", "optimizer.pt", "README.md"):
        (base / name).write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    facts = fold(plan_fold(base, llama_vector), llama_vector, tmp_path / "f", MIX)
    found = {str(path.relative_to(tmp_path / "f")) for path in (tmp_path / "f").rglob("*") if path.is_file()}
    dropped = {"optimizer.pt", "README.md"}
    assert found == {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()} - dropped | {
        "prefvec.json"
    }
    for name in found - {"model.safetensors", "prefvec.json"}:
        assert (tmp_path / "f" / name).read_bytes() == (base / name).read_bytes()
    told = read_provenance(tmp_path / "f")
    assert told is not None
    assert told.fold == facts
    assert told.metrics == {"delta_kept": facts.kept}
    assert (facts.onto, facts.dtype, facts.untied) == ("original", "base", False)
    assert facts.modules.keys() == llama_vector.deltas.keys()


def test_what_the_vector_does_not_touch_is_copied_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    vector = PreferenceVector({"model.layers.0.self_attn.q_proj": LowRankDelta(torch.ones(1, 64), torch.ones(64, 1))})
    fold(plan_fold(tiny_llama, vector), vector, tmp_path / "f", MIX)
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "f" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_tied_weights_stay_tied_where_neither_is_changed(tiny_gemma3: Path, tmp_path: Path) -> None:
    vector = random_vector(load(tiny_gemma3), rank=2, seed=0)
    assert not fold(plan_fold(tiny_gemma3, vector), vector, tmp_path / "f", MIX).untied
    model = load(tmp_path / "f")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tmp_path / "f" / "config.json").read_bytes() == (tiny_gemma3 / "config.json").read_bytes()


@pytest.mark.parametrize("side", ["model.embed_tokens", "lm_head"])
def test_a_delta_on_one_side_of_a_tied_pair_changes_that_side(tiny_gemma3: Path, tmp_path: Path, side: str) -> None:
    base = load(tiny_gemma3)
    vector = PreferenceVector({side: random_delta(*base.lm_head.weight.shape)})
    assert fold(plan_fold(tiny_gemma3, vector), vector, tmp_path / "f", MIX).untied
    assert json.loads((tmp_path / "f" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_adds(base, load(tmp_path / "f"), vector)


def test_names_without_the_first_part_are_found(tiny_gpt2: Path, tmp_path: Path) -> None:
    """GPT-2's published checkpoint has h.0.attn.c_attn.weight for transformer.h.0.attn.c_attn."""
    base = Path(shutil.copytree(tiny_gpt2, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): weight for name, weight in tensors.items()}
    save_file(short, base / "model.safetensors", {"format": "pt"})
    vector = random_vector(load(tiny_gpt2), rank=3, seed=0)
    fold(plan_fold(base, vector), vector, tmp_path / "f", MIX)
    assert_adds(load(tiny_gpt2), load(tmp_path / "f"), vector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_half_precision_says_what_it_kept(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    base = tiny_llama
    if stored != torch.float32:
        base = tmp_path / "base"
        load(tiny_llama, dtype=stored).save_pretrained(base)
    small = llama_vector * 0.01
    facts = fold(plan_fold(base, small, dtype), small, tmp_path / "f", MIX)
    model, plain = load(tmp_path / "f"), load(base)
    assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
    assert json.loads((tmp_path / "f" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    lost = whole = 0.0
    for name, delta in small.deltas.items():
        before, after = plain.get_submodule(name).weight.detach(), model.get_submodule(name).weight.detach()
        assert torch.equal(after, (before.float() + delta.dense()).to(dtype))
        change = after.float() - before.to(dtype).float()
        error, norm = float((change - delta.dense()).norm()), float(delta.dense().norm())
        assert facts.modules[name].kept == pytest.approx(max(0.0, 1 - error / norm), abs=1e-4)
        lost, whole = lost + error**2, whole + norm**2
    assert facts.kept == pytest.approx(1 - (lost / whole) ** 0.5, abs=1e-4)
    assert facts.kept < (0.9 if dtype == torch.bfloat16 else 0.99)


def test_large_matrices_go_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks that divide nothing evenly change no bit of the result."""
    from lora_prefvec.artifact import adding

    config = {"model_type": "llama"}
    tensors = {f"layers.{n}.proj.weight": torch.randn(37, 29, dtype=torch.bfloat16) for n in range(3)}
    tensors["wide.weight"] = torch.randn(3, 501)
    tensors["layers.3.experts.down_proj"] = torch.randn(5, 7, 11)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    save_file(tensors, base / "model.safetensors")
    vector = PreferenceVector(
        {
            "layers.1.proj": random_delta(37, 29),
            "wide": random_delta(3, 501),
            "layers.3.experts.down_proj.2": random_delta(7, 11),
        }
    )
    whole = fold(plan_fold(base, vector), vector, tmp_path / "whole", MIX)
    monkeypatch.setattr(adding, "CHUNK", 100)
    monkeypatch.setattr(adding, "BLOCK", 64)
    monkeypatch.setattr(adding, "_COPY", 64)
    parts = fold(plan_fold(base, vector), vector, tmp_path / "parts", MIX)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, weight in tensors.items():
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6 if weight.dtype == torch.float32 else 0)
        if name.removesuffix(".weight") not in vector.deltas and "experts" not in name:
            assert torch.equal(one[name], weight)
    expected = tensors["layers.3.experts.down_proj"].clone()
    expected[2] += vector.deltas["layers.3.experts.down_proj.2"].dense()
    torch.testing.assert_close(other["layers.3.experts.down_proj"], expected, rtol=0, atol=1e-6)
    assert parts.kept == pytest.approx(whole.kept, abs=1e-6)


def test_folds_that_are_refused(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="changes no module"):
        plan_fold(tiny_llama, PreferenceVector({}))
    missing = PreferenceVector({"model.layers.7.mlp.up_proj": LowRankDelta(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(InputError, match=r"no linear layer model\.layers\.7\.mlp\.up_proj"):
        plan_fold(tiny_llama, missing)
    odd = PreferenceVector({"model.layers.0.mlp.up_proj": LowRankDelta(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(InputError, match=r"in the base and \[2, 2\] in the vector"):
        plan_fold(tiny_llama, odd)
    with pytest.raises(InputError, match="overflows F16"):
        fold(plan_fold(tiny_llama, llama_vector * 1e8, torch.float16), llama_vector * 1e8, tmp_path / "f", MIX)
    assert list(tmp_path.iterdir()) == []
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][3, 4] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight overflows F16"):
        fold(plan_fold(base, llama_vector, torch.float16), llama_vector, tmp_path / "f", MIX)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        plan_fold(base, llama_vector)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not in the folder"):
        plan_fold(base, llama_vector)
    (base / "pytorch_model.bin").rename(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InputError, match="quantised"):
        plan_fold(base, llama_vector)


def test_an_error_in_a_thread_leaves_nothing(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    plan = plan_fold(base, llama_vector)
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)
    with pytest.raises(InputError, match="cut off"):
        fold(plan, llama_vector, tmp_path / "f", MIX)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


MEMORY = """
import sys
from pathlib import Path

import torch

from lora_prefvec.artifact import Provenance, fold, plan_fold
from lora_prefvec.vector import LowRankDelta, PreferenceVector


def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024


delta = LowRankDelta(torch.ones(8, 4096), torch.ones(4096, 8))
vector = PreferenceVector({f"layers.{n}.proj": delta for n in range(6)})
before = peak()
fold(plan_fold(Path(sys.argv[1]), vector), vector, sys.argv[2], Provenance(kind="fold"))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 200 MB in matrices of 33 MB takes some buffers, less than one matrix in float32."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    weight = torch.randn(4096, 4096).bfloat16()
    save_file({f"layers.{n}.proj.weight": weight + n for n in range(6)}, base / "model.safetensors")
    call = [sys.executable, "-c", MEMORY, str(base), str(tmp_path / "f")]
    grown = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    assert grown < 60
