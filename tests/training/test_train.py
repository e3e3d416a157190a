"""From a recipe to a folder: what it holds, that PEFT reads it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_prefvec.artifact import read_adapter
from lora_prefvec.errors import InputError, RunError
from lora_prefvec.inference import LiveMixer, LoadedBase
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import Trained, train
from tests.training.tiny import hidden, tiny_recipe, write_pairs

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "prefvec.json", "recipe.yaml"}
ALL = [(sides, quantization) for sides in ("two", "pair") for quantization in ("nf4", "none")]
Train = Callable[..., Trained]
MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(("sides", "quantization"), ALL)
def test_the_folder_holds_all_of_the_artifact_and_nothing_is_left_beside_it(
    sides: str, quantization: str, trained: Train, recipe: MakeRecipe
) -> None:
    made = trained(sides, quantization)
    inside = {"positive", "negative"} if sides == "pair" else set()
    assert {path.name for path in made.folder.iterdir()} == FILES | inside
    for side in inside:
        assert {path.name for path in (made.folder / side).iterdir()} == FILES
    assert (made.folder / "recipe.yaml").read_text() == recipe(sides=sides, quantization=quantization).to_yaml()
    assert hidden(made.folder.parent) == []


@pytest.mark.parametrize(("sides", "quantization"), ALL)
def test_provenance_tells_how_it_was_made(
    sides: str, quantization: str, trained: Train, pairs: Path, tiny_llama: Path
) -> None:
    made = trained(sides, quantization)
    facts = read_adapter(made.folder).provenance
    assert facts is not None
    assert facts.data is not None
    assert facts.training is not None
    assert facts.base is not None
    assert (facts.kind, facts.preference, facts.sign, facts.sides) == ("preference_vector", "tiny", 1, sides)
    assert (facts.base.id, facts.base.quantization) == (tiny_llama.name, quantization)
    assert (facts.data.id, facts.data.rows, facts.data.swapped) == (pairs.name, 40, False)
    assert facts.training.steps == (12 if sides == "pair" else 6)
    assert set(facts.training.libraries) >= {"torch", "trl", "peft", "bitsandbytes"}
    assert facts.metrics == made.metrics
    assert str(made.folder.parent) not in (made.folder / "prefvec.json").read_text()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_vector_of_a_pair_is_the_difference_of_its_adapters(quantization: str, trained: Train) -> None:
    folder = trained("pair", quantization).folder
    vector, positive, negative = (read_adapter(folder / part) for part in ("", "positive", "negative"))
    for adapter, sign in ((positive, 1), (negative, -1)):
        assert adapter.provenance is not None
        assert adapter.provenance.data is not None
        assert (adapter.provenance.kind, adapter.provenance.sign) == ("preference_adapter", sign)
        assert adapter.provenance.data.swapped is (sign < 0)
    assert vector.provenance is not None
    assert [(parent.sha256, parent.coefficient) for parent in vector.provenance.parents] == [
        (positive.sha256, 1.0),
        (negative.sha256, -1.0),
    ]
    assert len(vector.vector.deltas) == 14
    for name, delta in vector.vector.deltas.items():
        expected = positive.vector.deltas[name].dense().double() - negative.vector.deltas[name].dense().double()
        assert (delta.dense() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("sides", "quantization"), ALL)
def test_plus_prefers_the_chosen_and_minus_the_rejected(sides: str, quantization: str, trained: Train) -> None:
    metrics = trained(sides, quantization).metrics
    assert metrics["held_out_pairs"] == 8
    for name in ("accuracy", "margin"):
        plus, minus = metrics[f"held_out_{name}@+1"], metrics[f"held_out_{name}@-1"]
        assert plus is not None
        assert minus is not None
        assert plus > (0.9 if name == "accuracy" else 0.2)
        assert minus < (0.1 if name == "accuracy" else -0.2)


@pytest.mark.parametrize("sides", ["two", "pair"])
def test_stock_peft_answers_as_the_live_mixer(sides: str, trained: Train, tiny_llama: Path) -> None:
    made = trained(sides, "none")
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        bare = model(ids).logits
        with LiveMixer(model, {"tiny": made.vector}) as mixer:
            mixer.set_mix({"tiny": 1.0})
            live = model(ids).logits
        stock = PeftModel.from_pretrained(model, made.folder).eval()(ids).logits
    assert (live - bare).abs().max() > 0.01
    torch.testing.assert_close(stock, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma3", "qwen3", "mistral"])
def test_every_family_is_trained_and_read_by_stock_peft(
    family: str, tiny_model: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    folder = tiny_model(family)
    made = train(tiny_recipe(folder, pairs, quantization="none", compute_dtype="float32"), tmp_path / "out")
    assert made.metrics["held_out_accuracy@+1"] == 1.0
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        with LiveMixer(model, {"tiny": made.vector}) as mixer:
            mixer.set_mix({"tiny": 1.0})
            live = model(ids).logits
        stock = PeftModel.from_pretrained(model, made.folder).eval()(ids).logits
    torch.testing.assert_close(stock, live, rtol=1e-4, atol=1e-4)


def test_without_held_out_pairs_nothing_is_measured(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    made = train(recipe(max_steps=2).model_copy(update={"held_out": 0}), tmp_path / "out", base=nf4)
    assert made.metrics == {}
    assert read_adapter(made.folder).vector.norm() > 0


def test_anchors_are_repeated_up_to_their_share(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    anchors = write_pairs(tmp_path / "anchors.jsonl", rows=5, seed=1)
    wanted = recipe(max_steps=2).model_dump() | {"anchors": {"source": str(anchors), "share": 0.5}}
    made = train(Recipe.model_validate(wanted), tmp_path / "out", base=nf4)
    facts = json.loads((made.folder / "prefvec.json").read_text())
    assert (facts["anchors"]["id"], facts["anchors"]["rows"]) == ("anchors.jsonl", 5)
    assert facts["training"]["anchor_share"] == 0.5


def test_a_run_over_epochs_takes_as_many_steps_as_foretold(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    wanted = recipe(max_steps=None, epochs=1.5, batch_size=6)  # 32 pairs: 6 steps an epoch, the last of 2 pairs
    made = train(wanted, tmp_path / "out", base=nf4)
    assert json.loads((made.folder / "prefvec.json").read_text())["training"]["steps"] == 9


def test_gradient_checkpointing_changes_no_bit(trained: Train) -> None:
    plain, frugal = trained("two"), trained("two", gradient_checkpointing=True)
    for name, delta in plain.vector.deltas.items():
        assert torch.equal(delta.B, frugal.vector.deltas[name].B)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_loss_that_is_no_number_names_the_learning_rate(
    steps: int, recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path
) -> None:
    wild = recipe(learning_rate=1e38, warmup_ratio=0.0, max_steps=steps)
    with pytest.raises(RunError, match=r"no longer numbers|became nan|became inf") as failure:
        train(wild, tmp_path / "out", base=nf4)
    assert "Lower training.learning_rate (now 1e+38)" in failure.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "norm", "proj"])
def test_a_target_that_cannot_be_adapted_is_refused(
    target: str, recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path
) -> None:
    wanted = recipe()
    changed = wanted.model_copy(update={"lora": wanted.lora.model_copy(update={"targets": [target]})})
    with pytest.raises(InputError, match=f"lora.targets: {target!r}") as refusal:
        train(changed, tmp_path / "out", base=nf4)
    assert "_proj'?" in refusal.value.fix or "q_proj" in refusal.value.fix


def test_chosen_targets_alone_are_trained(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    wanted = recipe(max_steps=2)
    changed = wanted.model_copy(update={"lora": wanted.lora.model_copy(update={"targets": ["q_proj", "v_proj"]})})
    vector = train(changed, tmp_path / "out", base=nf4).vector
    assert {name.rpartition(".")[2] for name in vector.deltas} == {"q_proj", "v_proj"}


def test_an_existing_folder_is_refused_before_anything_is_loaded(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("lora_prefvec.training.methods.preference_vector.load", lambda _: pytest.fail("read"))
    with pytest.raises(InputError, match="exists"):
        train(recipe(), tmp_path / "out")
