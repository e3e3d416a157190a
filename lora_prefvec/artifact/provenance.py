"""Where an artifact comes from: `prefvec.json`, as pydantic models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lora_prefvec.errors import InputError
from lora_prefvec.recipe import TagWord
from lora_prefvec.vector import BaseIdentity

SCHEMA_VERSION = 1
FILE = "prefvec.json"
MAX_BYTES = 16 * 2**20  # of any JSON file in an adapter folder
MAX_ITEMS = 50_000  # in a JSON file that is checked field by field

Kind = Literal["preference_adapter", "preference_vector", "mix", "conditional_adapter", "reward_model", "fold"]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataFacts(_Facts):
    """A set of pairs that trained an adapter.

    Args:
        id: Hub id, `name:part`, or a file's name; never a path of a machine.
        sha256: of the normalised pairs, in the order in which they were read.
        rows: number of pairs used, or of prompts with rated replies.
        swapped: whether chosen and rejected were exchanged.
    """

    id: str
    revision: str | None = None
    split: str | None = None
    form: str | None = None
    sha256: str | None = None
    rows: int | None = None
    swapped: bool = False


class ObjectiveFacts(_Facts):
    """One of the objectives that were weighed while an adapter was trained.

    Args:
        data: the pairs that it alone learned from; None where it is a rating in the adapter's data.
        anchors: further pairs of its own.
    """

    name: str
    weight: float
    data: DataFacts | None = None
    anchors: DataFacts | None = None


class ConditionFacts(_Facts):
    """How a conditional adapter is asked, in its prompt, for more or less of an axis.

    Axes are in the order of their names, whatever wrote them down: so they stand in the prompts of training, and after.

    Args:
        kind: `levels` for a whole number on each axis (CPO), `direction` for a unit vector over all of them (DPA).
        axes: axis -> the lowest and the highest level or component that it was trained on.
        levels: axis -> all levels that it was trained on, lowest first; empty for a direction.
        system: whether a direction stands in a system turn of its own; else it begins the first turn.
        grades: how many grades a component is written in, as a level; None for hundredths in a sentence.
        tags: axis -> the word that stands for it in a tag, where it is not its name.
    """

    kind: Literal["levels", "direction"]
    axes: dict[str, tuple[float, float]]
    levels: dict[str, list[float]] = Field(default_factory=dict)
    system: bool = False
    grades: int | None = Field(default=None, ge=2)
    tags: dict[str, TagWord] = Field(default_factory=dict)

    @field_validator("axes", "levels", "tags")
    @classmethod
    def _by_name(cls, axes: dict[str, Any]) -> dict[str, Any]:
        return dict(sorted(axes.items()))


class HeadFacts(_Facts):
    """One head of a reward model: its axis, and mean and standard deviation of the ratings that it learned."""

    axis: str
    mean: float
    sd: float = Field(gt=0)


class RewardFacts(_Facts):
    """The heads of a reward model, in the order in which they lie in `heads.safetensors`, and that file's SHA-256."""

    heads: list[HeadFacts]
    heads_sha256: str

    @property
    def axes(self) -> dict[str, tuple[float, float]]:
        """Axis -> mean and standard deviation."""
        return {head.axis: (head.mean, head.sd) for head in self.heads}


class TrainingFacts(_Facts):
    """How an adapter was trained; the whole of the settings is in `recipe.yaml` beside it.

    Args:
        anchor_share: part of the pairs that were anchors.
        libraries: package -> version.
        wall_seconds: from the first step to the last.
        tokens: of prompts and replies that training read, padding left out.
        peak_memory_bytes: of the device, or of the process on a CPU.
    """

    beta: float | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    rank: int | None = None
    seed: int | None = None
    sft_weight: float | None = None
    anchor_share: float | None = None
    compute_dtype: str | None = None
    device: str | None = None
    libraries: dict[str, str] = Field(default_factory=dict)
    wall_seconds: float | None = None
    tokens: int | None = None
    peak_memory_bytes: int | None = None


class CalibrationFacts(_Facts):
    """The unit of a vector: the coefficient at which it moves its base by a given amount.

    Args:
        coefficient: one unit; `0.5kl` in a mix is half of it.
        kl: the amount in nats per token, KL(mix || base) at the places of replies that the mix wrote.
        error: standard error of what was measured at the unit.
        prompts_sha256: of the prompts, in order.
        seed: of the replies.
        measured: (coefficient, nats per token) of all that was measured.
    """

    coefficient: float = Field(gt=0, allow_inf_nan=False)
    kl: float = Field(gt=0, allow_inf_nan=False)
    error: float
    prompts: int
    prompts_sha256: str
    max_new_tokens: int
    seed: int
    measured: list[tuple[float, float]] = Field(default_factory=list)


class Parent(_Facts):
    """An artifact that this one was made from.

    Args:
        name: its preference, or the name it was given.
        sha256: of its weights file.
        coefficient: the number that multiplied it, or one for each of equally spaced depths.
        filter: the part of it that counted, as `layers=8-20,modules=mlp`; None for the whole.
        revision: commit of the Hub repository it came from.
    """

    name: str
    sha256: str | None = None
    coefficient: float | tuple[float, ...] = 1.0
    filter: str | None = None
    revision: str | None = None


class FoldedModule(_Facts):
    """What folding did to one module.

    Args:
        kept: part of its delta that survived rounding; see `FoldFacts`.
        distance: norm of what NF4 changes in the base's weight, over that of the delta; None where that is unknown.
    """

    kept: float
    distance: float | None = None


class FoldFacts(_Facts):
    """How a vector was folded into a base.

    Args:
        onto: the weights that it was added to: the base's own, or `nf4`, the dequantised ones that training saw.
        dtype: of the weights written; `nf4` for a 4-bit checkpoint, `base` for the base's own.
        kept: part of the delta that survived: 1 - |W' - W - delta| / |delta| over all modules, W being the base and W'
            the result, both in the written type; 0.0 where rounding outweighs the delta.
        distance: |W_nf4 - W_original| / |delta| over the modules that NF4 rounds: how far the base that training saw is
            from the other one; estimated from a sample of rows where `onto` is `original`; None for a vector that was
            not trained on NF4.
        untied: whether embedding and head, one matrix in the base, are two now.
    """

    onto: Literal["original", "nf4"]
    dtype: str
    kept: float
    distance: float | None = None
    untied: bool = False
    modules: dict[str, FoldedModule] = Field(default_factory=dict)


class Provenance(_Facts):
    """What `prefvec.json` says of the folder it lies in.

    Args:
        preference: slug of the axis; None for a mix of several.
        sign: +1 for labels as given (and for vectors), -1 for swapped labels; None for a mix.
        method: `dpo` for a preference vector and its sides, else the name of the method that trained the adapter; for
            a mix how it was combined (`exact`).
        objectives: what a method weighed that trains one adapter for several.
        sides: `pair` for two runs, `two` for one two-sided run.
        base: the base that training saw; None where a plain adapter did not tell.
        fold: how it was added to a base; None for what is no fold.
        condition: what its prompt can ask for; None for what is no conditional adapter.
        reward: what its heads rate; None for what is no reward model.
        calibration: the unit of its coefficient; None where nobody measured it.
        metrics: name -> value, as measured when the artifact was made; None for what came out as NaN or infinite.
        weights_sha256: of `adapter_model.safetensors`; filled in when the folder is written.
    """

    schema_version: Literal[1] = 1
    kind: Kind
    preference: str | None = None
    sign: Literal[1, -1] | None = None
    method: str | None = None
    sides: Literal["pair", "two"] | None = None
    base: BaseIdentity | None = None
    data: DataFacts | None = None
    anchors: DataFacts | None = None
    objectives: list[ObjectiveFacts] = Field(default_factory=list)
    training: TrainingFacts | None = None
    parents: list[Parent] = Field(default_factory=list)
    fold: FoldFacts | None = None
    condition: ConditionFacts | None = None
    reward: RewardFacts | None = None
    calibration: CalibrationFacts | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    weights_sha256: str | None = None

    @field_validator("metrics")
    @classmethod
    def _json_numbers(cls, metrics: dict[str, float | None]) -> dict[str, float | None]:
        return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}

    @property
    def counted(self) -> str:
        """What the rows of `data` are."""
        rated = self.condition or self.reward or any(one.data is None for one in self.objectives)
        return "prompts with rated replies" if rated else "pairs"

    def to_json(self) -> str:
        """The text of `prefvec.json`: sorted keys, indented, newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_provenance(folder: Path) -> Provenance | None:
    """What `prefvec.json` in `folder` says; None where there is none.

    Raises:
        InputError: the file is no JSON, of a newer schema, or a field is unknown or of the wrong type.
    """
    path = folder / FILE
    if not path.exists():
        return None
    content = read_json(path, MAX_ITEMS)
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema {version}, and this version reads up to {SCHEMA_VERSION}",
            "Update with: pip install -U lora-prefvec",
        )
    try:
        return Provenance.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path} is no provenance: {first_complaint(error)}", _UNTOLD) from None


def read_json(path: Path, items: int = 10**6) -> dict[str, Any]:
    """The object in a JSON file of an artifact.

    Args:
        items: how many values it may hold, about.

    Raises:
        InputError: the file cannot be read, is absurdly large, is no JSON or holds no object.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file", "Give a complete adapter folder.")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MB", "It is no file of an adapter.")
        text = path.read_text(encoding="utf-8")
        if text.count(",") > items:
            raise InputError(f"{path} holds more than {items} values", "It is no file of an adapter.")
        content = json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "Check its permissions.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no valid JSON", "The file is damaged: get the folder again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object", "The file is damaged: get the folder again.")
    return content


def first_complaint(error: ValidationError) -> str:
    """The first thing pydantic found wrong, on one line: `training.beta: input should be a valid number`."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    message = str(found["msg"])
    return f"{where}: {message[:1].lower()}{message[1:]}" if where else message


_UNTOLD = "Remove the file to read the folder as a plain adapter."
