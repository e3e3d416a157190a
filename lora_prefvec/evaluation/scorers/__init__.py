"""Prompts and replies -> numbers on named axes."""

from lora_prefvec.evaluation.scorers.find import find_scorer, find_scorers, scorer_list
from lora_prefvec.evaluation.scorers.implicit import implicit_preference
from lora_prefvec.evaluation.scorers.protocol import (
    Message,
    Prompt,
    Scorer,
    Unread,
    Writer,
    answers,
    apply,
    fingerprint,
    messages_of,
    unread_note,
)

__all__ = [
    "Message",
    "Prompt",
    "Scorer",
    "Unread",
    "Writer",
    "answers",
    "apply",
    "find_scorer",
    "find_scorers",
    "fingerprint",
    "implicit_preference",
    "messages_of",
    "scorer_list",
    "unread_note",
]
