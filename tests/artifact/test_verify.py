"""`verify`: each trap that an engine sets is reported for it, and nothing that we write falls into one."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import Provenance, identity_of, read_adapter, write_adapter
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.artifact.verify import ENGINES, RULES, Report, verify
from lora_prefvec.artifact.verify.config import KNOWN_FIELDS
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.helpers import random_vector

VECTOR = Provenance(kind="preference_vector", preference="helpful", sign=1)
P = "base_model.model.model.layers."
Q0, V0, UP0, GATE0 = (
    f"{P}0.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")
)
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


@pytest.fixture
def sound(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> Path:
    """A canonical folder for the tiny Llama, which says that it is on the Hub."""
    named = replace(
        llama_vector, identity=replace(identity_of(tiny_llama), id=f"owner/{tiny_llama.name}", revision="1" * 40)
    )
    write_adapter(tmp_path / "sound", named, VECTOR, base=tiny_llama)
    (tmp_path / "sound" / "prefvec.json").unlink()  # the weights are changed below
    return tmp_path / "sound"


@pytest.fixture
def changed(sound: Path) -> Callable[[Change], Path]:
    """That folder after a change of its config and tensors."""

    def change(by: Change) -> Path:
        config = json.loads((sound / "adapter_config.json").read_text())
        tensors = load_file(sound / WEIGHTS)
        by(config, tensors)
        (sound / "adapter_config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, sound / WEIGHTS)
        return sound

    return change


def fails(report: Report) -> dict[str, dict[str, str]]:
    """Rule -> engine -> severity; Ollama's standing warning is left out."""
    found: dict[str, dict[str, str]] = {}
    for finding in report.findings:
        if finding.rule != "RUN3":
            found.setdefault(finding.rule, {}).update(finding.engines)
    return found


def says(**values: Any) -> Change:
    return lambda config, _: config.update(values)


def holds(**shapes: Any) -> Change:
    """Tensors that are added, by name with `__` for a dot."""
    return lambda _, tensors: tensors.update({name.replace("__", "."): torch.ones(s) for name, s in shapes.items()})


def lacks(*words: str) -> Change:
    def drop(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if all(word in name for word in words)]:
            del tensors[name]

    return drop


def renamed(old: str, new: str) -> Change:
    def rename(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return rename


def reshaped(size: int) -> Change:
    """Every q_proj as of a model of another width."""

    def shape(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "q_proj" in name:
                tensors[name] = torch.ones(len(tensor), size) if "lora_A" in name else torch.ones(size, tensor.shape[1])

    return shape


def ranks(rank: int, words: str = "") -> Change:
    """Factors of another rank, and the config as it was."""

    def cut(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if words in name:
                tensors[name] = tensor[:rank] if "lora_A" in name else tensor[:, :rank]

    return cut


def scaled(by: dict[str, float]) -> Change:
    def multiply(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] *= next(factor for part, factor in by.items() if part in name)

    return multiply


def both(*changes: Change) -> Change:
    return lambda config, tensors: [change(config, tensors) for change in changes]


# Number in the list of traps -> what falls into it, the rule that reports it, and what happens where.
TRAPS: dict[str, tuple[Change, str, dict[str, str]]] = {
    "1 rsLoRA": (says(use_rslora=True), "C5", {"sglang": "wrong", "llama.cpp": "wrong", "ollama": "wrong"}),
    "2 alpha_pattern": (
        says(alpha_pattern={"q_proj": 3}),
        "C6",
        {"sglang": "wrong", "llama.cpp": "wrong", "ollama": "wrong", "lorax": "wrong"},
    ),
    "3 alpha 0": (says(lora_alpha=0), "C3", {"llama.cpp": "wrong", "vllm": "drop", "peft": "drop"}),
    "4 rank of the config": (
        ranks(4),
        "S1",
        {"vllm": "wrong", "llama.cpp": "wrong", "sglang": "crash", "peft": "block", "transformers": "block"},
    ),
    "5 padded rank": (both(ranks(5), says(r=5, lora_alpha=5)), "S5", {"lorax": "wrong", "vllm": "warn"}),
    "7 odd scale": (says(lora_alpha=24), "S9", {"vllm": "warn"}),
    "8 prefix": (
        renamed("model.layers", "model.text.layers"),
        "N5",
        {"vllm": "drop", "peft": "drop", "transformers": "drop", "sglang": "block", "llama.cpp": "block"},
    ),
    "8 layer": (renamed("layers.1.", "layers.9."), "N5", {"vllm": "drop", "peft": "drop", "sglang": "block"}),
    "8 multimodal name": (
        renamed("model.layers", "model.language_model.layers"),
        "N8",
        {"vllm": "drop", "peft": "drop"},
    ),
    "9 not targeted": (says(target_modules=["q_proj"]), "N11", {"peft": "drop", "transformers": "drop"}),
    "9 another layer": (says(layers_to_transform=[0]), "N11", {"peft": "drop", "transformers": "drop"}),
    "10 no prefix": (renamed("base_model.model.", ""), "N1", {"peft": "drop", "lorax": "drop"}),
    "10 adapter name": (
        renamed(".weight", ".default.weight"),
        "N2",
        {"vllm": "block", "llama.cpp": "block", "transformers": "drop", "peft": "drop"},
    ),
    "11 modules_to_save": (
        says(modules_to_save=["lm_head"]),
        "C10",
        {"sglang": "drop", "lorax": "drop", "vllm": "block", "llama.cpp": "block"},
    ),
    "11 unlisted embedding": (
        holds(
            **{
                f"{P[:-8]}.embed_tokens.lora_embedding_{part}".replace(".", "__"): shape
                for part, shape in (("A", (8, 262)), ("B", (64, 8)))
            }
        ),
        "E8",
        {"sglang": "drop"},
    ),
    "12 norm weights": (
        holds(**{f"{P}0.input_layernorm.weight".replace(".", "__"): (64,)}),
        "N4",
        {"llama.cpp": "block", "vllm": "block", "sglang": "crash"},
    ),
    "13 incomplete leaf": (lacks("layers.1.mlp.down_proj"), "N10", {"lorax": "drop", "peft": "warn"}),
    "15 vision tower": (renamed("model.layers", "vision_tower.layers"), "N6", {"llama.cpp": "drop", "sglang": "crash"}),
    "16 smaller shapes": (
        reshaped(32),
        "S2",
        {"vllm": "wrong", "sglang": "crash", "peft": "block", "llama.cpp": "block"},
    ),
    "16 larger shapes": (reshaped(128), "S2", {"vllm": "block", "sglang": "crash", "peft": "block"}),
    "18 bias": (holds(**{f"{Q0}.lora_B.bias".replace(".", "__"): (64,)}), "N4", {"sglang": "crash", "vllm": "block"}),
    "19 PiSSA": (
        says(init_lora_weights="pissa_niter_4"),
        "C11",
        {"peft": "wrong", "transformers": "wrong", "vllm": "block"},
    ),
    "20 base layer": (
        holds(**{f"{P[:-8]}.embed_tokens.base_layer.weight".replace(".", "__"): (262, 64)}),
        "N4",
        {"peft": "wrong", "transformers": "wrong"},
    ),
    "26 rank pattern": (
        both(says(rank_pattern={"q_proj": 4}), ranks(4, "q_proj")),
        "C7",
        {"sglang": "crash", "mlx": "block", "lorax": "block"},
    ),
    "26 ranks": (
        both(says(rank_pattern={"q_proj": 4}), ranks(4, "q_proj")),
        "S3",
        {"sglang": "crash", "mlx": "block", "lorax": "block"},
    ),
    "26 q without v": (lacks("v_proj"), "N9", {"sglang": "block"}),
    "26 k without q": (lacks("q_proj"), "N9", {"sglang": "crash"}),
    "26 up without gate": (lacks("gate_proj"), "N9", {"sglang": "crash"}),
    "one half": (
        lacks(f"{Q0}.lora_A"),
        "N3",
        {"vllm": "block", "llama.cpp": "block", "sglang": "crash", "peft": "warn", "mlx": "drop"},
    ),
    "peft_type": (
        says(peft_type="IA3"),
        "C1",
        {"peft": "block", "transformers": "block", "sglang": "block", "vllm": "drop"},
    ),
    "peft_type in small letters": (
        says(peft_type="lora"),
        "C1",
        {"peft": "block", "transformers": "block", "vllm": "drop"},
    ),
    "r": (says(r="8"), "C2", {"peft": "block", "vllm": "block", "sglang": "block", "transformers": "block"}),
    "no alpha": (says(lora_alpha=None), "C3", {"vllm": "block", "llama.cpp": "block"}),
    "float alpha": (says(lora_alpha=8.0), "C4", {"ollama": "block"}),
    "bias": (says(bias="all"), "C8", {"vllm": "block", "sglang": "crash", "lorax": "wrong"}),
    "DoRA": (says(use_dora=True), "C9", {"vllm": "block", "sglang": "block", "llama.cpp": "block", "lorax": "wrong"}),
    "regex": (says(target_modules=".*_proj"), "C12", {"sglang": "block"}),
    "no targets": (lambda config, _: config.pop("target_modules"), "C12", {"vllm": "block", "sglang": "block"}),
    "other leaves": (says(target_modules=["q_proj", "c_attn"]), "C13", {"sglang": "block"}),
    "layer_replication": (says(layer_replication=[[0, 1]]), "C14", {"vllm": "block", "sglang": "wrong"}),
    "KaSA": (says(kasa_config={"beta": 1}), "C15", {"vllm": "wrong", "sglang": "wrong", "llama.cpp": "wrong"}),
    "aLoRA": (says(alora_invocation_tokens=[1]), "C16", {"vllm": "block", "sglang": "wrong"}),
    "trained tokens": (says(trainable_token_indices=[1]), "C17", {"vllm": "block", "sglang": "drop"}),
    "a local base": (says(base_model_name_or_path="/models/base"), "C18", {"vllm": "warn"}),
    "no revision": (says(revision=None), "C19", {"peft": "warn"}),
    "unknown field": (says(prefvec=1), "C20", {"peft": "warn", "transformers": "warn"}),
    "fused": (
        renamed("self_attn.q_proj", "self_attn.qkv_proj"),
        "N7",
        {"vllm": "block", "llama.cpp": "block", "peft": "drop"},
    ),
    "integers": (lambda _, t: t.update({n: x.int() for n, x in t.items()}), "S6", dict.fromkeys(ENGINES, "block")),
    "two types": (
        lambda _, t: t.update({n: x.half() for n, x in t.items() if "lora_A" in n}),
        "S6",
        {"llama.cpp": "warn"},
    ),
    "NaN": (scaled({"q_proj.lora_B": math.nan, "": 1.0}), "S7", dict.fromkeys(ENGINES, "wrong")),
    "beyond float16": (scaled({"q_proj.lora_B": 1e8, "": 1.0}), "S7", dict.fromkeys(ENGINES, "wrong")),
    "zero": (scaled({"lora_B": 0.0, "": 1.0}), "S8", dict.fromkeys(ENGINES, "warn")),
    "experts together": (
        holds(**{f"{P}0.mlp.experts.lora_{part}.weight".replace(".", "__"): (8, 8) for part in "AB"}),
        "MOE2",
        {"vllm": "block", "llama.cpp": "block"},
    ),
    "an expert alone": (
        holds(**{f"{P}0.mlp.experts.1.up_proj.lora_{part}.weight".replace(".", "__"): (8, 8) for part in "AB"}),
        "MOE1",
        {"vllm": "crash", "llama.cpp": "block", "peft": "block", "transformers": "block"},
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_reported_for_its_engine(changed: Callable[[Change], Path], tiny_llama: Path, trap: str) -> None:
    change, rule, expected = TRAPS[trap]
    report = verify(str(changed(change)), base=str(tiny_llama))
    found = fails(report).get(rule, {})
    assert {engine: found.get(engine) for engine in expected} == expected
    for engine, severity in found.items():
        assert report.verdict(engine) == "fails" if severity != "warn" else report.verdict(engine) != "ok"
    for finding in report.findings:
        assert "\n" not in finding.problem + finding.fix
        assert finding.fix


def test_factors_that_half_precision_loses_are_reported(changed: Callable[[Change], Path]) -> None:
    folder = changed(scaled({"lora_A": 2.0**-18, "lora_B": 2.0**14}))
    expected = dict.fromkeys(["vllm", "sglang", "transformers", "lorax"], "warn")
    assert fails(verify(str(folder)))["S10"] == expected


def test_another_name_of_the_base_is_told(sound: Path, tiny_llama: Path, tmp_path: Path) -> None:
    found = fails(verify(str(sound), base=str(shutil.copytree(tiny_llama, tmp_path / "copy"))))
    assert found == {"I2": dict.fromkeys(ENGINES, "warn")}


def test_the_sound_folder_falls_into_none(sound: Path, tiny_llama: Path) -> None:
    report = verify(str(sound), base=str(tiny_llama))
    assert fails(report) == {}
    assert report.unchecked == []
    assert {engine: report.verdict(engine) for engine in ENGINES} == dict.fromkeys(ENGINES, "ok") | {"ollama": "warn"}


def test_every_rule_is_tested() -> None:
    elsewhere = {
        "F1",
        "F2",
        "F3",
        "F4",
        "F5",
        "I1",
        "I2",
        "S4",
        "E2",
        "E3",
        "E4",
        "E5",
        "E6",
        "E7",
        "A1",
        "RUN3",
        "S10",
    }
    assert {rule.id for rule in RULES} == {rule for _, rule, _ in TRAPS.values()} | elsewhere | {"A1", "RUN3"}


def test_the_known_fields_are_those_of_peft() -> None:
    import peft

    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} | {"peft_version"} == KNOWN_FIELDS


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("gemma3", "embed_tokens", {"E2": ("vllm", "block"), "E4": ("llama.cpp", "crash")}),
        ("gemma3", "embed_tokens", {"E2": ("sglang", "drop"), "E4": ("mlx", "wrong")}),
        ("gemma3", "lm_head", {"E5": ("llama.cpp", "block")}),
        ("mistral", "embed_tokens", {"E2": ("vllm", "block")}),
        ("llama", "embed_tokens", {}),
        ("llama", "lm_head", {}),
    ],
)
def test_embeddings_and_heads(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, module: str, expected: dict[str, tuple[str, str]]
) -> None:
    folder = embedding_adapter(tmp_path / "a", module, vocabulary=262)
    report = verify(str(folder), base=str(tiny_model(family)))
    found = {rule: engines for rule, engines in fails(report).items() if rule.startswith("E")}
    for rule, (engine, severity) in expected.items():
        assert found[rule][engine] == severity
    assert bool(found) == bool(expected)
    wide = embedding_adapter(tmp_path / "b", module, vocabulary=300)
    if module == "embed_tokens":
        assert fails(verify(str(wide), base=str(tiny_model(family))))["E3"] == {
            "vllm": "block",
            "sglang": "crash",
            "llama.cpp": "block",
            "ollama": "block",
        }


def embedding_adapter(folder: Path, module: str, vocabulary: int) -> Path:
    folder.mkdir()
    if module == "lm_head":
        tensors = {"lm_head.lora_A.weight": torch.ones(8, 64), "lm_head.lora_B.weight": torch.ones(vocabulary, 8)}
    else:
        tensors = {
            "model.embed_tokens.lora_embedding_A": torch.ones(8, vocabulary),
            "model.embed_tokens.lora_embedding_B": torch.ones(64, 8),
        }
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": [module], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "module", "rule", "expected"),
    [
        (
            {"model_type": "gemma2", "tie_word_embeddings": False},
            "lm_head",
            "E6",
            {"llama.cpp": "drop", "vllm": "block"},
        ),
        ({"model_type": "llama", "vocab_size": 300_000}, "lm_head", "E7", {"vllm": "block"}),
        ({"model_type": "falcon"}, "lm_head", "A1", {"llama.cpp": "warn", "ollama": "warn"}),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "lm_head", "N8", {"peft": "drop"}),
    ],
)
def test_what_a_config_of_the_base_tells(
    tmp_path: Path, config: dict[str, Any], module: str, rule: str, expected: dict[str, str]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    report = verify(str(embedding_adapter(tmp_path / "a", module, 262)), base=str(tmp_path / "base"))
    found = fails(report)[rule]
    assert {engine: found.get(engine) for engine in expected} == expected
    assert "N5" in report.unchecked  # the base has no weights here


def test_traps_of_the_files(sound: Path, tiny_llama: Path) -> None:
    def found() -> dict[str, dict[str, str]]:
        return fails(verify(str(sound), base=str(tiny_llama)))

    shutil.copy(sound / WEIGHTS, sound / "other.safetensors")
    assert found() == {"F2": {"sglang": "crash", "lorax": "wrong"}}
    (sound / "other.safetensors").unlink()
    (sound / "added_tokens.json").write_text('{"<new>": 262}')
    assert found() == {"F3": {"sglang": "block"}}
    (sound / "added_tokens.json").write_text('{"<old>": 258}')
    assert found() == {}
    whole = (sound / WEIGHTS).read_bytes()
    (sound / WEIGHTS).write_bytes(whole[:-1])
    assert found()["F5"] == dict.fromkeys(ENGINES, "block")
    (sound / WEIGHTS).rename(sound / "adapter_model.bin")
    assert found() == {
        "F4": {"mlx": "block", "ollama": "block"}
        | dict.fromkeys(["vllm", "sglang", "llama.cpp", "peft", "transformers"], "warn")
    }
    (sound / "adapter_model.bin").unlink()
    assert found()["F1"] == dict.fromkeys(ENGINES, "block")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"r": {"a": 1}, "target_modules": 3, "rank_pattern": [1], "bias": {}}']
)
def test_a_damaged_config_is_reported(sound: Path, text: str) -> None:
    (sound / "adapter_config.json").write_text(text)
    report = verify(str(sound))
    assert not report.passes


def test_whatever_lies_there_is_judged(sound: Path) -> None:
    values: list[Any] = [None, True, -1, 10**400, 1e308, "x", "(a+)+$", [], [3], {"a": None}, {"(b*)*": 2}, [["q"]]]
    config = json.loads((sound / "adapter_config.json").read_text())
    whole = (sound / WEIGHTS).read_bytes()
    generator = random.Random(0)
    for _ in range(150):
        keys = generator.sample(sorted(KNOWN_FIELDS), 3)
        mutated = {**config, **{key: generator.choice(values) for key in keys}}
        (sound / "adapter_config.json").write_text(json.dumps(mutated))
        damaged = bytearray(whole)
        for _ in range(generator.randrange(3)):
            damaged[generator.choice([generator.randrange(4000), generator.randrange(len(whole))])] ^= (
                1 << generator.randrange(8)
            )
        (sound / WEIGHTS).write_bytes(damaged[: generator.choice([len(whole), generator.randrange(len(whole))])])
        report = verify(str(sound))
        assert report.passes == all(report.verdict(engine) != "fails" for engine in ENGINES)


def test_absurd_names_take_no_time(sound: Path) -> None:
    long = "model.layers." + "9" * 50 + ".mlp" + ".lora_A" * 20_000
    names = [f"{long}.weight", f"base_model.model.model.layers.{'9' * 6}.mlp.up_proj.lora_A.weight", ".", "experts.1"]
    save_file({name: torch.ones(8, 8) for name in names}, sound / WEIGHTS)
    begin = time.monotonic()
    assert not verify(str(sound)).passes
    assert time.monotonic() - begin < 2


def test_integrity(tiny_llama: Path, tiny_mistral: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", llama_vector, VECTOR, base=tiny_llama)
    assert fails(verify(str(tmp_path / "a"), base=str(tiny_llama))).keys() <= {"C18"}
    said = fails(verify(str(tmp_path / "a"), base=str(tiny_mistral)))
    assert said["I2"] == dict.fromkeys(ENGINES, "wrong")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "a" / WEIGHTS)
    report = verify(str(tmp_path / "a"), ["peft"])
    assert fails(report)["I1"] == {"peft": "wrong"}
    assert "SHA-256" in report.findings[0].problem


def test_a_rank_above_the_limit_gets_the_command_and_the_energy(
    sound: Path, llama_vector: PreferenceVector, tmp_path: Path
) -> None:
    pieces = [random_pieces(llama_vector, seed) for seed in range(5)]
    total = pieces[0] + pieces[1] + pieces[2] + pieces[3] + pieces[4]
    write_adapter(tmp_path / "wide", total, VECTOR)
    report = verify(str(tmp_path / "wide"), ["vllm", "sglang"])
    assert report.rank == 32
    assert fails(report)["S4"] == {"vllm": "warn"}
    assert "--max-lora-rank 32" in report.way("vllm")
    report = verify(str(tmp_path / "wide"), ["vllm", "sglang", "peft"], max_rank=20)
    finding = next(finding for finding in report.findings if finding.rule == "S4")
    assert finding.engines == {"vllm": "block", "sglang": "block"}
    spectra = [torch.linalg.svdvals(delta.dense().double()) ** 2 for delta in total.deltas.values()]
    kept = sum(float(values[:16].sum()) for values in spectra) / sum(float(values.sum()) for values in spectra)
    assert 0.5 < kept < 0.99
    command = f"prefvec compose {tmp_path / 'wide'} --rank 16 --out DIR"
    assert finding.fix == f"{command} keeps {math.floor(kept * 1e4) / 100:.2f}% of the energy"
    assert report.verdict("peft") == "ok" or fails(report).keys() == {"S4", "C19", "C18"}
    assert verify(str(tmp_path / "wide"), ["vllm"], max_rank=32).passes


def random_pieces(vector: PreferenceVector, seed: int) -> PreferenceVector:
    generator = torch.Generator().manual_seed(seed)
    return replace(
        vector,
        deltas={
            name: LowRankDelta(
                torch.randn(4, delta.shape[1], generator=generator),
                torch.randn(delta.shape[0], 4, generator=generator) * 0.1,
            )
            for name, delta in vector.deltas.items()
        },
    )


def test_what_is_asked_wrongly(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'vllm'"):
        verify(str(sound), ["vlm"])
    with pytest.raises(InputError, match="there is no"):
        verify("nothing-here")
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"llama\.cpp and Ollama alone"):
        verify(str(tmp_path / "a.gguf"), ["peft"])


def peft_folder(base: Path, folder: Path, **options: Any) -> Path:
    """What PEFT writes for a LoRA with these options."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def only(vector: PreferenceVector, *words: str) -> PreferenceVector:
    return replace(vector, deltas={n: d for n, d in vector.deltas.items() if any(word in n for word in words)})


KINDS: dict[str, Callable[[PreferenceVector, Path, Path], PreferenceVector]] = {
    "plain": lambda vector, base, work: vector,
    "different ranks": lambda vector, base, work: vector + only(random_pieces(vector, 1), "q_proj", "layers.1.mlp"),
    "rank above 16": lambda vector, base, work: (
        vector
        + random_pieces(vector, 1)
        + random_pieces(vector, 2) * 3
        + random_pieces(vector, 3)
        - random_pieces(vector, 4)
    ),
    "missing modules": lambda vector, base, work: only(vector, "v_proj", "up_proj"),
    "a single module": lambda vector, base, work: only(vector, "layers.1.self_attn.k_proj"),
    "a single layer": lambda vector, base, work: only(vector, "layers.1."),
    "unbalanced": lambda vector, base, work: replace(
        vector, deltas={n: LowRankDelta(d.A * 2.0**-18, d.B * 2.0**18) for n, d in vector.deltas.items()}
    ),
    "negative": lambda vector, base, work: -vector,
    "rsLoRA": lambda vector, base, work: read_adapter(peft_folder(base, work, use_rslora=True)).vector,
    "patterns": lambda vector, base, work: (
        read_adapter(
            peft_folder(
                base, work, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6}, alpha_pattern={"down_proj": 9}
            )
        ).vector
    ),
    "regex": lambda vector, base, work: (
        read_adapter(peft_folder(base, work, target_modules=r".*\.(gate|up)_proj")).vector
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_falls_into_no_trap(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    identity = replace(identity_of(tiny_llama), id="owner/base", revision="1" * 40)
    vector = replace(KINDS[kind](llama_vector, tiny_llama, tmp_path / "source"), identity=identity)
    write_adapter(tmp_path / "a", vector, VECTOR, dtype=dtype, base=tiny_llama)
    report = verify(str(tmp_path / "a"), base=str(tiny_llama))
    costs = {"S4", "S5"} if vector.rank > 16 else set()  # a flag of vLLM, and perhaps some of its memory
    assert fails(report).keys() <= costs
    assert report.passes
    assert report.unchecked == []


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3", "phi3"])
def test_nor_for_other_families(tiny_model: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    import transformers

    base = tiny_model(family)
    vector = random_vector(transformers.AutoModelForCausalLM.from_pretrained(base), rank=3, seed=0)
    write_adapter(tmp_path / "a", vector, replace_base(VECTOR, base), base=base)
    report = verify(str(tmp_path / "a"), base=str(base))
    assert fails(report) == {}
    assert report.unchecked == []


def replace_base(facts: Provenance, base: Path) -> Provenance:
    return facts.model_copy(update={"base": replace(identity_of(base), id="owner/base", revision="1" * 40)})
