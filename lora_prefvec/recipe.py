"""The recipe: the YAML file that makes an artifact, with errors that name the line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_prefvec.errors import InputError, nearest

DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".parquet", ".gz"}
PREFERENCE = r"^[a-z0-9]+(-[a-z0-9]+)*$"


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSpec(Section):
    """The frozen base: a folder, `sandbox` or a Hub id; `nf4` loads it in 4-bit."""

    id: str
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"


class DataSpec(Section):
    """Preference pairs: a local file, `name:part` of an installed source, or a Hub id with optional @revision."""

    source: str
    split: str = "train"
    form: str | None = None
    columns: dict[str, str] | None = None
    attribute: str | None = None
    margin: float = Field(default=0.0, ge=0)
    rows: int | None = Field(default=None, gt=0)


class AnchorSpec(DataSpec):
    """Pairs on other prompts that hold behaviour where the preference has no say.

    `share` is the part of all training pairs that are anchors. `swapped` lets them change sign with the preference;
    held fixed, they ask the same of +v and of -v.
    """

    share: float = Field(default=0.5, gt=0, lt=1)
    swapped: bool = False


class LoraSpec(Section):
    """The adapter: W + (alpha / rank) B A on `targets` (all linear layers but the head, or a list of module names)."""

    rank: int = Field(default=16, ge=1, le=512)
    alpha: int = Field(default=32, ge=1)
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class TrainingSpec(Section):
    """How the adapter is trained; `batch_size` pairs make one optimiser step, `micro_batch_size` one forward.

    A run trains its adapter at a coefficient of 1, and as often at `reach` where that is more: text then stays whole
    when the slider goes that far. d+ - d- is twice as long as either, so a pair needs twice the reach.
    """

    sides: Literal["two", "pair"] = "two"
    reach: float = Field(default=1.0, ge=1.0, le=8.0)
    beta: float = Field(default=0.1, gt=0)
    sft_weight: float = Field(default=0.0, ge=0)
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0)
    micro_batch_size: int = Field(default=2, gt=0)
    max_prompt_tokens: int = Field(default=512, gt=0)
    max_reply_tokens: int = Field(default=512, gt=0)
    gradient_checkpointing: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**31)
    evaluate_every: int | None = Field(default=None, gt=0)
    checkpoint_every: int = Field(default=50, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSpec:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


class Recipe(Section):
    """What makes one preference vector.

    `held_out` is either a number of pairs that are set apart from `data`, never sharing a prompt with it, or a data
    set of its own; preference accuracy is measured there.
    """

    preference: str = Field(pattern=PREFERENCE)
    base: BaseSpec
    data: DataSpec
    held_out: int | DataSpec = 200
    anchors: AnchorSpec | None = None
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults spelled out, so that it means the same to every version that reads it."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


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
    named = {("base", "id"): recipe.base.id, ("data", "source"): recipe.data.source}
    if isinstance(recipe.held_out, DataSpec):
        named["held_out", "source"] = recipe.held_out.source
    if recipe.anchors:
        named["anchors", "source"] = recipe.anchors.source
    for path, given in named.items():
        file = Path(given).expanduser()
        is_path = given.startswith(("/", "./", "../", "~")) or file.suffix in DATA_SUFFIXES
        if is_path and not file.exists():
            beside = [entry.name for entry in file.parent.glob("[!.]*")] if file.parent.is_dir() else []
            hint = nearest(file.name, beside) if beside else f"There is no folder {file.parent}."
            raise InputError(f"{place(path, name, lines, changed)}: {'.'.join(path)} = {given!r} does not exist", hint)


def place(path: tuple[str, ...], name: str, lines: Mapping[tuple[str, ...], int], changed: set[tuple[str, ...]]) -> str:
    """Where a key was given: `recipe.yaml, line 3`, or the `--set` that changed it."""
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
    where = place(path, name, lines, changed)
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}. {nearest(path[-1], known_keys(path[:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: the key {key!r} is missing"
    if fault["type"] in ("model_type", "dict_type"):
        keys = ", ".join(known_keys(path)[:3])
        return f"{where}: {key} = {fault['input']!r}: should be a mapping with keys such as {keys}"
    if not path or isinstance(inside, Mapping):
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}: {key} = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def known_keys(path: Sequence[str]) -> list[str]:
    """The keys that a recipe section knows."""
    sections: dict[tuple[str, ...], type[BaseModel]] = {
        (): Recipe,
        ("base",): BaseSpec,
        ("data",): DataSpec,
        ("held_out",): DataSpec,
        ("anchors",): AnchorSpec,
        ("lora",): LoraSpec,
        ("training",): TrainingSpec,
    }
    section = sections.get(tuple(path))
    return list(section.model_fields) if section else []
