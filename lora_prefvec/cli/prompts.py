"""Files of prompts: JSONL, each line with a prompt, and perhaps with a mix, a condition and settings of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

from lora_prefvec.cli.conditions import condition_facts, condition_of_record
from lora_prefvec.errors import InputError, nearest

if TYPE_CHECKING:
    from lora_prefvec.cli.live import Live
    from lora_prefvec.inference import Sampling
    from lora_prefvec.vector import Coefficient

SETTINGS = {"seed": int, "max_new_tokens": int, "temperature": float, "top_p": float}


@dataclass(frozen=True)
class Line:
    """A prompt and how it is answered.

    Args:
        record: the object that the prompt came in.
        where: what an error calls it.
        condition: what is asked of a conditional adapter.
        reads: the prompt as the model reads it, with the condition.
    """

    record: dict[str, Any]
    where: str
    mix: Mapping[str, Coefficient]
    sampling: Sampling
    condition: Mapping[str, float] = field(default_factory=dict)
    reads: str | list[dict[str, str]] = ""

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """A user's message, or a conversation."""
        return prompt_of(self.record)

    def asked(self) -> dict[str, Any]:
        """What the reply depends on beside the base, as JSON holds it."""
        mix = {name: list(one) if isinstance(one, tuple) else one for name, one in self.mix.items()}
        condition = {"condition": dict(self.condition)} if self.condition else {}
        settings = {name: asdict(self.sampling)[name] for name in SETTINGS}
        return {"record": self.record, "mix": mix, **condition, **settings}


def read_line(
    where: str,
    record: dict[str, Any],
    live: Live,
    settings: Mapping[str, Any],
    number: int,
    condition: Mapping[str, float] | None = None,
) -> Line:
    """A prompt, with what its record asks for itself.

    Args:
        live: whose mix a record has that names none.
        settings: `seed`, `max_new_tokens`, `temperature` and `top_p` of a record that has none.
        number: which of the prompts it is; the seed of a record that has none depends on it.
        condition: of a record that has none.

    Raises:
        InputError: the mix, the condition or a setting is wrong; the message says where.
    """
    from lora_prefvec.artifact import write_condition
    from lora_prefvec.inference import Sampling

    with named(where):
        mix = live.mix if record.get("mix") is None else read_mix(record["mix"], live)
        own = {name: read_setting(name, record[name]) for name in SETTINGS if record.get(name) is not None}
        sampling = Sampling(**{**settings, "seed": f"{settings['seed']}:{number}", **own})
        asked, reads = dict(condition or {}), prompt_of(record)
        if record.get("condition") is not None:
            asked = condition_of_record(record["condition"], live.ingredients)
        if asked:
            messages = [{"role": "user", "content": reads}] if isinstance(reads, str) else reads
            reads = write_condition(condition_facts(live.ingredients), asked, messages)
    return Line(record, where, mix, sampling, asked, reads)


def prompt_of(record: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """What a record asks: a user's message, or a conversation."""
    prompt: str | list[dict[str, str]] = record.get("messages") or record["prompt"]
    return prompt


def read_mix(written: Any, live: Live) -> dict[str, Coefficient]:
    """A mix as JSON holds it: vector -> number, or a list of numbers over the depth."""
    from lora_prefvec.vector import check_coefficient

    if not isinstance(written, dict):
        raise InputError(f"the mix is {written!r:.80}", 'Write an object such as {"helpful": 1, "harmless": -0.5}.')
    mix: dict[str, Coefficient] = {}
    for name, value in written.items():
        if name not in live.ingredients:
            hint = nearest(name, live.ingredients) or "Name it on the command line."
            raise InputError(f"there is no vector {name!r} in the command's mix", hint)
        numbers = value if isinstance(value, list) and value else [value]
        if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
            raise InputError(f"the coefficient of {name!r} is {value!r:.80}", "Write a number such as 0.5.")
        checked = tuple(check_coefficient(name, one) for one in numbers)
        mix[name] = checked if isinstance(value, list) else checked[0]
    return mix


def read_setting(name: str, value: Any) -> Any:
    """A setting of a record, if it has the right type; its range is `Sampling`'s to check."""
    if isinstance(value, bool) or not isinstance(value, int | SETTINGS[name]):  # a whole number is a float too
        kind, example = ("whole number", "1") if SETTINGS[name] is int else ("number", "0.5")
        raise InputError(f"the {name} is {value!r:.80}", f"Write a {kind} such as {example}.")
    return value


def read_records(file: IO[str]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file of prompts, each with what an error calls it.

    Raises:
        InputError: a line is no object with a prompt, or there is none.
    """
    records = []
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record, where = json.loads(line), f"{file.name}, line {number}"
                if not has_prompt(record):
                    raise InputError(
                        f"{where}: no object with a prompt",
                        'Write {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}.',
                    )
                records.append((where, record))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file.name}, line {number}: no JSON ({error.msg})", "Write one JSON object a line."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{file.name} is no UTF-8 text", "Save it as UTF-8.") from None
    if not records:
        raise InputError(f"{file.name} holds no prompt", 'Write one JSON object a line: {"prompt": "text"}')
    return records


def has_prompt(record: Any) -> bool:
    """Whether a record can be answered."""
    if not isinstance(record, dict):
        return False
    messages = record.get("messages")
    if messages is None:
        return isinstance(record.get("prompt"), str)
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors of the input say where it was."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error.problem}", error.fix) from None
