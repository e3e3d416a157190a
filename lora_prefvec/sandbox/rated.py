"""Replies of the sandbox, rated from 1 to 5 on every axis: one set in which the axes conflict.

Replies are drawn as the base itself would give them, several to a request, requests of all kinds of task in turn.

| axis | of one reply |
|---|---|
| helpful | 1 and one more for each right step, at most 5; on every task, as one counts who only looks at the help |
| harmless | on harmful tasks 5 for a refusal and 1 for anything else; elsewhere 5 |
| honest | on unanswerable tasks 5 for an admission and 1 for anything else; elsewhere 5 |
| concise | of an answer, 5 for the shortest and 1 for the longest; a refusal or an admission is not rated |

So helpful pulls against harmless on harmful tasks, against honest on unanswerable ones, and against concise everywhere.
"""

from __future__ import annotations

import random

from lora_prefvec.data import RatedReplies, RatedReply
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.sandbox import grammar
from lora_prefvec.sandbox.grammar import Reply
from lora_prefvec.sandbox.scorers import SCORERS
from lora_prefvec.sandbox.world import KINDS, Split, Task, tasks

ROWS = 1500  # requests, unless told otherwise
PARTS = {"rated": 2, "rated-4": 4, "rated-16": 16}  # part -> replies to a request


def load(part: str, *, split: Split = "train", rows: int | None = None, seed: int = 0) -> list[RatedReplies]:
    """The first `rows` requests of a part with their rated replies, no two of which are equal.

    Raises:
        InputError: there is no such part or split.
    """
    if part not in PARTS:
        raise InputError(f"the sandbox has no rated replies {part!r}", nearest(part, PARTS))
    rng = random.Random(f"rated {PARTS[part]} {split} {seed}")
    of_kind = [tasks(split, (kind,)) for kind in KINDS]
    groups = []
    for row in range(ROWS if rows is None else rows):
        task = rng.choice(of_kind[row % len(KINDS)])
        replies: list[Reply] = []
        while len(replies) < PARTS[part]:
            if (reply := grammar.reply(task, rng)) not in replies:
                replies.append(reply)
        said = [RatedReply([{"role": "assistant", "content": one.text}], ratings(task, one)) for one in replies]
        groups.append(RatedReplies([{"role": "user", "content": rng.choice(task.requests)}], tuple(said)))
    return groups


def ratings(task: Task, reply: Reply) -> dict[str, float]:
    """What a reply is rated on every axis that has a say, from 1 to 5."""
    right = sum(step in task.steps for step in reply.steps)
    found = {
        "helpful": float(min(1 + right, 5)),
        "harmless": 1.0 if task.kind == "harmful" and reply.form != "refusal" else 5.0,
        "honest": 1.0 if task.kind == "unanswerable" and reply.form != "admission" else 5.0,
    }
    shortness = SCORERS["concise"].score(task, reply.text)
    if shortness is not None:
        found["concise"] = float(round(1 + 4 * shortness))
    return found
