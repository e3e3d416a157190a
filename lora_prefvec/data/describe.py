"""What there is to know about a set of pairs before training on it."""

from __future__ import annotations

import math
import statistics as stdlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from lora_prefvec.data.pairs import Content, Pair, PairSet, canonical

CountTokens: TypeAlias = Callable[[Pair], tuple[int, int, int]]
PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Lengths:
    """Length of one part over all pairs; `p95` is the shortest that 95 % of them do not exceed."""

    median: float
    p95: int
    max: int


@dataclass(frozen=True)
class Statistics:
    """Facts about `pairs` pairs.

    Args:
        pairs: how many.
        prompts: distinct prompts among them.
        duplicates: pairs that are equal to an earlier one.
        contradictions: sets of two replies of which each is preferred to the other somewhere, to the same prompt.
        longer_wins: share of pairs with a longer chosen reply (in characters), among those whose lengths differ.
        characters: part -> lengths in characters, roles and template left out.
        tokens: part -> lengths in tokens, as counted by the given counter; None without one.
    """

    pairs: int
    prompts: int
    duplicates: int
    contradictions: int
    longer_wins: float | None
    characters: dict[str, Lengths]
    tokens: dict[str, Lengths] | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def statistics(pairs: PairSet | Sequence[Pair], count_tokens: CountTokens | None = None) -> Statistics:
    """Count and measure pairs.

    Args:
        pairs: at least one.
        count_tokens: pair -> tokens of its prompt, chosen and rejected reply.
    """
    rows = pairs.pairs if isinstance(pairs, PairSet) else pairs
    characters = [tuple(characters_of(getattr(pair, part)) for part in PARTS) for pair in rows]
    seen: Counter[tuple[str, str, str]] = Counter()
    for pair in rows:
        seen[canonical(pair.prompt), canonical(pair.chosen), canonical(pair.rejected)] += 1
    differing = [chosen > rejected for _, chosen, rejected in characters if chosen != rejected]
    return Statistics(
        pairs=len(rows),
        prompts=len({prompt for prompt, _, _ in seen}),
        duplicates=len(rows) - len(seen),
        contradictions=sum((prompt, rejected, chosen) in seen for prompt, chosen, rejected in seen) // 2,
        longer_wins=sum(differing) / len(differing) if differing else None,
        characters=_lengths(characters),
        tokens=_lengths([count_tokens(pair) for pair in rows]) if count_tokens else None,
    )


def characters_of(content: Content) -> int:
    """Characters of a string, or of all turns together."""
    return len(content) if isinstance(content, str) else sum(len(turn["content"]) for turn in content)


def _lengths(counts: Sequence[tuple[int, ...]]) -> dict[str, Lengths]:
    columns = (sorted(column) for column in zip(*counts, strict=True))
    return {
        part: Lengths(stdlib.median(column), column[math.ceil(0.95 * len(column)) - 1], column[-1])
        for part, column in zip(PARTS, columns, strict=True)
    }
