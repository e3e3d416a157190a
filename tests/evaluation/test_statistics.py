"""Means, their intervals, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from lora_prefvec.evaluation import Score, estimate, spearman
from lora_prefvec.evaluation.statistics import from_error, from_share


def test_a_mean_counts_what_has_a_say() -> None:
    found = estimate([1.0, 3.0, None, 5.0])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.error == pytest.approx(2 / 3**0.5)
    assert estimate([None, None]) == Score(None, None, None, None, 0)
    assert estimate([]) == Score(None, None, None, None, 0)
    assert estimate([None, 2.0]) == Score(2.0, None, None, None, 1)
    assert estimate([1.0, 3.0], n=2) == Score(2.0, None, None, None, 2)  # two replies to one prompt


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = estimate(list(rng.random(60) < 0.3))
        held += found.low <= 0.3 <= found.high  # type: ignore[operator]
    assert 0.91 <= held / 400 <= 0.98


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=40)
    found = estimate(list(values))
    rng = np.random.default_rng(2)
    means = [rng.choice(values, 40).mean() for _ in range(20_000)]
    assert [found.low, found.high] == pytest.approx(list(np.percentile(means, [2.5, 97.5])), abs=0.03)


def test_many_values_give_the_same_interval_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(3).random(50))
    whole = estimate(values)
    monkeypatch.setattr("lora_prefvec.evaluation.statistics.BLOCK", 1000)
    assert estimate(values) == whole
    assert estimate(values, seed=1) != whole


def test_several_replies_to_a_prompt_are_no_independent_evidence() -> None:
    once = np.random.default_rng(4).random(30)
    one, thrice = estimate(list(once)), estimate(list(np.repeat(once, 3)), n=3)
    numbers = [(found.mean, found.low, found.high, found.error) for found in (one, thrice)]
    assert numbers[0] == pytest.approx(numbers[1])
    assert thrice.n == 90
    assert estimate(list(np.repeat(once, 3))).error < one.error / 1.5  # type: ignore[operator]


def test_prompts_weigh_by_the_replies_that_count() -> None:
    found = estimate([1.0, 1.0, 0.0, None, None, None], n=2)
    assert (found.mean, found.n) == (pytest.approx(2 / 3), 3)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("xs", "ys", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 25, 100], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),  # ties: scipy.stats.spearmanr gives the same
        ([106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17], -29 / 165),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
        ([1, 2, 3], [5, 5, 5], 0.0),
    ],
)
def test_spearman(xs: Sequence[float], ys: Sequence[float], expected: float) -> None:
    assert spearman(xs, ys) == pytest.approx(expected)
    assert spearman(ys, xs) == pytest.approx(expected)


def test_an_interval_from_a_standard_error_and_of_a_share() -> None:
    assert from_error(1.0, 0.5, 9) == Score(1.0, pytest.approx(0.02), pytest.approx(1.98), 0.5, 9)
    assert from_error(1.0, math.nan, 1) == Score(1.0, None, None, None, 1)
    some = from_share(0.5, 0.05, 100)
    assert (some.low, some.high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    every = from_share(1.0, 0.0, 100)
    assert (every.low, every.high) == (pytest.approx(0.963, abs=1e-3), pytest.approx(1.0))
