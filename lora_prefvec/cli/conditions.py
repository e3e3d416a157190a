"""What a conditional adapter is asked for: `--condition helpful=5`, `--direction helpful=0.97,concise=-0.26`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_prefvec.errors import InputError

if TYPE_CHECKING:
    from lora_prefvec.artifact import ConditionFacts, Ingredient

Command = TypeVar("Command", bound=Callable[..., Any])
EXAMPLES = {"levels": "--condition helpful=5", "direction": "--direction helpful=0.97,concise=-0.26"}


def asks(command: Command) -> Command:
    """`--condition` and `--direction`, for verbs that talk to a live mix."""
    command = click.option("--direction", metavar="AXIS=PART,...", help="What a DPA adapter is asked to weigh.")(
        command
    )
    return click.option(
        "--condition", "levels", multiple=True, metavar="AXIS=LEVEL", help="A level that a CPO adapter is asked for."
    )(command)


def typed_condition(
    levels: Sequence[str], direction: str | None, ingredients: Mapping[str, Ingredient]
) -> dict[str, float]:
    """What a command line asks for, checked against the adapter that takes conditions; nothing where it asks nothing.

    Raises:
        InputError: both options are given, one is malformed, or as `check_asked`.
    """
    if levels and direction is not None:
        raise InputError("--condition and --direction are for different adapters", "Give one of them.")
    if direction is not None:
        return check_asked(written_axes(direction.split(",")), ingredients, "direction")
    return check_asked(written_axes(levels), ingredients, "levels") if levels else {}


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
