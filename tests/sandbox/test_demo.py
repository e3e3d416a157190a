"""The demo, on the shipped vectors and few prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_prefvec.artifact import adapter_names, read_adapter
from lora_prefvec.errors import InputError
from lora_prefvec.sandbox import demo
from lora_prefvec.sandbox.scorers import SCORERS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prefvec demo --quick` writes, with few prompts."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK_PROMPTS", 12)
        demo.run_demo(folder, quick=True)
    return folder


def test_writes_results_pictures_and_a_mix(made: Path) -> None:
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert len(results["points"]) == len(demo.COEFFICIENTS) ** 2 + len(demo.COEFFICIENTS) - 1
    assert set(results["points"][0]["scores"]) == set(SCORERS)
    assert results["first_two_untouched_by_third"]
    assert [len(sample["replies"]) for sample in results["samples"]] == [4, 4, 4]
    for picture in ("control.png", "front.png"):
        assert (made / picture).read_bytes().startswith(b"\x89PNG")
    mix = read_adapter(made / results["mix"])
    assert [parent.name for parent in mix.provenance.parents] == ["helpful", "harmless"]  # type: ignore[union-attr]


def test_does_not_replace_what_is_there(made: Path) -> None:
    before = (made / "results.json").read_bytes()
    with pytest.raises(InputError, match="--force"):
        demo.run_demo(made, quick=True)
    assert (made / "results.json").read_bytes() == before


def test_four_vectors_are_shipped_with_cards_and_read() -> None:
    from lora_prefvec.artifact import resolve_adapter

    for axis in ("helpful", "harmless", "honest", "concise"):
        assert f"sandbox-{axis}" in adapter_names()
        folder = resolve_adapter(f"sandbox-{axis}")
        adapter = read_adapter(folder)
        assert adapter.provenance is not None
        assert adapter.provenance.preference == axis
        assert adapter.provenance.kind == "preference_vector"
        assert (folder / "README.md").is_file()
        assert (folder / "recipe.yaml").is_file()
