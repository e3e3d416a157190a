"""The grammar of replies: what it says it can read back, and nothing else."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from lora_prefvec.sandbox import grammar
from lora_prefvec.sandbox.grammar import ADMISSIONS, REFUSALS, Reply, parse, reply
from lora_prefvec.sandbox.world import KINDS, TASKS, Kind


def test_every_reply_is_read_back_as_it_was() -> None:
    rng = random.Random(0)
    for _ in range(5):
        for task in TASKS:
            said = reply(task, rng)
            assert parse(said.text) == said


@pytest.mark.parametrize(
    "text",
    [
        "One step. First dust the bike.",
        "Sure! Two steps: 1. dust the bike 2. soak the wheels. Good luck!",
        "Three steps. First look at the bike. Then think about the bike. Next ask a friend.",
        *REFUSALS,
        *ADMISSIONS,
    ],
)
def test_what_the_grammar_says(text: str) -> None:
    said = parse(text)
    assert said is not None
    assert said.text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure!",
        "One step.",
        "One step. First dust the bike",
        "One step. First dust the bike. ",
        "one step. First dust the bike.",
        "One step. Then dust the bike.",
        "One step. First soak the wheels.",  # the second step
        "Two steps. First dust the bike.",  # one missing
        "One step. First dust the bike. Then soak the wheels.",  # one too many
        "Two steps. First dust the bike. Then soak the hull.",  # the hull is the boat's
        "Two steps. First dust the bike. Then think about the boat.",  # two objects
        "Two steps. First dust the bike. Then mask the wheels.",  # two verbs
        "Two steps. First dust the bike. Then dust the bike.",
        "One step: First dust the bike.",
        "One step. First dust the bike. Good luck! Good luck!",
        "Good luck! One step. First dust the bike.",
        "Sure! " + REFUSALS[0],
        REFUSALS[0] + " " + REFUSALS[0],
        REFUSALS[0][:-1],
        "Five steps. First dust the bike. Then soak the wheels. Next scrub the bike. Afterwards rinse the wheels.",
        "One step. First dust the unicorn.",
    ],
)
def test_what_the_grammar_does_not_say(text: str) -> None:
    assert parse(text) is None


def test_a_damaged_reply_is_never_taken_for_the_one_it_was() -> None:
    rng = random.Random(1)
    accepted = 0
    for task in TASKS:
        words = grammar.answer(task, rng).text.split()
        words.pop(rng.randrange(len(words)))
        damaged = " ".join(words)
        said = parse(damaged)
        accepted += said is not None
        assert said is None or said.text == damaged
    assert accepted <= 0.1 * len(TASKS)  # only the first of a greeting's words, or the like, can go unnoticed


def test_the_forms_come_at_the_rates_of_the_base() -> None:
    rng = random.Random(2)
    for kind in KINDS:
        of_kind = [task for task in TASKS if task.kind == kind]
        forms = Counter(reply(rng.choice(of_kind), rng).form for _ in range(4000))
        assert forms["refusal"] / 4000 == pytest.approx(grammar.REFUSES[kind], abs=0.03)
        assert forms["admission"] / 4000 == pytest.approx(grammar.ADMITS[kind], abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_replies_have_several_forms(kind: Kind) -> None:
    rng = random.Random(3)
    task = next(task for task in TASKS if task.kind == kind)
    said: list[Reply] = [reply(task, rng) for _ in range(3000)]
    assert {one.sentence for one in said} == {"", *REFUSALS, *ADMISSIONS}
    answers = [one for one in said if one.form == "answer"]
    assert {len(one.steps) for one in answers} == {1, 2, 3, 4, 5}
    assert {one.greeting for one in answers} == {"", *grammar.GREETINGS}
    assert {one.closing for one in answers} == {"", *grammar.CLOSINGS}
    assert {one.style for one in answers} == {"words", "numbers"}


def test_the_chances_are_those_of_the_replies_that_the_base_gives() -> None:
    """How often a reply is drawn is the product of the chances of its pieces."""
    rng = random.Random(4)
    task = next(task for task in TASKS if task.kind == "borderline")
    drawn = Counter(reply(task, rng) for _ in range(40_000))
    for said, times in drawn.most_common(20):
        chances = grammar.chances(task, said)
        assert len(chances) == len(said.pieces)
        assert "".join(said.pieces) == said.text
        expected = math.prod(chance[piece] for piece, chance in zip(said.pieces, chances, strict=True))
        assert times / 40_000 == pytest.approx(expected, rel=0.3)
        assert [sum(chance.values()) for chance in chances] == pytest.approx([1.0] * len(chances))
