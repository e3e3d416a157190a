"""Sizes and angles, against dense matrices and known cases."""

from __future__ import annotations

import math

import pytest
import torch

from lora_prefvec.errors import InputError
from lora_prefvec.vector import (
    LowRankDelta,
    PreferenceVector,
    cosine_matrix,
    effective_rank,
    energy_kept,
    layer_cosines,
    layer_norms,
    layer_of,
    module_cosines,
    module_norms,
    norm_grid,
    subspace_interference,
    type_norms,
    type_of,
)


def random_delta(seed: int, rank: int = 3, rows: int = 8, columns: int = 6) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))


def test_modules_know_their_place() -> None:
    assert layer_of("model.layers.13.self_attn.q_proj") == 13
    assert layer_of("transformer.h.0.attn.c_attn") == 0
    assert layer_of("model.layers.2.mlp.experts.7.up_proj") == 2
    assert layer_of("lm_head") is None
    assert type_of("model.layers.13.self_attn.q_proj") == "q_proj"
    assert type_of("lm_head") == "lm_head"
    assert type_of("model.layers.2.mlp.experts.gate_up_proj.3") == "gate_up_proj"


def test_norms_add_up_by_layer_and_by_type() -> None:
    names = ["model.layers.10.q_proj", "lm_head", "model.layers.2.q_proj", "model.layers.2.up_proj"]
    vector = PreferenceVector({name: random_delta(seed) for seed, name in enumerate(names)})
    dense = {name: float(vector.deltas[name].dense().double().norm()) for name in names}

    assert module_norms(vector) == pytest.approx(dense, rel=1e-6)
    by_layer = layer_norms(vector)
    assert list(by_layer) == [2, 10, None]
    assert by_layer[2] == pytest.approx(math.hypot(dense[names[2]], dense[names[3]]), rel=1e-6)
    by_type = type_norms(vector)
    assert by_type["q_proj"] == pytest.approx(math.hypot(dense[names[0]], dense[names[2]]), rel=1e-6)
    assert math.hypot(*by_layer.values()) == pytest.approx(vector.norm())
    assert math.hypot(*by_type.values()) == pytest.approx(vector.norm())


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4)) == 0.0
    assert 1.0 < effective_rank(torch.tensor([1.0, 0.1])) < 2.0


def test_cosine_matrix_agrees_with_pairs() -> None:
    vectors = [
        PreferenceVector({"a": random_delta(0), "b": random_delta(1, rank=2)}),
        PreferenceVector({"b": random_delta(2, rank=5)}),  # lacks a
        PreferenceVector({"a": random_delta(3, rank=1), "b": random_delta(4)}),
        PreferenceVector({}),  # zero
    ]
    cosines = cosine_matrix(vectors)
    expected = [[left.cosine(right) for right in vectors] for left in vectors]
    torch.testing.assert_close(cosines, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert cosines[0, 0] == pytest.approx(1.0)
    assert cosine_matrix([]).shape == (0, 0)


def test_interference_shows_the_layer_where_vectors_oppose() -> None:
    first, second = random_delta(0), random_delta(1)
    v = PreferenceVector({"layers.0.q_proj": first, "layers.1.q_proj": second, "lm_head": first})
    w = PreferenceVector({"layers.0.q_proj": first * 2, "layers.1.q_proj": -second})
    layers = layer_cosines([v, w])
    assert list(layers) == [0, 1, None]
    assert float(layers[0][0, 1]) == pytest.approx(1.0)
    assert float(layers[1][0, 1]) == pytest.approx(-1.0)
    assert float(layers[None][0, 1]) == 0.0


def test_module_cosines_are_those_of_the_deltas_alone() -> None:
    left, right = (PreferenceVector({"a": random_delta(seed), "b": random_delta(seed + 1, rank=2)}) for seed in (0, 4))
    cosines = module_cosines([left, right])
    for name in ("a", "b"):
        alone = [PreferenceVector({name: vector.deltas[name]}) for vector in (left, right)]
        torch.testing.assert_close(cosines[name], cosine_matrix(alone), rtol=0, atol=1e-12)
        dense = [vector.deltas[name].dense().flatten() for vector in (left, right)]
        assert float(cosines[name][0, 1]) == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)), abs=1e-5)


def test_two_shapes_of_one_module_are_named() -> None:
    with pytest.raises(InputError, match=r"module a is \[8, 6\] in one vector and \[9, 6\] in another"):
        cosine_matrix([PreferenceVector({"a": random_delta(0)}), PreferenceVector({"a": random_delta(0, rows=9)})])


def test_a_grid_has_a_cell_for_every_layer_and_type() -> None:
    names = [
        "layers.1.up_proj",
        "lm_head",
        "layers.0.q_proj",
        "layers.1.experts.up_proj.0",
        "layers.1.experts.up_proj.1",
    ]
    vector = PreferenceVector({name: random_delta(seed) for seed, name in enumerate(names)})
    layers, types, cells = norm_grid(vector)
    assert (layers, types) == ([0, 1, None], ["q_proj", "up_proj", "lm_head"])
    assert float(cells[0, 1]) == 0.0
    assert float(cells[1, 1]) == pytest.approx(math.hypot(*(vector.deltas[names[i]].norm() for i in (0, 3, 4))))
    assert float(cells.norm()) == pytest.approx(vector.norm())


def test_energy_is_what_the_best_approximation_keeps() -> None:
    deltas = [random_delta(0, rank=4), random_delta(1, rank=2)]
    kept = energy_kept([delta.spectrum() for delta in deltas])
    assert len(kept) == 4
    assert float(kept[-1]) == pytest.approx(1.0)
    lost = total = 0.0
    for delta in deltas:
        dense = delta.dense().double()
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        lost += float((dense - u[:, :2] * s[:2] @ vh[:2]).norm()) ** 2
        total += float(dense.norm()) ** 2
    assert float(kept[1]) == pytest.approx(1 - lost / total, abs=1e-6)
    assert energy_kept([]).shape == (0,)
    assert energy_kept([torch.zeros(3)]).tolist() == [1.0, 1.0, 1.0]


def dense_interference(deltas: list[LowRankDelta], rank: int) -> float:
    """The equation of arXiv 2412.00081 word for word, on dense matrices."""
    parts = [torch.linalg.svd(delta.dense().double(), full_matrices=False) for delta in deltas]
    U = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    V = torch.cat([vh[:rank].T for _, _, vh in parts], dim=1)
    S = torch.block_diag(*(torch.diag(s[:rank]) for _, s, _ in parts))
    own = torch.eye(len(S), dtype=torch.float64)
    return float(((U.T @ U - own) @ S @ (V.T @ V - own)).abs().sum())


def test_subspace_interference_is_the_equation_of_its_paper() -> None:
    vectors = [PreferenceVector({"a": random_delta(i), "b": random_delta(i + 5) * 3}) for i in range(3)]
    found = subspace_interference(vectors, rank=2)
    assert list(found) == ["b", "a"]  # largest first
    for name, value in found.items():
        assert value == pytest.approx(dense_interference([vector.deltas[name] for vector in vectors], 2), rel=1e-4)
    assert list(subspace_interference(vectors, modules=1)) == ["b"]


def test_subspace_interference_knows_apart_and_alike() -> None:
    eye = torch.eye(6)
    one = PreferenceVector({"a": LowRankDelta(eye[:2], eye[:, :2])})
    apart = PreferenceVector({"a": LowRankDelta(eye[2:4], eye[:, 2:4])})
    assert subspace_interference([one, apart])["a"] == pytest.approx(0.0, abs=1e-12)
    # Alike: both blocks off the diagonal are the identity, so the product is S, of 2 + 2 values of 1.
    assert subspace_interference([one, one])["a"] == pytest.approx(4.0)
    assert subspace_interference([one, -one])["a"] == pytest.approx(4.0)  # a sign is in the singular vectors
    assert subspace_interference([one, one * 3])["a"] == pytest.approx(8.0)  # it grows with the size


def test_subspace_interference_is_unmoved_by_padding_and_by_absent_modules() -> None:
    one, other = random_delta(0, rank=2), random_delta(1, rank=2)
    padded = LowRankDelta(torch.cat([one.A, random_delta(2).A]), torch.cat([one.B, torch.zeros(8, 3)], dim=1))
    plain = subspace_interference([PreferenceVector({"a": one}), PreferenceVector({"a": other})])
    same = subspace_interference(
        [PreferenceVector({"a": padded}), PreferenceVector({}), PreferenceVector({"a": other})]
    )
    assert same["a"] == pytest.approx(plain["a"], rel=1e-6)
    assert subspace_interference([PreferenceVector({"a": one}), PreferenceVector({})])["a"] == pytest.approx(
        0, abs=1e-9
    )
    zero = PreferenceVector({"a": LowRankDelta(one.A, torch.zeros(8, 2))})
    assert subspace_interference([zero, PreferenceVector({"a": one})])["a"] == pytest.approx(0, abs=1e-9)
    assert subspace_interference([]) == {}
