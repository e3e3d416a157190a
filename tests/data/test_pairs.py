from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_prefvec.data import Pair, PairSet, split_held_out, swap
from lora_prefvec.errors import InputError
from tests.data.strategies import pairs


@given(st.lists(pairs, max_size=5))
def test_swap_is_an_involution_that_keeps_prompts(rows: list[Pair]) -> None:
    swapped = swap(rows)
    assert swap(swapped) == rows
    assert [pair.prompt for pair in swapped] == [pair.prompt for pair in rows]
    assert all(a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(rows, swapped, strict=True))
    assert not rows or swapped != rows


@given(st.lists(pairs, min_size=2, max_size=5))
def test_the_hash_sees_every_text_and_the_order(rows: list[Pair]) -> None:
    first = PairSet(rows, "trl-standard", "a").sha256
    assert first == PairSet(list(rows), "hh-rlhf", "b", rows_read=9).sha256
    assert first != PairSet(swap(rows), "trl-standard", "a").sha256
    assert first != PairSet(rows[1:], "trl-standard", "a").sha256
    assert (first == PairSet(rows[::-1], "trl-standard", "a").sha256) == (rows == rows[::-1])


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    there = [{"role": "user", "content": "q"}]
    back = [{"content": "q", "role": "user"}]
    sets = [PairSet([Pair(prompt, "a", "b")], "", "") for prompt in (there, back)]
    assert sets[0].sha256 == sets[1].sha256


@given(st.lists(st.integers(0, 6), min_size=4, max_size=40), st.integers(0, 5), st.integers(0, 3))
def test_a_held_out_prompt_is_never_trained_on(prompts: list[int], seed: int, n: int) -> None:
    rows = [Pair(f"prompt {prompt}", f"good {i}", f"bad {i}") for i, prompt in enumerate(prompts)]
    try:
        train, held = split_held_out(rows, n, seed)
    except InputError:
        # Only where no choice of whole prompts leaves something on both sides.
        assert min(prompts.count(prompt) for prompt in set(prompts)) > n or len(set(prompts)) == 1
        return
    assert not {str(pair.prompt) for pair in train} & {str(pair.prompt) for pair in held}
    assert sorted(train + held, key=str) == sorted(rows, key=str)
    assert [rows.index(pair) for pair in train] == sorted(rows.index(pair) for pair in train)
    assert len(held) <= n
    assert (train, held) == split_held_out(rows, n, seed)


def test_distinct_prompts_give_exactly_n_and_the_seed_matters() -> None:
    rows = [Pair(f"prompt {i}", "good", "bad") for i in range(100)]
    splits = [split_held_out(rows, 20, seed)[1] for seed in (0, 1)]
    assert [len(held) for held in splits] == [20, 20]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("n", [-1, 3, 4])
def test_a_split_with_an_empty_side_is_refused(n: int) -> None:
    rows = [Pair(f"prompt {i}", "good", "bad") for i in range(3)]
    with pytest.raises(InputError, match=f"cannot hold out {n}"):
        split_held_out(rows, n)
