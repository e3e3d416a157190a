"""The recipe as a whole."""

from __future__ import annotations

import yaml
from pydantic import Field, model_validator

from lora_prefvec.recipe.methods import MethodSpec, PreferenceVectorSpec, WeightedSpec
from lora_prefvec.recipe.sections import AnchorSpec, BaseSpec, DataSpec, LoraSpec, Section, TrainingSpec

PREFERENCE = r"^[a-z0-9]+(-[a-z0-9]+)*$"


class Recipe(Section):
    """What makes one artifact: a preference vector unless `method` says otherwise.

    `held_out` is either a number of pairs that are set apart from `data`, never sharing a prompt with it, or a data
    set of its own; preference accuracy is measured there. `data` is left out where every objective has its own.
    """

    preference: str = Field(pattern=PREFERENCE)
    method: MethodSpec = PreferenceVectorSpec()
    base: BaseSpec
    data: DataSpec | None = None
    held_out: int | DataSpec = 200
    anchors: AnchorSpec | None = None
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.data is None and not (isinstance(self.method, WeightedSpec) and self.method.brings_data):
            raise ValueError("the key 'data' is missing")
        if self.method.name == "preference_vector":
            return self
        if self.method.name == "sft" and self.training.sft_weight == 0:
            raise ValueError("training.sft_weight is 0, and SFT has no other term; give 1.0")
        if self.anchors:
            raise ValueError(f"anchors belong to preference vectors; {self.method.name} takes none")
        if self.training.reach != 1 or self.training.sides != "two":
            raise ValueError(f"training.sides and training.reach belong to preference vectors, not {self.method.name}")
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults spelled out, so that it means the same to every version that reads it."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)
