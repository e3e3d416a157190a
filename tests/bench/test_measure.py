"""Costs, bars, and how they are told."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from lora_prefvec.bench import Cost, Growth, Row, report
from lora_prefvec.bench.measure import faster, fsync_seconds, machine, ratio, rounds, timed, within, workplace
from lora_prefvec.errors import InputError


def test_a_bar_is_passed_on_its_own_side() -> None:
    assert faster("a", ours=0.01, peer=10.0, at_least=1000).passed
    assert not faster("a", ours=0.0101, peer=10.0, at_least=1000).passed
    assert ratio("a", ours=2.5, peer=1.0, at_most=2.5).passed
    assert not ratio("a", ours=2.6, peer=1.0, at_most=2.5).passed
    assert within("a", 700.0, 700, "MB").passed
    assert not within("a", 701.0, 700, "MB").passed
    assert not within("a", math.nan, 700, "MB").passed
    assert not within("a", math.inf, 700, "MB").passed


def test_works_take_turns_and_the_median_counts() -> None:
    order: list[str] = []
    seconds = {"ours": iter([9.0, 1.0, 2.0, 3.0, 100.0]), "peer": iter([21.0])}

    def work(name: str) -> Cost:
        order.append(name)
        return Cost(next(seconds[name]), peak_mb=5.0 if name == "peer" else None)

    costs = rounds({name: lambda name=name: work(name) for name in seconds}, patience=20.0)  # type: ignore[misc]
    assert order == ["ours", "peer", "ours", "ours", "ours", "ours"]  # a slow peer runs once
    assert (costs["ours"].seconds, costs["ours"].runs, costs["ours"].peak_mb) == (3.0, 5, None)
    assert (costs["peer"].seconds, costs["peer"].runs, costs["peer"].peak_mb) == (21.0, 1, 5.0)


def test_fsync_is_timed_apart_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.05))
    slow = os.fsync

    def work() -> None:
        os.fsync(0)
        os.fsync(0)

    cost = timed(work)
    assert cost.fsync >= 0.1
    assert cost.seconds < 0.05
    assert os.fsync is slow
    with pytest.raises(ZeroDivisionError), fsync_seconds():
        raise ZeroDivisionError
    assert os.fsync is slow


def test_a_workplace_needs_room_and_leaves_nothing() -> None:
    with workplace(1000) as folder:
        (folder / "file").write_text("x")
    assert not folder.exists()
    with pytest.raises(InputError, match=r"this needs 1000000000.0 GB"), workplace(10**18):
        raise AssertionError


ROWS = [
    faster("cut", 0.0071, 83.0, 1000, note="PEFT ran once"),
    within("memory", 712.0, 700, "MB", peer=2810.0),
    Row("odd", 1e-14, None, "", 1e-14, "at most", 1e-5, of=""),
]
GROWN = [Growth("Cost", "vectors", [1, 64], {"exact": [0.001, 0.06], "cut": [None, 2.5]})]


def test_a_row_reads_as_a_sentence() -> None:
    assert report.cells(ROWS[0]) == ["cut", "7.1 ms", "83 s", "11,690x", ">= 1,000x", "pass"]
    assert report.cells(ROWS[1]) == ["memory", "712 MB", "2,810 MB", "712 MB", "<= 700 MB", "miss"]
    assert report.cells(ROWS[2])[1:] == ["1e-14", "-", "1e-14", "<= 1e-05", "pass"]
    assert report.cells(ROWS[1], judged=False)[-1] == "-"


def test_files_hold_everything(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = report.write(tmp_path / "r.json", "prefvec bench x", ROWS, GROWN, machine(), quick=False)
    assert [file.name for file in files] == ["r.json", "r.md", "r.png"]
    found = json.loads(files[0].read_text())
    assert [row["passed"] for row in found["rows"]] == [True, False, True]
    assert found["growth"][0]["lines"]["cut"] == [None, 2.5]
    assert found["machine"]["threads"] >= 1
    text = files[1].read_text()
    for said in ("| cut | 7.1 ms | 83 s |", "- cut: PEFT ran once", "| 1 | 0.001 | - |", "| 64 | 0.06 | 2.5 |"):
        assert said in text
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert len(report.write(tmp_path / "r.json", "again", ROWS, [], machine(), quick=True)) == 2
