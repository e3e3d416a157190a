"""The laws of the algebra, against dense float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_prefvec.vector import LowRankDelta, Mix, MixEntry, PreferenceVector, extract
from tests.vector.strategies import SHAPES, assert_is, coefficients, dense, inner, size, vectors


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
    product = inner(dense(v), dense(w))
    norms = size(dense(v)) * size(dense(w))
    assert math.isclose(v @ w, product, rel_tol=1e-9, abs_tol=1e-9 * norms)
    assert math.isclose(v @ w, w @ v, rel_tol=1e-9, abs_tol=1e-9 * norms)
    assert math.isclose(v.norm(), size(dense(v)), rel_tol=1e-9)
    assert math.isclose(v.cosine(w), product / norms if norms else 0.0, abs_tol=1e-9)


@settings(max_examples=50)
@given(vectors(), vectors())
def test_svd_and_spectrum_are_those_of_the_dense_delta(v: PreferenceVector, w: PreferenceVector) -> None:
    total = v + w
    for name, delta in total.deltas.items():
        expected = torch.linalg.svdvals(dense(total)[name])
        count = min(delta.rank, *delta.shape)
        U, S, V = delta.svd()
        assert (U.shape, S.shape, V.shape) == ((delta.shape[0], count), (count,), (delta.shape[1], count))
        scale = float(expected[0])
        for values in (S, delta.spectrum(), total.spectrum()[name]):
            torch.testing.assert_close(values, expected[:count], rtol=0, atol=1e-12 * scale)
        torch.testing.assert_close(U * S @ V.T, dense(total)[name], rtol=0, atol=1e-12 * scale)
        for basis in (U, V):
            torch.testing.assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)


@given(vectors(), vectors(), st.integers(1, 14))
def test_truncation_is_the_best_of_its_rank(v: PreferenceVector, w: PreferenceVector, rank: int) -> None:
    """Eckart and Young: the error is the tail of the dense spectrum, and the energy is what is left of its squares."""
    total = v + w
    cut = total.truncate(rank=rank)
    assert cut.rank <= rank
    tails, squares = 0.0, 0.0
    for name, matrix in dense(total).items():
        values = torch.linalg.svdvals(matrix)
        tail = float(values[rank:].norm())
        scale = float(values[0])
        error = float((dense(cut)[name] - matrix).norm())
        assert math.isclose(error, tail, rel_tol=1e-6, abs_tol=2e-6 * scale)
        tails, squares = tails + tail**2, squares + float(values.square().sum())
        if name in total.deltas:
            kept = 1 - tail**2 / float(values.square().sum())
            assert math.isclose(total.deltas[name].energy(rank), kept, abs_tol=1e-9)
    assert math.isclose(total.energy(rank), 1 - tails / squares if squares else 1.0, abs_tol=1e-9)


@given(vectors(), vectors(), st.floats(0.05, 0.999))
def test_an_energy_is_kept_at_the_smallest_rank(v: PreferenceVector, w: PreferenceVector, energy: float) -> None:
    total = v + w
    rank = total.rank_for(energy)
    assert total.energy(rank) >= energy - 1e-9
    assert rank == 1 or total.energy(rank - 1) < energy
    cut = total.truncate(energy=energy)
    assert cut.rank <= rank
    assert (cut.norm() ** 2 + 1e-30) / (total.norm() ** 2 + 1e-30) >= energy - 1e-5

    each = total.truncate(energy=energy, per_module=True)
    for name, delta in total.deltas.items():
        smallest = delta.rank_for(energy)
        assert each.deltas[name].rank <= smallest
        assert smallest == 1 or delta.energy(smallest - 1) < energy
        assert (each.deltas[name].norm() / delta.norm()) ** 2 >= energy - 1e-5


@given(vectors())
def test_truncation_drops_no_direction_that_is_there(v: PreferenceVector) -> None:
    assert v.truncate(rank=max(v.rank, 1)).deltas == v.deltas  # the very same objects
    assert_is((v + v).truncate(energy=1.0), {name: 2 * matrix for name, matrix in dense(v).items()}, 2 * size(dense(v)))
    doubled = (v + v + v).truncate(rank=7)
    assert_is(doubled, {name: 3 * matrix for name, matrix in dense(v).items()}, 3 * size(dense(v)))
    for name, delta in doubled.deltas.items():
        own = v.deltas[name].rank
        assert delta.rank <= (own if 3 * own > 7 else 3 * own)  # three times the same directions
    nothing = (v - v).truncate(rank=1)
    assert all(not delta.dense().any() for delta in nothing.deltas.values())


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 9))
def test_factors_that_nearly_cancel_keep_their_digits(seed: int, digits: int) -> None:
    """As d+ - d- from one initialisation: what is left is 10^-digits of its terms, and the spectrum is right in it."""
    generator = torch.Generator().manual_seed(seed)
    A, B, C, D = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(3, 40), (30, 3)] * 2)
    size = 10.0**-digits
    delta = LowRankDelta(A, B) - LowRankDelta(A + size * C, B + size * D)
    exact = -size * (D @ A + B @ C + size * D @ C)
    rounding = 1e-13 / size
    torch.testing.assert_close(
        delta.spectrum()[:6], torch.linalg.svdvals(exact)[:6], rtol=0, atol=rounding * float(exact.norm())
    )
    cut = delta.truncate(rank=5).dense()
    tail = torch.linalg.svdvals(exact)[5]
    assert abs(float((cut - exact).norm()) - tail) <= rounding * float(exact.norm())


def test_factors_of_very_different_size_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 8, generator=generator), torch.randn(9, 3, generator=generator)
    scales = torch.tensor([1e9, 1e-9, 1.0])
    skewed = LowRankDelta(A * scales[:, None], B / scales) + LowRankDelta(A, B)
    torch.testing.assert_close(skewed.truncate(rank=3).dense(), 2 * B @ A, rtol=1e-5, atol=1e-5)


@given(vectors(), vectors())
def test_what_is_projected_out_is_gone(v: PreferenceVector, w: PreferenceVector) -> None:
    across, along = dense(w), inner(dense(v), dense(w))
    square = inner(across, across)
    share = along / square if square else 0.0
    expected = {name: matrix - share * across[name] for name, matrix in dense(v).items()}
    left = v.project_out(w)
    assert_is(left, expected, 2 * size(dense(v)))
    assert abs(left @ w) <= 1e-6 * size(dense(v)) * size(across)
    assert left.norm() <= v.norm() * (1 + 1e-6)

    each = v.project_out(w, per_module=True)
    assert each.deltas.keys() == v.deltas.keys()
    for name, matrix in dense(each).items():
        assert abs(float((matrix * across[name]).sum())) <= 1e-6 * float(dense(v)[name].norm() * across[name].norm())
        flat = across[name].flatten()
        rest = (
            dense(v)[name] - (float(dense(v)[name].flatten() @ flat) / max(float(flat @ flat), 1e-300)) * across[name]
        )
        assert float((matrix - rest).norm()) <= 2e-6 * float(dense(v)[name].norm())
