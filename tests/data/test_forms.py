from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_prefvec.data import FORMS, Pair, swap
from lora_prefvec.data.forms import choose_form, columns_of, convert, detect
from lora_prefvec.errors import InputError
from tests.data.strategies import (
    content,
    conversational_pairs,
    helpsteer_rows,
    hh_row,
    message,
    pku_row,
    sharegpt_row,
    single_turn_pairs,
    standard_pairs,
    texts,
    ultrafeedback_row,
)


def read(rows: list[Any], form: str | None = None, attribute: str | None = None, margin: float = 0.0) -> list[Any]:
    """Pairs and reasons, by the detected form where none is named."""
    name, attribute = choose_form(form, attribute, rows, "here")
    return [outcome for _, _, outcome in convert(rows, name, attribute, margin)]


@given(standard_pairs())
def test_trl_standard(pair: Pair) -> None:
    assert detect([pair.as_dict()]) == "trl-standard"
    assert read([pair.as_dict()]) == [pair]


@given(conversational_pairs())
def test_trl_conversational(pair: Pair) -> None:
    assert detect([pair.as_dict()]) == "trl-conversational"
    assert read([pair.as_dict() | {"score_chosen": 1.0}]) == [pair]


@given(conversational_pairs(), st.booleans())
def test_trl_conversational_with_the_prompt_inside_the_replies(pair: Pair, with_string: bool) -> None:
    row: dict[str, Any] = {"chosen": [*pair.prompt, *pair.chosen], "rejected": [*pair.prompt, *pair.rejected]}
    if with_string:  # as ultrafeedback_binarized is published
        row["prompt"] = content(pair, "prompt")
    assert detect([row]) == "trl-conversational-implicit"
    assert read([row]) == [pair]
    assert read([row | {"prompt": pair.prompt}]) == [pair]


@given(standard_pairs())
def test_trl_standard_without_a_prompt_loses_no_character(pair: Pair) -> None:
    row = {part: str(pair.prompt) + str(getattr(pair, part)) for part in ("chosen", "rejected")}
    assert detect([row]) == "trl-standard-implicit"
    (found,) = read([row])
    if isinstance(found, Pair):
        assert f"{found.prompt}{found.chosen}" == row["chosen"]
        assert f"{found.prompt}{found.rejected}" == row["rejected"]
        assert str(found.prompt).strip()
    else:
        assert found in ("empty prompt", "empty response")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is green", "The sky is"),
        ("The sky is blue", "The sky is black", "The sky is"),  # not "The sky is bl", as TRL would
        ("The sky is blue", "The sky isn't", "The sky"),
        ("Question\n\nyes", "Question\n\nno", "Question\n\n"),
        ("one two", "one two three", "one"),
    ],
)
def test_an_implicit_prompt_ends_at_a_word(chosen: str, rejected: str, prompt: str) -> None:
    (pair,) = read([{"chosen": chosen, "rejected": rejected}])
    assert pair == Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@given(conversational_pairs(system=False))
def test_hh_rlhf(pair: Pair) -> None:
    assert detect([hh_row(pair)]) == "hh-rlhf"
    assert read([hh_row(pair)]) == [pair]


@given(conversational_pairs())
def test_sharegpt(pair: Pair) -> None:
    assert detect([sharegpt_row(pair)]) == "sharegpt"
    assert read([sharegpt_row(pair)]) == [pair]


def test_sharegpt_with_a_system_column() -> None:
    pair = Pair([message("user", "q")], [message("assistant", "a")], [message("assistant", "b")])
    (found,) = read([sharegpt_row(pair) | {"system": "be brief"}])
    assert found.prompt == [message("system", "be brief"), message("user", "q")]


@given(single_turn_pairs, st.sampled_from([0, 1]), st.sampled_from([int, float, str]))
def test_pku_saferlhf_gives_two_preferences(pair: Pair, winner: int, kind: type) -> None:
    row = pku_row(pair, winner)
    row |= {name: kind(row[name]) for name in ("better_response_id", "safer_response_id")}  # CSV has only strings
    assert detect([row]) == "pku-saferlhf"
    assert read([row], "pku-saferlhf:helpful") == [pair]
    assert read([row], attribute="harmless") == swap([pair])
    del row["safer_response_id"]
    assert read([row], attribute="harmless") == swap([pair])


def test_pku_saferlhf_needs_a_preference() -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}
    with pytest.raises(InputError, match=r"helpful, harmless.*--form pku-saferlhf:helpful"):
        choose_form(None, None, [row], "here")
    reasons = read([row | {"better_response_id": bad} for bad in (-1, None, True, "x")], "pku-saferlhf:helpful")
    neither, missing = "better_response_id is neither 0 nor 1", "missing column 'better_response_id'"
    assert reasons == [neither, missing, neither, neither]
    flags = {"is_response_0_safe": True, "is_response_1_safe": True}
    assert read([row | flags], "pku-saferlhf:harmless") == ["tie"]


@given(single_turn_pairs.filter(lambda pair: "between" not in str(pair)))
def test_ultrafeedback_takes_the_best_and_the_worst_by_one_attribute(pair: Pair) -> None:
    row = ultrafeedback_row(pair, {"honesty": ("5", "1"), "helpfulness": (1.0, 3.0), "truthfulness": ("N/A", "4")})
    assert detect([row]) == "ultrafeedback"
    assert read([row], attribute="honesty") == [pair]
    assert read([row], "ultrafeedback:helpfulness") == swap([pair])
    assert read([row], "ultrafeedback:honesty", margin=5) == ["below margin"]
    assert read([row], "ultrafeedback:instruction_following") == [
        "fewer than two replies rated for instruction_following"
    ]


def test_ultrafeedback_ties_and_damage() -> None:
    pair = Pair([message("user", "q")], [message("assistant", "a")], [message("assistant", "b")])
    rows: list[Any] = [
        ultrafeedback_row(pair, {"honesty": ("2", "2.0")}),
        "row",
        {"instruction": "q", "completions": 3},
    ]
    rows += [{"instruction": "q", "completions": [3, {"annotations": [1]}, {"annotations": {"honesty": "4"}}]}]
    assert read(rows, "ultrafeedback:honesty") == [
        "tie",
        "row is not an object",
        "completions is not a list",
        "fewer than two replies rated for honesty",
    ]


@given(st.lists(st.tuples(single_turn_pairs, st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=4))
def test_helpsteer2_pairs_consecutive_rows(drawn: list[tuple[Pair, int, int]]) -> None:
    drawn = [  # neighbours with one prompt would be one group
        (Pair([message("user", f"{i} {content(pair, 'prompt')}")], pair.chosen, pair.rejected), low, gap)
        for i, (pair, low, gap) in enumerate(drawn)
    ]
    rows = [row for pair, low, gap in drawn for row in helpsteer_rows(pair, low + gap, low)]
    assert detect(rows) == "helpsteer2"
    by_gap = {0: "tie", 1: "below margin"}
    assert read(rows, attribute="helpfulness", margin=2) == [by_gap.get(gap, pair) for pair, _, gap in drawn]
    used = [number for _, number, _ in convert(rows, "helpsteer2", "helpfulness", 0)]
    assert sum(used) == len(rows)


def test_helpsteer2_counts_the_rows_that_are_in_no_pair() -> None:
    rows: list[Any] = [
        {"prompt": "q", "response": "worst", "helpfulness": 0},
        {"prompt": "q", "response": "between", "helpfulness": 2},
        {"prompt": "q", "response": "best", "helpfulness": 4},
        {"prompt": "alone", "response": "a", "helpfulness": 4},
        {"prompt": "alone", "response": "a", "helpfulness": None},
        "rubbish",
    ]
    outcomes = list(convert(rows, "helpsteer2", "helpfulness", 0))
    pair = Pair([message("user", "q")], [message("assistant", "best")], [message("assistant", "worst")])
    assert outcomes == [
        (1, 2, pair),
        (2, 1, "between best and worst reply"),
        (5, 1, "helpfulness is not a number"),
        (4, 1, "only reply to its prompt"),
        (6, 1, "row is not an object"),
    ]


def test_helpsteer2_prompts_of_several_turns() -> None:
    prompt = "first\n<extra_id_1>Assistant\nreply\n<extra_id_1>User\nsecond"
    rows = [{"prompt": prompt, "response": reply, "helpfulness": rating} for reply, rating in (("a", 1), ("b", 3))]
    (pair,) = read(rows, attribute="helpfulness")
    assert pair.prompt == [message("user", "first"), message("assistant", "reply"), message("user", "second")]


def test_strings_become_turns_where_the_conversational_form_is_named() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    expected = Pair([message("user", "q")], [message("assistant", "a")], [message("assistant", "b")])
    assert read([row], "trl-conversational") == [expected]
    assert read([row | {"chosen": [message("assistant", "a")]}]) == [expected]


USER, REPLY, OTHER = message("user", "q"), message("assistant", "a"), message("assistant", "b")
EMPTY = message("assistant", " \n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": [OTHER]}, "chosen equals rejected"),
        ({"chosen": [EMPTY]}, "empty response"),
        ({"rejected": []}, "empty response"),
        ({"prompt": []}, "empty prompt"),
        ({"prompt": [USER, EMPTY, USER]}, "empty turn in prompt"),
        ({"prompt": [USER, USER]}, "roles do not alternate"),
        ({"prompt": [USER, REPLY]}, "roles do not alternate"),
        ({"prompt": [REPLY, USER]}, "roles do not alternate"),
        ({"chosen": [message("tool", "x")]}, "roles do not alternate"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "content is not a string"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "content is not a string"),
        ({"chosen": ["a"]}, "chosen holds something that is no message"),
        ({"chosen": 3.5}, "chosen is neither a string nor messages"),
        ({"chosen": None}, "missing column 'chosen'"),
        ({"chosen": [message("assistant", "\ud800")]}, "content is not valid Unicode"),
    ],
)
def test_why_a_conversation_is_no_pair(change: dict[str, Any], reason: str) -> None:
    row = {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}
    assert read([row, row | change], "trl-conversational")[1] == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "b"}, "chosen equals rejected"),
        ({"chosen": " "}, "empty response"),
        ({"prompt": ""}, "empty prompt"),
        ({"chosen": 7}, "chosen is not a string"),
        ({"rejected": None}, "missing column 'rejected'"),
    ],
)
def test_why_a_row_of_strings_is_no_pair(change: dict[str, Any], reason: str) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read([row, row | change])[1] == reason


def test_replies_of_several_turns_are_kept() -> None:
    row = {"prompt": [USER], "chosen": [REPLY, OTHER], "rejected": [OTHER]}
    (pair,) = read([row])
    assert pair.chosen == [REPLY, OTHER]


def test_a_margin_on_labelled_pairs_reads_their_scores() -> None:
    row: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    scored = [row | {"score_chosen": high, "score_rejected": 5} for high in (8, 6, 5, "N/A")]
    outcomes = read(scored, margin=2)
    assert outcomes[0] == Pair("q", "a", "b")
    assert outcomes[1:] == ["below margin", "tie", "no score_chosen and score_rejected for the margin"]
    assert all(isinstance(outcome, Pair) for outcome in read(scored))


def test_bad_rows_do_not_outvote_the_form() -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert detect([3, {"x": 1}, good | {"chosen": None}, good]) == "trl-standard"
    assert detect([3, {"x": 1}]) is None


@given(st.dictionaries(texts, st.none() | st.integers() | texts | st.lists(texts), max_size=5))
def test_whatever_a_row_holds_it_becomes_a_pair_or_a_reason(row: dict[str, Any]) -> None:
    detect([row])
    for form in FORMS:
        for full in (row, {"prompt": row, "chosen": row, "rejected": [row], "completions": [row], "response_0": row}):
            outcomes = [outcome for _, _, outcome in convert([full], form, "helpful", 0)]
            assert len(outcomes) == 1
            assert isinstance(outcomes[0], Pair | str)


@pytest.mark.parametrize(
    ("form", "attribute", "message"),
    [
        ("hh-rhlf", None, "unknown form 'hh-rhlf'. Did you mean 'hh-rlhf'"),
        ("hh-rlhf", "helpful", "has no attributes"),
        ("ultrafeedback", None, "instruction_following, honesty"),
        ("ultrafeedback:honest", None, "no attribute 'honest'. Did you mean 'honesty'"),
        ("ultrafeedback:honesty", "helpfulness", "contradict"),
        (None, None, r"\(completion, label\)"),
    ],
)
def test_forms_and_attributes_that_do_not_exist(form: str | None, attribute: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_form(form, attribute, [{"completion": 1, "label": 1}], "here")


def test_column_names_cannot_steer_a_terminal_or_fill_it() -> None:
    shown = columns_of([{"\x1b[31mred": 1, "x" * 500: 2}, *({f"c{i}": 1} for i in range(50))])
    assert "\x1b" not in shown
    assert len(shown) < 200
