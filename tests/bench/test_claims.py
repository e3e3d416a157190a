"""The estimates of `claims.py`: what its intervals are made of."""

from __future__ import annotations

import pytest

from tests.bench.claims import estimate

TASKS = ["a", "a", "b", "b", "c", "c"]
ONE = [[0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 0.3, 0.5, 0.7, 0.9, 1.1]]


def test_what_seeds_and_prompts_share_leaves_a_difference() -> None:
    found = estimate([[value + 0.25 for value in row] for row in ONE], TASKS, ONE)
    assert (found.mean, found.low, found.high, found.seeds) == (0.25, 0.25, 0.25, [0.25, 0.25])


def test_seeds_that_differ_widen_the_interval() -> None:
    found = estimate([[0.0] * 6, [1.0] * 6], TASKS)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_prompts_of_one_task_are_drawn_together() -> None:
    values = [[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]
    assert estimate(values, TASKS).low == estimate(values, TASKS).high == 0.5
    assert estimate(values, list("abcdef")).low < 0.5


def test_every_seed_counts_alike_whatever_has_a_say_in_it() -> None:
    found = estimate([[1.0, None, 1.0, None, 1.0, None], [0.0] * 6], TASKS)
    assert found.mean == pytest.approx(0.5)
    assert found.seeds == [1.0, 0.0]
