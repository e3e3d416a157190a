"""Preference pairs: what a row of every published form becomes, and the operations that need nothing else."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias, TypeVar

from lora_prefvec.errors import InputError

Message: TypeAlias = dict[str, str]
Content: TypeAlias = str | list[Message]


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, of which `chosen` is preferred.

    All three parts are of one kind: strings (TRL's standard form: the text is continued as it is), or lists of
    `{"role", "content"}` messages (TRL's conversational form: a chat template renders them; the prompt ends with a user
    turn, each reply is one or more assistant turns).
    """

    prompt: Content
    chosen: Content
    rejected: Content

    @property
    def conversational(self) -> bool:
        """Whether the parts are messages rather than strings."""
        return not isinstance(self.prompt, str)

    def as_dict(self) -> dict[str, Content]:
        """The pair as a row of TRL's preference form."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class PairSet:
    """The pairs of one source, and what became of its rows.

    Args:
        pairs: in the order of the source.
        form: the published form they were read from, such as `hh-rlhf` or `ultrafeedback:honesty`.
        source: the file, Hub id or `name:part` as given.
        revision: commit of a Hub dataset; None elsewhere.
        skipped: reason -> number of rows that could not become a pair.
        rows_read: rows of the source, before any was skipped or left out by `rows`.
        first_rows: reason -> number (from 1) of the first row that was skipped for it.
    """

    pairs: list[Pair]
    form: str
    source: str
    revision: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    rows_read: int = 0
    first_rows: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def sha256(self) -> str:
        """Hash of the normalised pairs, their order included: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(canonical([pair.prompt, pair.chosen, pair.rejected]).encode() + b"\n")
        return digest.hexdigest()


def canonical(value: object) -> str:
    """A text that is equal for equal contents, whatever the order of keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def swap(pairs: Iterable[Pair]) -> list[Pair]:
    """The opposite preference: chosen and rejected change places, prompts and order stay.

    This is how the paper trains d- (DPO on swapped labels); applied twice it gives the pairs back.
    """
    return [Pair(prompt=pair.prompt, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


class Prompted(Protocol):
    """Anything that answers a prompt."""

    @property
    def prompt(self) -> Content:
        """What is answered."""


Answer = TypeVar("Answer", bound=Prompted)


def split_held_out(pairs: Sequence[Answer], n: int, seed: int = 0) -> tuple[list[Answer], list[Answer]]:
    """Set pairs, or rated ones, aside so that no prompt is on both sides.

    Whole prompts are drawn in a seeded order until `n` pairs are held out; prompts that would pass `n` are left where
    they are. So the second list has `n` pairs, or a few less where prompts recur.

    Returns:
        (train, held out), each in the order of `pairs`.

    Raises:
        InputError: `n` is negative, or leaves nothing to train on or nothing held out.
    """
    if n < 0:
        raise InputError(f"cannot hold out {n} pairs", "Give a number from 0 up.")
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(canonical(pair.prompt), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= n:
            held.update(group)
    if n and (not held or len(held) == len(pairs)):
        raise InputError(
            f"cannot hold out {n} of {len(pairs)} pairs on {len(groups)} prompts: one side would be empty",
            "Hold out fewer pairs, or give more data.",
        )
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return train, [pairs[index] for index in sorted(held)]
