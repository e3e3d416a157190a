"""Four kills of the fifty that `kills.py` makes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.bench.kills import Case, Tally, begin, look, prepare, torture
from tests.forks import Warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def cases(warm: Warm, folder: Path) -> dict[str, Case]:
    return {case.name: case for case in prepare(warm, folder)}


@pytest.mark.parametrize("name", ["train-two", "extract", "compose over an artifact", "fold"])
def test_what_is_killed_goes_on(name: str, cases: dict[str, Case], warm: Warm, folder: Path) -> None:
    tally = Tally()
    draw = random.Random(3)
    while not tally.kills:
        torture(warm, cases[name], folder / "round", draw, tally, most=1)
    assert tally.faults == []


def test_a_half_written_artifact_would_be_noticed(cases: dict[str, Case], warm: Warm, folder: Path) -> None:
    """The bench itself: a folder that reads well and is not whole is a fault."""
    case, tally = cases["extract over an artifact"], Tally()
    place = begin(case, folder / "round")
    look(warm, case, place, tally)
    assert (tally.reads_accepted, tally.faults) == (1, [])
    (place / "out" / "README.md").unlink()
    look(warm, case, place, tally)
    assert tally.faults == ["inspect accepts out, which is not whole"]
    (place / "out" / "adapter_model.safetensors").write_bytes(b"half")
    look(warm, case, place, tally)
    assert tally.reads_refused == 1
