"""Random vectors, and the dense float64 matrices that they stand for."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_prefvec.vector import LowRankDelta, PreferenceVector

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 9), "model.layers.0.mlp.up_proj": (7, 16), "lm_head": (20, 5)}
Dense = dict[str, Tensor]


@st.composite
def vectors(draw: st.DrawFn, *, dtype: torch.dtype = torch.float32, scales: int = 3) -> PreferenceVector:
    """A vector over any of the modules, each with a rank of its own and a scale over 2 `scales` orders of magnitude."""
    modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    deltas = {}
    for name in modules:
        rows, columns = SHAPES[name]
        rank = draw(st.integers(1, 6))
        scale = 10.0 ** draw(st.integers(-scales, scales))
        A = torch.randn(rank, columns, generator=generator, dtype=dtype)
        deltas[name] = LowRankDelta(A, torch.randn(rows, rank, generator=generator, dtype=dtype) * scale)
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
    """Frobenius norm over all modules."""
    return math.sqrt(sum(float((matrix**2).sum()) for matrix in matrices.values()))


def inner(left: Dense, right: Dense) -> float:
    """Frobenius inner product over all modules."""
    return sum(float((left[name] * right[name]).sum()) for name in left)


def assert_is(vector: PreferenceVector, expected: Dense, scale: float) -> None:
    """The vector is the expected delta, but for rounding of float32 at the scale of the terms that made it."""
    error = size({name: matrix - expected[name] for name, matrix in dense(vector).items()})
    assert error <= 1e-6 * scale
