"""A preference as a value: one low-rank delta per module, with `+ - * / @`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_prefvec.errors import InputError
from lora_prefvec.vector.checks import check_cut, check_rank, finite
from lora_prefvec.vector.delta import LowRankDelta, combine, kept, smallest_rank
from lora_prefvec.vector.identity import BaseIdentity

if TYPE_CHECKING:
    from lora_prefvec.vector.filters import Filter


@dataclass(frozen=True, eq=False)
class PreferenceVector:
    """What a preference changes in a base: a delta per module, zero where a module is missing.

    Args:
        deltas: module name without any prefix (`model.layers.0.self_attn.q_proj`) -> its delta.
        identity: the base that the vector was trained on; None where it is unknown, which agrees with every base.
    """

    deltas: Mapping[str, LowRankDelta]
    identity: BaseIdentity | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", dict(self.deltas))

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 for a vector that changes nothing."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    def __add__(self, other: PreferenceVector) -> PreferenceVector:
        return linear_combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: PreferenceVector) -> PreferenceVector:
        return linear_combination([(1.0, self), (-1.0, other)])

    def __neg__(self) -> PreferenceVector:
        return replace(self, deltas={name: -delta for name, delta in self.deltas.items()})

    def __mul__(self, coefficient: float) -> PreferenceVector:
        return replace(self, deltas={name: delta * coefficient for name, delta in self.deltas.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> PreferenceVector:
        return replace(self, deltas={name: delta / divisor for name, delta in self.deltas.items()})

    def __matmul__(self, other: PreferenceVector) -> float:
        """Inner product of the dense deltas, summed over the modules that both have."""
        common_identity([self.identity, other.identity])
        return math.fsum(left.inner(right) for _, left, right in _pairs(self, other))

    def norm(self) -> float:
        """Frobenius norm over all modules."""
        return math.hypot(*(delta.norm() for delta in self.deltas.values()))

    def cosine(self, other: PreferenceVector) -> float:
        """Cosine of the angle between two vectors, of their dense deltas; 0.0 where one of them is zero."""
        inner = self @ other
        mine, theirs = (math.fsum(one.inner(one) for one in vector.deltas.values()) for vector in (self, other))
        norms = math.sqrt(max(mine, 0.0)) * math.sqrt(max(theirs, 0.0))
        return max(-1.0, min(1.0, inner / norms)) if norms > 0 else 0.0

    def spectrum(self) -> dict[str, Tensor]:
        """Module -> singular values of its delta, largest first, float64."""
        return {name: delta.spectrum() for name, delta in self.deltas.items()}

    def energy(self, rank: int) -> float:
        """The part of the squared norm, over all modules, that the best approximation of each to `rank` keeps."""
        return kept(self._squares(), check_rank(rank))

    def rank_for(self, energy: float) -> int:
        """The smallest rank which, given to all modules alike, keeps that part of the squared norm over all of them.

        Raises:
            InputError: the energy is not above 0 and at most 1.
        """
        return smallest_rank(self._squares(), energy)

    def truncate(
        self, *, rank: int | None = None, energy: float | None = None, per_module: bool = False
    ) -> PreferenceVector:
        """The best approximation of every module (Eckart and Young 1936) to a rank, or to a part of the squared norm.

        Args:
            rank: the largest rank of a module.
            energy: the part to keep, above 0 and at most 1. All modules get one rank, the smallest that keeps this part
                of the vector's squared norm in total: what a written adapter with its one rank can use best.
            per_module: keep `energy` in every module instead, each at its own smallest rank.

        Raises:
            InputError: both or none of rank and energy are given, or one is out of range.
        """
        check_cut(rank, energy)
        if energy is not None and not per_module:
            rank, energy = self.rank_for(energy), None
        cut = {name: delta.truncate(rank=rank, energy=energy) for name, delta in self.deltas.items()}
        return replace(self, deltas=cut)

    def project_out(self, other: PreferenceVector, *, per_module: bool = False) -> PreferenceVector:
        """What is left after taking away the part along `other`: v - (<v, w> / <w, w>) w, orthogonal to w.

        Args:
            other: w; it may change modules that this vector lacks, and the result then changes them too.
            per_module: project each module on its own, so that the two are orthogonal in every one; no module is added.

        Raises:
            InputError: the two belong to different bases, or a module has two shapes.
        """
        if not per_module:
            shared = self @ other
            return linear_combination([(1.0, self), (-shared / (other @ other), other)]) if shared else self
        identity = common_identity([self.identity, other.identity])
        left = {name: mine.project_out(theirs) for name, mine, theirs in _pairs(self, other)}
        return PreferenceVector({**self.deltas, **left}, identity)

    def filtered(self, keep: Filter) -> PreferenceVector:
        """The vector with the modules that the filter keeps, unchanged there and zero everywhere else.

        Raises:
            InputError: the filter keeps no module, or one of its words names none.
        """
        names = keep.select(self.deltas)
        return replace(self, deltas={name: self.deltas[name] for name in names})

    def to(self, device: torch.device | str) -> PreferenceVector:
        """The same vector with its factors on `device`."""
        return replace(self, deltas={name: delta.to(device) for name, delta in self.deltas.items()})

    def _squares(self) -> Tensor:
        """The k-th largest squared singular values of all modules, summed, for every k: [largest rank], float64."""
        spectra = [values.cpu() for values in self.spectrum().values()]
        if not spectra:
            return torch.zeros(1, dtype=torch.float64)
        return (torch.nn.utils.rnn.pad_sequence(spectra) ** 2).sum(dim=1)


def extract(positive: PreferenceVector, negative: PreferenceVector) -> PreferenceVector:
    """The preference vector d+ - d-, exactly: B = [B+, -B-], A = [A+; A-].

    Args:
        positive: the adapter trained with the labels as given.
        negative: the adapter trained with chosen and rejected swapped.

    Raises:
        InputError: the two belong to different bases, or a module has two shapes.
    """
    return positive - negative


def linear_combination(terms: Sequence[tuple[float, PreferenceVector]]) -> PreferenceVector:
    """The sum of coefficient x vector, exactly, in one pass per module; terms with coefficient 0 are left out.

    Raises:
        InputError: vectors of different bases, a module with two shapes, or a coefficient that is not finite.
    """
    active = [(finite(c), vector) for c, vector in terms if c != 0]
    identity = common_identity(vector.identity for _, vector in active or terms)
    by_module: dict[str, list[tuple[float, LowRankDelta]]] = {}
    for coefficient, vector in active:
        for name, delta in vector.deltas.items():
            by_module.setdefault(name, []).append((coefficient, delta))
    for name, parts in by_module.items():
        for _, delta in parts[1:]:
            check_module(name, parts[0][1], delta)
    return PreferenceVector({name: combine(parts) for name, parts in by_module.items()}, identity)


def common_identity(identities: Iterable[BaseIdentity | None]) -> BaseIdentity | None:
    """The one base that all identities name, its facts gathered from every side that knows them; None agrees with all.

    Raises:
        InputError: two of them differ; it names both sides and the facts.
    """
    common: BaseIdentity | None = None
    for identity in identities:
        if common is None or identity is None:
            common = common or identity
        elif found := common.mismatches(identity):
            raise InputError(
                f"the vectors belong to two bases, {common.id!r} and {identity.id!r} ({'; '.join(found)})",
                "Use vectors that were trained on the same base.",
            )
        else:
            # A fact that one side knows binds the sum, or a third vector could slip past it.
            common = replace(
                common,
                config_sha256=common.config_sha256 or identity.config_sha256,
                tokenizer_sha256=common.tokenizer_sha256 or identity.tokenizer_sha256,
                template_sha256=common.template_sha256 or identity.template_sha256,
            )
    return common


def _pairs(left: PreferenceVector, right: PreferenceVector) -> Iterator[tuple[str, LowRankDelta, LowRankDelta]]:
    for name, delta in left.deltas.items():
        if name in right.deltas:
            check_module(name, delta, right.deltas[name])
            yield name, delta, right.deltas[name]


def check_module(name: str, left: LowRankDelta, right: LowRankDelta) -> None:
    """Raises InputError, with the module's name, where two vectors change it in different shapes."""
    if left.shape != right.shape:
        raise InputError(
            f"module {name} is {list(left.shape)} in one vector and {list(right.shape)} in another",
            "Use vectors that were trained on the same base.",
        )
