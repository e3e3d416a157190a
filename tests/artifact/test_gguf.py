"""The GGUF export against the rules of llama.cpp's loader, and against llama.cpp itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lora_prefvec.artifact import Provenance, find_base, identity_of, plan_gguf, read_base, write_gguf
from lora_prefvec.artifact.export_gguf import ARCHITECTURES
from lora_prefvec.artifact.verify import verify
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.artifact.gguf_files import LEAVES, applied, dense, reorder, write_base

MIX = Provenance(kind="mix", method="exact")
PERMUTED = {"llama", "mistral", "mixtral", "smollm3", "arcee", "granite"}
NAMES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
HEADS, SHARED, SIZE, WIDTH, INNER = 4, 2, 6, 20, 28  # head size and width of their own, as in Qwen3
SHAPES = {
    "self_attn.q_proj": (HEADS * SIZE, WIDTH),
    "self_attn.k_proj": (SHARED * SIZE, WIDTH),
    "self_attn.v_proj": (SHARED * SIZE, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * SIZE),
    "self_attn.qkv_proj": ((HEADS + 2 * SHARED) * SIZE, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.gate_up_proj": (2 * INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def some(shape: tuple[int, int], rank: int, seed: int = 0) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    )


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config.json of a family, which is all that the export needs."""

    def write(model_type: str, **more: Any) -> Path:
        folder = tmp_path / f"base-{model_type}"
        folder.mkdir()
        config = {
            "model_type": model_type,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": SHARED,
            "vocab_size": 50,
            **more,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def vector_for(model_type: str, rank: Callable[[int], int] = lambda index: 3) -> PreferenceVector:
    """A delta for each module that the family has a place for."""
    paths = [path for path, _ in ARCHITECTURES[model_type].places if path in SHAPES]
    modules = [f"model.layers.{layer}.{path}" for layer in range(2) for path in paths]
    return PreferenceVector(
        {name: some(SHAPES[name.split(".", 3)[3]], rank(i), seed=i) for i, name in enumerate(modules)}
    )


def export(vector: PreferenceVector, base: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    write_gguf(target, vector, plan_gguf(vector, read_base(base), dtype), MIX)
    return target


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("alike", [True, False], ids=["one rank", "many ranks"])
def test_llama_cpp_applies_the_vector(
    family: Callable[..., Path], tmp_path: Path, model_type: str, alike: bool
) -> None:
    vector = vector_for(model_type, lambda index: 3 if alike else 1 + index % 4)
    found = applied(export(vector, family(model_type), tmp_path / "a.gguf"))
    assert len(found) == len(vector.deltas)
    for module, delta in vector.deltas.items():
        _, _, layer, path = module.split(".", 3)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": SHARED}.get(path) if model_type in PERMUTED else None
        expected = reorder(dense(delta), heads) if heads else dense(delta)
        np.testing.assert_allclose(found[f"blk.{layer}.{LEAVES[path]}.weight"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_names_are_those_of_the_gguf_package(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    assert architecture.name == NAMES.get(model_type, model_type)
    known = gguf.get_tensor_name_map(kind, 2)
    for path, name in architecture.places:
        assert known.get_name(f"model.layers.1.{path}") == f"blk.1.{name}"
    assert (known.get_name("lm_head") == "output") >= architecture.head


def test_the_metadata_has_the_types_that_the_loader_asserts(family: Callable[..., Path], tmp_path: Path) -> None:
    base = family("llama")
    vector = replace(vector_for("llama"), identity=identity_of(base, "owner/base"))
    fields = gguf.GGUFReader(export(vector, base, tmp_path / "a.gguf")).fields
    for key, value in {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "general.base_model.0.name": "owner/base",
    }.items():
        assert fields[key].types == [gguf.GGUFValueType.STRING]
        assert fields[key].contents() == value
    assert fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert fields["adapter.lora.alpha"].contents() == 3.0
    assert json.loads(fields["prefvec.provenance"].contents())["kind"] == "mix"
    mixed = vector_for("llama", lambda index: 1 + index % 2)
    assert "adapter.lora.alpha" not in gguf.GGUFReader(export(mixed, base, tmp_path / "b.gguf")).fields


def test_shapes_as_ggml_counts_them(family: Callable[..., Path], tmp_path: Path) -> None:
    vector = PreferenceVector(
        {
            "model.layers.0.mlp.up_proj": some(SHAPES["mlp.up_proj"], 3),
            "model.embed_tokens": some((50, WIDTH), 2),
            "lm_head": some((50, WIDTH), 4),
            "model.layers.1.mlp.up_proj": some(SHAPES["mlp.up_proj"], 3) * 0.0,
        }
    )
    path = export(vector, family("qwen2"), tmp_path / "a.gguf", torch.float16)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {name: tuple(tensor.shape.tolist()) for name, tensor in tensors.items()} == {
        "blk.0.ffn_up.weight.lora_a": (WIDTH, 3),
        "blk.0.ffn_up.weight.lora_b": (3, INNER),
        "token_embd.weight.lora_a": (2, 50),
        "token_embd.weight.lora_b": (2, WIDTH),
        "output.weight.lora_a": (WIDTH, 4),
        "output.weight.lora_b": (4, 50),
    }
    assert {tensor.tensor_type for tensor in tensors.values()} == {gguf.GGMLQuantizationType.F16}
    found = applied(path)
    for module, name in (("model.embed_tokens", "token_embd.weight"), ("lm_head", "output.weight")):
        np.testing.assert_allclose(found[name], dense(vector.deltas[module]), rtol=0.01, atol=0.01)


def test_factors_of_very_different_size_survive_float16(family: Callable[..., Path], tmp_path: Path) -> None:
    whole = some(SHAPES["mlp.up_proj"], 3)
    lopsided = PreferenceVector({"model.layers.0.mlp.up_proj": LowRankDelta(whole.A * 2**-20, whole.B * 2**20)})
    plan = plan_gguf(lopsided, read_base(family("qwen3")), torch.float16)
    assert 0 < plan.cast_error < 1e-3
    write_gguf(tmp_path / "a.gguf", lopsided, plan, MIX)
    np.testing.assert_allclose(applied(tmp_path / "a.gguf")["blk.0.ffn_up.weight"], dense(whole), atol=0.01)
    with pytest.raises(InputError, match="overflows float16"):
        plan_gguf(lopsided * 1e12, plan.base, torch.float16)


@pytest.mark.parametrize(
    ("model_type", "module", "shape", "why"),
    [
        ("gemma", "lm_head", (50, WIDTH), "tied"),
        ("gemma2", "lm_head", (50, WIDTH), "tied"),
        ("gemma3_text", "lm_head", (50, WIDTH), "tied"),
        ("gemma3_text", "model.embed_tokens", (50, WIDTH), "aborts"),
        ("smollm3", "model.embed_tokens", (50, WIDTH), "aborts"),
        ("phi3", "model.layers.0.self_attn.q_proj", SHAPES["self_attn.q_proj"], "no place"),
        ("llama", "model.layers.0.self_attn.qkv_proj", SHAPES["self_attn.qkv_proj"], "no place"),
        ("llama", "model.layers.2.mlp.up_proj", SHAPES["mlp.up_proj"], "no place"),
        ("llama", "model.vision_tower.layers.0.mlp.up_proj", SHAPES["mlp.up_proj"], "no place"),
        ("llama", "model.layers.0.self_attn.q_proj", (HEADS * SIZE + 1, WIDTH), "4 heads"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj.3", (2 * INNER, WIDTH), "experts"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj", (INNER, WIDTH), "experts"),
        ("gpt2", "transformer.h.0.mlp.c_fc", (INNER, WIDTH), "known: llama, mistral"),
    ],
)
def test_what_has_no_place_is_refused_and_never_dropped(
    family: Callable[..., Path], model_type: str, module: str, shape: tuple[int, int], why: str
) -> None:
    vector = PreferenceVector({module: some(shape, 2)})
    with pytest.raises(InputError, match=why) as raised:
        plan_gguf(vector, read_base(family(model_type)))
    assert "\n" not in str(raised.value)
    assert raised.value.fix


def test_a_tied_qwen_refuses_and_an_untied_one_takes_the_head(family: Callable[..., Path]) -> None:
    vector = PreferenceVector({"lm_head": some((50, WIDTH), 2)})
    assert plan_gguf(vector, read_base(family("qwen2"))).names == {"lm_head": "output.weight"}
    with pytest.raises(InputError, match="tied"):
        plan_gguf(vector, read_base(family("qwen3", tie_word_embeddings=True)))


def test_a_multimodal_gemma_is_read_below_its_text_part(family: Callable[..., Path], tmp_path: Path) -> None:
    text = json.loads((family("gemma3_text") / "config.json").read_text())
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    module = "model.language_model.layers.1.self_attn.k_proj"
    vector = PreferenceVector({module: some(SHAPES["self_attn.k_proj"], 2)})
    assert plan_gguf(vector, read_base(folder)).names == {module: "blk.1.attn_k.weight"}


def test_a_vector_of_another_base_is_refused(tiny_llama: Path) -> None:
    vector = PreferenceVector({"model.layers.0.mlp.up_proj": some((8, 8), 2)})
    with pytest.raises(InputError, match="in the base and"):
        plan_gguf(vector, read_base(tiny_llama))
    with pytest.raises(InputError, match="nothing to write"):
        plan_gguf(vector * 0.0, read_base(tiny_llama))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
def test_verify_accepts_what_is_exported(tiny_model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    import transformers

    from tests.helpers import random_vector

    base = tiny_model(name)
    vector = random_vector(transformers.AutoModelForCausalLM.from_pretrained(base), rank=3, seed=0)
    report = verify(str(export(vector, base, tmp_path / "a.gguf")), base=str(base))
    assert report.findings == []
    assert report.unchecked == []
    assert set(report.checked) == {"llama.cpp", "ollama"}
    assert report.rank == 3


def broken(target: Path, change: str) -> Path:
    """A file that falls into one trap, written with the package and without our code."""
    writer = gguf.GGUFWriter(target, "qwen3" if change == "architecture" else "llama")
    writer.add_type("model" if change == "type" else "adapter")
    writer.add_string("adapter.type", "control" if change == "kind" else "lora")
    if change == "integer alpha":
        writer.add_uint32("adapter.lora.alpha", 2)
    elif change != "no alpha":
        writer.add_float32("adapter.lora.alpha", 0.0 if change == "zero alpha" else 2.0)
    ones = np.ones((64, 64), np.float32)
    kind = np.float16 if change == "types" else np.float32
    rank = 3 if change == "ranks" else 2
    name = "blk.7.attn_q.weight" if change == "layer" else "blk.0.attn_q.weight"
    columns = 63 if change == "shape" else 64
    writer.add_tensor(f"{name}.lora_a", ones[:2, :columns].astype(kind).copy())
    if change != "half":
        writer.add_tensor(f"{name}.lora_b", ones[:, :rank].copy())
    if change == "other":
        writer.add_tensor("blk.0.attn_q.bias", ones[0].copy())
    if change == "quantised":
        packed = gguf.quants.quantize(ones, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_v.weight.lora_a", packed[:32], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_v.weight.lora_b", ones[:32, :32].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("change", "rule", "severity"),
    [
        ("none", None, None),
        ("no alpha", None, None),
        ("types", None, None),
        ("architecture", "GGUF1", "block"),
        ("type", "GGUF1", "block"),
        ("kind", "GGUF1", "block"),
        ("integer alpha", "GGUF2", "crash"),
        ("zero alpha", "GGUF3", "wrong"),
        ("half", "GGUF4", "block"),
        ("other", "GGUF4", "block"),
        ("layer", "GGUF4", "block"),
        ("ranks", "GGUF5", "block"),
        ("shape", "GGUF5", "block"),
        ("quantised", "GGUF7", "warn"),
    ],
)
def test_verify_reports_each_trap(
    tiny_llama: Path, tmp_path: Path, change: str, rule: str | None, severity: str | None
) -> None:
    report = verify(str(broken(tmp_path / "a.gguf", change)), ["llama.cpp"], base=str(tiny_llama))
    assert [(finding.rule, finding.engines["llama.cpp"]) for finding in report.findings] == (
        [(rule, severity)] if rule else []
    )
    assert report.passes == (severity in (None, "warn"))


@pytest.mark.parametrize("length", [0, 3, 20, 200])
def test_verify_reports_a_file_that_is_cut_off(tmp_path: Path, length: int) -> None:
    whole = broken(tmp_path / "a.gguf", "none").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[:length])
    report = verify(str(tmp_path / "a.gguf"))
    assert report.findings[0].rule == "F5"
    assert not report.passes


def test_llama_cpp_answers_as_transformers_does(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import transformers

    write_base(tiny_llama, tmp_path / "base.gguf")
    embedding = {"model.embed_tokens": some((262, 64), 2, seed=7) * 0.1, "lm_head": some((262, 64), 2, seed=8) * 0.02}
    vectors = {
        "one rank": llama_vector,
        "many ranks": llama_vector + replace(llama_vector, deltas=dict(list(llama_vector.deltas.items())[:5])) * 0.5,
        "embedding": replace(llama_vector, deltas={**llama_vector.deltas, **embedding}),
    }
    answers = []
    for vector in (None, *vectors.values()):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        options = {}
        if vector:
            for name, delta in vector.deltas.items():
                model.get_submodule(name).weight.data += delta.dense()
            target = tmp_path / f"{len(answers)}.gguf"
            options = {"lora_path": str(export(vector, tiny_llama, target))}
        engine = llama_cpp.Llama(
            str(tmp_path / "base.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False, **options
        )
        tokens = list(range(1, 17))
        engine.eval(tokens)
        found = torch.tensor(engine.scores[: len(tokens)])
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0]
        assert float((found - expected).abs().max()) < 0.02  # its cache of keys and values is half precision
        theirs: list[int] = []
        for _ in range(24):
            theirs.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
            engine.eval(theirs[-1:])
        ours = model.generate(torch.tensor([tokens]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert theirs == ours[0, len(tokens) :].tolist()
        answers.append(tuple(theirs))
    assert len(set(answers)) == len(answers)


def test_the_base_of_the_vector_is_found(tiny_llama: Path, llama_vector: PreferenceVector) -> None:
    assert find_base(llama_vector.identity) is None  # a folder somewhere, whose name is all that is kept
    found = find_base(llama_vector.identity, str(tiny_llama))
    assert found
    assert (found.model_type, found.heads, found.tied) == ("llama", (4, 2), False)
