"""Replies with ratings: what a row of every rated form becomes, and the pairs with signs that lie in them.

| form | a row |
|---|---|
| `rated` | `prompt` and `replies`, a list of `{"reply", "ratings": {objective: number}}` |
| `signed` | `prompt`, `chosen`, `rejected` and `signs`, of which each is 1 (chosen is better), -1 or 0 (a tie) |
| `pku-saferlhf` | two replies: `helpful` and `harmless` as 1 over 0, `safe` as 1 or 0 where it is told |
| `ultrafeedback` | `instruction` and its `completions`, with a rating for each attribute |
| `helpsteer2` | consecutive rows with one prompt, with a rating for each attribute |
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from lora_prefvec.data.messages import EQUAL, Row, Skip, attempt, messages, text, valid_text
from lora_prefvec.data.pairs import Content, Message, Pair, canonical
from lora_prefvec.data.ratings import helpsteer_turns, number

ULTRAFEEDBACK = ("instruction_following", "honesty", "truthfulness", "helpfulness")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
RATED_FORMS = ("rated", "signed", "pku-saferlhf", "ultrafeedback", "helpsteer2")


@dataclass(frozen=True)
class RatedReply:
    """A reply, one or more assistant turns, and its rating on every objective that anybody rated it for."""

    reply: list[Message]
    ratings: dict[str, float]


@dataclass(frozen=True)
class RatedReplies:
    """One prompt, which ends with a user turn, and the rated replies to it."""

    prompt: list[Message]
    replies: tuple[RatedReply, ...]


@dataclass(frozen=True)
class RatedPair:
    """A pair, and what its two replies were rated. Whose rating is higher is the objective's sign."""

    pair: Pair
    chosen: dict[str, float]
    rejected: dict[str, float]

    @property
    def prompt(self) -> Content:
        """Of the pair."""
        return self.pair.prompt

    def sign(self, objective: str) -> int | None:
        """+1 where the objective prefers the chosen reply, -1 the rejected one, 0 neither; None where it has no say."""
        if objective not in self.chosen or objective not in self.rejected:
            return None
        difference = self.chosen[objective] - self.rejected[objective]
        return (difference > 0) - (difference < 0)

    def swapped(self) -> RatedPair:
        """The same two replies in the other order."""
        pair = Pair(self.pair.prompt, self.pair.rejected, self.pair.chosen)
        return RatedPair(pair, self.rejected, self.chosen)


@dataclass(frozen=True)
class RatedSet:
    """The rated replies of one source, and what became of its rows; the facts are those of a `PairSet`."""

    groups: list[RatedReplies]
    form: str
    source: str
    revision: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    rows_read: int = 0

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def sha256(self) -> str:
        """Hash of the normalised groups, their order included: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for group in self.groups:
            content = [group.prompt, [[one.reply, one.ratings] for one in group.replies]]
            digest.update(canonical(content).encode() + b"\n")
        return digest.hexdigest()

    @property
    def objectives(self) -> dict[str, tuple[float, float]]:
        """Objective -> its lowest and highest rating."""
        found: dict[str, list[float]] = {}
        for group in self.groups:
            for one in group.replies:
                for name, rating in one.ratings.items():
                    found.setdefault(name, []).append(rating)
        return {name: (min(values), max(values)) for name, values in found.items()}


def rated_pairs(groups: Iterable[RatedReplies]) -> list[RatedPair]:
    """Neighbouring replies of each group as pairs, none used twice; replies that are equal make none."""
    pairs = []
    for group in groups:
        for one, other in zip(group.replies[::2], group.replies[1::2], strict=False):
            if one.reply != other.reply:
                pair = Pair(prompt=group.prompt, chosen=one.reply, rejected=other.reply)
                pairs.append(RatedPair(pair, one.ratings, other.ratings))
    return pairs


def detect_rated(rows: Iterable[Any]) -> str | None:
    """The rated form that most of `rows` have; None where none of them has one."""
    votes = Counter(form for row in rows if isinstance(row, Mapping) and (form := _detect_row(row)))
    return votes.most_common(1)[0][0] if votes else None


def _detect_row(row: Row) -> str | None:
    columns = {name for name, value in row.items() if value is not None}
    for form, needed in (
        ("rated", {"prompt", "replies"}),
        ("signed", {"prompt", "chosen", "rejected", "signs"}),
        ("pku-saferlhf", {"prompt", "response_0", "response_1"}),
        ("ultrafeedback", {"instruction", "completions"}),
    ):
        if needed <= columns:
            return form
    return "helpsteer2" if {"prompt", "response"} <= columns and columns & set(HELPSTEER) else None


def convert_rated(rows: Iterable[Any], form: str) -> Iterator[tuple[int, RatedReplies | str]]:
    """Rows -> (rows used up; the rated replies, or the reason why there are none)."""
    if form == "helpsteer2":
        for _, group in groupby(rows, key=lambda row: row.get("prompt") if isinstance(row, Mapping) else None):
            found = list(group)
            yield len(found), _attempt_group(found)
        return
    read: dict[str, Callable[[Row], RatedReplies]] = {
        "rated": _rated,
        "signed": _signed,
        "pku-saferlhf": _pku,
        "ultrafeedback": _ultrafeedback,
    }
    for row in rows:
        yield 1, attempt(read[form], row)


def _rated(row: Row) -> RatedReplies:
    replies = row.get("replies")
    if not isinstance(replies, Sequence) or isinstance(replies, str) or not replies:
        raise Skip("replies is no list")
    found = []
    for one in replies:
        if not isinstance(one, Mapping):
            raise Skip("a reply is no object")
        ratings = {
            name: rated for name, value in _object(one, "ratings").items() if (rated := number(value)) is not None
        }
        if not ratings:
            raise Skip("a reply without ratings")
        found.append(RatedReply(messages(one, "reply", "assistant"), ratings))
    return _group(messages(row, "prompt", "user"), found)


def _signed(row: Row) -> RatedReplies:
    signs = {name: number(value) for name, value in _object(row, "signs").items()}
    if not signs or any(sign not in (-1, 0, 1) for sign in signs.values()):
        raise Skip("a sign is none of 1, -1 and 0")
    chosen, rejected = messages(row, "chosen", "assistant"), messages(row, "rejected", "assistant")
    above = {name: float(sign or 0) for name, sign in signs.items()}
    return _group(
        messages(row, "prompt", "user"), [RatedReply(chosen, above), RatedReply(rejected, dict.fromkeys(signs, 0.0))]
    )


def _pku(row: Row) -> RatedReplies:
    ratings: list[dict[str, float]] = [{}, {}]
    for objective, column in (("helpful", "better_response_id"), ("harmless", "safer_response_id")):
        if row.get(column) is not None:
            better = number(row[column])
            if better not in (0, 1):
                raise Skip(f"{column} is neither 0 nor 1")
            for index in (0, 1):
                ratings[index][objective] = float(index == better)
    for index in (0, 1):
        flag = row.get(f"is_response_{index}_safe")
        if flag is not None:
            ratings[index]["safe"] = float(str(flag).lower() in ("true", "1"))
    if not any(ratings):
        raise Skip("no better_response_id, safer_response_id or is_response_0_safe")
    replies = [RatedReply(_said(text(row, f"response_{index}")), ratings[index]) for index in (0, 1)]
    return _group([{"role": "user", "content": text(row, "prompt")}], replies)


def _ultrafeedback(row: Row) -> RatedReplies:
    completions = row.get("completions")
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise Skip("completions is not a list")
    replies = []
    for completion in completions:
        notes = completion.get("annotations") if isinstance(completion, Mapping) else None
        ratings = {}
        for objective in ULTRAFEEDBACK:
            node = notes.get(objective) if isinstance(notes, Mapping) else None
            rating = number(node.get("Rating")) if isinstance(node, Mapping) else None
            if rating is not None:
                ratings[objective] = rating
        if ratings:
            replies.append(RatedReply(_said(valid_text(completion.get("response"), "response")), ratings))
    if not replies:
        raise Skip("no completion is rated")
    return _group([{"role": "user", "content": text(row, "instruction")}], replies)


def _attempt_group(rows: list[Any]) -> RatedReplies | str:
    """Rows of HelpSteer2 that share their prompt."""

    def read(first: Row) -> RatedReplies:
        replies = []
        for row in rows:
            ratings = {name: rated for name in HELPSTEER if (rated := number(row.get(name))) is not None}
            if ratings:
                replies.append(RatedReply(_said(text(row, "response")), ratings))
        if not replies:
            raise Skip("no reply is rated")
        return _group(helpsteer_turns(text(first, "prompt")), replies)

    return attempt(read, rows[0])


def _group(prompt: list[Message], replies: list[RatedReply]) -> RatedReplies:
    if not prompt or not prompt[-1]["content"].strip():
        raise Skip("empty prompt")
    if not all(one.reply and one.reply[-1]["content"].strip() for one in replies):
        raise Skip("empty reply")
    if len(replies) == 2 and replies[0].reply == replies[1].reply:
        raise Skip(EQUAL)
    return RatedReplies(prompt, tuple(replies))


def _object(row: Row, column: str) -> Mapping[str, Any]:
    value = row.get(column)
    if not isinstance(value, Mapping):
        raise Skip(f"missing column {column!r}" if value is None else f"{column} is no object")
    return value


def _said(reply: str) -> list[Message]:
    return [{"role": "assistant", "content": reply}]
