"""Rated replies of the sandbox: ratings agree with the scorers, and the axes conflict."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_prefvec.data import load_rated, rated_pairs
from lora_prefvec.errors import InputError
from lora_prefvec.sandbox import load_scorer, task_of, tasks
from lora_prefvec.sandbox.scorers import AXES


@pytest.mark.parametrize("count", [4, 16])
def test_replies_are_rated_from_one_to_five_on_every_axis(count: int) -> None:
    found = load_rated(f"sandbox:rated-{count}", rows=400)
    assert found.objectives == dict.fromkeys(AXES, (1.0, 5.0))
    assert {len(group.replies) for group in found.groups} == {count}
    assert {task_of(group.prompt) for group in found.groups} <= set(tasks("train"))


def text(reply: object) -> str:
    assert isinstance(reply, list)
    return str(reply[0]["content"])


def test_a_sign_is_what_the_scorer_says() -> None:
    pairs = rated_pairs(load_rated("sandbox:rated", rows=600).groups)
    assert len(pairs) == 600
    for one in pairs:
        for axis in AXES:
            scorer = load_scorer(axis)
            chosen, rejected = (scorer.of(one.prompt, text(reply)) for reply in (one.pair.chosen, one.pair.rejected))
            if chosen is not None and rejected is not None and one.sign(axis):
                assert one.sign(axis) == (chosen > rejected) - (chosen < rejected)
    for axis in AXES:
        assert {-1, 0, 1} <= {one.sign(axis) for one in pairs}


@pytest.mark.parametrize(("one", "other"), [("helpful", "harmless"), ("helpful", "honest"), ("helpful", "concise")])
def test_axes_conflict(one: str, other: str) -> None:
    pairs = rated_pairs(load_rated("sandbox:rated", rows=1000).groups)
    products = Counter((pair.sign(one) or 0) * (pair.sign(other) or 0) for pair in pairs)
    assert products[-1] > 5 * products[1]


def test_rows_are_repeatable_and_fewer_are_a_prefix() -> None:
    assert load_rated("sandbox:rated", rows=20).groups == load_rated("sandbox:rated", rows=50).groups[:20]
    assert load_rated("sandbox:rated", rows=20, seed=1).groups != load_rated("sandbox:rated", rows=20).groups


def test_there_is_no_such_part() -> None:
    with pytest.raises(InputError, match=r"'rate'.*Did you mean 'rated'"):
        load_rated("sandbox:rate")
