from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_prefvec.inference import LoadedBase, load_base
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import Trained, train
from tests.training.tiny import tiny_recipe, write_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="session")
def resident(tiny_llama: Path) -> Callable[[str], LoadedBase]:
    """quantization -> the tiny Llama in memory, shared by all tests."""
    loaded: dict[str, LoadedBase] = {}

    def base(quantization: str) -> LoadedBase:
        if quantization not in loaded:
            loaded[quantization] = load_base(tiny_llama, quantization=quantization, device="cpu")
        return loaded[quantization]

    return base


@pytest.fixture(scope="session")
def nf4(resident: Callable[[str], LoadedBase]) -> LoadedBase:
    return resident("nf4")


@pytest.fixture(scope="session")
def recipe(tiny_llama: Path, pairs: Path) -> Callable[..., Recipe]:
    """`tiny_recipe` on the tiny Llama and the shared pairs."""
    return lambda **changes: tiny_recipe(tiny_llama, pairs, **changes)


@pytest.fixture(scope="session")
def trained(
    resident: Callable[[str], LoadedBase], recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trained]:
    """(sides, quantization, more settings) -> a finished training, made once."""
    made: dict[tuple[object, ...], Trained] = {}

    def once(sides: str, quantization: str = "nf4", **changes: object) -> Trained:
        key = (sides, quantization, *sorted(changes.items()))
        if key not in made:
            wanted = recipe(sides=sides, quantization=quantization, **changes)
            made[key] = train(wanted, tmp_path_factory.mktemp("trained") / "tiny", base=resident(quantization))
        return made[key]

    return once
