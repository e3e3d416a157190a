"""The shipped comparisons: every recipe that they name is there and takes their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_prefvec.artifact import shipped
from lora_prefvec.cli.compare import find_comparison
from lora_prefvec.cli.train import find_recipe
from lora_prefvec.errors import InputError
from lora_prefvec.experiments import read_comparison
from lora_prefvec.experiments.artifacts import check_bases, recipes_of

FILES = sorted((shipped("recipes") / "compare").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_recipes_are_there_and_of_its_base(file: Path) -> None:
    comparison = read_comparison(file)
    assert file.read_text(encoding="utf-8").startswith(f"# prefvec compare compare/{file.stem} --out ")
    for spec in comparison.methods.values():
        check_bases(comparison, recipes_of(spec, 0, find_recipe))


def test_a_comparison_that_is_not_there() -> None:
    assert find_comparison("compare/helpful-harmless") in FILES
    with pytest.raises(InputError, match=r"no comparison 'compare/helpful-harmles'.*'compare/helpful-harmless'"):
        find_comparison("compare/helpful-harmles")
