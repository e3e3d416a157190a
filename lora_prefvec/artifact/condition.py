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
    A direction stands in the system prompt, as DPA (arXiv 2402.18571) writes it, in hundredths; in grades it stands
    where levels do, and looks like them.

    Raises:
        InputError: as `check_condition`, or nobody asks anything in the conversation.
    """
    return write_condition(facts, check_condition(facts, asked), messages)


def write_condition(facts: ConditionFacts, asked: Mapping[str, float], messages: Sequence[Message]) -> list[Message]:
    """`conditioned`, for what `check_condition` has returned."""
    turns = [dict(message) for message in messages]
    if not asked:
        return turns
    if facts.kind == "levels" or facts.grades:
        users = [turn for turn in turns if turn["role"] == "user"]
        if not users:
            raise InputError("a condition stands before what the user says, and no user says anything", "Add a turn.")
        users[-1]["content"] = tags(facts, graded(facts, asked)) + users[-1]["content"]
        return turns
    rating = " + ".join(f"{axis}*{round(100 * part)}" for axis, part in asked.items())
    text = f"Maximize weighted rating = {rating}."
    if facts.system and turns[0]["role"] != "system":
        return [{"role": "system", "content": text}, *turns]
    turns[0]["content"] = f"{text} {turns[0]['content']}"
    return turns


def tags(facts: ConditionFacts, asked: Mapping[str, float]) -> str:
    """Levels as they stand in a prompt, the space before the user's own words included."""
    return "".join(f"< {facts.tags.get(axis, axis)}: {level:g} > " for axis, level in asked.items())


def graded(facts: ConditionFacts, asked: Mapping[str, float]) -> Mapping[str, float]:
    """A direction's components as grades, of which 1 is the least that the adapter was trained on; levels as they are.

    What lies outside of the training has the outermost grade.
    """
    if not facts.grades:
        return asked
    found = {}
    for axis, part in asked.items():
        low, high = facts.axes[axis]
        share = min(max((part - low) / (high - low), 0.0), 1.0)
        found[axis] = 1 + round((facts.grades - 1) * share)
    return found


def told(facts: ConditionFacts) -> str:
    """What can be asked for: `helpful 1, 2 or 3; harmless 0 or 1`, or the components of a direction."""
    parts = []
    for axis, (low, high) in facts.axes.items():
        *others, last = [f"{level:g}" for level in facts.levels.get(axis, [])] or [f"{low:g} to {high:g}"]
        parts.append(f"{axis} " + " or ".join(filter(None, [", ".join(others), last])))
    return "; ".join(parts)


def check_condition(facts: ConditionFacts, asked: Mapping[str, float]) -> dict[str, float]:
    """What is asked in the adapter's own order of axes; a direction is brought to length 1.

    Raises:
        InputError: an axis that the adapter does not know, a level that it was not trained on, a direction of length 0.
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
            if level not in (facts.levels.get(axis) or range(round(low), round(high) + 1)):
                raise InputError(f"{axis}={level:g} is no level of the adapter", f"It can be asked for {told(facts)}.")
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
