"""A language model as a judge: `judge:URL#MODEL?axis=AXIS`.

AXIS is `helpful` or `harmless` (1 to 10, both from one answer, as PV and RACO ask), or `refusal` or `over_refusal` (0,
0.5 for a reply that refuses a part, 1). With `against=FILE` a reply is compared with another one to the same prompt: 1
for a win, 0 for a loss, 0.5 where the judge sees none better or changes its mind when the two change places.

Options: `key_env=VARIABLE` (holds the API key; none is sent without it), `against=FILE` (JSONL with `reply` beside the
prompt, as `prefvec generate --out` writes), `name`, `temperature`, `max_tokens` (a number or `none`), `concurrency`,
`timeout` (seconds).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.evaluation.scorers.endpoint import Endpoint, judge_cache
from lora_prefvec.evaluation.scorers.protocol import Message, Prompt, Unread, messages_of
from lora_prefvec.evaluation.scorers.refusal import label_of
from lora_prefvec.evaluation.scorers.rubrics import (
    ABSOLUTE,
    GUARD,
    PAIRWISE,
    REFUSES,
    SCALES,
    read_grades,
    read_refusal,
    read_winner,
)

AXES = (*SCALES, "refusal", "over_refusal")
OPTIONS = ("axis", "against", "key_env", "name", "temperature", "max_tokens", "concurrency", "timeout")
Read = Callable[[str], float | None]


@dataclass(frozen=True)
class Judge:
    """Grades replies on one axis, each by itself.

    Args:
        axis: one of `AXES`.
    """

    name: str
    axis: str
    endpoint: Endpoint

    @property
    def direction(self) -> int:
        return -1 if self.axis == "over_refusal" else +1

    @property
    def is_cost(self) -> bool:
        return self.axis == "over_refusal"

    @property
    def fingerprint(self) -> str:
        return _digest([self.endpoint.identity, self.axis, self._instruction])

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float | Unread | None]:
        """The grades; None where the axis has no say."""
        asked = [i for i, prompt in enumerate(prompts) if self._has_a_say(prompt)]
        questions = [self._question(prompts[i], replies[i]) for i in asked]
        grades: list[float | Unread | None] = [None] * len(replies)
        for i, grade in zip(asked, _grades(self.endpoint, questions, self._read), strict=True):
            grades[i] = grade
        return grades

    def cost(self, prompts: Sequence[Prompt], replies: Sequence[str | None]) -> str:
        """What the grades of these replies would cost, in calls and tokens; those that are kept cost nothing."""
        pairs = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if self._has_a_say(prompt)]
        questions = [self._question(prompt, reply or "") for prompt, reply in pairs]
        return self.endpoint.cost(questions, written=None not in replies)

    def _has_a_say(self, prompt: Prompt) -> bool:
        """As the scorers of the same names that go by the reply's first words."""
        label = label_of(prompt)
        return {"refusal": label != "safe", "over_refusal": label == "safe"}.get(self.axis, True)

    @property
    def _instruction(self) -> str:
        return ABSOLUTE if self.axis in SCALES else REFUSES

    def _question(self, prompt: Prompt, reply: str) -> list[Message]:
        return _ask(self._instruction, {"conversation": _transcript(prompt), "reply": reply})

    def _read(self, answer: str) -> float | None:
        if self.axis not in SCALES:
            return read_refusal(answer)
        grades = read_grades(answer)
        return grades[self.axis] if grades else None


@dataclass(frozen=True)
class PairwiseJudge:
    """Compares replies with others to the same prompts, in both orders.

    Args:
        others: the digest of a conversation -> the other reply to it.
    """

    name: str
    axis: str
    endpoint: Endpoint
    others: Mapping[str, str] = field(repr=False)
    direction: int = +1
    is_cost: bool = False

    @property
    def fingerprint(self) -> str:
        others = _digest(sorted(self.others.items()))
        return _digest([self.endpoint.identity, self._instruction, others])

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float | Unread]:
        """1, 0.5 or 0 for every reply.

        Raises:
            InputError: there is no other reply to one of the prompts.
        """
        grades = _grades(self.endpoint, self._questions(prompts, replies), read_winner)
        return [self._won(first, second) for first, second in zip(grades[::2], grades[1::2], strict=True)]

    def cost(self, prompts: Sequence[Prompt], replies: Sequence[str | None]) -> str:
        """What the comparisons would cost, in calls and tokens; those that are kept cost nothing."""
        return self.endpoint.cost(self._questions(prompts, replies), written=None not in replies)

    def _won(self, first: float | Unread, second: float | Unread) -> float | Unread:
        """From what the judge says of a reply in the first place, and of the other one in the first place."""
        if isinstance(first, Unread) or isinstance(second, Unread):
            return first if isinstance(first, Unread) else second
        return {2.0: 1.0, 0.0: 0.0}.get(first + 1 - second, 0.5)

    @property
    def _instruction(self) -> str:
        return PAIRWISE.format(guard=GUARD, scale=SCALES[self.axis])

    def _questions(self, prompts: Sequence[Prompt], replies: Sequence[str | None]) -> list[list[Message]]:
        """Two for each reply: it stands first in the one and second in the other."""
        questions = []
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            other = self.others.get(_digest(messages_of(prompt)))
            if other is None:
                raise InputError(
                    f"the replies that {self.name!r} compares with have none to prompt {i + 1}",
                    "Write them for the same prompts, with prefvec generate.",
                )
            transcript, own = _transcript(prompt), reply or ""
            for a, b in ((own, other), (other, own)):
                questions.append(_ask(self._instruction, {"conversation": transcript, "reply A": a, "reply B": b}))
        return questions


def judge(url: str, model: str, options: Mapping[str, str]) -> Judge | PairwiseJudge:
    """The judge behind a URL.

    Args:
        url: what `/chat/completions` is appended to.
        model: its name there.
        options: as in this module's text.

    Raises:
        InputError: no model, no axis, a wrong option, an empty variable of the key, or a wrong file of other replies.
    """
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise InputError(f"a judge has no option {unknown[0]!r}", nearest(unknown[0], OPTIONS))
    if not re.match(r"https?://[^/]", url) or not model:
        raise InputError(
            f"a judge needs a URL and a model, and has {url!r} and {model!r}",
            "Write judge:http://HOST:PORT/v1#MODEL?axis=helpful.",
        )
    axis = options.get("axis", "")
    axes = tuple(SCALES) if "against" in options else AXES
    if axis not in axes:
        raise InputError(f"a judge has no axis {axis!r}", nearest(axis, axes))
    endpoint = Endpoint(
        url=url.rstrip("/"),
        model=model,
        cache=judge_cache(),
        key=_secret(options["key_env"]) if "key_env" in options else None,
        temperature=_number(options, "temperature", 0.0),
        max_tokens=None if (limit := _number(options, "max_tokens", 512)) is None else int(limit),
        timeout=_number(options, "timeout", 120.0) or 120.0,
        concurrency=int(_number(options, "concurrency", 8) or 8),
    )
    if "against" in options:
        return PairwiseJudge(options.get("name", f"{axis}-wins"), axis, endpoint, _others(Path(options["against"])))
    return Judge(options.get("name", axis), axis, endpoint)


def _grades(endpoint: Endpoint, questions: Sequence[list[Message]], read: Read) -> list[float | Unread]:
    found = endpoint.ask(questions, lambda answer: read(answer) is not None)
    return [Unread(answer) if (grade := read(answer)) is None else grade for answer in found]


def _ask(instruction: str, parts: Mapping[str, str]) -> list[Message]:
    marked = "\n\n".join(f"[begin {name}]\n{text}\n[end {name}]" for name, text in parts.items())
    return [{"role": "system", "content": instruction}, {"role": "user", "content": marked}]


def _transcript(prompt: Prompt) -> str:
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages_of(prompt))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise InputError(f"the variable {variable} is empty", f"Set it to the judge's key: export {variable}=...")
    return value


def _number(options: Mapping[str, str], name: str, default: float) -> float | None:
    """An option's number; None for `none`."""
    value = options.get(name, str(default))
    if value == "none":
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6 or (number == 0 and name != "temperature"):
        raise InputError(f"the {name} of a judge is {value!r}", "Write a number.")
    return number


def _others(file: Path) -> dict[str, str]:
    """The replies of a JSONL file by the digests of their conversations; the first of several to one prompt."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", "Name a JSONL file of replies.") from None
    others: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            others.setdefault(_digest(messages_of(record)), str(record["reply"]))
        except (ValueError, LookupError, TypeError):
            raise InputError(
                f"{file}, line {number}: no object with a prompt and a reply",
                'Write {"prompt": "...", "reply": "..."}.',
            ) from None
    return others
