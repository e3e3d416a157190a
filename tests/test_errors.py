"""Errors that are one sentence and an exit code."""

from __future__ import annotations

import pytest

from lora_prefvec.errors import InputError, Interrupted, PrefvecError, RunError, nearest, require_extra


@pytest.mark.parametrize(("kind", "code"), [(PrefvecError, 1), (RunError, 1), (InputError, 2), (Interrupted, 130)])
def test_every_kind_has_its_exit_code(kind: type[PrefvecError], code: int) -> None:
    assert kind("x").exit_code == code


@pytest.mark.parametrize(
    ("problem", "fix", "text"),
    [
        ("x exists", "Take y.", "x exists. Take y."),
        ("x exists.", "Take y.", "x exists. Take y."),
        ("x exists", "", "x exists"),
    ],
)
def test_problem_and_fix_make_one_text(problem: str, fix: str, text: str) -> None:
    error = InputError(problem, fix)
    assert (str(error), error.problem, error.fix) == (text, problem, fix)


def test_a_missing_extra_names_its_command() -> None:
    assert "pip install 'lora-prefvec[plots]'" in require_extra("matplotlib", "plots").fix


def test_nearest_names_one_or_lists_all() -> None:
    assert nearest("helpfull", ["harmless", "helpful"]) == "Did you mean 'helpful'?"
    assert nearest("xyz", {"harmless", "helpful"}) == "Known: harmless, helpful."
    assert nearest("xyz", []) == ""
    many = nearest("xyz", [f"name-{i:02}" for i in range(20)])
    assert many.endswith("name-11, ....")
    assert "name-12" not in many


def test_what_a_file_put_into_a_message_stays_on_its_line() -> None:
    error = InputError("there is no \n\x1b[2J\u202e module", "Give \0 another")
    assert str(error) == "there is no \\n\\x1b[2J\\u202e module. Give \\x00 another"
