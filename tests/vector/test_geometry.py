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
    layer_cosines,
    layer_norms,
    layer_of,
    module_norms,
    spectra,
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


def test_spectra_have_the_norm() -> None:
    vector = PreferenceVector({"a": random_delta(0), "b": random_delta(1)})
    for name, values in spectra(vector).items():
        assert float(values.norm()) == pytest.approx(vector.deltas[name].norm())
        assert torch.equal(values, values.sort(descending=True).values)


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


def test_two_shapes_of_one_module_are_named() -> None:
    with pytest.raises(InputError, match=r"module a is \[8, 6\] in one vector and \[9, 6\] in another"):
        cosine_matrix([PreferenceVector({"a": random_delta(0)}), PreferenceVector({"a": random_delta(0, rows=9)})])
