"""Several preferences on one base in memory: each finds it as it was loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_prefvec.inference import LiveMixer, LoadedBase, generate, load_base
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import Trained, adapter, train
from lora_prefvec.training.trainer import PreferenceTrainer
from tests.training.tiny import Stop, prepared, stop_at, trainer_of, weights_hash

MakeRecipe = Callable[..., Recipe]


def state(model: Any) -> dict[str, Any]:
    """All of a model that a training could leave changed: weights, modes, hooks, patches, configuration."""
    weights: dict[str, Tensor] = dict(model.state_dict())  # quantisation states are in it
    modules = {
        name: (
            type(module).__name__,
            module.training,
            sorted(key for key in vars(module) if not key.startswith("_") and key != "gradient_checkpointing"),
            getattr(module, "gradient_checkpointing", False),
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }
    return {
        "weights": {name: tensor.clone() for name, tensor in weights.items()},
        "pointers": {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "modules": modules,
        "own": sorted(vars(model)),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    now = state(model)
    weights, known = now.pop("weights"), before["weights"]
    assert weights.keys() == known.keys()
    for name in weights:
        assert torch.equal(weights[name], known[name]), name
    assert now == {key: value for key, value in before.items() if key != "weights"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_is_bit_for_bit_as_before(
    quantization: str, checkpointing: bool, tiny_llama: Path, recipe: MakeRecipe, tmp_path: Path
) -> None:
    base = load_base(tiny_llama, quantization=quantization, device="cpu")
    before = state(base.model)
    wanted = recipe(quantization=quantization, sides="pair", max_steps=2, gradient_checkpointing=checkpointing)
    train(wanted, tmp_path / "out", base=base)
    assert_unchanged(base.model, before)


def test_the_base_is_as_before_after_a_run_that_failed(
    tiny_llama: Path, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(tiny_llama, device="cpu")
    before = state(base.model)
    stop_at(monkeypatch, 2)
    with pytest.raises(Stop):
        train(recipe(gradient_checkpointing=True), tmp_path / "out", base=base)
    assert_unchanged(base.model, before)


def test_a_second_training_gives_the_same_bytes_as_one_on_a_fresh_base(
    tiny_llama: Path, recipe: MakeRecipe, tmp_path: Path
) -> None:
    base = load_base(tiny_llama, device="cpu")
    train(recipe(sides="two", seed=5, max_steps=3, gradient_checkpointing=True), tmp_path / "other", base=base)
    second = train(recipe(sides="pair", max_steps=4), tmp_path / "second", base=base)
    fresh = train(recipe(sides="pair", max_steps=4), tmp_path / "fresh")
    assert weights_hash(second.folder) == weights_hash(fresh.folder)


def gradients(trainer: PreferenceTrainer) -> Tensor:
    """Of the loss of four pairs, after the factors B were given values."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.trainable(trainer.model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer._compute_loss(trainer.model, batch, False).backward()
    found = [parameter.grad for parameter in adapter.trainable(trainer.model).values()]
    assert all(gradient is not None and gradient.any() for gradient in found)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def test_forwards_before_training_cut_no_gradient(
    recipe: MakeRecipe, tiny_llama: Path, trained: Callable[..., Trained], tmp_path: Path
) -> None:
    """bitsandbytes repacks 4-bit weights at the first forward without gradients on CPUs with avx512_bf16."""
    found = []
    for busy in (False, True):
        base: LoadedBase = load_base(tiny_llama, device="cpu")
        if busy:
            generate(base, ["say red"], max_new_tokens=4)
            with torch.inference_mode():
                base.model(torch.arange(64).view(2, 32))
            with LiveMixer(base.model, {"tiny": trained("two").vector}) as mixer:
                mixer.set_mix({"tiny": 1.0})
                generate(base, ["say red"], max_new_tokens=4)
        rows = prepared(recipe(), base).dataset
        with trainer_of(recipe(), base, "positive", tmp_path / str(busy), rows) as trainer:
            found.append(gradients(trainer))
    assert torch.equal(found[0], found[1])
