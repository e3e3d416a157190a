"""Every shipped recipe: it can be read, its header tells the truth, and its data are about its preference."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from lora_prefvec.artifact import shipped
from lora_prefvec.cli.train import find_recipe
from lora_prefvec.data.forms import ATTRIBUTES, FORMS
from lora_prefvec.data.rated import HELPSTEER, ULTRAFEEDBACK
from lora_prefvec.recipe import CpoSpec, DataSpec, DpaSpec, Recipe, Section, read_recipe

RECIPES = sorted(shipped("recipes").glob("*.yaml"), key=lambda file: file.stem)
MADE_FROM_PUBLISHED_DATA = [file for file in RECIPES if file.stem != "template"]
COMMAND = re.compile(
    r"# prefvec train (?P<name>\S+) --out (?P<out>\S+)(?P<overrides>( --set \S+)*)"
    r"(?P<weights> --weights \d+)?(   \(.+\))?"
)


def header(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def named(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


@pytest.fixture(autouse=True)
def own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which the file that the template names is there."""
    (tmp_path / "my-pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)


def test_the_recipes_that_were_promised_are_there() -> None:
    bases = ("llama-3.2-3b", "llama-3.1-8b", "qwen3-4b", "mistral-7b")
    promised = {f"{base}-{preference}" for base in bases for preference in ("helpful", "harmless")}
    promised |= {f"sandbox-{preference}" for preference in ("helpful", "harmless", "honest", "concise")}
    promised |= {"llama-3.2-3b-hh-helpful", "llama-3.2-3b-hh-harmless", "llama-3.2-3b-honest"}
    promised |= {"sandbox-cpo", "sandbox-dpa", "llama-3.2-3b-cpo", "llama-3.2-3b-dpa", "template"}
    assert promised <= {file.stem for file in RECIPES}


@named(RECIPES)
def test_header_gives_commands_that_run_this_file(file: Path) -> None:
    commands = [COMMAND.fullmatch(line) for line in header(file) if line.startswith("# prefvec train")]
    assert len(commands) >= 2, "a command and one with an override"
    for command in commands:
        assert command is not None
        assert command["name"] == ("template.yaml" if file.stem == "template" else file.stem)
        if file.stem != "template":
            assert find_recipe(command["name"]) == file
        overrides = re.findall(r"--set (\S+)", command["overrides"])
        changed = read_recipe(file, overrides)
        if command["weights"]:
            continue
        assert command["out"] == changed.preference
        assert bool(overrides) == (changed != read_recipe(file)), "an override changes something"


@named(RECIPES)
def test_header_says_what_memory_it_takes_and_what_was_measured(file: Path) -> None:
    text = "\n".join(header(file))
    assert re.search(r"^# Memory: ", text, re.MULTILINE)
    assert re.search(r"computed|[0-9] GB", text)
    assert re.search(r"not measured|Measured: \S+", text)


@named([file for file in MADE_FROM_PUBLISHED_DATA if read_recipe(file).method.name == "preference_vector"])
def test_source_and_form_are_about_the_preference(file: Path) -> None:
    recipe = read_recipe(file)
    assert file.stem.endswith(f"-{recipe.preference}")
    assert is_about(recipe.data, recipe.preference)
    if isinstance(recipe.held_out, DataSpec):
        assert is_about(recipe.held_out, recipe.preference)
        assert recipe.held_out.split != recipe.data.split
    if recipe.anchors:
        assert recipe.anchors.source != recipe.data.source


@pytest.mark.parametrize("name", ["llama-3.2-3b-cpo", "llama-3.2-3b-dpa"])
def test_published_replies_are_rated_on_the_axes_asked_for(name: str) -> None:
    recipe = read_recipe(find_recipe(name))
    assert isinstance(recipe.method, CpoSpec | DpaSpec)
    asked = recipe.method.objectives if isinstance(recipe.method, CpoSpec) else recipe.method.axes
    published = {
        "helpsteer2": ("nvidia/HelpSteer2", HELPSTEER),
        "ultrafeedback": ("openbmb/UltraFeedback", ULTRAFEEDBACK),
    }
    source, rated = published[str(recipe.data.form)]
    assert recipe.data.source == source
    assert set(asked) <= set(rated)


def is_about(data: DataSpec, preference: str) -> bool:
    """Whether a data section asks for pairs of this preference."""
    source, _, part = data.source.partition(":")
    if source == "sandbox":
        return part in (preference, "rated", "rated-4", "rated-16")  # rated replies are about all axes
    form, _, attribute = (data.form or "").partition(":")
    assert form in FORMS
    if form == "hh-rlhf":
        return data.source == f"Anthropic/hh-rlhf/{preference}-base"
    published = {"pku-saferlhf": "PKU-Alignment/PKU-SafeRLHF", "ultrafeedback": "openbmb/UltraFeedback"}
    assert data.source == published[form]
    assert attribute in ATTRIBUTES[form]
    return attribute == {"honest": "honesty"}.get(preference, preference)


@named([file for file in RECIPES if not file.stem.startswith("sandbox")])
def test_learning_rate_is_explained(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("learning_rate:"))
    assert lines[at - 1].strip().startswith("#")


def test_template_explains_every_key_in_a_comment() -> None:
    lines = (shipped("recipes") / "template.yaml").read_text(encoding="utf-8").splitlines()
    content = read_recipe(shipped("recipes") / "template.yaml")
    keys = {name for section in (content, *sections(content)) for name in type(section).model_fields}
    explained = {
        line.strip().partition(":")[0]
        for before, line in pairwise(lines)
        if before.strip().startswith("#") and not line.strip().startswith("#")
    }
    assert keys - set(Recipe.model_fields) <= explained
    assert {"preference", "held_out", "anchors"} <= explained


def sections(recipe: Recipe) -> list[Section]:
    """The sections of a recipe, without anchors, which repeat the keys of data."""
    return [recipe.base, recipe.data, recipe.lora, recipe.training]
