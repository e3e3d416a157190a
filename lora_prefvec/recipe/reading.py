"""YAML in: a recipe file with its overrides, and errors that name the line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.recipe.methods import (
    METHODS,
    AxisSpec,
    CpoSpec,
    ObjectiveSpec,
    PreferenceVectorSpec,
    RewardSpec,
    SafetySpec,
    WeightedSpec,
)
from lora_prefvec.recipe.recipe import Recipe
from lora_prefvec.recipe.sections import AnchorSpec, BaseSpec, DataSpec, LoraSpec, TrainingSpec

DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".gz"}


def read_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `training.beta=0.2`.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown, a value has the wrong type or range; the message
            names the line, or the override.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the recipe {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {file} is not UTF-8 text") from error
    return parse_recipe(text, str(file), overrides)


def parse_recipe(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`, from text; `name` stands in the error messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2026-13-01 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise InputError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or 'syntax error'})") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} is not a recipe: a mapping with preference, base and data is expected")
    lines = key_lines(node, name)
    changed = {tuple(override(content, text)) for text in overrides}
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, content, name, lines, changed)) from error
    check_files(recipe, name, lines, changed)
    return recipe


def override(content: dict[str, Any], assignment: str) -> list[str]:
    """Apply `a.b=value` to a nested mapping in place and return the path; the value is read as YAML."""
    path, equals, value = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {assignment!r} is no assignment", "Write it as --set training.beta=0.2")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {assignment!r}: the value is not valid YAML") from error
    section = content
    for key in keys[:-1]:
        below = section.setdefault(key, {})
        if not isinstance(below, dict):
            raise InputError(f"--set {assignment!r}: {key!r} is a value, not a section")
        section = below
    section[keys[-1]] = parsed
    return keys


def key_lines(node: yaml.Node | None, name: str, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line (from 1) of every key of a YAML document, by its path; a key given twice is an error."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise InputError(f"{name}, line {key.start_mark.line + 1}: {'.'.join(here)!r} is given twice")
            lines[here] = key.start_mark.line + 1
            lines.update(key_lines(value, name, here))
    return lines


def check_files(recipe: Recipe, name: str, lines: Mapping[tuple[str, ...], int], changed: set[tuple[str, ...]]) -> None:
    """Raises InputError where the base or a data source is written as a local path and nothing lies there."""
    named: dict[tuple[str, ...], str] = {("base", "id"): recipe.base.id}
    sections: dict[tuple[str, ...], object] = {
        ("data",): recipe.data,
        ("held_out",): recipe.held_out,
        ("anchors",): recipe.anchors,
    }
    if isinstance(recipe.method, WeightedSpec):
        for name, one in recipe.method.objectives.items():
            sections["method", "objectives", name, "data"] = one.data
            sections["method", "objectives", name, "anchors"] = one.anchors
    for section, spec in sections.items():
        if isinstance(spec, DataSpec):
            named[*section, "source"] = spec.source
    for path, given in named.items():
        file = Path(given).expanduser()
        is_path = given.startswith(("/", "./", "../", "~")) or file.suffix in DATA_SUFFIXES
        if is_path and not file.exists():
            beside = [entry.name for entry in file.parent.glob("[!.]*")] if file.parent.is_dir() else []
            hint = nearest(file.name, beside) if beside else f"There is no folder {file.parent}."
            raise InputError(f"{place(path, name, lines, changed)}: {'.'.join(path)} = {given!r} does not exist", hint)


def place(path: tuple[str, ...], name: str, lines: Mapping[tuple[str, ...], int], changed: set[tuple[str, ...]]) -> str:
    """Where a key was given: `recipe.yaml, line 3`, or the `--set` that changed it."""
    if not path:
        return name
    is_new = path not in lines and any(given[: len(path)] == path for given in changed)
    if is_new or any(path[:n] in changed for n in range(1, len(path) + 1)):
        return f"--set {'.'.join(path)}"
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return name if line is None else f"{name}, line {line}"


def explain(
    error: ValidationError,
    content: Mapping[str, Any],
    name: str,
    lines: Mapping[tuple[str, ...], int],
    changed: set[tuple[str, ...]],
) -> str:
    """One line for the first thing wrong: where it stands, what was given, what would be right."""
    faults = error.errors()
    if isinstance(content.get("held_out"), Mapping):  # a number or a data set; a mapping means the data set
        faults = [fault for fault in faults if fault["loc"] != ("held_out", "int")]
    fault = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")  # a typo explains a missing key
    path: tuple[str, ...] = ()
    inside: Any = content
    for part in fault["loc"]:
        is_last = part == fault["loc"][-1]  # a union puts the names of its members into the path; those are no keys
        if isinstance(inside, Mapping) and (part in inside or (is_last and isinstance(part, str))):
            path = (*path, str(part))
            inside = inside.get(part)
    known = partial(known_keys, content=content)
    where = place(path, name, lines, changed)
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}. {nearest(path[-1], known(path[:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: the key {key!r} is missing"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = content["method"].get("name")
        what = "the method has no name" if given is None else f"there is no method {given!r}"
        return f"{where}: {what}. {nearest(str(given), METHODS)}"
    if fault["type"] in ("model_type", "dict_type", "model_attributes_type"):
        keys = ", ".join(known(path)[:3])
        return f"{where}: {key} = {fault['input']!r}: should be a mapping with keys such as {keys}"
    if not path or fault["type"] == "value_error":
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}: {key} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def known_keys(path: Sequence[str], content: Mapping[str, Any]) -> list[str]:
    """The keys that a recipe section knows."""
    given = content.get("method")
    method = METHODS.get(str(given.get("name")) if isinstance(given, Mapping) else "", PreferenceVectorSpec)
    if len(path) > 2 and path[:2] == ("method", "objectives"):
        objective = AxisSpec if method is CpoSpec else ObjectiveSpec
        return list((DataSpec if path[-1] == "data" else objective).model_fields)
    if tuple(path) == ("method",):
        return list(method.model_fields)
    sections: dict[tuple[str, ...], type[BaseModel]] = {
        (): Recipe,
        ("base",): BaseSpec,
        ("data",): DataSpec,
        ("held_out",): DataSpec,
        ("anchors",): AnchorSpec,
        ("method", "safety"): SafetySpec,
        ("method", "reward"): RewardSpec,
        ("lora",): LoraSpec,
        ("training",): TrainingSpec,
    }
    section = sections.get(tuple(path))
    return list(section.model_fields) if section else []
