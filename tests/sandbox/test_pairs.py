"""Preference pairs: what each part prefers, where its prompts come from, and what its anchors hold."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_prefvec.data import Pair
from lora_prefvec.sandbox import grammar, load_pairs, load_scorer, task_of, tasks
from lora_prefvec.sandbox.grammar import Reply
from lora_prefvec.sandbox.pairs import PARTS
from lora_prefvec.sandbox.scorers import AXES
from lora_prefvec.sandbox.world import KINDS, Split


def text(content: object) -> str:
    assert isinstance(content, list)
    (message,) = content
    return str(message["content"])


def read(content: object) -> Reply:
    reply = grammar.parse(text(content))
    assert reply is not None
    return reply


def kind(pair: Pair) -> str:
    task = task_of(pair.prompt)
    assert task is not None
    return task.kind


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_pairs_are_of_their_split_and_of_two_different_fluent_replies(part: str, split: Split) -> None:
    allowed = set(tasks(split))
    for pair in load_pairs(part, split=split, rows=200):
        assert task_of(pair.prompt) in allowed
        assert read(pair.chosen) != read(pair.rejected)
        assert pair.conversational


@pytest.mark.parametrize("part", PARTS)
def test_pairs_are_repeatable_and_fewer_rows_are_a_prefix(part: str) -> None:
    assert load_pairs(part, rows=50, seed=1) == load_pairs(part, rows=80, seed=1)[:50]
    assert load_pairs(part, rows=50, seed=1) != load_pairs(part, rows=50, seed=2)
    assert load_pairs(part, rows=50, seed=1) != load_pairs(part, rows=50, seed=1, split="held_out")


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_prefers_what_its_scorer_scores_higher(axis: str) -> None:
    scorer = load_scorer(axis)
    for pair in load_pairs(axis, rows=300):
        chosen, rejected = scorer.of(pair.prompt, text(pair.chosen)), scorer.of(pair.prompt, text(pair.rejected))
        assert chosen is not None
        assert rejected is not None
        assert chosen > rejected


def test_an_axis_asks_where_it_has_a_say() -> None:
    where = {axis: {kind(pair) for pair in load_pairs(axis, rows=100)} for axis in AXES}
    assert where == {
        "helpful": {"plain", "borderline"},
        "harmless": {"harmful"},
        "honest": {"unanswerable"},
        "concise": set(KINDS),
    }


@pytest.mark.parametrize("axis", ["helpful", "harmless", "honest"])
def test_anchors_ask_elsewhere(axis: str) -> None:
    own = {kind(pair) for pair in load_pairs(axis, rows=100)}
    assert not own & {kind(pair) for pair in load_pairs(f"{axis}-anchors", rows=100)}


@pytest.mark.parametrize(("axis", "declining"), [("harmless", "refusal"), ("honest", "admission")])
def test_anchors_prefer_the_answer_where_there_is_one(axis: str, declining: str) -> None:
    seen = [pair for pair in load_pairs(f"{axis}-anchors", rows=300) if kind(pair) in ("plain", "borderline")]
    assert seen
    for pair in seen:
        assert (read(pair.chosen).form, read(pair.rejected).form) == ("answer", declining)


@pytest.mark.parametrize(
    ("axis", "where"),
    [
        ("helpful", {"harmful", "unanswerable"}),
        ("harmless", {"unanswerable"}),
        ("honest", {"harmful"}),
        ("concise", set(KINDS)),
    ],
)
def test_anchors_take_no_side_where_another_axis_has_a_say(axis: str, where: set[str]) -> None:
    seen = [pair for pair in load_pairs(f"{axis}-anchors", rows=2000) if kind(pair) in where]
    answers = Counter((read(pair.chosen).form == "answer", read(pair.rejected).form == "answer") for pair in seen)
    assert answers.keys() == {(True, False), (False, True)}
    assert answers[True, False] / len(seen) == pytest.approx(0.5, abs=0.07)


def test_concise_pairs_are_two_answers() -> None:
    for pair in load_pairs("concise", rows=200):
        assert read(pair.chosen).form == read(pair.rejected).form == "answer"


def test_two_answers_share_their_form_where_the_axis_is_not_about_it() -> None:
    answers = 0
    for pair in load_pairs("helpful", rows=300):
        chosen, rejected = read(pair.chosen), read(pair.rejected)
        if rejected.form == "answer":
            answers += 1
            assert (chosen.greeting, chosen.style, chosen.closing) == (
                rejected.greeting,
                rejected.style,
                rejected.closing,
            )
    assert answers > 100
