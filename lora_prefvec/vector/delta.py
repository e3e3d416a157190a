"""The change of one weight matrix, kept as the product of two thin factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_prefvec.errors import InputError


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """`B @ A`, the change of one weight matrix; a LoRA's scale is already folded into B.

    Arithmetic is exact in factor space: a sum concatenates factors, so its rank is the sum of the ranks, and no dense
    matrix is built. Half-precision factors are widened to float32, which loses nothing.

    Args:
        A: [r, in]
        B: [out, r]

    Raises:
        InputError: the factors are no matrices, do not meet in one rank of at least 1, or hold NaN or infinity.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        shapes = f"A {list(self.A.shape)} and B {list(self.B.shape)}"
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] or self.A.shape[0] == 0:
            raise InputError(
                f"the factors {shapes} are no low-rank delta", "Give A as [r, in] and B as [out, r], r >= 1."
            )
        dtypes = {self.A.dtype, self.B.dtype}
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise InputError(f"the factors {shapes} are of {self.A.dtype} and {self.B.dtype}", "Give real numbers.")
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        for name in ("A", "B"):
            factor = getattr(self, name).detach().to(dtype)
            # The sum is finite only if every value is; a sum may overflow where no value does, hence the second look.
            if not torch.isfinite(factor.sum()) and not torch.isfinite(factor).all():
                bad = int((~torch.isfinite(factor)).sum())
                raise InputError(
                    f"factor {name} {list(factor.shape)} holds {bad} values that are NaN or infinite",
                    "The adapter is damaged or its training diverged: use another one.",
                )
            object.__setattr__(self, name, factor)

    @property
    def rank(self) -> int:
        """Number of rows of A; the true rank of the dense delta may be lower."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense delta."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The delta as a matrix [out, in]."""
        return self.B @ self.A

    def __add__(self, other: LowRankDelta) -> LowRankDelta:
        return combine([(1.0, self), (1.0, other)])

    def __sub__(self, other: LowRankDelta) -> LowRankDelta:
        return combine([(1.0, self), (-1.0, other)])

    def __neg__(self) -> LowRankDelta:
        return LowRankDelta(self.A, -self.B)

    def __mul__(self, coefficient: float) -> LowRankDelta:
        return LowRankDelta(self.A, self.B * finite(coefficient))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LowRankDelta:
        if divisor == 0:
            raise InputError("a vector cannot be divided by 0", "Divide by any other number.")
        return LowRankDelta(self.A, self.B / finite(divisor))

    def inner(self, other: LowRankDelta) -> float:
        """Frobenius inner product of the dense deltas, in float64 and without building them.

        <B1 A1, B2 A2> = sum of (B1^T B2) * (A1 A2^T), elementwise: work and memory of r1 x r2.
        """
        same_shape(self, other)
        outputs = self.B.double().T @ other.B.double()
        inputs = self.A.double() @ other.A.double().T
        return float((outputs * inputs).sum())

    def norm(self) -> float:
        """Frobenius norm of the dense delta."""
        return math.sqrt(max(self.inner(self), 0.0))

    def spectrum(self) -> Tensor:
        """Singular values of the dense delta, largest first: [min(r, in, out)], float64.

        With A^T = Q_a R_a and B = Q_b R_b the delta is Q_b (R_b R_a^T) Q_a^T: the r x r core has its singular values.
        """
        _, r_a = torch.linalg.qr(self.A.double().T, mode="r")
        _, r_b = torch.linalg.qr(self.B.double(), mode="r")
        values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
        return values


def combine(terms: Sequence[tuple[float, LowRankDelta]]) -> LowRankDelta:
    """The sum of coefficient x delta over at least one term, exactly: factors side by side, coefficients in B.

    Raises:
        InputError: the deltas differ in shape, or a coefficient is not finite.
    """
    first_coefficient, first = terms[0]
    if len(terms) == 1:
        return first if first_coefficient == 1.0 else first * first_coefficient
    for _, delta in terms[1:]:
        same_shape(first, delta)
    A = torch.cat([delta.A for _, delta in terms])
    B = torch.cat([delta.B if c == 1.0 else delta.B * finite(c) for c, delta in terms], dim=1)
    return LowRankDelta(A, B)


def same_shape(left: LowRankDelta, right: LowRankDelta) -> None:
    """Raises InputError where two deltas change matrices of different shape."""
    if left.shape != right.shape:
        raise InputError(
            f"deltas of shape {list(left.shape)} and {list(right.shape)} cannot be combined",
            "Use vectors that were trained on the same base.",
        )


def finite(coefficient: float) -> float:
    """The coefficient as a float; raises InputError where it is NaN or infinite."""
    value = float(coefficient)
    if not math.isfinite(value):
        raise InputError(f"a coefficient of {value} cannot be applied", "Give a finite number such as 1.0 or -0.5.")
    return value
