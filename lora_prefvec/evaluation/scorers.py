"""Scorers, found by name: `sandbox:helpful` is the scorer `helpful` of the installed source `sandbox`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

from lora_prefvec.errors import InputError, nearest

GROUP = "lora_prefvec.scorers"
Prompt = str | Sequence[dict[str, str]]


class Scorer(Protocol):
    """Gives a reply a number on one axis.

    `direction` is +1 where more is better and -1 where less is; a cost is a quality that preferences should leave
    alone.
    """

    @property
    def name(self) -> str: ...

    @property
    def direction(self) -> int: ...

    @property
    def is_cost(self) -> bool: ...

    def __call__(self, prompt: Prompt, reply: str) -> float | None:
        """The score of a reply; None where the axis has no say on this prompt."""


def find_scorer(reference: str) -> Scorer:
    """The scorer that `source:name` names; a source is an entry point of the group `lora_prefvec.scorers`.

    Raises:
        InputError: no such source is installed, or it has no such scorer.
    """
    source, _, name = reference.partition(":")
    sources = {point.name: point for point in entry_points(group=GROUP)}
    if source not in sources:
        raise InputError(f"there is no source of scorers {source!r}", nearest(source, sources))
    scorer: Scorer = sources[source].load()(name)
    return scorer
