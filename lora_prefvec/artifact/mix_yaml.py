"""`mix.yaml`: what makes a mix again, as pydantic models, and how it names the folders around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lora_prefvec.artifact.provenance import first_complaint
from lora_prefvec.errors import InputError
from lora_prefvec.vector import Filter, Method, parse_layers, written_layers

Dtype = Literal["float32", "bfloat16", "float16"]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class MixVector(BaseModel):
    """One vector of `mix.yaml`: its coefficient, or a gradient over the layers, and the part of it that counts.

    `vector` is a name, a Hub id, or a folder relative to the file (it begins with a dot).
    """

    model_config = ConfigDict(extra="forbid")

    vector: str
    coefficient: _Number | Annotated[list[_Number], Field(min_length=1)] = 1.0
    layers: str | None = None
    modules: list[str] | None = None
    revision: str | None = None
    sha256: str | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _a_range(cls, layers: Any) -> Any:
        try:
            return None if layers is None else written_layers(parse_layers(layers))
        except InputError as error:
            raise ValueError(str(error)) from None

    @property
    def filter(self) -> Filter:
        """`layers` and `modules` as a filter."""
        return Filter(parse_layers(self.layers) if self.layers else None, tuple(self.modules or ()))


class MixSettings(BaseModel):
    """How the vectors of a mix become one; the numbers are those of `lora_prefvec.vector.merge`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "exact"
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: Annotated[int, Field(ge=0)] = 0
    normalize: bool = False

    @model_validator(mode="after")
    def _one_cut(self) -> MixSettings:
        if self.rank is not None and self.energy is not None:
            raise ValueError("a mix is cut either to a rank or to an energy")
        return self


class MixFile(MixSettings):
    """`mix.yaml`: all that `prefvec compose` needs to make a mix again.

    `approximate` names the base against which DoRAs among the vectors are fitted.
    """

    base: str | None = None
    revision: str | None = None
    approximate: str | None = None
    dtype: Dtype = "float32"
    vectors: Annotated[list[MixVector], Field(min_length=1)]

    def to_yaml(self) -> str:
        """The text of `mix.yaml`."""
        head = "# Makes this folder again: prefvec compose mix.yaml --out DIR\n"
        facts = self.model_dump(exclude_none=True)
        asked = self.settings.model_dump(exclude_defaults=True)
        order = ["base", "revision", "approximate", "method", *asked, "dtype", "vectors"]
        return head + yaml.safe_dump(
            {key: facts[key] for key in dict.fromkeys(order) if key in facts}, sort_keys=False, allow_unicode=True
        )

    @property
    def settings(self) -> MixSettings:
        """How its vectors become one, without which they are."""
        return MixSettings(**{key: getattr(self, key) for key in MixSettings.model_fields})


def read_mix_file(path: str | Path) -> MixFile:
    """The mix that a YAML file describes.

    Raises:
        InputError: the file is missing, no YAML, or has an unknown or wrong field.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "Give a mix.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}", "Mend the file.") from None
    try:
        return MixFile.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path} describes no mix: {first_complaint(error)}", "Mend the file.") from None


def relative(ref: str, target: Path) -> str:
    """A local folder as `mix.yaml` in `target` names it: by a path that begins with a dot."""
    path = os.path.relpath(Path(ref).expanduser().resolve(), target.resolve())
    return path if path.startswith(".") else f"./{path}"


def beside(file: str | Path, ref: str) -> str:
    """What `relative` wrote, from where we stand; any other reference as it is."""
    return os.path.normpath(Path(file).parent / ref) if ref.startswith(".") else ref
