"""Ratings as levels that a prompt can ask for: the value of a reply under a condition, and how conditions are drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_prefvec.artifact import ConditionFacts
from lora_prefvec.data import RatedReplies, RatedReply, RatedSet
from lora_prefvec.errors import InputError
from lora_prefvec.recipe import AxisSpec, CpoSpec

LEVELS = (0, 10)  # the lowest and the highest rating that can be a level
TIE = 1e-9  # sums of ratings that differ by less are equal

Condition = dict[str, float]  # axis -> the level asked for; an axis that is not named shall be as good as can be


def value(ratings: Mapping[str, float], condition: Mapping[str, float], objectives: Mapping[str, AxisSpec]) -> float:
    """R(y | c) = sum_i omega_i g_i (arXiv 2402.19085), over the axes that are rated.

    g_i is -lambda_i |P_i - c_i| where the condition c names axis i, and the rating P_i itself where it does not.
    """

    def part(axis: str) -> float:
        if axis not in condition:
            return ratings[axis]
        return -objectives[axis].penalty * abs(ratings[axis] - condition[axis])

    return sum(one.weight * part(axis) for axis, one in objectives.items() if axis in ratings)


def advantage(
    one: RatedReply, other: RatedReply, condition: Mapping[str, float], objectives: Mapping[str, AxisSpec]
) -> float:
    """R(one | c) - R(other | c), 0 for a tie; an axis that only one of them is rated on has no say."""
    both = one.ratings.keys() & other.ratings.keys()
    values = [value({axis: reply.ratings[axis] for axis in both}, condition, objectives) for reply in (one, other)]
    difference = values[0] - values[1]
    return difference if abs(difference) > TIE else 0.0


def levels_of(found: RatedSet, spec: CpoSpec) -> ConditionFacts:
    """The levels that can be asked for: on each axis those that a reply of the data has; and how an axis is called.

    Raises:
        InputError: a rating is no whole number from 0 to 10, or all replies have the same.
    """
    seen: dict[str, set[float]] = {axis: set() for axis in spec.objectives}
    for group in found.groups:
        for reply in group.replies:
            for axis in seen.keys() & reply.ratings.keys():
                seen[axis].add(reply.ratings[axis])
    low, high = LEVELS
    for axis, levels in seen.items():
        odd = [level for level in levels if not (low <= level <= high and level == round(level))]
        if odd:
            raise InputError(
                f"{found.source} rates {axis!r} {odd[0]:g}, and a level is a whole number from {low} to {high}",
                "Round or scale the ratings, or leave this objective out.",
            )
        if len(levels) < 2:
            raise InputError(f"all replies in {found.source} have the same rating for {axis!r}", "Leave it out.")
    ordered = {axis: sorted(levels) for axis, levels in seen.items()}
    axes = {axis: (levels[0], levels[-1]) for axis, levels in ordered.items()}
    return ConditionFacts(kind="levels", axes=axes, levels=ordered, tags=spec.tags)


@dataclass(frozen=True)
class Dice:
    """Draws conditions as a recipe asks for them, of the axes and levels that the data hold."""

    spec: CpoSpec
    levels: Mapping[str, Sequence[float]]
    random: random.Random

    def condition(self) -> Condition:
        """Any condition."""
        return {axis: self._level(axis) for axis in self._axes(self.spec.untagged)}

    def condition_of(self, reply: RatedReply, group: RatedReplies) -> Condition:
        """One that a reply meets: its own ratings on the axes drawn.

        Only a reply to which no other of its group is preferred goes untagged, so that untagged means best. A level of
        an axis that a reply is not rated on is drawn: it says nothing about that reply.
        """
        best = all(advantage(other, reply, {}, self.spec.objectives) <= 0 for other in group.replies)
        axes = self._axes(self.spec.untagged if best else 0.0)
        return {axis: reply.ratings[axis] if axis in reply.ratings else self._level(axis) for axis in axes}

    def _axes(self, untagged: float) -> list[str]:
        names, single = list(self.levels), self.spec.single
        several = max(1 - self.spec.untagged - single, 0.0)
        (kind,) = self.random.choices((0, 1, 2), (untagged, single, several))
        count = self.random.randint(2, len(names)) if kind == 2 and len(names) > 1 else min(kind, 1)
        return self.random.sample(names, count)

    def _level(self, axis: str) -> float:
        return self.random.choice(self.levels[axis])
