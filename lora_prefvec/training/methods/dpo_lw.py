"""DPO-LW: one DPO loss for each objective, added up with the user's weights; RACO with c = 0."""

from __future__ import annotations

from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import Recipe, WeightedSpec
from lora_prefvec.training.made import Made
from lora_prefvec.training.objectives import RUN, train_rows
from lora_prefvec.training.rows import PreparedRows, Rows, by_signs, load_rows, prepare_rows
from lora_prefvec.training.run import Job


def runs(recipe: Recipe) -> tuple[str, ...]:
    """One run."""
    return (RUN,)


def load(recipe: Recipe) -> Rows:
    """Pairs with a sign for every objective, and the pairs of those that bring their own."""
    spec = recipe.method
    assert isinstance(spec, WeightedSpec)
    return load_rows(recipe, spec.weights, by_signs(list(spec.objectives)), spec.objectives)


def prepare(recipe: Recipe, rows: Rows, base: LoadedBase) -> PreparedRows:
    """Rendered, with the base's log-probabilities."""
    return prepare_rows(recipe, rows, base)


def make(job: Job, prepared: PreparedRows) -> Made:
    """Minimise sum w_i L_i."""
    return train_rows(job, prepared)
