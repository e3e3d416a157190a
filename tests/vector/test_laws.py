"""The laws of the algebra, against dense float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_prefvec.vector import LowRankDelta, Mix, MixEntry, PreferenceVector, extract

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 9), "model.layers.0.mlp.up_proj": (7, 16), "lm_head": (20, 5)}
Dense = dict[str, Tensor]


@st.composite
def vectors(draw: st.DrawFn) -> PreferenceVector:
    """A vector over any of the modules, each with a rank of its own and a scale over six orders of magnitude."""
    modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    deltas = {}
    for name in modules:
        rows, columns = SHAPES[name]
        rank = draw(st.integers(1, 6))
        scale = 10.0 ** draw(st.integers(-3, 3))
        A = torch.randn(rank, columns, generator=generator)
        deltas[name] = LowRankDelta(A, torch.randn(rows, rank, generator=generator) * scale)
    return PreferenceVector(deltas)


coefficients = st.floats(-4, 4, width=16)  # none so small that float32 factors underflow


def dense(vector: PreferenceVector) -> Dense:
    """What the vector stands for: a float64 matrix for every module, zeros where it has none."""
    return {
        name: vector.deltas[name].B.double() @ vector.deltas[name].A.double()
        if name in vector.deltas
        else torch.zeros(shape, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def size(matrices: Dense) -> float:
    return math.sqrt(sum(float((matrix**2).sum()) for matrix in matrices.values()))


def assert_is(vector: PreferenceVector, expected: Dense, scale: float) -> None:
    """The vector is the expected delta, but for rounding of float32 at the scale of the terms that made it."""
    error = size({name: matrix - expected[name] for name, matrix in dense(vector).items()})
    assert error <= 1e-6 * scale


def test_dense_is_the_product_of_the_factors() -> None:
    delta = LowRankDelta(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0], [-1.0]]))
    assert delta.dense().tolist() == [[2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]]
    assert (delta.rank, delta.shape) == (1, (2, 3))


@given(vectors())
def test_identity_and_zero(v: PreferenceVector) -> None:
    same = Mix([MixEntry("v", v, 1.0)]).compose()
    assert same.deltas == v.deltas  # the very same objects: nothing is recomputed
    assert Mix([MixEntry("v", v, 0.0)]).compose().deltas == {}
    assert size(dense(v * 0.0)) == 0.0
    assert_is(v + PreferenceVector({}), dense(v), 0.0)


@given(vectors(), coefficients.filter(lambda c: c != 0))
def test_scaling_and_negation(v: PreferenceVector, c: float) -> None:
    scale = size(dense(v)) * abs(c)
    assert_is(v * c, {name: c * matrix for name, matrix in dense(v).items()}, scale)
    assert_is(c * v, dense(v * c), 0.0)
    assert_is(v * c / c, dense(v), scale / abs(c))
    assert_is(-v, {name: -matrix for name, matrix in dense(v).items()}, 0.0)
    assert_is(v - v, {name: 0 * matrix for name, matrix in dense(v).items()}, 1e-6 * size(dense(v)))


@given(vectors(), vectors(), coefficients, coefficients)
def test_sums_are_linear(v: PreferenceVector, w: PreferenceVector, a: float, b: float) -> None:
    expected = {name: a * dense(v)[name] + b * dense(w)[name] for name in SHAPES}
    scale = abs(a) * size(dense(v)) + abs(b) * size(dense(w))
    assert_is(a * v + b * w, expected, scale)
    assert_is(Mix([MixEntry("v", v, a), MixEntry("w", w, b)]).compose(), expected, scale)


@given(vectors(), vectors(), vectors())
def test_order_and_brackets_do_not_matter(u: PreferenceVector, v: PreferenceVector, w: PreferenceVector) -> None:
    scale = 1e-6 * (size(dense(u)) + size(dense(v)) + size(dense(w)))
    assert_is(u + v, dense(v + u), scale)
    assert_is((u + v) + w, dense(u + (v + w)), scale)
    assert_is(u - v, dense(-(v - u)), scale)


@given(vectors(), vectors())
def test_extract_is_the_dense_difference(positive: PreferenceVector, negative: PreferenceVector) -> None:
    vector = extract(positive, negative)
    expected = {name: dense(positive)[name] - dense(negative)[name] for name in SHAPES}
    assert_is(vector, expected, size(dense(positive)) + size(dense(negative)))
    for name in positive.deltas.keys() & negative.deltas.keys():
        plus, minus = positive.deltas[name], negative.deltas[name]
        assert torch.equal(vector.deltas[name].A, torch.cat([plus.A, minus.A]))
        assert torch.equal(vector.deltas[name].B, torch.cat([plus.B, -minus.B], dim=1))


def test_extract_in_float32_within_1e_5_at_a_real_shape() -> None:
    """Relative to the difference itself, where + and - came from one initialisation, as in training."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(16, 1024, generator=generator) / 32
    steps = [0.01 * torch.randn(2048, 16, generator=generator) for _ in range(2)]
    plus, minus = (
        LowRankDelta(A, steps[0]),
        LowRankDelta(A + 1e-3 * torch.randn(16, 1024, generator=generator), steps[1]),
    )
    reference = plus.B.double() @ plus.A.double() - minus.B.double() @ minus.A.double()
    got = extract(PreferenceVector({"m": plus}), PreferenceVector({"m": minus})).deltas["m"].dense()
    assert got.dtype == torch.float32
    assert float((got - reference).norm() / reference.norm()) <= 1e-5


@given(vectors(), vectors())
def test_inner_product_norm_and_cosine(v: PreferenceVector, w: PreferenceVector) -> None:
    product = sum(float((dense(v)[name] * dense(w)[name]).sum()) for name in SHAPES)
    norms = size(dense(v)) * size(dense(w))
    assert math.isclose(v @ w, product, rel_tol=1e-9, abs_tol=1e-9 * norms)
    assert math.isclose(v @ w, w @ v, rel_tol=1e-9, abs_tol=1e-9 * norms)
    assert math.isclose(v.norm(), size(dense(v)), rel_tol=1e-9)
    assert math.isclose(v.cosine(w), product / norms if norms else 0.0, abs_tol=1e-9)


@settings(max_examples=50)
@given(vectors())
def test_spectrum_is_that_of_the_dense_delta(v: PreferenceVector) -> None:
    for name, delta in v.deltas.items():
        expected = torch.linalg.svdvals(dense(v)[name])
        count = min(delta.rank, *delta.shape)
        assert delta.spectrum().shape == (count,)
        torch.testing.assert_close(delta.spectrum(), expected[:count], rtol=1e-9, atol=1e-9 * float(expected[0]))
