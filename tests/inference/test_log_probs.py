"""Log-probabilities of replies against the plain computation, and what they say of a preference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.inference import (
    LiveMixer,
    LoadedBase,
    RenderedPair,
    load_base,
    pair_log_probs,
    preference_accuracy,
)
from lora_prefvec.inference.log_probs import collate
from tests.helpers import CONFIGS, random_vector
from tests.inference.log_probs import naive_log_probs


def some_pairs(count: int = 7) -> list[RenderedPair]:
    """Pairs of many lengths, some longer than the sliding windows of 32 tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    return [RenderedPair(ids(1 + 6 * i), ids(1 + (5 * i) % 7), ids(1 + (3 * i) % 11)) for i in range(count)]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Callable[[str], LoadedBase]:
    loaded: dict[str, LoadedBase] = {}

    def of(family: str) -> LoadedBase:
        if family not in loaded:
            loaded[family] = load_base(tiny_model(family), quantization="none", device="cpu", compute_dtype="float32")
        return loaded[family]

    return of


@pytest.mark.parametrize("family", CONFIGS)
def test_they_equal_a_computation_with_full_logits(family: str, base: Callable[[str], LoadedBase]) -> None:
    model, pairs = base(family).model, some_pairs()
    expected = naive_log_probs(model, pairs)
    found = pair_log_probs(model, pairs, pad_token_id=256, batch_size=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(pair_log_probs(model, pairs, pad_token_id=0, batch_size=50), expected, rtol=0, atol=1e-4)


def test_a_live_mix_takes_part(base: Callable[[str], LoadedBase]) -> None:
    model, pairs = base("llama").model, some_pairs()
    before = pair_log_probs(model, pairs, pad_token_id=256)
    with LiveMixer(model, {"v": random_vector(model, 2, seed=0)}) as mixer:
        mixer.set_mix({"v": 1.0})
        mixed = pair_log_probs(model, pairs, pad_token_id=256)
        torch.testing.assert_close(mixed, naive_log_probs(model, pairs), rtol=0, atol=1e-4)
    assert (mixed - before).abs().min() > 1e-3
    assert torch.equal(pair_log_probs(model, pairs, pad_token_id=256), before)


def test_the_model_is_left_as_it_was(base: Callable[[str], LoadedBase]) -> None:
    model: Any = base("qwen3").model
    known = sorted(vars(model))
    model.train()
    try:
        pair_log_probs(model, some_pairs(2), pad_token_id=256)
        assert model.training
        broken = [RenderedPair([1], [10_000], [2])]  # no such token
        with pytest.raises(IndexError):
            pair_log_probs(model, broken, pad_token_id=256)
        assert model.training
    finally:
        model.eval()
    assert sorted(vars(model)) == known


def test_progress_is_told_in_pairs(base: Callable[[str], LoadedBase]) -> None:
    done: list[int] = []
    pair_log_probs(base("llama").model, some_pairs(7), pad_token_id=256, batch_size=3, on_batch=done.append)
    assert done == [3, 3, 1]
    assert pair_log_probs(base("llama").model, [], pad_token_id=256).shape == (0, 2)


def test_a_batch_has_all_chosen_rows_first() -> None:
    batch = collate([RenderedPair([1, 2], [3], [4, 5]), RenderedPair([6], [7], [8])], 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [6, 7, 0, 0], [1, 2, 4, 5], [6, 8, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 3, -100],
        [-100, 7, -100, -100],
        [-100, -100, 4, 5],
        [-100, 8, -100, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_preference_accuracy_counts_margins_against_the_reference() -> None:
    policy = torch.tensor([[-1.0, -3.0], [-2.0, -2.0], [-5.0, -2.0], [-1.0, -4.0]])
    reference = torch.tensor([[-2.0, -3.0], [-2.0, -2.0], [-5.0, -6.0], [-3.0, -4.0]])
    found = preference_accuracy(policy, reference)  # margins 1, 0, -4, 2
    assert found.accuracy == (1 + 0.5 + 0 + 1) / 4
    assert found.margin == pytest.approx(-0.25)
    assert found.chosen_shift == pytest.approx(0.75)
    assert found.pairs == 4
    assert found.accuracy_error == pytest.approx(math.sqrt(0.625 * 0.375 / 4))
    assert found.margin_error == pytest.approx(torch.tensor([1.0, 0.0, -4.0, 2.0]).std().item() / 2)


def test_ties_count_one_half_and_swapping_mirrors() -> None:
    policy, reference = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(0))
    assert preference_accuracy(policy, policy).accuracy == 0.5
    there = preference_accuracy(policy, reference)
    back = preference_accuracy(policy.flip(1), reference.flip(1))
    assert there.accuracy + back.accuracy == pytest.approx(1.0)
    assert there.margin == pytest.approx(-back.margin)


def test_one_pair_has_no_margin_error() -> None:
    found = preference_accuracy(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -3.0]]))
    assert (found.accuracy, found.margin) == (1.0, 1.0)
    assert math.isnan(found.margin_error)
