"""Edges of the vector room: what is refused, and in which words."""

from __future__ import annotations

import pytest
import torch

from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity, LowRankDelta, Mix, MixEntry, PreferenceVector, extract

MODULE = "model.layers.0.self_attn.q_proj"


def delta(rows: int = 4, columns: int = 3, rank: int = 2) -> LowRankDelta:
    return LowRankDelta(torch.ones(rank, columns), torch.ones(rows, rank))


def vector(identity: BaseIdentity | None = None, rows: int = 4) -> PreferenceVector:
    return PreferenceVector({MODULE: delta(rows)}, identity)


@pytest.mark.parametrize(
    ("A", "B"),
    [
        (torch.ones(2, 3), torch.ones(4, 1)),  # two ranks
        (torch.ones(3), torch.ones(4, 3)),  # a vector
        (torch.ones(0, 3), torch.ones(4, 0)),  # no rank
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 2, dtype=torch.int64)),
        (torch.ones(2, 3, dtype=torch.complex64), torch.ones(4, 2)),
    ],
)
def test_factors_that_are_no_delta(A: torch.Tensor, B: torch.Tensor) -> None:
    with pytest.raises(InputError, match="the factors A"):
        LowRankDelta(A, B)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    B = torch.ones(4, 2)
    B[1, 0] = bad
    with pytest.raises(InputError, match=r"factor B \[4, 2\] holds 1 values that are NaN or infinite"):
        LowRankDelta(torch.ones(2, 3), B)


def test_large_finite_values_whose_sum_overflows_are_fine() -> None:
    assert LowRankDelta(torch.full((1, 3), 3e38), torch.ones(4, 1)).rank == 1


def test_half_precision_is_widened_without_loss() -> None:
    A, B = torch.randn(2, 3).bfloat16(), torch.randn(4, 2).half()
    made = LowRankDelta(A, B)
    assert made.A.dtype == made.B.dtype == torch.float32
    assert torch.equal(made.A.bfloat16(), A)
    assert torch.equal(made.B.half(), B)


def test_factors_are_values_and_carry_no_graph() -> None:
    made = LowRankDelta(torch.ones(2, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True))
    assert not made.A.requires_grad
    assert not made.B.requires_grad


def test_two_shapes_of_one_module_are_named() -> None:
    for combined in (lambda a, b: a + b, extract, lambda a, b: a @ b, lambda a, b: a.cosine(b)):
        with pytest.raises(InputError, match=rf"{MODULE} is \[4, 3\] in one vector and \[5, 3\] in another"):
            combined(vector(), vector(rows=5))


def test_vectors_of_two_bases_are_refused_by_name() -> None:
    llama, qwen = BaseIdentity("llama", config_sha256="a" * 64), BaseIdentity("qwen", config_sha256="b" * 64)
    for combined in (lambda a, b: a + b, extract, lambda a, b: a @ b):
        with pytest.raises(InputError, match=r"'llama' and 'qwen' \(config: a+ != b+\)"):
            combined(vector(llama), vector(qwen))
    assert (vector(llama) + vector()).identity == llama
    assert (vector() + vector(llama)).identity == llama


def test_a_sum_keeps_every_fact_that_one_side_knows() -> None:
    bare = BaseIdentity("base")
    known = BaseIdentity("base", config_sha256="a" * 64, template_sha256="c" * 64)
    total = vector(bare) + vector(known)
    assert total.identity is not None
    assert total.identity.config_sha256 == "a" * 64
    with pytest.raises(InputError, match="two bases"):
        total + vector(BaseIdentity("other", config_sha256="b" * 64))


def test_coefficient_zero_drops_even_a_vector_that_would_not_fit() -> None:
    mix = Mix([MixEntry("a", vector(), 1.0), MixEntry("b", vector(rows=5), 0.0)])
    assert mix.compose().deltas == mix.entries[0].vector.deltas


def test_the_same_vector_twice_counts_twice() -> None:
    total = Mix([MixEntry("a", vector(), 1.0), MixEntry("a", vector(), 0.5)]).compose()
    torch.testing.assert_close(total.deltas[MODULE].dense(), 1.5 * delta().dense())


def test_empty_mix_is_the_base() -> None:
    empty = Mix([]).compose()
    assert empty.deltas == {}
    assert empty.rank == 0
    assert empty.norm() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_coefficients_must_be_finite(bad: float) -> None:
    with pytest.raises(InputError, match="'helpful' is no finite number"):
        Mix([MixEntry("helpful", vector(), bad)])
    with pytest.raises(InputError, match="coefficient"):
        vector() * bad
    with pytest.raises(InputError, match="divided by 0"):
        vector() / 0


def test_values_are_not_shared_with_the_caller() -> None:
    deltas = {MODULE: delta()}
    made = PreferenceVector(deltas)
    deltas.clear()
    assert list(made.deltas) == [MODULE]


def test_a_sum_copies_nothing_until_its_factors_are_asked_for() -> None:
    one, other = (LowRankDelta(torch.randn(2, 3).bfloat16(), torch.randn(4, 2).bfloat16()) for _ in range(2))
    total = 0.5 * (one - 3.0 * other)
    assert [(c, A.data_ptr()) for c, A, _ in total.terms] == [
        (0.5, one.terms[0].A.data_ptr()),
        (-1.5, other.terms[0].A.data_ptr()),
    ]
    assert total.A.dtype == total.B.dtype == torch.float32
    assert torch.equal(total.B, torch.cat([one.B * 0.5, other.B * -1.5], dim=1))
    assert total.A is total.A  # joined once


def test_what_is_remembered_of_a_delta_is_not_taken_for_another_one() -> None:
    delta = LowRankDelta(torch.randn(3, 5), torch.randn(4, 3))
    norm, values = delta.norm(), delta.spectrum()
    assert delta.grams()[0] is delta.grams()[0]
    for other in (delta * 2, delta + delta, (delta - delta) + delta * 2):
        assert other.norm() == pytest.approx(2 * norm)
        torch.testing.assert_close(other.spectrum()[:3], 2 * values)
    assert delta.norm() == norm


def test_a_coefficient_that_overflows_is_told() -> None:
    with pytest.raises(InputError, match="infinite"):
        _ = (LowRankDelta(torch.ones(1, 2), torch.full((2, 1), 1e30)) * 1e30).B
