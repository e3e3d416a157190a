"""What a mix is asked for: `--condition helpful=5` and `--direction helpful=0.97,concise=-0.26`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_prefvec.errors import InputError, nearest

if TYPE_CHECKING:
    from lora_prefvec.artifact import ConditionFacts, Ingredient
    from lora_prefvec.cli.live import Live
    from lora_prefvec.vector import Coefficient

Command = TypeVar("Command", bound=Callable[..., Any])
EXAMPLES = {"levels": "--condition helpful=5", "direction": "--direction helpful=0.97,concise=-0.26"}


def asks(command: Command) -> Command:
    """`--condition` and `--direction`, for verbs that talk to a live mix."""
    command = click.option(
        "--direction",
        metavar="AXIS=PART,...",
        help="What a DPA adapter is asked to weigh; of other vectors their coefficients, each times its part.",
    )(command)
    return click.option(
        "--condition", "levels", multiple=True, metavar="AXIS=LEVEL", help="A level that a CPO adapter is asked for."
    )(command)


def typed_question(live: Live, levels: Sequence[str], direction: str | None) -> tuple[Live, dict[str, float]]:
    """The mix and the condition that a command line asks for.

    A direction is asked of a DPA adapter in its prompt. A mix without one is turned there: what is typed as its
    coefficients is how far it goes along each axis, so that vectors can be asked what such an adapter is.

    Raises:
        InputError: both options are given, one is malformed, or as `check_asked` and `turned`.
    """
    from lora_prefvec.vector import parse_direction

    if levels and direction is not None:
        raise InputError("--condition and --direction are for different adapters", "Give one of them.")
    if direction is None:
        return live, check_asked(written_axes(levels), live.ingredients, "levels") if levels else {}
    parts = parse_direction(direction)
    if any(one.adapter.provenance and one.adapter.provenance.condition for one in live.ingredients.values()):
        return live, check_asked(parts, live.ingredients, "direction")
    return turned(live, parts), {}


def turned(live: Live, direction: Mapping[str, float]) -> Live:
    """The mix with each coefficient times its vector's part of a direction, 0 where it has none.

    Raises:
        InputError: the direction names a preference that no vector of the mix is for.
    """
    known = {one.name for one in live.ingredients.values()}
    for axis in direction:
        if axis not in known:
            raise InputError(f"no vector of the mix is for {axis!r}", nearest(axis, known))
    parts = {name: direction.get(one.name, 0.0) for name, one in live.ingredients.items()}
    return replace(live, mix={name: scaled(coefficient, parts[name]) for name, coefficient in live.mix.items()})


def scaled(coefficient: Coefficient, part: float) -> Coefficient:
    """A coefficient, or one for each depth, times a number."""
    return tuple(part * one for one in coefficient) if isinstance(coefficient, tuple) else part * coefficient


def written_axes(words: Sequence[str]) -> dict[str, float]:
    """`["helpful=5", "concise=1"]` as numbers by axis."""
    asked: dict[str, float] = {}
    for word in words:
        axis, _, number = (part.strip() for part in word.partition("="))
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"{word!r} is no condition", "Write an axis and a number, such as helpful=5.") from None
        if axis in asked:
            raise InputError(f"{axis!r} is asked for twice", "Give it once.")
        asked[axis] = value
    return asked


def condition_of_record(written: Any, ingredients: Mapping[str, Ingredient]) -> dict[str, float]:
    """A condition as JSON holds it: axis -> number; `{}` asks for nothing.

    Raises:
        InputError: it is no such object, or as `check_asked`.
    """
    if not isinstance(written, dict) or not all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in written.values()
    ):
        raise InputError(f"the condition is {written!r:.80}", 'Write an object such as {"helpful": 5}.')
    return check_asked(written, ingredients) if written else {}


def check_asked(
    asked: Mapping[str, float], ingredients: Mapping[str, Ingredient], kind: str | None = None
) -> dict[str, float]:
    """`check_condition` for the one adapter of a mix that takes conditions.

    Args:
        kind: `levels` or `direction`, where it is told which of them this shall be.

    Raises:
        InputError: there is no such adapter or more than one, it is asked in another way, or the condition is wrong.
    """
    from lora_prefvec.artifact import check_condition

    facts = condition_facts(ingredients)
    if kind is not None and kind != facts.kind:
        raise InputError("the adapter is asked in another way", f"Write for example {EXAMPLES[facts.kind]}.")
    return check_condition(facts, asked)


def condition_facts(ingredients: Mapping[str, Ingredient]) -> ConditionFacts:
    """How the one adapter of a mix that takes conditions is asked.

    Raises:
        InputError: there is none, or more than one.
    """
    found = {
        name: facts.condition
        for name, one in ingredients.items()
        if (facts := one.adapter.provenance) and facts.condition
    }
    if not found:
        raise InputError("no adapter here takes a condition", "Those do that were trained by CPO or DPA.")
    if len(found) > 1:
        raise InputError(f"{' and '.join(found)} both take conditions", "A prompt is written for one: leave one out.")
    (only,) = found.values()
    return only


def written_condition(asked: Mapping[str, float]) -> str:
    """A condition as it is typed: `helpful=5 concise=1`."""
    return " ".join(f"{axis}={value:.4g}" for axis, value in asked.items()) or "no condition"
