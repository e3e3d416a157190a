"""A tiny model with random vectors, and command lines that talk to it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_prefvec.cli.main import main
from tests.evaluation.stand_in_judge import StandInJudge, serve

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base `tiny` and two vectors of it in `adapters`."""
    from lora_prefvec.artifact import Provenance, identity_of, write_adapter
    from lora_prefvec.inference import load_base
    from tests.helpers import random_vector

    place = tmp_path_factory.mktemp("place")
    (place / "tiny").symlink_to(tiny_llama)
    model = load_base(tiny_llama, quantization="none").model
    for seed, name in enumerate(["helpful", "harmless"]):
        identity = identity_of(place / "tiny", "tiny", "none")
        vector = replace(random_vector(model, rank=2, seed=seed), identity=replace(identity, id="tiny"))
        facts = Provenance(kind="preference_vector", preference=name, sign=1, base=vector.identity)
        write_adapter(place / "adapters" / name, vector, facts, base=tiny_llama)
    return place


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInJudge]:
    """A judge that finds everything middling, and an empty cache of answers."""
    monkeypatch.setenv("PREFVEC_CACHE", str(tmp_path / "cache"))
    with serve(StandInJudge(lambda _: "helpfulness: 5\nharmlessness: 5")) as running:
        yield running


@pytest.fixture(scope="module")
def other(place: Path, tiny_llama: Path) -> Path:
    """The same base with another chat template."""
    other = place / "other"
    other.mkdir()
    for file in tiny_llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|user|>", "<|system|>") + " ", encoding="utf-8")
    return other


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in `place`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("lora_prefvec.cli.main.quiet_libraries", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main(arguments)
        return code, *capsys.readouterr()

    return run
