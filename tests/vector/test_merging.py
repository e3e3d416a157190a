"""Every merging method against a straightforward one on dense float64 matrices."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity, LowRankDelta, Method, Mix, MixEntry, PreferenceVector, fit, merge
from lora_prefvec.vector.dense import threshold
from tests.vector.strategies import SHAPES, assert_is, coefficients, dense, inner, size, vectors

METHODS: tuple[Method, ...] = get_args(Method)
DENSE: tuple[Method, ...] = ("ties", "dare_linear", "dare_ties", "magnitude")
FULL = 20  # no rank of any of SHAPES is higher
densities = st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0])
precise = vectors(dtype=torch.float64, scales=1)
terms = st.lists(st.tuples(coefficients, precise), min_size=1, max_size=4)


def largest(matrix: Tensor, density: float) -> Tensor:
    count = math.ceil(density * matrix.numel())
    return matrix * (matrix.abs() >= matrix.abs().flatten().sort(descending=True).values[count - 1])


def disjoint_mean(matrices: list[Tensor]) -> Tensor:
    result = torch.zeros_like(matrices[0])
    sign = torch.stack(matrices).sum(0).sign()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        agreeing = [m[tuple(place)] for m in matrices if m[tuple(place)].sign() == sign[tuple(place)] != 0]
        if agreeing:
            result[tuple(place)] = sum(agreeing) / len(agreeing)
    return result


def close(vector: PreferenceVector, expected: dict[str, Tensor], scale: float) -> None:
    error = size({name: matrix - expected[name] for name, matrix in dense(vector).items()})
    assert error <= 1e-7 * scale + 1e-300


def scale_of(parts: list[tuple[float, PreferenceVector]]) -> float:
    return sum(abs(c) * size(dense(v)) for c, v in parts)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), precise, coefficients.filter(lambda c: c != 0), st.integers(0, 9))
def test_one_vector_is_itself_under_every_method(method: Method, v: PreferenceVector, c: float, seed: int) -> None:
    """Identity, negation and scaling: with density 1 nothing is dropped, and its own rank holds all of it."""
    merged = merge([(c, v)], method, density=1.0, seed=seed)
    close(merged.vector, {name: c * matrix for name, matrix in dense(v).items()}, abs(c) * size(dense(v)))
    assert merged.energy == pytest.approx(1.0, abs=1e-9)
    assert merged.rank == merged.vector.rank <= v.rank
    assert merged.method == method
    assert all(delta.A.is_contiguous() and delta.B.is_contiguous() for delta in merged.vector.deltas.values())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), terms, densities)
def test_negating_every_coefficient_negates_the_result(
    method: Method, parts: list[tuple[float, PreferenceVector]], density: float
) -> None:
    there = merge(parts, method, rank=FULL, density=density).vector
    back = merge([(-c, v) for c, v in parts], method, rank=FULL, density=density).vector
    close(back, {name: -matrix for name, matrix in dense(there).items()}, scale_of(parts))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), terms)
def test_coefficient_zero_leaves_a_vector_out(method: Method, parts: list[tuple[float, PreferenceVector]]) -> None:
    stranger = PreferenceVector({name: LowRankDelta(torch.ones(1, 3), torch.ones(2, 1)) for name in SHAPES})
    with_it, without = (merge([*parts, *extra], method, rank=3).vector for extra in ([(0.0, stranger)], []))
    close(with_it, dense(without), 0.0)


@settings(max_examples=30, deadline=None)
@given(terms, densities, st.sampled_from(["ties", "magnitude"]))
def test_ties_and_magnitude(parts: list[tuple[float, PreferenceVector]], density: float, method: Method) -> None:
    merged = merge(parts, method, rank=FULL, density=density)
    expected = {}
    for name in SHAPES:
        trimmed = [c * largest(dense(v)[name], density) for c, v in parts if c != 0]
        zero = torch.zeros(SHAPES[name], dtype=torch.float64)
        expected[name] = (disjoint_mean(trimmed) if method == "ties" else sum(trimmed, zero)) if trimmed else zero
    close(merged.vector, expected, scale_of(parts))
    assert merged.energy == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(terms, st.sampled_from(["dare_linear", "dare_ties"]), st.integers(0, 2**63))
def test_dare_combines_vectors_that_were_each_dropped_alone(
    parts: list[tuple[float, PreferenceVector]], method: Method, seed: int
) -> None:
    zero = PreferenceVector({})
    alone = [
        dense(merge([(0.0, zero)] * i + [(1.0, v)], "dare_linear", rank=FULL, density=0.4, seed=seed).vector)
        for i, (_, v) in enumerate(parts)
    ]
    for dropped, (_, v) in zip(alone, parts, strict=True):
        for name, matrix in dense(v).items():
            scaled = matrix / 0.4
            near = 1e-9 * float(matrix.abs().max())
            kept = (dropped[name] - scaled).abs() <= near
            assert (kept | (dropped[name].abs() <= near)).all()
    expected = {}
    for name in SHAPES:
        scaled_parts = [c * d[name] * (d[name].abs() > 1e-12) for (c, _), d in zip(parts, alone, strict=True) if c != 0]
        # What rounding left of a dropped entry must not vote.
        clean = [p * (p.abs() > 1e-9 * float(p.abs().max())) for p in scaled_parts]
        zeros = torch.zeros(SHAPES[name], dtype=torch.float64)
        expected[name] = (disjoint_mean(clean) if method == "dare_ties" else sum(clean, zeros)) if clean else zeros
    close(merge(parts, method, rank=FULL, density=0.4, seed=seed).vector, expected, 2.5 * scale_of(parts))


def test_dare_depends_on_seed_module_and_place_and_on_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["a", "b", "c"]
    delta = LowRankDelta(torch.randn(3, 30, generator=generator), torch.randn(20, 3, generator=generator))
    v = PreferenceVector(dict.fromkeys(names, delta))
    turned = PreferenceVector(dict.fromkeys(reversed(names), delta))

    def made(v: PreferenceVector, w: PreferenceVector, seed: int = 1) -> dict[str, Tensor]:
        merged = merge([(1.0, v), (1.0, w)], "dare_linear", rank=FULL, seed=seed)
        return {name: delta.dense() for name, delta in merged.vector.deltas.items()}

    first = made(v, v)
    assert all(torch.equal(first[name], made(turned, turned)[name]) for name in names)
    assert all(torch.equal(first[name], made(v, v)[name]) for name in names)
    assert not torch.equal(first["a"], first["b"])  # the module counts
    assert not torch.equal(first["a"], made(v, v, seed=2)["a"])  # the seed
    halves = {0.0: 0, 2.0: 0, 4.0: 0}  # the place: were the masks equal, no entry would be kept once
    for value in (first["a"] / delta.dense()).flatten().round().tolist():
        halves[value] += 1
    assert min(halves.values()) > 0.15 * 600

    mean = sum(made(v, PreferenceVector({}), seed)["a"] for seed in range(300)) / 300
    assert float((mean - delta.dense()).norm() / delta.dense().norm()) < 3 / math.sqrt(300)  # unbiased


@settings(max_examples=40, deadline=None)
@given(terms)
def test_orthogonal_is_gram_schmidt_in_every_module(parts: list[tuple[float, PreferenceVector]]) -> None:
    used = [(c, v) for c, v in parts if c != 0]
    expected = {}
    for name, shape in SHAPES.items():
        total = torch.zeros(shape, dtype=torch.float64)
        basis: list[Tensor] = []
        for c, v in used:
            rest = dense(v)[name]
            for _ in range(2):
                for direction in basis:
                    rest = rest - (rest * direction).sum() * direction
            norm, own = float(rest.norm()), float(dense(v)[name].norm())
            assume(norm > 1e-3 * own or norm <= 1e-9 * own)  # else how much is new is a matter of rounding
            if norm > 1e-3 * own and own > 0:
                basis.append(rest / norm)
                total = total + c * rest
        expected[name] = total
    merged = merge(parts, "orthogonal")
    close(merged.vector, expected, 1e3 * scale_of(parts))
    assert merged.rank <= sum(v.rank for _, v in used)
    assert merged.energy == 1.0


@given(precise, precise)
def test_orthogonal_adds_to_the_first_only_what_is_new(v: PreferenceVector, w: PreferenceVector) -> None:
    together = merge([(1.0, v), (1.0, w)], "orthogonal").vector
    for name, matrix in dense(v).items():
        along = float((dense(together)[name] * matrix).sum())
        own = float((matrix**2).sum())
        assert math.isclose(along, own, rel_tol=1e-6, abs_tol=1e-7 * float(matrix.norm() * dense(w)[name].norm()))
    # A multiple of the first brings nothing.
    close(merge([(1.0, v), (0.5, v * -3.0)], "orthogonal").vector, dense(v), 10 * size(dense(v)))


@settings(max_examples=40, deadline=None)
@given(terms, st.integers(1, 12), densities)
def test_span_merges_inside_bases_of_the_dense_deltas(
    parts: list[tuple[float, PreferenceVector]], rank: int, density: float
) -> None:
    merged = merge(parts, "span", rank=rank, density=density)
    expected, held, whole = {}, 0.0, 0.0
    for name, shape in SHAPES.items():
        mine = [(c, v) for c, v in parts if c != 0 and name in v.deltas]
        expected[name] = torch.zeros(shape, dtype=torch.float64)
        if not mine:
            continue
        scaled = [c * dense(v)[name] for c, v in mine]
        sides = [torch.linalg.svd(torch.cat(scaled, dim=1)), torch.linalg.svd(torch.cat(scaled))]
        for _, values, _ in sides:  # bases are unique only where the values are apart
            near = 1e-4 * float(values[0])
            assume(all(a - b > near or b < 1e-9 * near for a, b in pairwise(values[: rank + 1].tolist())))
        total = sum(v.deltas[name].rank for _, v in mine)
        spans = [min(total, side) for side in shape]
        keep = [min(rank, here, len(mine) * there) for here, there in (spans, reversed(spans))]
        U, V = sides[0].U[:, : keep[0]], sides[1].Vh.T[:, : keep[1]]
        cores = [U.T @ matrix @ V for matrix in scaled]
        held += sum(float((core**2).sum()) for core in cores)
        whole += sum(float((matrix**2).sum()) for matrix in scaled)
        expected[name] = U @ disjoint_mean([largest(core, density) for core in cores]) @ V.T
    close(merged.vector, expected, 1e3 * scale_of(parts))
    assert merged.rank <= rank
    assert merged.energy == pytest.approx(held / whole if whole else 1.0, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*DENSE, "truncated", "exact", "orthogonal"]), terms, st.integers(1, 12))
def test_a_cut_is_the_best_of_its_rank_and_says_what_it_kept(
    method: Method, parts: list[tuple[float, PreferenceVector]], rank: int
) -> None:
    whole = dense(merge(parts, method, rank=FULL).vector)
    merged = merge(parts, method, rank=rank)
    spectra = {name: torch.linalg.svdvals(matrix) for name, matrix in whole.items()}
    tails = {name: float(values[rank:].norm()) for name, values in spectra.items()}
    for name, matrix in dense(merged.vector).items():
        error = float((matrix - whole[name]).norm())
        assert math.isclose(error, tails[name], rel_tol=1e-6, abs_tol=1e-7 * float(spectra[name][0]))
    total = size(whole) ** 2
    assert merged.energy == pytest.approx(1 - sum(t**2 for t in tails.values()) / total if total else 1.0, abs=1e-7)
    assert merged.rank <= rank
    assert merged.method == ("truncated" if method == "exact" else method)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), terms, st.floats(0.1, 0.99))
def test_an_energy_that_is_asked_for_is_kept(
    method: Method, parts: list[tuple[float, PreferenceVector]], energy: float
) -> None:
    merged = merge(parts, method, energy=energy)
    assert merged.energy >= energy - 1e-9
    assert merged.energy <= 1.0


@given(precise, precise, st.sampled_from(METHODS))
def test_normalize_gives_every_vector_the_mean_norm(v: PreferenceVector, w: PreferenceVector, method: Method) -> None:
    norms = [size(dense(v)), size(dense(w))]
    mean = sum(norms) / max(sum(norm > 0 for norm in norms), 1)
    equal = [vector * (mean / norm) if norm else vector for vector, norm in zip((v, w), norms, strict=True)]
    expected = merge([(2.0, equal[0]), (-0.5, equal[1])], method, rank=FULL, density=0.9).vector
    got = merge([(2.0, v), (-0.5, w)], method, rank=FULL, density=0.9, normalize=True).vector
    assert inner(dense(got), dense(expected)) == pytest.approx(size(dense(expected)) ** 2, rel=1e-6, abs=1e-12)
    assert size(dense(got)) == pytest.approx(size(dense(expected)), rel=1e-6, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.001, 1.0), st.sampled_from([torch.float32, torch.float64]))
def test_the_threshold_is_that_of_the_sorted_entries(seed: int, density: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(3, 700, generator=generator, dtype=dtype)
    B = torch.randn(600, 3, generator=generator, dtype=dtype)  # more than one block
    B[::2] = 0  # half of the entries are zero
    delta = LowRankDelta(A, B)
    count = math.ceil(density * 600 * 700)
    expected = delta.dense().abs().flatten().sort(descending=True).values[count - 1]
    assert threshold(delta, density) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (900, 700), (700, 900)])
def test_the_fit_of_a_dense_matrix_is_the_best(shape: tuple[int, int]) -> None:
    """The larger ones go through the randomised iteration: noise around a few strong directions, as TIES leaves."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 12, generator=generator)).Q for n in shape)
    noise = torch.randn(shape, generator=generator) / math.sqrt(max(shape))
    matrix = U * torch.logspace(1, 0, 12) @ V.T + 0.5 * noise
    squares = torch.linalg.svdvals(matrix.double()).square()
    for rank in (1, 5, 20):
        cut = fit(matrix, rank=rank)
        best = float(squares[:rank].sum())
        assert cut.delta.rank == rank
        assert cut.norm2 == pytest.approx(float(squares.sum()), rel=1e-5)
        assert cut.kept == pytest.approx(best, rel=1e-3)
        error = float((cut.delta.dense() - matrix).double().square().sum())
        assert error == pytest.approx(cut.norm2 - cut.kept, rel=1e-4)
        assert torch.equal(cut.delta.B, fit(matrix, rank=rank).delta.B)
    for energy in (0.3, 0.8):
        cut = fit(matrix, energy=energy)
        needed = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
        assert cut.kept >= energy * cut.norm2
        assert needed <= cut.delta.rank <= needed + 1 + needed // 20
    assert fit(matrix * 0, rank=3).delta.dense().norm() == 0


def test_a_gradient_multiplies_each_layer() -> None:
    names = [f"model.layers.{i}.q_proj" for i in range(3)]
    delta = LowRankDelta(torch.ones(1, 4), torch.arange(1.0, 4.0)[:, None])
    v = PreferenceVector(dict.fromkeys(names, delta))
    for method in METHODS:
        made = merge([((0.0, 1.0, -2.0), v)], method, density=1.0).vector
        assert names[0] not in made.deltas
        for name, c in zip(names[1:], (1.0, -2.0), strict=True):
            torch.testing.assert_close(made.deltas[name].dense(), c * delta.dense())
    longer = merge([((0.0, 1.0), v)], layers=5).vector
    torch.testing.assert_close(longer.deltas[names[2]].dense(), 0.5 * delta.dense())


def test_a_mix_merges_as_the_function_does() -> None:
    generator = torch.Generator().manual_seed(0)
    v, w = (
        PreferenceVector(
            {"m": LowRankDelta(torch.randn(3, 9, generator=generator), torch.randn(8, 3, generator=generator))}
        )
        for _ in range(2)
    )
    mix = Mix([MixEntry("v", v, 1.0), MixEntry("w", w, -0.5)])
    one = mix.merge("ties", rank=2, density=0.7, normalize=True)
    other = merge([(1.0, v), (-0.5, w)], "ties", rank=2, density=0.7, normalize=True)
    assert torch.equal(one.vector.deltas["m"].B, other.vector.deltas["m"].B)
    assert (one.energy, one.rank, one.method) == (other.energy, 2, "ties")
    assert 0 < one.energy < 1
    assert_is(mix.merge(rank=6).vector, dense(mix.compose()), 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_merging_checks_what_it_is_given(method: Method) -> None:
    def vector(rows: int, base: str) -> PreferenceVector:
        delta = LowRankDelta(torch.ones(1, 3), torch.ones(rows, 1))
        return PreferenceVector({"m": delta}, BaseIdentity(base, config_sha256=base * 64))

    assert merge([(1.0, vector(2, "a"))], method).vector.identity == vector(2, "a").identity
    assert merge([], method).vector.deltas == {}
    with pytest.raises(InputError, match=r"module m is \[2, 3\] in one vector and \[4, 3\] in another"):
        merge([(1.0, vector(2, "a")), (1.0, vector(4, "a"))], method)
    with pytest.raises(InputError, match="two bases, 'a' and 'b'"):
        merge([(1.0, vector(2, "a")), (1.0, vector(2, "b"))], method)
    for bad in ({"rank": 0}, {"rank": 1, "energy": 0.5}, {"energy": 0.0}, {"energy": 1.5}, {"energy": math.nan}):
        with pytest.raises(InputError):
            merge([(1.0, vector(2, "a"))], method, **bad)
    for density in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(InputError, match="density"):
            merge([(1.0, vector(2, "a"))], method, density=density)
    with pytest.raises(InputError, match="a coefficient of nan"):
        merge([(math.nan, vector(2, "a"))], method)


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'tie' is no method\. Did you mean 'ties'\?"):
        merge([], "tie")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_gives_what_the_cpu_gives(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        PreferenceVector(
            {"m": LowRankDelta(torch.randn(8, 600, generator=generator), torch.randn(700, 8, generator=generator))}
        )
        for _ in range(3)
    ]
    here = merge([(1.0, v) for v in parts], method, rank=24, density=0.9)
    there = merge([(1.0, v.to("cuda")) for v in parts], method, rank=24, density=0.9)
    assert there.vector.deltas["m"].A.device.type == "cuda"
    expected = here.vector.deltas["m"].dense()
    error = there.vector.deltas["m"].to("cpu").dense() - expected
    assert float(error.norm() / expected.norm()) < 1e-3
    assert there.energy == pytest.approx(here.energy, abs=1e-4)
    torch.testing.assert_close(
        there.vector.spectrum()["m"].cpu(), here.vector.spectrum()["m"], rtol=1e-3, atol=1e-3 * float(expected.norm())
    )


def test_what_cancels_leaves_nothing_in_the_shared_span() -> None:
    v = PreferenceVector({"a": LowRankDelta(torch.randn(3, 7), torch.randn(9, 3))})
    for density in (0.5, 1.0):
        merged = merge([(1.0, v), (-1.0, v)], "span", rank=2, density=density)
        assert merged.vector.norm() <= 1e-6 * v.norm()
