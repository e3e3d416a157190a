"""DPO-safe-first: one DPO run in which helpfulness decides between safe replies, and safety between all others."""

from __future__ import annotations

from lora_prefvec.data import RatedPair
from lora_prefvec.recipe import Recipe, SafeFirstSpec
from lora_prefvec.training.methods.dpo_lw import prepare, runs
from lora_prefvec.training.objectives import train_rows as make
from lora_prefvec.training.rows import Row, Rows, load_rows

__all__ = ["load", "make", "prepare", "runs"]


def load(recipe: Recipe) -> Rows:
    """Pairs by the main objective where both replies are safe, by safety elsewhere; ties are left out."""
    spec = recipe.method
    assert isinstance(spec, SafeFirstSpec)

    def see(pair: RatedPair) -> Row | None:
        safety = spec.safety
        if pair.sign(safety.axis) is None:
            return None
        both_safe = all(one[safety.axis] >= safety.at_least for one in (pair.chosen, pair.rejected))
        sign = pair.sign(spec.main if both_safe else safety.axis)
        return Row(pair.pair, (float(sign),)) if sign else None

    return load_rows(recipe, {spec.main: 1.0}, see, also=[spec.safety.axis])
