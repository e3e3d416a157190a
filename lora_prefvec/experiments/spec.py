"""What a comparison compares: methods with their knobs, seeds, scorers, as a YAML file says it."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from lora_prefvec.errors import InputError
from lora_prefvec.recipe import BaseSpec, Section

PART = r"^[a-z0-9][a-z0-9-]*$"
METHOD = r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$"


class SweepSpec(Section):
    """The prompts and how replies are written; `prompts` is a JSONL file or `sandbox:SPLIT`."""

    prompts: str = "sandbox:held_out"
    limit: int = Field(default=200, ge=2)
    n: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=96, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    seed: int = 0


class RatesSpec(Section):
    """How every method comes by its learning rate: its recipes' own, times the best of `factors`.

    Each is tried with the first seed: coefficients and conditions at all settings of the knob, weights at those that
    stand in the recipe. Best is the greatest hypervolume on prompts that the comparison itself does not ask.
    """

    factors: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    prompts: str = "sandbox:validation"
    limit: int = Field(default=200, ge=2)


class PartSpec(Section):
    """A recipe that makes one of the vectors of a mix; `part` takes an adapter from inside its folder."""

    recipe: str
    set: list[str] = Field(default_factory=list)
    part: Literal["positive", "negative"] | None = None


class Tried(Section):
    """Whether the comparison's rates are tried for a method; without, it keeps those of its recipes."""

    rates: bool = True


class MixSpec(Tried):
    """Vectors that are trained once each and mixed; the knob is their coefficients.

    Each vector takes all of `coefficients`; with `sum_to` the mixes are those of them whose sum is that.
    """

    knob: Literal["coefficients"]
    vectors: Annotated[dict[str, PartSpec], Field(min_length=1)]
    coefficients: Annotated[list[float], Field(min_length=1)]
    sum_to: float | None = None

    def points(self) -> list[dict[str, float]]:
        """The mixes."""
        found = [
            dict(zip(self.vectors, row, strict=True)) for row in product(self.coefficients, repeat=len(self.vectors))
        ]
        return [one for one in found if self.sum_to is None or abs(sum(one.values()) - self.sum_to) < 1e-6]


class WeightsSpec(Tried):
    """A method whose weights are fixed when it trains: an adapter for each of an even grid of weights, or of a list."""

    knob: Literal["weights"]
    recipe: str
    set: list[str] = Field(default_factory=list)
    points: Annotated[int, Field(ge=2)] | Annotated[list[dict[str, float]], Field(min_length=1)] = 5


class AskedSpec(Tried):
    """One conditional adapter, asked for several conditions or directions in its prompt.

    `part` takes an adapter from inside its folder, such as an earlier round.
    """

    knob: Literal["condition"]
    recipe: str
    set: list[str] = Field(default_factory=list)
    part: str | None = Field(default=None, pattern=PART)
    ask: Annotated[list[dict[str, float]], Field(min_length=1)]


class OneSpec(Tried):
    """A method without a knob: one adapter, one point."""

    knob: Literal["none"]
    recipe: str
    set: list[str] = Field(default_factory=list)


MethodSpec = Annotated[MixSpec | WeightsSpec | AskedSpec | OneSpec, Field(discriminator="knob")]


class Comparison(Section):
    """Methods side by side on one base, one set of prompts and the same scorers.

    Args:
        axes: the scorers over which the fronts lie.
        costs: further scorers that are told along each front.
        seeds: of training; each is a run of its own.
        rates: how learning rates are chosen; None for those that the recipes have.
    """

    name: str
    base: BaseSpec
    axes: Annotated[list[str], Field(min_length=2)]
    costs: list[str] = Field(default_factory=list)
    seeds: Annotated[list[int], Field(min_length=1, default_factory=lambda: [0])]
    sweep: SweepSpec = SweepSpec()
    rates: RatesSpec | None = None
    methods: Annotated[dict[Annotated[str, Field(pattern=METHOD)], MethodSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_seed_twice(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands there twice")
        return self


def read_comparison(file: Path) -> Comparison:
    """Read a comparison.

    Raises:
        InputError: the file is missing, no YAML, or something in it is wrong; the message says where.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", "Name a YAML file.") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise InputError(f"{where}: not valid YAML", "Mend it.") from None
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise InputError(
            f"{file}: {f'{where}: ' if where else ''}{fault['msg'].removeprefix('Value error, ')}"
        ) from None
