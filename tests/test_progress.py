"""Plain lines of progress where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import sys

import pytest

from lora_prefvec import progress as module
from lora_prefvec.output import out
from lora_prefvec.progress import BarProgress, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the last number of this list."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[-1])
    return now


def test_plain_lines_come_every_ten_seconds_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("tiny", 10) as bar:
        for second in (104.0, 108.0, 112.0, 116.0):
            clock.append(second)
            bar.advance()
        clock.append(140.0)
        bar.advance(6, info="loss 0.5")
    assert capsys.readouterr().err == "tiny: 3/10, 28 s left\ntiny: 10/10, 0 s left, loss 0.5\n"


def test_work_that_began_before_does_not_count_for_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("tiny", 100, start=80) as bar:
        clock.append(120.0)
        bar.advance(10)
    assert capsys.readouterr().err == "tiny: 90/100, 20 s left\n"


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(out, "format", "quiet")
    with progress("tiny", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("tiny", 4, start=1) as bar:
        assert isinstance(bar, BarProgress)
        bar.advance(3, info="loss 0.5")
        assert bar.done == 4
    shown = terminal.getvalue()
    for part in ("tiny", "4/4", "loss 0.5"):
        assert part in shown
