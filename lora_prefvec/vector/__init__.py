"""The algebra of preferences: low-rank deltas, vectors of them, mixes, and how they lie to each other."""

from lora_prefvec.vector.checks import not_finite
from lora_prefvec.vector.delta import Cut, LowRankDelta
from lora_prefvec.vector.direction import parse_direction, unit
from lora_prefvec.vector.filters import (
    Filter,
    Gradient,
    coefficient_at,
    depth_of,
    graded,
    parse_layers,
    written_layers,
)
from lora_prefvec.vector.geometry import (
    cosine_matrix,
    effective_rank,
    energy_kept,
    layer_cosines,
    layer_norms,
    layer_of,
    module_cosines,
    module_norms,
    norm_grid,
    subspace_interference,
    type_norms,
    type_of,
)
from lora_prefvec.vector.identity import BaseIdentity
from lora_prefvec.vector.lowrank import fit
from lora_prefvec.vector.merging import Coefficient, Merged, Method, merge
from lora_prefvec.vector.mix import (
    MAX_COEFFICIENT,
    Mix,
    MixEntry,
    MixTerm,
    check_coefficient,
    parse_reference,
    parse_term,
    written_coefficient,
)
from lora_prefvec.vector.preference_vector import PreferenceVector, common_identity, extract, linear_combination

__all__ = [
    "MAX_COEFFICIENT",
    "BaseIdentity",
    "Coefficient",
    "Cut",
    "Filter",
    "Gradient",
    "LowRankDelta",
    "Merged",
    "Method",
    "Mix",
    "MixEntry",
    "MixTerm",
    "PreferenceVector",
    "check_coefficient",
    "coefficient_at",
    "common_identity",
    "cosine_matrix",
    "depth_of",
    "effective_rank",
    "energy_kept",
    "extract",
    "fit",
    "graded",
    "layer_cosines",
    "layer_norms",
    "layer_of",
    "linear_combination",
    "merge",
    "module_cosines",
    "module_norms",
    "norm_grid",
    "not_finite",
    "parse_direction",
    "parse_layers",
    "parse_reference",
    "parse_term",
    "subspace_interference",
    "type_norms",
    "type_of",
    "unit",
    "written_coefficient",
    "written_layers",
]
