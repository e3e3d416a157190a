"""The whole way on CUDA: load in NF4, train both ways, resume, compose, generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_prefvec.artifact import compose, mix_provenance, open_mix, read_adapter, write_adapter
from lora_prefvec.inference import LiveMixer, LoadedBase, generate, load_base, pair_log_probs
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import Trained, adapter, train
from tests.inference.test_log_probs import some_pairs
from tests.training.test_resident import assert_unchanged, state
from tests.training.tiny import Stop, hidden, stop_at, tiny_recipe, trainer_of, write_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [[{"role": "user", "content": f"say {word}"}] for word in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> LoadedBase:
    return load_base(tiny_llama)


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")
    return lambda **changes: tiny_recipe(tiny_llama, pairs, **changes)


@pytest.fixture(scope="module")
def trained(
    base: LoadedBase, recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    """sides -> a vector trained on the GPU."""
    place = tmp_path_factory.mktemp("trained")
    return {sides: train(recipe(sides=sides, max_steps=12), place / sides, base=base) for sides in ("two", "pair")}


def test_the_base_is_loaded_in_nf4(base: LoadedBase) -> None:
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert base.device.type == "cuda"
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # double quantisation
        assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize("sides", ["two", "pair"])
def test_both_ways_of_training(sides: str, trained: dict[str, Trained]) -> None:
    made = trained[sides]
    assert made.metrics["held_out_accuracy@+1"] == 1.0
    assert made.metrics["held_out_accuracy@-1"] == 0.0
    facts = read_adapter(made.folder).provenance
    assert facts is not None
    assert facts.training is not None
    assert facts.training.device == "cuda"
    assert facts.training.peak_memory_bytes


def test_factors_and_optimiser_are_fp32(base: LoadedBase, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with trainer_of(
        recipe(max_steps=2, learning_rate=5e-6, schedule="constant", warmup_ratio=0.0), base, "two", tmp_path
    ) as trainer:
        before = {name: value.detach().clone() for name, value in adapter.trainable(trainer.model).items()}
        trainer.train()
        for name, value in adapter.trainable(trainer.model).items():
            assert value.dtype == torch.float32
            assert value.device.type == "cuda"
            assert (value != before[name]).float().mean() > 0.99
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert all(value.dtype == torch.float32 for value in states)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_as_before(
    checkpointing: bool, base: LoadedBase, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    before = state(base.model)
    train(recipe(max_steps=2, gradient_checkpointing=checkpointing), tmp_path / "out", base=base)
    assert_unchanged(base.model, before)


@pytest.mark.parametrize("step", [2, 8, 11])
def test_a_stopped_run_goes_on(
    step: int,
    trained: dict[str, Trained],
    base: LoadedBase,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = recipe(sides="two", max_steps=12)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, step)
        train(wanted, tmp_path / "out", base=base)
    resumed = train(wanted, tmp_path / "out", base=base, resume=True).vector
    assert hidden(tmp_path) == []
    unbroken = trained["two"].vector
    # Backward passes on a GPU add up in no fixed order, so bits may differ and the vector may not.
    assert (resumed - unbroken).norm() < 0.02 * unbroken.norm()


def test_log_probs_are_those_of_the_cpu(tiny_llama: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        loaded = load_base(tiny_llama, quantization="none", device=device, compute_dtype="float32")
        found.append(pair_log_probs(loaded.model, some_pairs(), pad_token_id=256))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_a_composed_mix_answers_as_the_live_one(trained: dict[str, Trained], base: LoadedBase, tmp_path: Path) -> None:
    ingredients = open_mix([(str(trained["two"].folder), 8.0), (str(trained["pair"].folder), 4.0)])
    vector = compose(ingredients)
    write_adapter(tmp_path / "mix", vector, mix_provenance(ingredients, vector, "mix"))
    ids = torch.arange(60, device=base.device).view(3, 20)
    parts = {sides: made.vector for sides, made in trained.items()}
    with torch.no_grad():
        bare = base.model(ids).logits.float()
        with LiveMixer(base.model, parts) as mixer:
            mixer.set_mix({"two": 8.0, "pair": 4.0})
            live = base.model(ids).logits.float()
        with LiveMixer(base.model, {"mix": read_adapter(tmp_path / "mix").vector}) as mixer:
            mixer.set_mix({"mix": 1.0})
            composed = base.model(ids).logits.float()
        assert torch.equal(base.model(ids).logits.float(), bare)
    # Coefficients that are seen through the rounding of bfloat16.
    assert (live - bare).norm() > 0.03 * bare.norm()
    assert (composed - live).norm() < 0.2 * (live - bare).norm()


def test_replies_are_repeatable_row_by_row(trained: dict[str, Trained], base: LoadedBase) -> None:
    with LiveMixer(base.model, {"tiny": trained["two"].vector}) as mixer:
        mixes = [{"tiny": 2.0}, {"tiny": -2.0}, {}]
        first, again = (generate(base, PROMPTS, max_new_tokens=8, seed=1, mixer=mixer, mixes=mixes) for _ in range(2))
    assert first == again
    assert len(first) == 3
