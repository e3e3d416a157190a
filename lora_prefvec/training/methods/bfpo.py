"""BFPO (arXiv 2408.15313) in its DPO form, as the Preference Vector paper runs it: safety sets a pair's strength.

    L = -log sigma(beta' D),  beta' = (beta / 2) / (1.5 I(chosen) - 0.5 I(rejected) - alpha)

Pairs come from one objective; I is 1 for a safe reply. With alpha = 0.5 a pair of two safe replies keeps beta, a safe
winner over an unsafe loser has half of it, and an unsafe winner counts the other way round.
"""

from __future__ import annotations

from lora_prefvec.data import RatedPair
from lora_prefvec.recipe import BfpoSpec, Recipe
from lora_prefvec.training.methods.dpo_lw import prepare, runs
from lora_prefvec.training.objectives import train_rows as make
from lora_prefvec.training.rows import Row, Rows, by_signs, load_rows

__all__ = ["load", "make", "prepare", "runs", "strength"]


def load(recipe: Recipe) -> Rows:
    """The main objective's pairs, with what safety makes of beta."""
    spec = recipe.method
    assert isinstance(spec, BfpoSpec)
    signs = by_signs([spec.main])

    def see(pair: RatedPair) -> Row | None:
        row, safety = signs(pair), spec.safety
        if row is None or pair.sign(safety.axis) is None:
            return None
        safe = [one[safety.axis] >= safety.at_least for one in (pair.chosen, pair.rejected)]
        winner, loser = safe if row.signs[0] > 0 else reversed(safe)
        return Row(row.pair, row.signs, strength(winner, loser, spec.alpha))

    return load_rows(recipe, {spec.main: 1.0}, see, also=[spec.safety.axis])


def strength(winner_is_safe: bool, loser_is_safe: bool, alpha: float) -> float:
    """beta' / beta."""
    return 0.5 / (1.5 * winner_is_safe - 0.5 * loser_is_safe - alpha)
