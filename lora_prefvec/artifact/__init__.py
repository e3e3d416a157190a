"""Adapter folders: where they lie, what they say of themselves, how they are read, written and folded."""

from lora_prefvec.artifact.approximate import Approximation, approximate
from lora_prefvec.artifact.atomic import atomic_file, atomic_folder, check_output, check_target
from lora_prefvec.artifact.base_facts import Base, find_base, need_base, read_base
from lora_prefvec.artifact.calibration import keep_calibration, no_provenance, plain_coefficient
from lora_prefvec.artifact.condition import check_condition, conditioned, told, write_condition
from lora_prefvec.artifact.describe import compare, describe, powers_of_two
from lora_prefvec.artifact.export_gguf import GgufPlan, import_gguf, plan_gguf, write_gguf
from lora_prefvec.artifact.export_mlx import MlxPlan, plan_mlx, write_mlx
from lora_prefvec.artifact.fold import FoldPlan, fold, plan_fold
from lora_prefvec.artifact.folder import Adapter, read_adapter
from lora_prefvec.artifact.identity import base_identity, identity_of
from lora_prefvec.artifact.mix_yaml import Dtype, MixFile, MixSettings, beside, complaint, read_mix_file
from lora_prefvec.artifact.mixing import (
    Ingredient,
    check_same_base,
    compose,
    extract_provenance,
    merge_mix,
    mix_file,
    mix_provenance,
    named_base,
    open_mix,
    reopen_mix,
    typed_mix,
    typed_term,
)
from lora_prefvec.artifact.provenance import (
    CalibrationFacts,
    ConditionFacts,
    DataFacts,
    FoldFacts,
    Parent,
    Provenance,
    RewardFacts,
    TrainingFacts,
    read_provenance,
)
from lora_prefvec.artifact.reference import (
    adapter_names,
    commit_of,
    public_name,
    resolve_adapter,
    resolve_base,
    shipped,
)
from lora_prefvec.artifact.reward_model import RewardModel, fill_reward_model, read_reward_model
from lora_prefvec.artifact.writing import Written, fill_adapter, plan_adapter, write_adapter

__all__ = [
    "Adapter",
    "Approximation",
    "Base",
    "CalibrationFacts",
    "ConditionFacts",
    "DataFacts",
    "Dtype",
    "FoldFacts",
    "FoldPlan",
    "GgufPlan",
    "Ingredient",
    "MixFile",
    "MixSettings",
    "MlxPlan",
    "Parent",
    "Provenance",
    "RewardFacts",
    "RewardModel",
    "TrainingFacts",
    "Written",
    "adapter_names",
    "approximate",
    "atomic_file",
    "atomic_folder",
    "base_identity",
    "beside",
    "check_condition",
    "check_output",
    "check_same_base",
    "check_target",
    "commit_of",
    "compare",
    "complaint",
    "compose",
    "conditioned",
    "describe",
    "extract_provenance",
    "fill_adapter",
    "fill_reward_model",
    "find_base",
    "fold",
    "identity_of",
    "import_gguf",
    "keep_calibration",
    "merge_mix",
    "mix_file",
    "mix_provenance",
    "named_base",
    "need_base",
    "no_provenance",
    "open_mix",
    "plain_coefficient",
    "plan_adapter",
    "plan_fold",
    "plan_gguf",
    "plan_mlx",
    "powers_of_two",
    "public_name",
    "read_adapter",
    "read_base",
    "read_mix_file",
    "read_provenance",
    "read_reward_model",
    "reopen_mix",
    "resolve_adapter",
    "resolve_base",
    "shipped",
    "told",
    "typed_mix",
    "typed_term",
    "write_adapter",
    "write_condition",
    "write_gguf",
    "write_mlx",
]
