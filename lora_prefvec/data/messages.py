"""Cells of a row -> text and messages, and the rules that a dialogue must keep to become a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from lora_prefvec.data.pairs import Message, Pair

Row: TypeAlias = Mapping[str, Any]

EQUAL = "chosen equals rejected"
DIFFERS = "differs before last turn"
ROLES = "roles do not alternate"
EMPTY_RESPONSE = "empty response"
EMPTY_TURN = "empty turn in prompt"
EMPTY_PROMPT = "empty prompt"

# ShareGPT has no one list of speakers; these are the names in the published sets.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Skip(Exception):
    """This row cannot become a pair, for this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Read = TypeVar("Read")


def attempt(read: Callable[[Row], Read], row: Any) -> Read | str:
    """What `read` makes of a row, or the reason why it makes nothing of it."""
    try:
        if not isinstance(row, Mapping):
            raise Skip("row is not an object")
        return read(row)
    except Skip as skip:
        return skip.reason


def text(row: Row, column: str) -> str:
    """The string in a column. Raises Skip where there is none."""
    value = row.get(column)
    if value is None:
        raise Skip(f"missing column {column!r}")
    return valid_text(value, column)


def valid_text(value: Any, name: str) -> str:
    """`value` if a tokenizer can read it. Raises Skip for what is no string, and for half a surrogate pair."""
    if not isinstance(value, str):
        raise Skip(f"{name} is not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Skip(f"{name} is not valid Unicode") from None
    return value


def messages(row: Row, column: str, role: str = "") -> list[Message]:
    """The turns in a column: a list of messages, one message, or (where a role is given) a string spoken by that role.

    Messages are `{"role", "content"}` or ShareGPT's `{"from", "value"}`; other keys are left out.
    """
    value = row.get(column)
    if role and isinstance(value, str):
        return [{"role": role, "content": valid_text(value, column)}]
    if value is None:
        raise Skip(f"missing column {column!r}")
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise Skip(f"{column} is neither a string nor messages" if role else f"{column} is not a list of messages")
    return [_message(turn, column) for turn in turns]


def _message(turn: Any, column: str) -> Message:
    if isinstance(turn, Mapping) and turn.get("role") is not None:
        return {"role": valid_text(turn["role"], "role"), "content": valid_text(turn.get("content"), "content")}
    if isinstance(turn, Mapping) and turn.get("from") is not None:
        speaker = valid_text(turn["from"], "from")
        return {"role": SPEAKERS.get(speaker, speaker), "content": valid_text(turn.get("value"), "value")}
    raise Skip(f"{column} holds something that is no message")


def dialogue_pair(chosen: list[Message], rejected: list[Message]) -> Pair:
    """A pair from two whole dialogues that share every turn but the last, which is the assistant's."""
    if chosen == rejected:
        raise Skip(EQUAL)
    if chosen[:-1] != rejected[:-1]:
        raise Skip(DIFFERS)
    return conversational_pair(chosen[:-1], chosen[-1:], rejected[-1:])


def conversational_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    """A checked pair of messages.

    The prompt is an optional system turn, then user and assistant by turns, the user first and last: what every chat
    template accepts. Raises Skip with the first rule that is broken.
    """
    if chosen == rejected:
        raise Skip(EQUAL)
    if not prompt:
        raise Skip(EMPTY_PROMPT)
    turns = prompt[1:] if prompt[0]["role"] == "system" else prompt
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [turn["role"] for turn in turns] != expected or any(turn["role"] != "assistant" for turn in chosen + rejected):
        raise Skip(ROLES)
    if not chosen or not rejected or any(not turn["content"].strip() for turn in chosen + rejected):
        raise Skip(EMPTY_RESPONSE)
    if any(not turn["content"].strip() for turn in prompt):
        raise Skip(EMPTY_TURN)
    return Pair(prompt, chosen, rejected)


def standard_pair(prompt: str, chosen: str, rejected: str) -> Pair:
    """A checked pair of strings."""
    if chosen == rejected:
        raise Skip(EQUAL)
    if not prompt.strip():
        raise Skip(EMPTY_PROMPT)
    if not chosen.strip() or not rejected.strip():
        raise Skip(EMPTY_RESPONSE)
    return Pair(prompt, chosen, rejected)


def single_turn(prompt: str, chosen: str, rejected: str) -> Pair:
    """A pair of two replies to one request, as messages."""
    return conversational_pair(
        [{"role": "user", "content": prompt}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
    )
