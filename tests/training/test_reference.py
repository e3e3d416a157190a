"""One reference pass for both signs, kept on disk under what determines it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_prefvec.inference import LoadedBase, RenderedPair, load_base, pair_log_probs
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import reference, train
from lora_prefvec.training.reference import cache_folder, reference_log_probs
from tests.inference.log_probs import naive_log_probs

PAIRS = [RenderedPair([1, 2, 3], [4, 5, 258], [6, 258]), RenderedPair([7], [8, 9], [10, 11, 12, 258])]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFVEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each pass over the base computed."""
    counted: list[int] = []

    def counting(model: Any, pairs: list[RenderedPair], **options: Any) -> torch.Tensor:
        counted.append(len(pairs))
        return pair_log_probs(model, pairs, **options)

    monkeypatch.setattr(reference, "pair_log_probs", counting)
    return counted


def test_one_pass_serves_both_signs_and_the_next_run(
    recipe: Callable[..., Recipe], nf4: LoadedBase, passes: list[int], tmp_path: Path
) -> None:
    train(recipe(sides="pair", max_steps=1), tmp_path / "pair", base=nf4)
    assert passes == [40]
    train(recipe(sides="two", max_steps=1, beta=0.5, learning_rate=1e-4), tmp_path / "two", base=nf4)
    assert passes == [40]


def test_another_base_or_other_tokens_miss_the_cache(
    resident: Callable[[str], LoadedBase], tiny_qwen3: Path, passes: list[int]
) -> None:
    first = reference_log_probs(resident("nf4"), PAIRS, batch_size=2)
    assert torch.equal(reference_log_probs(resident("nf4"), PAIRS, batch_size=2), first)
    assert passes == [2]
    longer = [replace(PAIRS[0], chosen_ids=[4, 5, 6, 258]), PAIRS[1]]
    for base, pairs, size in (
        (resident("none"), PAIRS, 2),
        (load_base(tiny_qwen3, device="cpu"), PAIRS, 2),
        (resident("nf4"), longer, 2),
        (resident("nf4"), PAIRS[::-1], 2),
        (resident("nf4"), PAIRS, 1),  # another batch rounds otherwise
    ):
        reference_log_probs(base, pairs, batch_size=size)
    assert passes == [2] * 6


def test_a_base_that_was_written_again_misses_the_cache(tiny_llama: Path, tmp_path: Path, passes: list[int]) -> None:
    import os
    import shutil

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    base = load_base(folder, quantization="none", device="cpu")
    reference_log_probs(base, PAIRS, batch_size=2)
    os.utime(folder / "model.safetensors", ns=(0, 0))
    reference_log_probs(base, PAIRS, batch_size=2)
    assert passes == [2, 2]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_it_equals_a_computation_with_full_logits(quantization: str, tiny_llama: Path) -> None:
    base = load_base(tiny_llama, quantization=quantization, device="cpu", compute_dtype="float32")
    found = reference_log_probs(base, PAIRS, batch_size=2)
    torch.testing.assert_close(found, naive_log_probs(base.model, PAIRS), rtol=0, atol=1e-4)


def test_a_broken_or_closed_cache_costs_time_and_not_the_run(
    nf4: LoadedBase, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference_log_probs(nf4, PAIRS, batch_size=2)
    (file,) = cache_folder().iterdir()
    for spoil in (
        lambda: file.write_bytes(b"half a fi"),
        lambda: save_file({"other": first}, file),
        lambda: save_file({"log_probs": first[:1]}, file),
    ):
        spoil()
        assert torch.equal(reference_log_probs(nf4, PAIRS, batch_size=2), first)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFVEC_CACHE", str(tmp_path / "file"))
    assert torch.equal(reference_log_probs(nf4, PAIRS, batch_size=2), first)
    assert passes == [2] * 5
