"""`bench compose` on tiny shapes: the rows, and that peers do the work that is said to be theirs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.bench import compose
from lora_prefvec.bench.shapes import LLAMA_8B, QUICK


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the peers are called with."""
    from peft.tuners.lora import LoraModel

    seen: list[Any] = []
    svd, copyfile = LoraModel.add_weighted_adapter, shutil.copyfile

    def spy(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((options["combination_type"], options["svd_rank"], len(arguments[0])))
        return svd(self, *arguments, **options)

    def copy(source: Any, target: Any, **options: Any) -> Any:
        seen.append(("copy", os.path.getsize(source)))
        return copyfile(source, target, **options)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", spy)
    monkeypatch.setattr(shutil, "copyfile", copy)
    return seen


def test_truncation_beside_peft(calls: list[Any]) -> None:
    speed, error = compose.truncation(96)
    assert calls == [("svd", 16, 4)] * 5
    assert speed.peer is not None
    assert speed.figure == pytest.approx(speed.peer / speed.ours)
    assert (speed.sense, speed.bar) == ("at least", 1000)
    assert error.passed  # as close to the dense optimum as the issue asks, at any size
    assert error.peer is not None
    assert abs(error.peer) < 1e-5  # PEFT gets there too: both were given the same adapters


def test_an_exact_mix_beside_copying(calls: list[Any]) -> None:
    row = compose.exact(QUICK)
    copied = [size for name, size in calls if name == "copy"]
    assert len(copied) == 4 * 5
    factors = sum(2 * 16 * (out + in_) for out, in_ in QUICK.linear().values())
    assert factors < min(copied) < 1.2 * factors
    assert (row.sense, row.bar, row.unit) == ("at most", 2.5, "s")
    assert "fsync" in row.note


def test_run_gives_every_row_of_the_issue() -> None:
    rows = compose.run(quick=True)
    assert [(row.sense, row.bar) for row in rows] == [
        ("at least", 1000),
        ("at most", 1e-5),
        ("at most", 2.5),
        ("at most", 1.0),
    ]
    assert all(row.ours >= 0 for row in rows)
    grown = compose.growth(quick=True)
    for one in grown:
        assert all(len(line) == len(one.places) for line in one.lines.values())
        assert all(seconds and seconds > 0 for line in one.lines.values() for seconds in line)


def test_the_optimum_is_that_of_the_dense_matrix() -> None:
    dense = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(dense)
    assert compose.optimum(dense, 5) == pytest.approx(float(values[5:].norm()))


def test_shapes_are_those_of_the_models(tmp_path: Path) -> None:
    assert len(LLAMA_8B.linear()) == 224
    assert LLAMA_8B.parameters == 8_030_261_248
    assert sum(2 * 16 * (out + in_) for out, in_ in LLAMA_8B.linear().values()) == pytest.approx(84e6, rel=0.01)
