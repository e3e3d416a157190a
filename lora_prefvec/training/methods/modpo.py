"""MODPO (arXiv 2310.03708): DPO on one objective, whose margin the frozen adapters of the others shift.

    L = -log sigma(R(chosen) - R(rejected)),  R(y) = (beta log-ratio(y) - sum_k w_k m_k(y)) / w_main

where m_k(y) = beta_k log-ratio_k(y) is the implicit reward of the adapter that was trained for objective k alone, with
the beta of its own training where that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lora_prefvec.artifact import read_adapter, resolve_adapter
from lora_prefvec.inference import LoadedBase, RenderedPair
from lora_prefvec.recipe import ModpoSpec, Recipe
from lora_prefvec.training.methods.dpo_lw import runs
from lora_prefvec.training.objectives import train_rows as make
from lora_prefvec.training.rows import PreparedRows, Rows, adapter_margins, by_signs, load_rows, prepare_rows

__all__ = ["load", "make", "prepare", "runs"]


def load(recipe: Recipe) -> Rows:
    """The pairs of the main objective."""
    spec = spec_of(recipe)
    for reference in spec.margins.values():
        resolve_adapter(reference)
    rows = load_rows(recipe, {spec.main: 1.0}, by_signs([spec.main]), {spec.main: spec.objectives[spec.main]})
    return replace(rows, train=[replace(row, strength=1 / spec.weights[spec.main]) for row in rows.train])


def prepare(recipe: Recipe, rows: Rows, base: LoadedBase) -> PreparedRows:
    """Rendered, with the base's log-probabilities and the margins of the frozen adapters."""
    spec = spec_of(recipe)

    def offsets(base: LoadedBase, pairs: Sequence[RenderedPair], reference: Tensor) -> Tensor:
        total = reference.new_zeros(len(pairs))
        for name, adapter in spec.margins.items():
            found = read_adapter(resolve_adapter(adapter))
            training = found.provenance.training if found.provenance else None
            beta = (training and training.beta) or recipe.training.beta
            margins = adapter_margins(base, found.vector, pairs, reference)
            total += spec.weights[name] * (beta / recipe.training.beta) * margins
        return total

    return prepare_rows(recipe, rows, base, offsets)


def spec_of(recipe: Recipe) -> ModpoSpec:
    """The recipe's method."""
    assert isinstance(recipe.method, ModpoSpec)
    return recipe.method
