"""A preference as a value: one low-rank delta per module, with `+ - * / @`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_prefvec.errors import InputError
from lora_prefvec.vector.delta import LowRankDelta, combine, finite
from lora_prefvec.vector.identity import BaseIdentity


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
        return math.sqrt(max(self @ self, 0.0))

    def cosine(self, other: PreferenceVector) -> float:
        """Cosine of the angle between two vectors, of their dense deltas; 0.0 where one of them is zero."""
        norms = self.norm() * other.norm()
        return max(-1.0, min(1.0, (self @ other) / norms)) if norms > 0 else 0.0


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
