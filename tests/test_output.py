"""Results to stdout in three formats, everything else to stderr."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from lora_prefvec.output import Format, Output, show

Printed = Callable[..., tuple[str, str]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """(format, what is said) -> what came out on stdout and on stderr."""

    def say(format_: Format, speak: Callable[[Output], None]) -> tuple[str, str]:
        output = Output()
        output.format = format_
        speak(output)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return say


RESULT = {"out": "a/b", "rank": 8, "accuracy": 0.5, "parts": [1, 2], "facts": {"x": 1}}


def test_a_result_in_every_format(printed: Printed) -> None:
    out, err = printed("json", lambda output: output.result(RESULT, text="done"))
    assert (json.loads(out), err) == (RESULT, "")
    assert printed("quiet", lambda output: output.result(RESULT, text="done")) == ("a/b\n8\n0.5\n", "")
    assert printed("human", lambda output: output.result(RESULT, text="done")) == ("done\n", "")
    out, _ = printed("human", lambda output: output.result({"out": "a/b", "rank": 8}))
    assert out == "out: a/b\nrank: 8\n"


def test_a_table_in_every_format(printed: Printed) -> None:
    def speak(output: Output) -> None:
        output.table(["name", "norm"], [["helpful", 1.23456], ["harmless", None]], title="vectors", note="a note")

    out, err = printed("json", speak)
    assert (json.loads(out), err) == ([{"name": "helpful", "norm": 1.23456}, {"name": "harmless", "norm": None}], "")
    assert printed("quiet", speak) == ("helpful\t1.235\nharmless\t-\n", "")
    out, err = printed("human", speak)
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "vectors"
    assert any(line.split() == ["helpful", "1.235"] for line in lines)
    assert any(line.split() == ["harmless", "-"] for line in lines)
    assert "a note" in out
    assert err == ""


def test_a_table_takes_brackets_for_text(printed: Printed) -> None:
    out, _ = printed("human", lambda output: output.table(["name"], [["[red]x[/red]"], ["[/]"]]))
    assert "[red]x[/red]" in out
    assert "[/]" in out


def test_a_long_cell_is_not_cut_away(printed: Printed) -> None:
    out, _ = printed("human", lambda output: output.table(["a", "b"], [["x" * 100, "y" * 100]]))
    assert out.count("x") == 100
    assert out.count("y") == 100


@pytest.mark.parametrize("format_", ["human", "json", "quiet"])
def test_what_is_no_result_goes_to_stderr(format_: Format, printed: Printed) -> None:
    quiet = format_ == "quiet"
    assert printed(format_, lambda output: output.note("working")) == ("", "" if quiet else "working\n")
    assert printed(format_, lambda output: output.warn("careful")) == ("", "warning: careful\n")
    assert printed(format_, lambda output: output.error("broken")) == ("", "error: broken\n")


@pytest.mark.parametrize(
    ("cell", "text"), [(None, "-"), (0.123456, "0.1235"), (12345.6, "1.235e+04"), (3, "3"), ("x", "x"), (True, "True")]
)
def test_cells(cell: object, text: str) -> None:
    assert show(cell) == text


def test_a_table_that_is_too_wide_folds_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    drawn = io.StringIO()
    monkeypatch.setattr(Output, "console", lambda self: Console(file=drawn, width=60, highlight=False, markup=False))
    Output().table([f"column {i}" for i in range(8)], [[f"0.{i} ±0.0{i}" for i in range(8)]])
    told = drawn.getvalue()
    assert all(f"0.{i}" in told and f"±0.0{i}" in told and "column" in told for i in range(8))
    assert max(map(len, told.splitlines())) <= 60
