from __future__ import annotations

from pathlib import Path

import pytest

from lora_prefvec.data import Lengths, Pair, load, statistics, swap


def test_counts_of_a_small_set() -> None:
    pairs = [
        Pair("one", "long reply", "short"),
        Pair("one", "long reply", "short"),
        Pair("one", "short", "long reply"),
        Pair("two", "same", "size"),
        Pair([{"role": "system", "content": "abc"}, {"role": "user", "content": "de"}], [], []),
    ]
    facts = statistics(pairs[:4])
    assert (facts.pairs, facts.prompts, facts.duplicates, facts.contradictions) == (4, 2, 1, 1)
    assert facts.longer_wins == pytest.approx(2 / 3)
    assert facts.characters["chosen"] == Lengths(median=7.5, p95=10, max=10)
    assert facts.tokens is None
    assert statistics(pairs[3:4]).longer_wins is None
    assert statistics(pairs[4:]).characters["prompt"].max == 5


def test_p95_is_the_shortest_that_95_percent_do_not_exceed() -> None:
    pairs = [Pair("x" * i, "a", "b") for i in range(1, 101)]
    assert statistics(pairs).characters["prompt"] == Lengths(median=50.5, p95=95, max=100)


def test_tokens_by_the_given_counter() -> None:
    facts = statistics([Pair("a b c", "d e", "f")], lambda pair: (3, 2, 1))
    assert facts.tokens == {"prompt": Lengths(3, 3, 3), "chosen": Lengths(2, 2, 2), "rejected": Lengths(1, 1, 1)}
    assert facts.as_dict()["tokens"]["prompt"] == {"median": 3, "p95": 3, "max": 3}


def test_known_facts_of_real_data(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "preference"
    assert statistics(load(folder / "llamafactory_dpo_en_300.jsonl.gz")).duplicates == 5
    helpful = statistics(load(folder / "hh_helpful_base.train.jsonl.gz"))
    harmless = statistics(load(folder / "hh_harmless_base.train.jsonl.gz"))
    assert helpful.longer_wins is not None
    assert harmless.longer_wins is not None
    assert helpful.longer_wins > 0.5 > harmless.longer_wins  # in harmless-base the chosen reply is shorter on average


def test_swapping_exchanges_the_replies_and_the_winner(shared_dir: Path) -> None:
    pairs = load(shared_dir / "data" / "preference" / "hh_helpful_base.test.jsonl.gz").pairs
    there, back = statistics(pairs), statistics(swap(pairs))
    assert there.longer_wins is not None
    assert back.longer_wins == pytest.approx(1 - there.longer_wins)
    assert (there.characters["chosen"], there.characters["rejected"]) == (
        back.characters["rejected"],
        back.characters["chosen"],
    )
