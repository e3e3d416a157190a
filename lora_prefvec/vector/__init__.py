"""The algebra of preferences: low-rank deltas, vectors of them, mixes, and how they lie to each other."""

from lora_prefvec.vector.delta import LowRankDelta
from lora_prefvec.vector.geometry import (
    cosine_matrix,
    effective_rank,
    layer_cosines,
    layer_norms,
    layer_of,
    module_norms,
    spectra,
    type_norms,
    type_of,
)
from lora_prefvec.vector.identity import BaseIdentity
from lora_prefvec.vector.mix import Mix, MixEntry, check_coefficient, parse_reference
from lora_prefvec.vector.preference_vector import PreferenceVector, common_identity, extract, linear_combination

__all__ = [
    "BaseIdentity",
    "LowRankDelta",
    "Mix",
    "MixEntry",
    "PreferenceVector",
    "check_coefficient",
    "common_identity",
    "cosine_matrix",
    "effective_rank",
    "extract",
    "layer_cosines",
    "layer_norms",
    "layer_of",
    "linear_combination",
    "module_norms",
    "parse_reference",
    "spectra",
    "type_norms",
    "type_of",
]
