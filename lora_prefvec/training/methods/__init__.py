"""One file per method, each reading like the algorithm in its paper; `recipe.method.name` picks one."""

from __future__ import annotations

from typing import Any

from lora_prefvec.training.methods import preference_vector

METHODS: dict[str, Any] = {"preference_vector": preference_vector}

__all__ = ["METHODS"]
