"""One file per method, each reading like the algorithm in its paper; `recipe.method.name` picks one."""

from __future__ import annotations

from typing import Any

from lora_prefvec.training.methods import bfpo, cpo, dpa, dpo_lw, modpo, preference_vector, raco, safe_first, sft

METHODS: dict[str, Any] = {
    "preference_vector": preference_vector,
    "dpo_lw": dpo_lw,
    "raco": raco,
    "modpo": modpo,
    "bfpo": bfpo,
    "safe_first": safe_first,
    "sft": sft,
    "cpo": cpo,
    "dpa": dpa,
}

__all__ = ["METHODS"]
