"""The recipe: the YAML file that makes an artifact."""

from lora_prefvec.recipe.methods import (
    AxisSpec,
    BfpoSpec,
    CpoSpec,
    DpaSpec,
    DpoLwSpec,
    MethodSpec,
    ModpoSpec,
    ObjectiveSpec,
    PreferenceVectorSpec,
    RacoSpec,
    RewardSpec,
    SafeFirstSpec,
    SafetySpec,
    SftSpec,
    TagWord,
    WeightedSpec,
)
from lora_prefvec.recipe.reading import parse_recipe, read_recipe
from lora_prefvec.recipe.recipe import Recipe
from lora_prefvec.recipe.sections import AnchorSpec, BaseSpec, DataSpec, LoraSpec, Section, TrainingSpec

__all__ = [
    "AnchorSpec",
    "AxisSpec",
    "BaseSpec",
    "BfpoSpec",
    "CpoSpec",
    "DataSpec",
    "DpaSpec",
    "DpoLwSpec",
    "LoraSpec",
    "MethodSpec",
    "ModpoSpec",
    "ObjectiveSpec",
    "PreferenceVectorSpec",
    "RacoSpec",
    "Recipe",
    "RewardSpec",
    "SafeFirstSpec",
    "SafetySpec",
    "Section",
    "SftSpec",
    "TagWord",
    "TrainingSpec",
    "WeightedSpec",
    "parse_recipe",
    "read_recipe",
]
