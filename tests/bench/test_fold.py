"""`bench fold` on a tiny model: the rows, both folds in processes of their own, and that they fold alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_prefvec.artifact import Provenance, write_adapter
from lora_prefvec.bench import fold
from lora_prefvec.bench.measure import Cost
from lora_prefvec.bench.one_fold import COEFFICIENTS
from lora_prefvec.bench.shapes import QUICK, TINY_LLAMA, random_vector, write_base
from lora_prefvec.errors import RunError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("model") / "base", QUICK, shard=200_000)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("vectors") / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write_adapter(folder, random_vector(QUICK, 4, seed), Provenance(kind="preference_vector", preference="x"))
    return folders


@pytest.mark.parametrize("who", ["ours", "peft"])
def test_a_fold_of_its_own_process_folds(who: str, base: Path, vectors: list[Path], tmp_path: Path) -> None:
    cost = fold.process(who, base, tmp_path / "out", vectors)
    assert cost.whole is not None
    assert 0 < cost.seconds < cost.whole
    assert cost.peak_mb is not None
    assert 50 < cost.peak_mb < 5000
    before, after = fold.weights(base, fold.MODULE), fold.weights(tmp_path / "out", fold.MODULE)
    deltas = [random_vector(QUICK, 4, seed).deltas[fold.MODULE.removesuffix(".weight")] for seed in (0, 1)]
    expected = sum(c * delta.dense() for c, delta in zip(COEFFICIENTS, deltas, strict=True)) + before
    torch.testing.assert_close(after, expected, rtol=1e-2, atol=2e-3)
    assert not torch.equal(after, before)


def test_a_fold_that_fails_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the fold by ours failed: .*nowhere"):
        fold.process("ours", base, tmp_path / "out", [tmp_path / "nowhere", tmp_path / "nowhere"])


def test_the_rows_hold_our_fold_against_both(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {
        "ours": Cost(2.0, 1.0, peak_mb=650.0, whole=4.0),
        "copy": Cost(1.6, 0.9),
        "peft": Cost(4.0, peak_mb=2800.0, whole=9.0),
    }
    monkeypatch.setattr(fold, "measure", lambda shape, repeats=5: (costs, 1e-3))
    rows = fold.run()
    assert [(round(row.figure, 3), row.bar, row.passed) for row in rows] == [
        (1.25, 1.3, True),
        (0.5, 0.4, False),
        (650.0, 700, True),
    ]
    assert "1.1B" in rows[0].work
    grown = fold.growth(quick=True)
    assert list(grown[1].lines) == ["prefvec fold", "PEFT merge and save"]


def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    costs, apart = fold.measure(QUICK, repeats=1)
    assert set(costs) == {"ours", "copy", "peft"}
    assert all(cost.seconds > 0 for cost in costs.values())
    assert apart < 1e-2


def test_the_model_is_tinyllama_in_shards(base: Path) -> None:
    assert TINY_LLAMA.parameters == 1_100_048_384
    shards = list(base.glob("*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 250_000
