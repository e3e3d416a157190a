"""SFT on the chosen replies of ordinary pairs: the loss of a pair without its preference term."""

from __future__ import annotations

from dataclasses import replace

from lora_prefvec.recipe import ObjectiveSpec, Recipe
from lora_prefvec.training.methods.dpo_lw import prepare, runs
from lora_prefvec.training.objectives import train_rows as make
from lora_prefvec.training.rows import Rows, load_rows

__all__ = ["load", "make", "prepare", "runs"]


def load(recipe: Recipe) -> Rows:
    """The recipe's pairs, none of which prefers anything: a strength of 0 leaves the likelihood of the chosen reply."""
    chosen = ObjectiveSpec(weight=1.0, data=recipe.data)
    rows = load_rows(recipe, {recipe.preference: 1.0}, lambda pair: None, {recipe.preference: chosen})
    return replace(rows, train=[replace(row, strength=0.0) for row in rows.train])
