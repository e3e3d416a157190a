"""What a scorer is, what it is given, and the checked way to call it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import lora_prefvec
from lora_prefvec.errors import InputError, PrefvecError, RunError

if TYPE_CHECKING:
    from lora_prefvec.inference import LiveMixer, LoadedBase
    from lora_prefvec.vector import Coefficient

Message = dict[str, str]
Prompt = str | Sequence[Message] | Mapping[str, Any]
"""A user's message; a conversation; or the record of a prompts file, `prompt` or `messages` with columns of its own
beside it, such as the `label` of what was asked (`safe`, `unsafe`) that `over_refusal` reads."""


NONSENSE = 5  # answers that hold no score, and no other: whoever gives them is no judge


class Unread(str):
    """In the place of a score, an answer that holds none: it is counted, not kept, and asked for again another time."""


class Scorer(Protocol):
    """Gives replies numbers on one axis.

    `direction` is +1 where more is better and -1 where less is; a cost is a quality that preferences should leave
    alone. A scorer may also have:

    - `needs_model = True`: it is called with a third argument, the `Writer` of the replies;
    - `fingerprint`: a text that changes whenever its scores may;
    - `cost(prompts, replies)`: what scoring them would cost, in words; a reply that is None is not written yet.
    """

    @property
    def name(self) -> str: ...

    @property
    def direction(self) -> int: ...

    @property
    def is_cost(self) -> bool: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[float | Unread | None]:
        """Given prompts and replies, the score of every reply; None where the axis has no say on its prompt."""


@dataclass(frozen=True)
class Writer:
    """The model that wrote some replies, for the scorers that ask it.

    Args:
        loaded: the base.
        mixer: the vectors on it.
        mixes: each reply's mix.
    """

    loaded: LoadedBase
    mixer: LiveMixer
    mixes: Sequence[Mapping[str, Coefficient]]


def apply(
    scorer: Scorer, prompts: Sequence[Prompt], replies: Sequence[str], writer: Writer | None = None
) -> list[float | None]:
    """The scores of replies, one for each, checked; None where there is none.

    Raises:
        InputError, RunError: as `answers`.
    """
    return [None if isinstance(one, Unread) else one for one in answers(scorer, prompts, replies, writer)]


def answers(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    replies: Sequence[str],
    writer: Writer | None = None,
    *,
    known: bool = False,
) -> list[float | Unread | None]:
    """The same, with what could not be read.

    Args:
        known: whether the scorer gave a score before, to other replies.

    Raises:
        InputError: the scorer needs a writer and there is none; it fails; or it returns anything but a finite number
            or None for every reply.
        RunError: none of its answers can be read.
    """
    arguments: list[Any] = [prompts, replies]
    if getattr(scorer, "needs_model", False):
        if writer is None:
            raise InputError(f"the scorer {scorer.name!r} asks the model that wrote the replies", "Name its base.")
        arguments.append(writer)
    try:
        returned = scorer(*arguments)
    except PrefvecError:
        raise
    except Exception as error:
        raise _wrong(scorer, f"raised {type(error).__name__}: {error}") from error
    if isinstance(returned, str | Mapping) or not hasattr(returned, "__len__"):
        raise _wrong(scorer, f"returned {'nothing' if returned is None else repr(returned)[:60]}")
    if len(returned) != len(replies):
        raise _wrong(scorer, f"returned {len(returned)} scores for {len(replies)} replies")
    found: list[float | Unread | None] = [
        value if isinstance(value, Unread) else _number(scorer, value, i) for i, value in enumerate(returned)
    ]
    unread = [one for one in found if isinstance(one, Unread)]
    if len(unread) == len(found) - found.count(None) >= NONSENSE and not known:
        raise RunError(
            f"none of the {len(unread)} answers of {scorer.name!r} can be read, the first begins {unread[0][:60]!r}",
            "Take a model that follows instructions.",
        )
    return found


def unread_note(name: str, number: int) -> str:
    """What is told of answers that hold no score."""
    answers = "1 answer" if number == 1 else f"{number} answers"
    return f"{answers} of {name!r} cannot be read: no score; the same command asks again"


def fingerprint(scorer: Scorer) -> str:
    """A text that changes whenever the scorer's scores may: its own, or else its kind, its name and our version."""
    kind = type(scorer)
    default = f"{kind.__module__}.{kind.__qualname__} {scorer.name} {lora_prefvec.__version__}"
    return str(getattr(scorer, "fingerprint", default))


def messages_of(prompt: Prompt) -> list[Message]:
    """The conversation that a prompt is; a text is one user message."""
    said: str | Sequence[Message] = (
        (prompt.get("messages") or prompt["prompt"]) if isinstance(prompt, Mapping) else prompt
    )
    return [{"role": "user", "content": said}] if isinstance(said, str) else list(said)


def _number(scorer: Scorer, value: Any, index: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(scorer, f"returned {value!r:.60} for reply {index + 1}")
    return number


def _wrong(scorer: Scorer, what: str) -> InputError:
    return InputError(
        f"the scorer {scorer.name!r} {what}", "It must return a finite number, or None for no say, for every reply."
    )
