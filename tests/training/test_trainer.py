"""What happens in a step: fp32 factors, one start for both signs, drawn signs, swapped labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import adapter
from lora_prefvec.training.trainer import PreferenceTrainer, Side, swap_labels
from tests.training.tiny import prepared, trainer_of

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def rows(recipe: MakeRecipe, nf4: LoadedBase) -> Dataset:
    """Rendered pairs with their reference, the last ten of them anchors that keep their labels."""
    found = prepared(recipe(), nf4).dataset
    return found.remove_columns("swaps").add_column("swaps", [True] * (len(found) - 10) + [False] * 10)


def factors(trainer: PreferenceTrainer, part: str) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter.trainable(trainer.model).items() if part in name}


def first_batches(trainer: PreferenceTrainer, count: int) -> list[dict[str, Tensor]]:
    return list(islice(trainer.get_train_dataloader(), count))


@pytest.mark.parametrize("side", ["two", "positive"])
def test_factors_and_optimiser_are_fp32_and_all_of_A_moves(
    side: Side, recipe: MakeRecipe, nf4: LoadedBase, rows: Dataset, tmp_path: Path
) -> None:
    # An A of 0.1 in bf16 moves by 5e-4 or not at all; at this rate a step is a hundred times smaller.
    gentle = recipe(learning_rate=5e-6, schedule="constant", warmup_ratio=0.0, max_steps=2)
    with trainer_of(gentle, nf4, side, tmp_path, rows) as trainer:
        before = factors(trainer, "lora_")
        assert len(before) == 28
        trainer.train()
        after = factors(trainer, "lora_")
        for name, tensor in after.items():
            assert tensor.dtype == torch.float32
            moved = (tensor != before[name]).float().mean().item()
            assert moved == 1.0 if "lora_A" in name else moved > 0.99, f"{moved:.1%} of {name}"  # B moved twice
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        assert len(states) == 3 * 28
        assert all(value.dtype == torch.float32 for value in states)
    assert nf4.model.dtype in (torch.bfloat16, torch.float32)


def test_both_signs_begin_with_the_same_adapter_and_the_same_batches(
    recipe: MakeRecipe, nf4: LoadedBase, rows: Dataset, tmp_path: Path
) -> None:
    begun = []
    for side in ("positive", "negative", "two"):
        with trainer_of(recipe(), nf4, side, tmp_path / side, rows) as trainer:
            begun.append((factors(trainer, "lora_A"), factors(trainer, "lora_B"), first_batches(trainer, 8)))
    with trainer_of(recipe(seed=1), nf4, "positive", tmp_path / "other", rows) as trainer:
        other = factors(trainer, "lora_A"), first_batches(trainer, 8)
    A, B, batches = begun[0]
    assert not any(tensor.any() for tensor in B.values())
    for same_A, same_B, same_batches in begun[1:]:
        assert all(torch.equal(A[name], same_A[name]) for name in A)
        assert all(torch.equal(B[name], same_B[name]) for name in B)
        for batch, same in zip(batches, same_batches, strict=True):
            assert all(torch.equal(batch[name], same[name]) for name in batch)
    assert not any(torch.equal(A[name], other[0][name]) for name in A)
    assert any(
        batch["input_ids"].shape != there["input_ids"].shape or not torch.equal(batch["input_ids"], there["input_ids"])
        for batch, there in zip(batches, other[1], strict=True)
    )


def drawn_signs(trainer: PreferenceTrainer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The coefficients of a whole training."""
    signs: list[float] = []
    original = trainer._draw_coefficient
    monkeypatch.setattr(trainer, "_draw_coefficient", lambda: signs.append(original()) or signs[-1])
    trainer.train()
    return signs


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without a model: the loss is a sum of the factors."""

    def loss(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Tensor:
        return sum(tensor.sum() for tensor in adapter.trainable(self.model).values())

    monkeypatch.setattr("trl.DPOTrainer._compute_loss", loss)


@pytest.mark.usefixtures("instant")
def test_signs_are_balanced_and_a_function_of_seed_and_position(
    recipe: MakeRecipe, nf4: LoadedBase, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    # as many micro-batches, in optimiser steps of 1, 2 and 4 of them; 32 rows, so several epochs
    for seed, batch_size in ((0, 2), (0, 4), (0, 8), (1, 2)):
        wanted = recipe(seed=seed, batch_size=batch_size, max_steps=128 // batch_size, checkpoint_every=1000)
        with trainer_of(wanted, nf4, "two", tmp_path / f"{seed}-{batch_size}", rows) as trainer:
            drawn.append(drawn_signs(trainer, monkeypatch))
    assert [len(signs) for signs in drawn] == [64] * 4
    assert all(sum(signs[i : i + 2]) == 0 for signs in drawn for i in range(0, 64, 2))
    assert 8 < sum(sign > 0 for sign in drawn[0][::2]) < 24  # which of two comes first is drawn, too
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


@pytest.mark.usefixtures("instant")
def test_a_reach_is_drawn_as_often_as_one(
    recipe: MakeRecipe, nf4: LoadedBase, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(reach=2.0, max_steps=32, checkpoint_every=1000)
    with trainer_of(wanted, nf4, "two", tmp_path, rows) as trainer:
        drawn = drawn_signs(trainer, monkeypatch)
    assert set(drawn) == {1.0, -1.0, 2.0, -2.0}
    assert all(sum(drawn[i : i + 2]) == 0 for i in range(0, 64, 2))
    assert 16 < sum(abs(coefficient) == 2.0 for coefficient in drawn) < 48


@pytest.mark.usefixtures("instant")
def test_the_sides_of_a_pair_draw_the_same_strength(
    recipe: MakeRecipe, nf4: LoadedBase, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(sides="pair", reach=2.0, max_steps=32, checkpoint_every=1000)
    drawn = []
    for side in ("positive", "negative"):
        with trainer_of(wanted, nf4, side, tmp_path / side, rows) as trainer:
            drawn.append(drawn_signs(trainer, monkeypatch))
    assert set(drawn[0]) == {1.0, 2.0}
    assert drawn[1] == [-coefficient for coefficient in drawn[0]]


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize(("side", "sign"), [("positive", 1), ("negative", -1)])
def test_a_side_of_a_pair_has_one_sign(
    side: Side,
    sign: int,
    recipe: MakeRecipe,
    nf4: LoadedBase,
    rows: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with trainer_of(recipe(), nf4, side, tmp_path, rows) as trainer:
        assert drawn_signs(trainer, monkeypatch) == [sign] * 12


def test_swap_labels_exchanges_the_rows_that_swap() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]]),
        "completion_mask": torch.tensor([[1], [2], [3], [4], [5], [6]]),
        "ref_chosen_logps": torch.tensor([-1.0, -2.0, -3.0]),
        "ref_rejected_logps": torch.tensor([-4.0, -5.0, -6.0]),
    }
    swapped = swap_labels(batch, torch.tensor([True, False, True]))
    assert swapped["input_ids"][:, 0].tolist() == [4, 2, 6, 1, 5, 3]
    assert swapped["completion_mask"][:, 0].tolist() == [4, 2, 6, 1, 5, 3]
    assert swapped["ref_chosen_logps"].tolist() == [-4.0, -2.0, -6.0]
    assert swapped["ref_rejected_logps"].tolist() == [-1.0, -5.0, -3.0]
    assert swapped.keys() == batch.keys()
    again = swap_labels(swapped, torch.tensor([True, False, True]))
    assert all(torch.equal(again[name], batch[name]) for name in batch)


@pytest.fixture
def learned(recipe: MakeRecipe, nf4: LoadedBase, rows: Dataset, tmp_path: Path) -> Iterator[PreferenceTrainer]:
    """A two-sided trainer whose adapter has already learned something."""
    with trainer_of(recipe(), nf4, "two", tmp_path / "learned", rows) as trainer:
        generator = torch.Generator().manual_seed(0)
        for tensor in factors(trainer, "lora_B"):
            parameter = trainer.model.get_parameter(tensor)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        yield trainer


def loss_and_gradient(trainer: PreferenceTrainer, examples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    batch = trainer.data_collator(examples)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in adapter.trainable(trainer.model).values()]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize("coefficient", [-1.0, 2.0, -2.0])
def test_minus_v_has_the_loss_of_swapped_labels(
    coefficient: float, learned: PreferenceTrainer, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [rows[i] for i in (0, 1, len(rows) - 1)]
    assert [example["swaps"] for example in examples] == [True, True, False]
    by_hand = [dict(example) for example in examples]
    for example in by_hand[:2] if coefficient < 0 else []:
        for kept, other in (("chosen_ids", "rejected_ids"), ("ref_chosen_logps", "ref_rejected_logps")):
            example[kept], example[other] = example[other], example[kept]
    monkeypatch.setattr(learned, "_draw_coefficient", lambda: 1)
    given, _ = loss_and_gradient(learned, examples)
    monkeypatch.setattr(learned, "_draw_coefficient", lambda: coefficient)
    found, gradient = loss_and_gradient(learned, examples)
    # The same by hand: labels exchanged in the data, the coefficient multiplied into factor B.
    monkeypatch.setattr(learned, "_draw_coefficient", lambda: 1)
    for name in factors(learned, "lora_B"):
        learned.model.get_parameter(name).data.mul_(coefficient)
    expected, expected_gradient = loss_and_gradient(learned, by_hand)
    assert abs(found - given) > 0.003
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    size = {name: parameter.numel() for name, parameter in adapter.trainable(learned.model).items()}
    factor = torch.cat([torch.full((count,), coefficient if "lora_B" in name else 1.0) for name, count in size.items()])
    assert expected_gradient.norm() > 0
    assert (gradient - factor * expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_the_loss_is_that_of_dpo(learned: PreferenceTrainer, rows: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), arXiv 2305.18290 equation 7."""
    from lora_prefvec.inference import RenderedPair, pair_log_probs

    examples = [rows[i] for i in range(3)]
    monkeypatch.setattr(learned, "_draw_coefficient", lambda: 1)
    found, _ = loss_and_gradient(learned, examples)
    pairs = [RenderedPair(*(one[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))) for one in examples]
    policy = pair_log_probs(learned.model, pairs, pad_token_id=256)
    reference = torch.tensor([[one["ref_chosen_logps"], one["ref_rejected_logps"]] for one in examples])
    margin = (policy - reference) @ torch.tensor([1.0, -1.0])
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(0.1 * margin).mean(), rtol=1e-3, atol=1e-3)
