"""Vectors with coefficients for one base, and how a person writes them: `helpful=1.0`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lora_prefvec.errors import InputError
from lora_prefvec.vector.preference_vector import PreferenceVector, linear_combination


class MixEntry(NamedTuple):
    """One vector of a mix: its name or reference, the vector, and the number that multiplies it."""

    name: str
    vector: PreferenceVector
    coefficient: float = 1.0


@dataclass(frozen=True, eq=False)
class Mix:
    """An ordered list of vectors with coefficients; the same vector may come twice and then counts twice.

    Args:
        entries: `MixEntry(name, vector, coefficient)` each; a plain tuple will do.

    Raises:
        InputError: a coefficient is NaN or infinite.
    """

    entries: Sequence[MixEntry]

    def __post_init__(self) -> None:
        entries = tuple(MixEntry(*entry) for entry in self.entries)
        for entry in entries:
            check_coefficient(entry.name, entry.coefficient)
        object.__setattr__(self, "entries", entries)

    def compose(self) -> PreferenceVector:
        """The sum of coefficient x vector, exactly; coefficient 0 drops a vector, and an empty mix changes nothing."""
        return linear_combination([(coefficient, vector) for _, vector, coefficient in self.entries])


def parse_reference(text: str) -> tuple[str, float]:
    """Splits `REF=COEF` at its last `=`; without one the coefficient is 1.0.

    A path that itself holds a `=` is written with its coefficient: `runs/lr=2e-4=1`.

    Raises:
        InputError: the reference is empty, or the coefficient is no finite number.
    """
    reference, separator, written = text.rpartition("=")
    if not separator:
        reference, written = text, "1.0"
    reference = reference.strip()
    if not reference:
        raise InputError(f"{text!r} names no vector", "Write REF=COEF, for example helpful=1.0.")
    return reference, check_coefficient(reference, written)


def check_coefficient(name: str, written: float | str) -> float:
    """The coefficient of the vector `name` as a float; raises InputError where it is no finite number."""
    try:
        coefficient = float(written)
    except (TypeError, ValueError):
        coefficient = math.nan
    if not math.isfinite(coefficient):
        raise InputError(
            f"the coefficient {str(written).strip()!r} of {name!r} is no finite number",
            f"Write {name}=1.0, or another number such as -0.5.",
        )
    return coefficient
