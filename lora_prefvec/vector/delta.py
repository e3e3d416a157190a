"""The change of one weight matrix, kept as the product of two thin factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_prefvec.errors import InputError
from lora_prefvec.vector.checks import check_cut, check_energy, check_rank, finite, not_finite

ROUNDING = 1e-14  # of the sum of the terms' norms: below this a direction of the sum is rounding in float64
CANCELLED = 2.0**-23  # of the terms' norms: factors in float32 cannot tell what is below from zero
WELL_APART = 0.01  # sine of the angle between a factor's column and those before it
REMEMBERED = 128  # largest rank whose Gram matrices are kept: 256 kB


class Term(NamedTuple):
    """One term of a delta: coefficient x B @ A, with A [r, in] and B [out, r] as they came, in whatever precision."""

    coefficient: float
    A: Tensor
    B: Tensor


class LowRankDelta:
    """`B @ A`, the change of one weight matrix; a LoRA's scale is already folded into B.

    Arithmetic is exact in factor space: a sum concatenates factors, so its rank is the sum of the ranks, and no dense
    matrix is built. It costs nothing before it is needed: a sum keeps its `terms`, and joins them when `A` or `B` is
    first asked for. Half-precision factors are widened to float32 then, which loses nothing.

    Args:
        A: [r, in]
        B: [out, r]

    Raises:
        InputError: the factors are no matrices, do not meet in one rank of at least 1, or hold NaN or infinity.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        shapes = f"A {list(A.shape)} and B {list(B.shape)}"
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
            raise InputError(
                f"the factors {shapes} are no low-rank delta", "Give A as [r, in] and B as [out, r], r >= 1."
            )
        if not (A.dtype.is_floating_point and B.dtype.is_floating_point):
            raise InputError(f"the factors {shapes} are of {A.dtype} and {B.dtype}", "Give real numbers.")
        A, B = A.detach(), B.detach()
        for name, factor in (("A", A), ("B", B)):
            if bad := not_finite(factor):
                raise InputError(
                    f"factor {name} {list(factor.shape)} holds {bad} values that are NaN or infinite",
                    "The adapter is damaged or its training diverged: use another one.",
                )
        self._terms: tuple[Term, ...] = (Term(1.0, A, B),)
        self._grams: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, terms: Iterable[Term]) -> LowRankDelta:
        """The sum of terms of one shape whose factors were checked before."""
        delta = cls.__new__(cls)
        delta._terms, delta._grams = tuple(terms), None
        return delta

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the delta is the sum of; one term with coefficient 1 once the factors were asked for."""
        return self._terms

    @property
    def A(self) -> Tensor:
        """The right factor, [rank, in], in float32 or float64."""
        return self._joined().A

    @property
    def B(self) -> Tensor:
        """The left factor, [out, rank], in float32 or float64."""
        return self._joined().B

    def _joined(self) -> Term:
        terms = self._terms
        dtypes = {factor.dtype for _, A, B in terms for factor in (A, B)}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        if len(terms) > 1 or terms[0].coefficient != 1.0 or dtypes != {dtype}:
            A = torch.cat([term.A.to(dtype) for term in terms])
            B = torch.cat([term.B.to(dtype) * term.coefficient for term in terms], dim=1)
            if not_finite(B):
                raise InputError("a coefficient makes the factors infinite", "Give one nearer to 0.")
            self._terms = (Term(1.0, A, B),)
        return self._terms[0]

    @property
    def rank(self) -> int:
        """Number of rows of A; the true rank of the dense delta may be lower."""
        return sum(term.A.shape[0] for term in self._terms)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense delta."""
        first = self._terms[0]
        return first.B.shape[0], first.A.shape[1]

    def dense(self) -> Tensor:
        """The delta as a matrix [out, in]."""
        return self.B @ self.A

    def __add__(self, other: LowRankDelta) -> LowRankDelta:
        return combine([(1.0, self), (1.0, other)])

    def __sub__(self, other: LowRankDelta) -> LowRankDelta:
        return combine([(1.0, self), (-1.0, other)])

    def __neg__(self) -> LowRankDelta:
        return self * -1.0

    def __mul__(self, coefficient: float) -> LowRankDelta:
        return combine([(coefficient, self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LowRankDelta:
        if divisor == 0:
            raise InputError("a vector cannot be divided by 0", "Divide by any other number.")
        return self * (1.0 / finite(divisor))

    def inner(self, other: LowRankDelta) -> float:
        """Frobenius inner product of the dense deltas, in float64 and without building them.

        <B1 A1, B2 A2> = sum of (B1^T B2) * (A1 A2^T), elementwise: work and memory of r1 x r2.
        """
        if other is self:
            across_A, across_B = self.grams()
        else:
            same_shape(self, other)
            across_A = self.A.double() @ other.A.double().T
            across_B = self.B.double().T @ other.B.double()
        return float((across_A * across_B).sum())

    def grams(self) -> tuple[Tensor, Tensor]:
        """A A^T and B^T B, each [r, r] in float64; norm and spectrum are made of them."""
        if self._grams is not None:
            return self._grams
        A, B = self.A.double(), self.B.double()
        grams = A @ A.T, B.T @ B
        if self.rank <= REMEMBERED:
            self._grams = grams
        return grams

    def norm(self) -> float:
        """Frobenius norm of the dense delta; 0.0 where its terms cancel but for their rounding in float32."""
        gram_A, gram_B = self.grams()
        products = gram_A * gram_B
        squared = float(products.sum())
        return math.sqrt(squared) if squared > CANCELLED**2 * float(products.abs().sum()) else 0.0

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of the dense delta, from the factors: delta = U diag(S) V^T.

        With A^T = Q_a R_a and B = Q_b R_b the delta is Q_b (R_b R_a^T) Q_a^T, and the r x r core has its SVD.

        Returns:
            U [out, k], S [k] largest first, V [in, k], all float64 on the delta's device; k = min(r, in, out).
        """
        q_a, r_a = torch.linalg.qr(self.A.double().T)
        q_b, r_b = torch.linalg.qr(self.B.double())
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, s, q_a @ vh.T

    def spectrum(self) -> Tensor:
        """Singular values of the dense delta, largest first: [min(r, in, out)], float64."""
        r_a, r_b = self._triangles()
        values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
        return values

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """R of the QR decompositions of A^T and of B."""
        gram_A, gram_B = self.grams()
        return _triangle(self.A.T, gram_A), _triangle(self.B, gram_B)

    def energy(self, rank: int) -> float:
        """The part of the squared norm that the best approximation of that rank keeps; 1.0 for a delta of zeros."""
        return kept(self.spectrum() ** 2, check_rank(rank))

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, whose best approximation keeps that part of the squared norm.

        Raises:
            InputError: the energy is not above 0 and at most 1.
        """
        return smallest_rank(self.spectrum() ** 2, energy)

    def truncate(self, *, rank: int | None = None, energy: float | None = None) -> LowRankDelta:
        """The best approximation of a rank (Eckart and Young 1936), or of the smallest that keeps an energy.

        Args:
            rank: largest rank of the result. It is lower where the delta has no more directions, and a delta that has
                no more factors is returned as it is.
            energy: part of the squared norm to keep, above 0 and at most 1.

        Raises:
            InputError: both or none of the two are given, or one is out of range.
        """
        check_cut(rank, energy)
        return self if rank is not None and rank >= self.rank else self.cut(rank=rank, energy=energy).delta

    def cut(self, *, rank: int | None = None, energy: float | None = None) -> Cut:
        """As `truncate`, with the norms before and after.

        No dense matrix and no orthonormal basis is built. With the core's SVD U S V^T (see `svd`) and k values kept,
        B' = B (R_a^T V S^-1/2) and A' = (S^-1/2 U^T R_b) A.
        """
        check_cut(rank, energy)
        A, B = self.A.double(), self.B.double()
        r_a, r_b = self._triangles()
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        squares = s.square()
        norm2 = float(squares.sum())
        if rank is not None and rank >= self.rank:
            return Cut(self, norm2, norm2)
        count = smallest_rank(squares, energy) if energy is not None else check_rank(rank)
        # Directions below the rounding of the terms that make the core are noise, and S^-1/2 would blow them up.
        terms = torch.linalg.vector_norm(r_a, dim=0) @ torch.linalg.vector_norm(r_b, dim=0)
        count = min(count, int((s > ROUNDING * terms).sum()))
        if count == 0:
            return Cut(LowRankDelta(self.A[:1] * 0, self.B[:, :1] * 0), norm2, 0.0)
        root = s[:count].rsqrt()
        reduced_B = B @ (r_a.T @ (vh[:count].T * root))
        reduced_A = ((u[:, :count] * root).T @ r_b) @ A
        delta = LowRankDelta(reduced_A.to(self.A.dtype), reduced_B.to(self.B.dtype))
        return Cut(delta, norm2, float(squares[:count].sum()))

    def project_out(self, other: LowRankDelta) -> LowRankDelta:
        """What is left after taking away the part along `other`: d - (<d, o> / <o, o>) o, at the sum of both ranks."""
        shared = self.inner(other)
        return combine([(1.0, self), (-shared / other.inner(other), other)]) if shared else self

    def to(self, device: torch.device | str) -> LowRankDelta:
        """The same delta with its factors on `device`."""
        return LowRankDelta.of(Term(c, A.to(device), B.to(device)) for c, A, B in self._terms)


class Cut(NamedTuple):
    """A low-rank delta and what it was cut from.

    Attributes:
        delta: the delta.
        norm2: squared Frobenius norm of what was cut.
        kept: squared norm of what is left of it.
    """

    delta: LowRankDelta
    norm2: float
    kept: float


def _triangle(matrix: Tensor, product: Tensor) -> Tensor:
    """R of the QR decomposition of a tall matrix [n, r] with its Gram matrix: [min(n, r), r], float64.

    The Cholesky factor of the Gram matrix is the same R four times sooner, but squares the condition number: it serves
    where every column stands off from those before it, and not where factors cancel, as those of d+ - d- do.
    """
    triangle: Tensor
    triangle, failed = torch.linalg.cholesky_ex(product, upper=True)
    apart = triangle.diagonal().square() > WELL_APART**2 * product.diagonal()
    if not failed and apart.all():
        return triangle
    triangle = torch.linalg.qr(matrix.double(), mode="r").R
    return triangle


def gram(deltas: Sequence[LowRankDelta]) -> Tensor:
    """Inner products of every two of k deltas of one shape, [k, k], float64 on the CPU.

    One product of the stacked factors, (B^T B) * (A A^T), and then the sum over each r_i x r_j block.
    """
    A = torch.cat([delta.A for delta in deltas]).double()
    B = torch.cat([delta.B for delta in deltas], dim=1).double()
    product = ((B.T @ B) * (A @ A.T)).cpu()
    owner = torch.repeat_interleave(torch.tensor([delta.rank for delta in deltas]))
    member = torch.nn.functional.one_hot(owner, len(deltas)).double()
    return member.T @ product @ member


def combine(terms: Sequence[tuple[float, LowRankDelta]]) -> LowRankDelta:
    """The sum of coefficient x delta over at least one term, exactly: factors side by side, coefficients in B.

    Raises:
        InputError: the deltas differ in shape, or a coefficient is not finite.
    """
    first_coefficient, first = terms[0]
    if len(terms) == 1 and first_coefficient == 1.0:
        return first
    for _, delta in terms[1:]:
        same_shape(first, delta)
    return LowRankDelta.of(
        term._replace(coefficient=finite(coefficient * term.coefficient))
        for coefficient, delta in terms
        for term in delta.terms
    )


def same_shape(left: LowRankDelta, right: LowRankDelta) -> None:
    """Raises InputError where two deltas change matrices of different shape."""
    if left.shape != right.shape:
        raise InputError(
            f"deltas of shape {list(left.shape)} and {list(right.shape)} cannot be combined",
            "Use vectors that were trained on the same base.",
        )


def kept(squares: Tensor, rank: int) -> float:
    """The part that the first `rank` of some squared singular values have in their sum; 1.0 where all are zero."""
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total > 0 else 1.0


def smallest_rank(squares: Tensor, energy: float) -> int:
    """How many of some squared singular values, largest first, make up that part of their sum: at least 1."""
    check_energy(energy)
    sums = squares.cumsum(0)
    return min(int((sums < energy * sums[-1]).sum()) + 1, len(sums)) if len(sums) else 1
