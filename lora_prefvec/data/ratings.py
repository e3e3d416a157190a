"""Pairs from ratings: UltraFeedback (one row, several replies) and HelpSteer2 (several rows, one prompt).

Each prompt gives one pair, its best against its worst reply on one attribute, so that prompts with many replies
weigh no more than others. Ties are dropped, and so are differences below the margin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_prefvec.data.messages import Row, Skip, attempt, conversational_pair, single_turn, text, valid_text
from lora_prefvec.data.pairs import Message, Pair

TIE = "tie"
BELOW_MARGIN = "below margin"
BETWEEN = "between best and worst reply"
ALONE = "only reply to its prompt"

# How a HelpSteer2 prompt of several turns marks who speaks.
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def number(value: Any) -> float | None:
    """A rating as a finite number; None for what is none, such as UltraFeedback's "N/A"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        rating = float(value)
    except (ValueError, OverflowError):
        return None
    return rating if math.isfinite(rating) else None


def check_margin(higher: float, lower: float, margin: float) -> None:
    """Raises Skip unless `higher` lies above `lower` by at least `margin`."""
    if higher == lower:
        raise Skip(TIE)
    if higher - lower < margin:
        raise Skip(BELOW_MARGIN)


def best_and_worst(ratings: Sequence[float], margin: float) -> tuple[int, int]:
    """Positions of the highest and the lowest rating, the first of equals. Raises Skip as `check_margin`."""
    best = max(range(len(ratings)), key=lambda index: ratings[index])
    worst = min(range(len(ratings)), key=lambda index: ratings[index])
    check_margin(ratings[best], ratings[worst], margin)
    return best, worst


def ultrafeedback_pair(row: Row, attribute: str, margin: float) -> Pair:
    """`instruction` with the best and the worst of its `completions`, by `annotations.<attribute>.Rating`."""
    completions = row.get("completions")
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise Skip("completions is not a list")
    replies, ratings = [], []
    for completion in completions:
        node: Any = completion
        for key in ("annotations", attribute, "Rating"):
            node = node.get(key) if isinstance(node, Mapping) else None
        rating = number(node)
        if rating is not None:
            replies.append(valid_text(completion.get("response"), "response"))
            ratings.append(rating)
    if len(ratings) < 2:
        raise Skip(f"fewer than two replies rated for {attribute}")
    best, worst = best_and_worst(ratings, margin)
    return single_turn(text(row, "instruction"), replies[best], replies[worst])


@dataclass(frozen=True)
class Rated:
    """One row of HelpSteer2: a reply and what it got."""

    prompt: list[Message]
    reply: str
    rating: float


def helpsteer_pairs(
    rows: Iterable[tuple[int, Any]], attribute: str, margin: float
) -> Iterator[tuple[int, int, Pair | str]]:
    """Consecutive rows with one prompt -> (number of the first row, rows used up, pair or reason)."""
    for _, group in groupby(rows, key=lambda item: item[1].get("prompt") if isinstance(item[1], Mapping) else None):
        rated: list[tuple[int, Rated]] = []
        for index, row in group:
            outcome = attempt(lambda row: helpsteer_row(row, attribute), row)
            if isinstance(outcome, str):
                yield index, 1, outcome
            else:
                rated.append((index, outcome))
        if rated:
            yield from _best_pair(rated, margin)


def helpsteer_row(row: Row, attribute: str) -> Rated:
    """A row with its rating on `attribute`. Raises Skip where it has none."""
    prompt, reply, rating = text(row, "prompt"), text(row, "response"), number(row.get(attribute))
    if rating is None:
        raise Skip(f"{attribute} is not a number")
    return Rated(helpsteer_turns(prompt), reply, rating)


def _best_pair(rated: list[tuple[int, Rated]], margin: float) -> Iterator[tuple[int, int, Pair | str]]:
    """The one pair of a prompt, and what became of the rows that are not in it."""
    first, rows = rated[0][0], [row for _, row in rated]
    if len(rows) == 1:
        yield first, 1, ALONE
        return
    try:
        best, worst = best_and_worst([row.rating for row in rows], margin)
        replies = [[{"role": "assistant", "content": rows[index].reply}] for index in (best, worst)]
        pair = conversational_pair(rows[0].prompt, replies[0], replies[1])
    except Skip as skip:
        yield first, len(rows), skip.reason
        return
    yield rated[min(best, worst)][0], 2, pair
    for position, (index, _) in enumerate(rated):
        if position not in (best, worst):
            yield index, 1, BETWEEN


def helpsteer_turns(prompt: str) -> list[Message]:
    """The turns of a prompt: the first is the user's, later ones stand behind `<extra_id_1>` markers."""
    first, *rest = HELPSTEER_TURN.split(prompt)
    turns = [{"role": "user", "content": first}]
    turns += [{"role": rest[i].lower(), "content": rest[i + 1]} for i in range(0, len(rest), 2)]
    return turns
