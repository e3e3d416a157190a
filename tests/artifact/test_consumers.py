"""What stock PEFT and transformers make of the folders that we write, and we of those that they write."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.artifact import Provenance, fold, plan_fold, read_adapter, write_adapter
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.helpers import random_vector

VECTOR = Provenance(kind="preference_vector", preference="helpful", sign=1)
MIX = Provenance(kind="fold", method="exact")
TOKENS = torch.arange(24).reshape(2, 12)


def load(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def with_dense(folder: Path, vector: PreferenceVector) -> torch.Tensor:
    """Logits of the base with the dense sum added to its weights."""
    model = load(folder)
    for name, delta in vector.deltas.items():
        model.get_submodule(name).weight.data += delta.dense()
    return logits(model)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@contextmanager
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Any warning, of the module or of a logger, fails."""
    for name in ("transformers", "peft", "huggingface_hub"):
        logging.getLogger(name).propagate = True
    caplog.set_level(logging.WARNING)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        yield
    said = [record.getMessage() for record in caplog.records if "kernels-community" not in record.getMessage()]
    assert said == []


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
    fold(plan_fold(base, vector), vector, tmp_path / "f", MIX)
    assert distance(logits(load(tmp_path / "f")), expected) <= 1e-5


def test_conv1d_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tiny_gpt2), LoraConfig(target_modules=["c_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="Conv1D"):
        read_adapter(tmp_path / "a")


def sharded(folder: Path, target: Path) -> Path:
    """The same model in several files."""
    import transformers

    load(folder).save_pretrained(target, max_shard_size="100kB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    assert len(list(target.glob("*.safetensors"))) > 1
    return target


@pytest.mark.parametrize("shards", [False, True])
def test_a_fold_is_base_plus_delta(
    tiny_llama: Path,
    llama_vector: PreferenceVector,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shards: bool,
) -> None:
    import transformers

    base = sharded(tiny_llama, tmp_path / "base") if shards else tiny_llama
    steps: list[int] = []
    plan = plan_fold(base, llama_vector)
    kept = fold(plan, llama_vector, tmp_path / "f", MIX, advance=lambda: steps.append(1))
    assert kept > 0.9999
    assert len(steps) == plan.tensors
    assert plan.size == sum(t.numel() * t.element_size() for t in load(base).state_dict().values())
    with no_complaints(caplog):
        model = load(tmp_path / "f")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "f")
    assert distance(logits(model), with_dense(base, llama_vector)) <= 1e-6
    assert tokenizer.chat_template
    copied = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in copied:
        assert (tmp_path / "f" / name).read_bytes() == (base / name).read_bytes()
    weights = {path.name for path in base.glob("model*")}
    assert {path.name for path in (tmp_path / "f").iterdir()} == copied | weights | {"prefvec.json"}
    assert json.loads((tmp_path / "f" / "prefvec.json").read_text())["metrics"] == {"delta_kept": kept}


def test_what_the_vector_does_not_touch_is_copied_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    delta = LowRankDelta(torch.ones(1, 64), torch.ones(64, 1))
    vector = PreferenceVector({"model.layers.0.self_attn.q_proj": delta})
    fold(plan_fold(tiny_llama, vector), vector, tmp_path / "f", MIX)
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "f" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_tied_weights_stay_tied(tiny_gemma3: Path, tmp_path: Path) -> None:
    vector = random_vector(load(tiny_gemma3), rank=2, seed=0)
    fold(plan_fold(tiny_gemma3, vector), vector, tmp_path / "f", MIX)
    model = load(tmp_path / "f")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fold_in_half_precision_says_what_it_kept(
    tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path, dtype: torch.dtype
) -> None:
    small = llama_vector * 0.01
    kept = fold(plan_fold(tiny_llama, small, dtype), small, tmp_path / "f", MIX)
    model, plain = load(tmp_path / "f"), load(tiny_llama)
    assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
    lost = whole = 0.0
    for name, delta in small.deltas.items():
        before, after = plain.get_submodule(name).weight.detach(), model.get_submodule(name).weight.detach()
        change = after.float() - before.to(dtype).float()
        lost += float((change - delta.dense()).norm()) ** 2
        whole += float(delta.dense().norm()) ** 2
    assert kept == pytest.approx(1 - (lost / whole) ** 0.5, abs=1e-4)
    assert kept < (0.9 if dtype == torch.bfloat16 else 0.99)


def test_folds_that_are_refused(tiny_llama: Path, llama_vector: PreferenceVector, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(InputError, match="changes no module"):
        plan_fold(tiny_llama, PreferenceVector({}))
    missing = PreferenceVector({"model.layers.7.mlp.up_proj": LowRankDelta(torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(InputError, match=r"no linear layer model\.layers\.7\.mlp\.up_proj"):
        plan_fold(tiny_llama, missing)
    with pytest.raises(InputError, match="overflows F16"):
        fold(plan_fold(tiny_llama, llama_vector * 1e8, torch.float16), llama_vector * 1e8, tmp_path / "f", MIX)
    assert not (tmp_path / "f").exists()
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
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


def test_pissa_needs_its_conversion_and_is_read_after_it(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(tiny_llama), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = logits(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(InputError, match="pissa"):
        read_adapter(tmp_path / "raw")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    vector = read_adapter(tmp_path / "converted").vector
    assert distance(with_dense(tiny_llama, vector), expected) <= 1e-4
    assert (tmp_path / "converted" / WEIGHTS).is_file()
