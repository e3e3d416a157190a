"""`fold` as a user types it, and when it is killed."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from lora_prefvec.artifact import Provenance, TrainingFacts, identity_of, write_adapter
from lora_prefvec.cli.fold import fold
from lora_prefvec.errors import InputError
from lora_prefvec.output import out
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector
from tests.artifact.factors import small_vector
from tests.artifact.models import load
from tests.forks import Warm
from tests.helpers import random_vector


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder for adapters named by their place in it."""
    monkeypatch.setattr(out, "format", "human")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vector(tiny_llama: Path, place: Path) -> PreferenceVector:
    """The adapter `helpful` of the tiny Llama, trained in 4 bits."""
    identity = identity_of(tiny_llama, quantization="nf4")
    found = replace(random_vector(load(tiny_llama), rank=2, seed=0), identity=identity)
    facts = TrainingFacts(compute_dtype="float32")
    write_adapter("helpful", found, Provenance(kind="preference_vector", base=identity, training=facts))
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(fold, [str(argument) for argument in arguments], catch_exceptions=False)


def refused(*arguments: object) -> str:
    """The error of a fold that leaves the folder as it was."""
    before = sorted(os.listdir())
    with pytest.raises(InputError) as raised:
        run(*arguments)
    assert sorted(os.listdir()) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_fold_makes_a_model(tiny_llama: Path, vector: PreferenceVector, place: Path) -> None:
    assert "would write f" in run(tiny_llama, "helpful=0.5", "--out", "f", "--dry-run").stdout
    assert not (place / "f").exists()
    result = run(tiny_llama, "helpful=0.5", "helpful=1", "--out", "f")
    assert re.match(r"wrote f: tiny-llama0 \+0\.5 helpful \+1 helpful, 14 matrices changed, 430\.3 kB", result.stdout)
    assert "100.0% of the delta kept" in result.stdout
    name = "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(
        load(place / "f").get_submodule(name).weight - load(tiny_llama).get_submodule(name).weight,
        vector.deltas[name].dense() * 1.5,
        rtol=1e-3,
        atol=1e-5,
    )
    facts = json.loads((place / "f" / "prefvec.json").read_text())
    assert (facts["kind"], facts["base"]["id"], len(facts["parents"])) == ("fold", "tiny-llama0", 2)
    assert facts["fold"]["modules"].keys() == vector.deltas.keys()
    assert "exists" in refused(tiny_llama, "helpful", "--out", "f")


def test_a_fold_of_another_base_is_refused(tiny_llama: Path, place: Path) -> None:
    other = BaseIdentity("owner/base", None, "1" * 64, "2" * 64, "3" * 64)
    write_adapter("other", replace(small_vector(2, 0), identity=other), Provenance(kind="mix", base=other))
    assert "belongs to" in refused(tiny_llama, "other", "--out", "g")
    assert "in the base and" in refused(tiny_llama, "other", "--out", "g", "--allow-mismatch")


def test_what_was_lost_is_said(tiny_llama: Path, vector: PreferenceVector) -> None:
    result = run(tiny_llama, "helpful=1e-4", "--out", "f", "--dtype", "bfloat16")
    assert re.search(r"warning: rounding took \d+% of the delta", result.stderr)
    assert re.search(r"module +delta kept +base distance", result.stdout)
    assert "the 8 that lost most; 6 more in prefvec.json" in result.stdout
    out.format = "json"
    found = json.loads(run(tiny_llama, "helpful=1", "--out", "g").stdout)
    assert found["delta_kept"] == found["kept"] > 0.999
    assert len(found["modules"]) == 14


def test_the_base_is_chosen_in_the_open(tiny_llama: Path, vector: PreferenceVector, place: Path) -> None:
    result = run(tiny_llama, "helpful", "--out", "original")
    said = re.search(r"the 4-bit base of training is (\S+) times the delta away from the original", result.stderr)
    assert said
    result = run(tiny_llama, "helpful", "--out", "seen", "--onto", "nf4")
    assert "folded onto what training saw" in result.stderr
    facts = [json.loads((place / name / "prefvec.json").read_text())["fold"] for name in ("original", "seen")]
    assert [one["onto"] for one in facts] == ["original", "nf4"]
    assert float(said[1]) == pytest.approx(facts[1]["distance"], rel=0.05)


def test_4_bits_that_lose_the_mix_must_be_accepted(tiny_llama: Path, vector: PreferenceVector, place: Path) -> None:
    assert "of the delta" in refused(tiny_llama, "helpful=0.01", "--out", "q", "--to", "nf4")
    result = run(tiny_llama, "helpful=0.01", "--out", "q", "--to", "nf4", "--accept-loss")
    assert re.search(r"\d+\.\d% of the delta kept by 4 bits", result.stdout)
    assert load(place / "q").is_loaded_in_4bit
    assert "of the delta kept" in run(tiny_llama, "helpful=100", "--out", "big", "--to", "nf4").stdout


def test_an_untied_head_is_said(tiny_gemma3: Path, place: Path) -> None:
    rows, columns = load(tiny_gemma3).lm_head.weight.shape
    identity = identity_of(tiny_gemma3)
    vector = PreferenceVector({"lm_head": LowRankDelta(torch.ones(1, columns), torch.ones(rows, 1))}, identity)
    write_adapter("head", vector, Provenance(kind="mix", base=identity), base=tiny_gemma3)
    assert "they are two now" in run(tiny_gemma3, "head", "--out", "f").stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_any_touch_it_leaves_nothing_that_loads(
    tiny_llama: Path, vector: PreferenceVector, place: Path, warm: Warm
) -> None:
    """SIGKILL just before a touch of a file, of every so many: what has a config.json is whole."""
    line = ["fold", tiny_llama, f"{place / 'helpful'}=1", "--out"]
    (place / "whole").mkdir()
    ended = warm.run(*line, place / "whole" / "f", watched=place / "whole")
    assert ended.code == 0, ended.err
    whole = contents(place / "whole" / "f")
    assert ended.touches is not None
    for kill_at in range(1, ended.touches + 1, max(1, ended.touches // 12)):
        work = place / str(kill_at)
        work.mkdir()
        assert warm.run(*line, work / "f", watched=work, kill_at=kill_at).code < 0
        for config in work.rglob("config.json"):
            assert contents(config.parent) == whole
        assert warm.run(*line, work / "f", "--force").code == 0
        assert [path.name for path in work.iterdir()] == ["f"]
        assert contents(work / "f") == whole
