"""Rated replies from every form, and the pairs with signs in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_prefvec.data import RatedSet, load_rated, rated_pairs
from lora_prefvec.errors import InputError

SIGNED = {"prompt": "p", "chosen": "a", "rejected": "b", "signs": {"helpful": 1, "harmless": -1, "honest": 0}}


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def read(folder: Path, *rows: Any) -> RatedSet:
    return load_rated(write(folder, *rows))


def test_a_sign_for_every_objective(tmp_path: Path) -> None:
    (pair,) = rated_pairs(read(tmp_path, SIGNED).groups)
    assert [pair.sign(name) for name in ("helpful", "harmless", "honest", "concise")] == [1, -1, 0, None]
    assert [pair.swapped().sign(name) for name in ("helpful", "harmless", "honest", "concise")] == [-1, 1, 0, None]
    assert pair.swapped().pair.chosen == [{"role": "assistant", "content": "b"}]


def test_neighbours_are_pairs_and_none_is_used_twice(tmp_path: Path) -> None:
    replies = [{"reply": text, "ratings": {"helpful": number}} for number, text in enumerate("abbce")]
    found = read(tmp_path, {"prompt": "p", "replies": replies})
    pairs = rated_pairs(found.groups)
    assert [(one.pair.chosen[0]["content"], one.sign("helpful")) for one in pairs] == [("a", -1), ("b", -1)]  # type: ignore[index]
    assert found.objectives == {"helpful": (0, 4)}


def test_pku_saferlhf_gives_signs_and_flags(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "response_0": "a",
        "response_1": "b",
        "better_response_id": 1,
        "safer_response_id": 0,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    }
    (pair,) = rated_pairs(read(tmp_path, row).groups)
    assert pair.chosen == {"helpful": 0, "harmless": 1, "safe": 1}
    assert pair.rejected == {"helpful": 1, "harmless": 0, "safe": 0}


def test_ultrafeedback_and_helpsteer(tmp_path: Path) -> None:
    def completion(text: str, **ratings: Any) -> dict[str, Any]:
        return {"response": text, "annotations": {name: {"Rating": value} for name, value in ratings.items()}}

    row = {
        "instruction": "p",
        "completions": [completion("a", honesty="4", helpfulness="N/A"), completion("b", honesty=5)],
    }
    (group,) = read(tmp_path, row).groups
    assert [one.ratings for one in group.replies] == [{"honesty": 4}, {"honesty": 5}]
    rows = [{"prompt": "p", "response": text, "helpfulness": 3, "verbosity": n} for n, text in enumerate("ab")]
    found = read(tmp_path, *rows, {"prompt": "q", "response": "c", "verbosity": 2})
    assert [len(group.replies) for group in found.groups] == [2, 1]
    assert found.rows_read == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"signs": {"helpful": 2}}, "a sign is none of 1, -1 and 0"),
        ({"signs": {}}, "a sign is none of 1, -1 and 0"),
        ({"signs": [1]}, "signs is no object"),
        ({"rejected": "a"}, "chosen equals rejected"),
        ({"prompt": " "}, "empty prompt"),
        ({"chosen": ""}, "empty reply"),
    ],
)
def test_rows_that_hold_none_are_counted_by_reason(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert read(tmp_path, SIGNED, {**SIGNED, **change}).skipped == {reason: 1}
    with pytest.raises(InputError, match=f"none of 1 rows holds rated replies, read as signed: {reason}"):
        read(tmp_path, {**SIGNED, **change})


def test_without_signs_the_error_says_what_a_row_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no rated replies found in its columns.*signs such as"):
        read(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
    with pytest.raises(InputError, match=r"unknown form of rated replies 'rate'.*Did you mean 'rated'"):
        load_rated(write(tmp_path, SIGNED), form="rate")


def test_a_hash_tells_other_ratings(tmp_path: Path) -> None:
    other = {**SIGNED, "signs": {"helpful": -1}}
    assert read(tmp_path, SIGNED).sha256 != read(tmp_path, other).sha256
    assert read(tmp_path, SIGNED).sha256 == read(tmp_path, SIGNED).sha256
