"""A preference small enough to be trained in a second, and what is asked of its results."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import Recipe
from lora_prefvec.training.prepare import Prepared, load_pairs, prepare
from lora_prefvec.training.trainer import PreferenceTrainer, Side

WORDS = "red green blue cat dog sun moon tree".split()
QUICK: dict[str, Any] = {
    "max_steps": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "checkpoint_every": 3,
}


def write_pairs(file: Path, rows: int = 40, seed: int = 0) -> Path:
    """Conversations in which the reply that repeats a word of the prompt is preferred."""
    draw = random.Random(seed)
    lines = []
    for number in range(rows):
        word, other = draw.sample(WORDS, 2)
        turns = [("user", f"say {word} {number}"), ("assistant", f"{word} yes"), ("assistant", f"no {other}!")]
        prompt, chosen, rejected = ([{"role": role, "content": text}] for role, text in turns)
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    file.write_text("\n".join(lines) + "\n")
    return file


def tiny_recipe(base: Path, pairs: Path, *, quantization: str = "nf4", **training: Any) -> Recipe:
    """A recipe of six quick steps; `training` changes its section of that name."""
    return Recipe.model_validate(
        {
            "preference": "tiny",
            "base": {"id": str(base), "quantization": quantization},
            "data": {"source": str(pairs)},
            "held_out": 8,
            "lora": {"rank": 4, "alpha": 8},
            "training": {**QUICK, **training},
        }
    )


def prepared(recipe: Recipe, base: LoadedBase) -> Prepared:
    return prepare(recipe, load_pairs(recipe), base)


@contextmanager
def trainer_of(
    recipe: Recipe, base: LoadedBase, side: Side, folder: Path, dataset: Dataset | None = None
) -> Iterator[PreferenceTrainer]:
    """The trainer of one side, taken off the base again afterwards."""
    rows = prepared(recipe, base).dataset if dataset is None else dataset
    trainer = PreferenceTrainer(base, recipe.lora, recipe.training, side, rows, folder)
    try:
        yield trainer
    finally:
        trainer.release()


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def hidden(folder: Path) -> list[str]:
    """What lies beside the results of runs in `folder`: work in progress, unfinished writes."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class Stop(BaseException):
    """Ends a run at once, as a kill does, but leaves the test running."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, side: Side | None = None) -> None:
    """Ends training in the middle of optimiser step `step` (from 1), of one side alone if named."""
    original = PreferenceTrainer.training_step

    def training_step(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1 and side in (None, self.side):
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "training_step", training_step)
