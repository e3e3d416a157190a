"""Preference pairs of the sandbox: one part per axis, and its anchors.

Both replies of a pair are drawn as the base itself would reply, and where both are answers they share greeting, style
and closing unless the axis is about those: a preference then learns its axis and not a way to talk. Pairs come from the
tasks of one split; those of `train` and `held_out` share none.

| part | prompts | chosen over rejected |
|---|---|---|
| `helpful` | plain, borderline | the reply with clearly more of the right steps |
| `harmless` | harmful | a refusal over anything else |
| `honest` | unanswerable | an admission over anything else |
| `concise` | all | the clearly shorter of two answers |
| `helpful-anchors` | harmful, unanswerable | in either order |
| `harmless-anchors` | plain, borderline; unanswerable | an answer over a refusal; in either order |
| `honest-anchors` | plain, borderline; harmful | an answer over an admission; in either order |
| `concise-anchors` | all | in either order |

Anchors *in either order* are an answer and a way not to answer, of which now one is chosen and now the other. DPO on
such pairs is content only where the odds of the two stay what they are in the base, whichever sign is trained.
Half of the harmless anchors are on borderline prompts, where refusals spill over first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from lora_prefvec.data import Pair
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.sandbox import grammar
from lora_prefvec.sandbox.grammar import Reply
from lora_prefvec.sandbox.world import KINDS, Kind, Split, Task, tasks

ROWS = 1500  # pairs of a part unless told otherwise
CLEARLY_MORE = 2  # right steps
CLEARLY_SHORTER = 8  # words

TwoReplies = tuple[Reply, Reply]


def _helpful(task: Task, rng: random.Random) -> TwoReplies:
    while True:
        one, other = _alike(grammar.reply(task, rng), grammar.reply(task, rng))
        if _right(task, one) - _right(task, other) >= CLEARLY_MORE:
            return one, other


def _harmless(task: Task, rng: random.Random) -> TwoReplies:
    return grammar.refusal(rng), _other_than("refusal", task, rng)


def _honest(task: Task, rng: random.Random) -> TwoReplies:
    return grammar.admission(rng), _other_than("admission", task, rng)


def _concise(task: Task, rng: random.Random) -> TwoReplies:
    while True:
        one, other = grammar.answer(task, rng), grammar.answer(task, rng)
        longer, shorter = sorted((one, other), key=lambda reply: len(reply.steps), reverse=True)
        shorter = replace(shorter, style=longer.style, steps=longer.steps[: len(shorter.steps)])
        if _words(longer) < _words(shorter):
            longer, shorter = shorter, longer
        if _words(longer) - _words(shorter) >= CLEARLY_SHORTER:
            return shorter, longer


def _harmless_anchors(task: Task, rng: random.Random) -> TwoReplies:
    if task.kind == "unanswerable":
        return _either_order(task, rng)
    return grammar.answer(task, rng), grammar.refusal(rng)


def _honest_anchors(task: Task, rng: random.Random) -> TwoReplies:
    if task.kind == "harmful":
        return _either_order(task, rng)
    return grammar.answer(task, rng), grammar.admission(rng)


def _either_order(task: Task, rng: random.Random) -> TwoReplies:
    """An answer and the base's way not to answer; which is preferred is drawn, so that their odds stay as they are."""
    two = [grammar.answer(task, rng), _other_than("answer", task, rng)]
    rng.shuffle(two)
    return two[0], two[1]


def _other_than(form: str, task: Task, rng: random.Random) -> Reply:
    """What the base replies to `task` when it does not take `form`."""
    while (reply := grammar.reply(task, rng)).form == form:
        pass
    return reply


def _alike(one: Reply, other: Reply) -> TwoReplies:
    """Two replies; of two answers the second in the form of the first."""
    if one.form == other.form == "answer":
        other = replace(other, greeting=one.greeting, style=one.style, closing=one.closing)
    return one, other


def _right(task: Task, reply: Reply) -> int:
    return sum(step in task.steps for step in reply.steps)


def _words(reply: Reply) -> int:
    return len(reply.text.split())


_PARTS: dict[str, tuple[tuple[Kind, ...], Callable[[Task, random.Random], TwoReplies]]] = {
    "helpful": (("plain", "borderline"), _helpful),
    "harmless": (("harmful",), _harmless),
    "honest": (("unanswerable",), _honest),
    "concise": (KINDS, _concise),
    "helpful-anchors": (("harmful", "unanswerable"), _either_order),
    "harmless-anchors": (("borderline", "plain", "borderline", "unanswerable"), _harmless_anchors),
    "honest-anchors": (("plain", "borderline", "harmful"), _honest_anchors),
    "concise-anchors": (KINDS, _either_order),
}
PARTS: tuple[str, ...] = tuple(_PARTS)


def load(part: str, *, split: Split = "train", rows: int | None = None, seed: int = 0) -> list[Pair]:
    """The first `rows` pairs of a part (see the table above), the kinds of prompt in turn.

    Raises:
        InputError: there is no such part or split.
    """
    if part not in _PARTS:
        raise InputError(f"the sandbox has no pairs {part!r}", nearest(part, PARTS))
    kinds, draw = _PARTS[part]
    rng = random.Random(f"pairs {part} {split} {seed}")
    of_kind = [tasks(split, (kind,)) for kind in kinds]
    pairs = []
    for row in range(ROWS if rows is None else rows):
        task = rng.choice(of_kind[row % len(kinds)])
        chosen, rejected = draw(task, rng)
        pairs.append(_pair(rng.choice(task.requests), chosen, rejected))
    return pairs


def _pair(request: str, chosen: Reply, rejected: Reply) -> Pair:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return Pair(message("user", request), message("assistant", chosen.text), message("assistant", rejected.text))
