"""The arithmetic of `spill_over.py`: its bootstrap and the comparison at one gain."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from tests.bench.claims import estimate as estimate_of_claims
from tests.bench.spill_over import Bootstrap, at_gain, command, common_gain, estimate, spill

TASKS = ["a", "a", "b", "b", "c", "c"]
ONE = [[0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 0.3, 0.5, 0.7, 0.9, 1.1]]


def samples(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_what_both_share_leaves_a_difference() -> None:
    bootstrap = Bootstrap(TASKS, 2)
    more = bootstrap.means([[value + 0.25 for value in row] for row in ONE])
    assert estimate(more - bootstrap.means(ONE)) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_its_means_are_those_of_claims() -> None:
    values = [[0.0, None, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, None, 0.0, 0.0, 1.0]]
    mine, theirs = estimate(Bootstrap(TASKS, 2).means(values)), estimate_of_claims(values, TASKS)
    assert mine["mean"] == theirs.mean
    assert mine["low"] == pytest.approx(theirs.low, abs=0.1)
    assert mine["high"] == pytest.approx(theirs.high, abs=0.1)


def test_linear_between_the_places() -> None:
    own, other = samples(0.0, 0.2, 0.4, 0.3), samples(0.0, 1.0, 3.0, 9.0)
    assert at_gain(own, other, 0.3)[0] == pytest.approx(2.0)
    assert at_gain(own, own, 0.1)[0] == pytest.approx(0.1)
    assert np.isnan(at_gain(own, other, 0.5)[0])


def test_a_gain_that_all_reach() -> None:
    assert common_gain([samples(0.0, 0.33), samples(0.0, 0.27, 0.1)], most=0.3, step=0.05) == 0.25
    assert common_gain([samples(0.0, 0.9)], most=0.3, step=0.05) == 0.3


def test_what_exists_in_a_part_of_the_samples_says_so() -> None:
    assert estimate(np.array([1.0, 1.0, np.nan, 3.0, 2.0]))["exists"] == 0.75


def test_spill_counts_either_direction_and_not_the_own_axis() -> None:
    changes = {"helpful": samples(0.3), "harmless": samples(-0.2), "honest": samples(0.1), "concise": samples(0.0)}
    assert spill(changes, "helpful")[0] == pytest.approx(0.1)


def test_the_command_is_what_differs_from_the_defaults() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--rules", nargs="*", default=["sum"])
    told = command("tests/bench/some.py", parser, parser.parse_args(["--work", "x", "--rules", "sum", "shared once"]))
    assert told == "python tests/bench/some.py --rules sum 'shared once'"
    assert command("some.py", parser, parser.parse_args([])) == "python tests/bench/some.py"
