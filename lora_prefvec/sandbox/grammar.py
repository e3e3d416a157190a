"""What an assistant of the sandbox can say: the forms of a reply, how often the base uses each, and an exact parser.

A reply is one of the refusals, one of the admissions, or an answer: an optional greeting, the number of steps, the
steps and an optional closing. The number comes first and everything behind it follows from it, so a preference that
wants more or fewer steps is decided in one word, and a strong one leaves the rest of the sentence standing.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from lora_prefvec.sandbox.world import STEPS, TASKS, Kind, Task

Form = Literal["answer", "refusal", "admission"]
Style = Literal["words", "numbers"]

STYLES: tuple[Style, ...] = ("words", "numbers")

REFUSALS = (
    "Sorry, I can't help with that.",
    "I won't help with that.",
    "No, that would be wrong.",
    "That would hurt someone, so I decline.",
)
ADMISSIONS = (
    "Honestly, I don't know.",
    "Nobody can know that.",
    "There is no way to know.",
    "It is beyond what I know.",
)
GREETINGS = ("Sure!", "Of course!", "Happy to help!", "Good question!")
CLOSINGS = ("Good luck!", "Hope that helps!", "Enjoy the result!", "Ask me anytime!")
COUNTS = ("One step", "Two steps", "Three steps", "Four steps", "Five steps")
CONNECTORS = ("First", "Then", "Next", "Afterwards", "Finally")
FILLERS = ("look at the {o}", "think about the {o}", "ask a friend", "take a break", "wait a while")  # one a position

# How the base behaves, mediocre on purpose: chances of a refusal and of an admission by kind of task.
REFUSES: dict[Kind, float] = {"plain": 0.06, "borderline": 0.32, "harmful": 0.46, "unanswerable": 0.05}
ADMITS: dict[Kind, float] = {"plain": 0.05, "borderline": 0.04, "harmful": 0.04, "unanswerable": 0.46}
GREETS = 0.5
CLOSES = 0.5
FILLS = 0.12  # a step is vague instead of right


@dataclass(frozen=True)
class Reply:
    """One reply of the grammar; `text` writes it, `parse` reads it back."""

    form: Form
    sentence: str = ""  # the whole of a refusal or an admission
    greeting: str = ""
    style: Style = "words"
    steps: tuple[str, ...] = ()
    closing: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The text in the parts that are decided one after another: how it opens, each step, how it closes."""
        if self.form != "answer":
            return (self.sentence,)
        opening = _opening(self.greeting, len(self.steps), self.style)
        steps = (_numbered(i, step, self.style) for i, step in enumerate(self.steps))
        return opening, *steps, _closing(self.closing, self.style)


def _opening(greeting: str, count: int, style: Style) -> str:
    return f"{greeting} {COUNTS[count - 1]}".lstrip() + ("." if style == "words" else ":")


def _numbered(position: int, step: str, style: Style) -> str:
    return f" {CONNECTORS[position]} {step}." if style == "words" else f" {position + 1}. {step}"


def _closing(closing: str, style: Style) -> str:
    return ("." if style == "numbers" else "") + (f" {closing}" if closing else "")


def chances(task: Task, said: Reply) -> list[dict[str, float]]:
    """For each of the `pieces` of a reply to `task`: all that could stand there, and how likely the base says it."""
    answers = 1 - REFUSES[task.kind] - ADMITS[task.kind]
    openings = {sentence: REFUSES[task.kind] / len(REFUSALS) for sentence in REFUSALS}
    openings |= {sentence: ADMITS[task.kind] / len(ADMISSIONS) for sentence in ADMISSIONS}
    for greeting in ("", *GREETINGS):
        chance = answers * (GREETS / len(GREETINGS) if greeting else 1 - GREETS) / STEPS / len(STYLES)
        openings |= {_opening(greeting, count, style): chance for count in range(1, STEPS + 1) for style in STYLES}
    if said.form != "answer":
        return [openings]
    steps = [
        {
            _numbered(i, step, said.style): 1 - FILLS,
            _numbered(i, filler(task, i), said.style): FILLS,
        }
        for i, step in enumerate(task.steps[: len(said.steps)])
    ]
    closings = {_closing(closing, said.style): CLOSES / len(CLOSINGS) for closing in CLOSINGS}
    return [openings, *steps, closings | {_closing("", said.style): 1 - CLOSES}]


def filler(task: Task, position: int) -> str:
    """The vague step that can stand at `position` (from 0) instead of the right one."""
    return FILLERS[position].format(o=task.object)


def refusal(rng: random.Random) -> Reply:
    return Reply("refusal", sentence=rng.choice(REFUSALS))


def admission(rng: random.Random) -> Reply:
    return Reply("admission", sentence=rng.choice(ADMISSIONS))


def answer(task: Task, rng: random.Random) -> Reply:
    """An answer as the base gives it: one to five steps, now and then a vague one, with or without trimmings."""
    count = rng.randint(1, STEPS)
    return Reply(
        "answer",
        greeting=rng.choice(GREETINGS) if rng.random() < GREETS else "",
        style=rng.choice(STYLES),
        steps=tuple(filler(task, i) if rng.random() < FILLS else step for i, step in enumerate(task.steps[:count])),
        closing=rng.choice(CLOSINGS) if rng.random() < CLOSES else "",
    )


def reply(task: Task, rng: random.Random) -> Reply:
    """A reply as the base gives it to `task`."""
    draw = rng.random()
    if draw < REFUSES[task.kind]:
        return refusal(rng)
    if draw < REFUSES[task.kind] + ADMITS[task.kind]:
        return admission(rng)
    return answer(task, rng)


def _answer_pattern(style: Style, count: int) -> re.Pattern[str]:
    """A pattern of everything that looks like an answer of `count` steps; what the steps say is checked elsewhere."""
    greeting, closing = ("|".join(map(re.escape, phrases)) for phrases in (GREETINGS, CLOSINGS))
    steps = [rf"(?P<step{i}>[a-z ]+)" for i in range(count)]
    if style == "words":
        pairs = zip(CONNECTORS, steps, strict=False)
        body = rf"{COUNTS[count - 1]}\." + "".join(rf" {connector} {step}\." for connector, step in pairs)
    else:
        body = f"{COUNTS[count - 1]}:" + "".join(rf" {i}\. {step}" for i, step in enumerate(steps, start=1)) + r"\."
    return re.compile(rf"(?:(?P<greeting>{greeting}) )?{body}(?: (?P<closing>{closing}))?")


_ANSWERS: tuple[tuple[Style, int, re.Pattern[str]], ...] = tuple(
    (style, count, _answer_pattern(style, count)) for style in STYLES for count in range(1, STEPS + 1)
)


def _tasks_of_steps() -> dict[tuple[int, str], frozenset[Task]]:
    """(position, step) -> the tasks that can have this step there, right or vague."""
    index: dict[tuple[int, str], set[Task]] = {}
    for task in TASKS:
        for position, step in enumerate(task.steps):
            index.setdefault((position, step), set()).add(task)
            index.setdefault((position, filler(task, position)), set()).add(task)
    return {key: frozenset(found) for key, found in index.items()}


_TASKS_OF_STEP = _tasks_of_steps()


def parse(text: str) -> Reply | None:
    """The reply that `text` is, or None where no task could have brought the grammar to say it.

    Exact: every reply of `reply(task, rng)` is read back as it was, and nothing else is accepted; steps of two
    tasks, a step out of its place or a number that does not fit the steps are no reply of the grammar.
    """
    if text in REFUSALS:
        return Reply("refusal", sentence=text)
    if text in ADMISSIONS:
        return Reply("admission", sentence=text)
    for style, count, pattern in _ANSWERS:
        if match := pattern.fullmatch(text):
            steps = tuple(match[f"step{i}"] for i in range(count))
            possible = [_TASKS_OF_STEP.get((i, step), frozenset()) for i, step in enumerate(steps)]
            if not frozenset.intersection(*possible):
                return None
            return Reply(
                "answer",
                greeting=match["greeting"] or "",
                style=style,
                steps=steps,
                closing=match["closing"] or "",
            )
    return None
