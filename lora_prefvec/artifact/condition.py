"""Conditional adapters: one adapter whose prompt says how much of each axis is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lora_prefvec.artifact.provenance import ConditionFacts
from lora_prefvec.data import Message
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.output import out


def conditioned(facts: ConditionFacts, asked: Mapping[str, float], messages: Sequence[Message]) -> list[Message]:
    """A conversation with what is asked of the adapter written into it; without anything asked it stays as it is.

    Levels stand before the last user turn, as CPO (arXiv 2402.19085) writes them: `< helpful: 5 > < honest: 3 > ...`.
    A direction stands in the system prompt, as DPA (arXiv 2402.18571) writes it, in hundredths.

    Raises:
        InputError: as `check_condition`.
    """
    asked = check_condition(facts, asked)
    turns = [dict(message) for message in messages]
    if not asked:
        return turns
    if facts.kind == "levels":
        tags = "".join(f"< {axis}: {level:g} > " for axis, level in asked.items())
        last = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
        turns[last]["content"] = tags + turns[last]["content"]
        return turns
    rating = " + ".join(f"{axis}*{round(100 * part)}" for axis, part in asked.items())
    text = f"Maximize weighted rating = {rating}."
    if facts.system:
        return [{"role": "system", "content": text}, *turns]
    turns[0]["content"] = f"{text} {turns[0]['content']}"
    return turns


def check_condition(facts: ConditionFacts, asked: Mapping[str, float]) -> dict[str, float]:
    """What is asked in the adapter's own order of axes; a direction is brought to length 1.

    Raises:
        InputError: an axis that the adapter does not know, a level out of its range, a direction of length zero.
    """
    for axis, value in asked.items():
        if axis not in facts.axes:
            raise InputError(f"the adapter knows no condition {axis!r}", nearest(axis, facts.axes))
        if not math.isfinite(value):
            raise InputError(f"the condition {axis}={value} is no number", "Give for example 1.")
    found = {axis: float(asked[axis]) for axis in facts.axes if axis in asked}
    if facts.kind == "levels":
        for axis, level in found.items():
            low, high = facts.axes[axis]
            if not (low <= level <= high and level == round(level)):
                raise InputError(
                    f"the condition {axis}={level:g} is no level of the adapter", f"Levels go from {low:g} to {high:g}."
                )
        return found
    if not found:
        return found
    length = math.hypot(*found.values())
    if length == 0:
        raise InputError("a direction of length 0 points nowhere", "Give for example helpful=1.")
    found = {axis: found.get(axis, 0.0) / length for axis in facts.axes}
    outside = [
        f"{axis} {low:g} to {high:g}" for axis, (low, high) in facts.axes.items() if not low <= found[axis] <= high
    ]
    if outside:
        out.warn(f"this direction lies outside of what the adapter was trained on: {', '.join(outside)}")
    return found
