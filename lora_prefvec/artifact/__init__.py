"""Adapter folders: where they lie, what they say of themselves, how they are read, written and folded."""

from lora_prefvec.artifact.atomic import atomic_file, atomic_folder, check_target
from lora_prefvec.artifact.describe import describe
from lora_prefvec.artifact.fold import FoldPlan, fold, plan_fold
from lora_prefvec.artifact.folder import Adapter, read_adapter
from lora_prefvec.artifact.identity import base_identity, identity_of
from lora_prefvec.artifact.mixing import (
    Dtype,
    Ingredient,
    MixFile,
    check_same_base,
    compose,
    extract_provenance,
    mix_file,
    mix_provenance,
    open_mix,
    read_mix_file,
    reopen_mix,
)
from lora_prefvec.artifact.provenance import DataFacts, Parent, Provenance, TrainingFacts, read_provenance
from lora_prefvec.artifact.reference import (
    adapter_names,
    commit_of,
    public_name,
    resolve_adapter,
    resolve_base,
    shipped,
)
from lora_prefvec.artifact.writing import Written, fill_adapter, plan_adapter, write_adapter

__all__ = [
    "Adapter",
    "DataFacts",
    "Dtype",
    "FoldPlan",
    "Ingredient",
    "MixFile",
    "Parent",
    "Provenance",
    "TrainingFacts",
    "Written",
    "adapter_names",
    "atomic_file",
    "atomic_folder",
    "base_identity",
    "check_same_base",
    "check_target",
    "commit_of",
    "compose",
    "describe",
    "extract_provenance",
    "fill_adapter",
    "fold",
    "identity_of",
    "mix_file",
    "mix_provenance",
    "open_mix",
    "plan_adapter",
    "plan_fold",
    "public_name",
    "read_adapter",
    "read_mix_file",
    "read_provenance",
    "reopen_mix",
    "resolve_adapter",
    "resolve_base",
    "shipped",
    "write_adapter",
]
