"""A recipe in, a recipe out; and for everything that is wrong one line that says where and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_prefvec.errors import InputError
from lora_prefvec.recipe import AnchorSpec, DataSpec, Recipe, parse_recipe, read_recipe

GOOD = """\
# prefvec train gentle.yaml --out gentle
preference: gentle
base:
  id: owner/base
data:
  source: owner/pairs
  rows: 100
anchors:
  source: owner/others
  share: 0.25
training:
  beta: 0.2
  learning_rate: 1e-4
"""


def wrong(text: str, *overrides: str) -> str:
    """The one line that a wrong recipe gets."""
    with pytest.raises(InputError) as refusal:
        parse_recipe(text, "gentle.yaml", overrides)
    message = str(refusal.value)
    assert "\n" not in message
    assert refusal.value.exit_code == 2
    return message


def test_a_recipe_is_read_and_its_defaults_filled_in(tmp_path: Path) -> None:
    (tmp_path / "gentle.yaml").write_text(GOOD)
    recipe = read_recipe(tmp_path / "gentle.yaml")
    assert recipe.preference == "gentle"
    assert (recipe.base.id, recipe.base.quantization) == ("owner/base", "nf4")
    assert recipe.training.learning_rate == 1e-4  # YAML 1.1 takes 1e-4 for a text
    assert recipe.anchors == AnchorSpec(source="owner/others", share=0.25)
    assert recipe.held_out == 200
    assert recipe.lora.targets == "all-linear"


@pytest.mark.parametrize(
    "extra", ["", "held_out: 7\n", "held_out:\n  source: owner/held\n  split: test\n", "lora:\n  targets: [q_proj]\n"]
)
def test_yaml_and_back(extra: str) -> None:
    recipe = parse_recipe(GOOD + extra)
    text = recipe.to_yaml()
    assert parse_recipe(text) == recipe
    assert parse_recipe(text).to_yaml() == text
    assert "quantization: nf4" in text  # defaults are spelled out


def test_overrides_are_read_as_yaml() -> None:
    recipe = parse_recipe(
        GOOD,
        overrides=[
            "training.beta=0.5",
            "lora.targets=[q_proj, v_proj]",
            "held_out={source: owner/held}",
            "anchors=null",
            "training.evaluate_every=10",
            "data.source=owner/other=1",
        ],
    )
    assert recipe.training.beta == 0.5
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert recipe.held_out == DataSpec(source="owner/held")
    assert recipe.anchors is None
    assert recipe.training.evaluate_every == 10
    assert recipe.data.source == "owner/other=1"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # unknown keys
        ("beta: 0.2", "betta: 0.2", ["line 12", "unknown key 'training.betta'", "Did you mean 'beta'?"]),
        ("anchors:", "anchor:", ["line 8", "unknown key 'anchor'", "Did you mean 'anchors'?"]),
        ("  rows: 100", "  zzzz: 100", ["line 7", "unknown key 'data.zzzz'", "Known: attribute, columns, form"]),
        ("preference: gentle", "preference: gentle\n7: x", ["line 3", "keys should be strings"]),
        ("preference: gentle", "Preference: gentle", ["line 2", "unknown key 'Preference'", "'preference'"]),
        # wrong types
        ("rows: 100", "rows: many", ["line 7", "data.rows = 'many'", "valid integer"]),
        ("rows: 100", "rows: 1.5", ["line 7", "data.rows = 1.5", "valid integer"]),
        ("preference: gentle", "preference: [a]", ["line 2", "preference = ['a']", "valid string"]),
        ("preference: gentle", "preference: Very Gentle", ["line 2", "preference = 'Very Gentle'", "match pattern"]),
        ("preference: gentle", "preference: no", ["line 2", "preference = False", "valid string"]),
        ("  id: owner/base", "  - owner/base", ["line 3", "base = ['owner/base']", "mapping with keys such as id"]),
        ("base:\n  id: owner/base", "base: owner/base", ["line 3", "base = 'owner/base'", "a mapping"]),
        # wrong values
        ("share: 0.25", "share: 1.0", ["line 10", "anchors.share = 1.0", "less than 1"]),
        ("beta: 0.2", "beta: 0", ["line 12", "training.beta = 0", "greater than 0"]),
        ("beta: 0.2", "epochs: .inf", ["line 12", "training.epochs = inf", "finite number"]),
        ("beta: 0.2", "beta: .nan", ["line 12", "training.beta = nan"]),
        ("beta: 0.2", "sides: both", ["line 12", "training.sides = 'both'", "'two' or 'pair'"]),
        ("beta: 0.2", "batch_size: 3", ["line 11", "micro_batch_size 2 does not divide batch_size 3"]),
        ("beta: 0.2", "reach: 0.5", ["line 12", "training.reach = 0.5"]),
        ("anchors:", "lora: {targets: []}\nanchors:", ["line 8", "lora.targets = []"]),
        ("anchors:", "held_out: {split: test}\nanchors:", ["line 8", "the key 'held_out.source' is missing"]),
        ("anchors:", "held_out: {source: x, rows: none}\nanchors:", ["line 8", "held_out.rows = 'none'"]),
        ("anchors:", "held_out: some\nanchors:", ["line 8", "held_out = 'some'", "valid integer"]),
        # missing keys
        ("preference: gentle\n", "", ["gentle.yaml: the key 'preference' is missing"]),
        ("  id: owner/base", "  revision: main", ["line 3", "the key 'base.id' is missing"]),
        # given twice
        ("  rows: 100", "  rows: 100\n  rows: 200", ["line 8", "'data.rows' is given twice"]),
        ("anchors:", "base: {id: x}\nanchors:", ["line 8", "'base' is given twice"]),
        # files that are not there
        ("owner/pairs", "./no/pairs.jsonl", ["line 6", "data.source = './no/pairs.jsonl' does not exist"]),
        ("owner/base", "/no/such/base", ["line 4", "base.id = '/no/such/base' does not exist"]),
        ("owner/others", "others.csv", ["line 9", "anchors.source = 'others.csv' does not exist"]),
        # no YAML
        ("base:", "base: [", ["line 5", "not valid YAML"]),
        ("base:", "base:\n\tid: x", ["line 4", "not valid YAML"]),
        ("preference: gentle", "preference: 2026-13-45", ["gentle.yaml", "not valid YAML"]),
        ("preference: gentle", "preference: !!python/name:os.system", ["line 2", "not valid YAML"]),
        ("preference: gentle", "preference: \x00", ["gentle.yaml", "not valid YAML"]),
        ("# prefvec", "---\n--- #", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_said_with_its_line(old: str, new: str, expected: list[str]) -> None:
    assert GOOD.count(old) >= 1
    message = wrong(GOOD.replace(old, new, 1))
    for part in expected:
        assert part in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just a text", "# only a comment"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    assert "gentle.yaml is not a recipe" in wrong(text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.beta=abc", ["--set training.beta", "training.beta = 'abc'", "valid number"]),
        ("training.betta=1", ["--set training.betta", "unknown key", "Did you mean 'beta'?"]),
        ("trainig.beta=1", ["--set trainig", "unknown key 'trainig'", "Did you mean 'training'?"]),
        ("training={beta: abc}", ["--set training.beta", "training.beta = 'abc'"]),
        ("training=5", ["--set training", "training = 5", "a mapping"]),
        ("data.source=no/such.jsonl", ["--set data.source", "does not exist"]),
        ("base.id.x=5", ["--set 'base.id.x=5'", "'id' is a value, not a section"]),
        ("training.beta", ["--set 'training.beta' is no assignment", "Write it as --set training.beta=0.2"]),
        ("=5", ["is no assignment"]),
        ("a..b=5", ["is no assignment"]),
        ("data.rows=[", ["--set 'data.rows=['", "not valid YAML"]),
        ("data.rows=2026-13-45", ["not valid YAML"]),
        ("base.id=", ["--set base.id", "base.id = None", "valid string"]),
    ],
)
def test_a_wrong_override_is_named(override: str, expected: list[str]) -> None:
    message = wrong(GOOD, override)
    for part in expected:
        assert part in message
    assert "line" not in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.yaml cannot be read: No such file"):
        read_recipe(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("preference: süß".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_recipe(tmp_path / "latin.yaml")


def test_a_missing_file_has_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert "Did you mean 'pairs.jsonl'?" in wrong(GOOD.replace("owner/pairs", f"{tmp_path}/pars.jsonl"))


def test_every_shipped_recipe_is_sound() -> None:
    from lora_prefvec.artifact import shipped

    files = sorted(shipped("recipes").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        own_data = ["data.source=owner/pairs"] if file.stem == "template" else []
        assert isinstance(read_recipe(file, own_data), Recipe), file
        assert file.read_text().startswith(f"# prefvec train {file.stem}"), file
