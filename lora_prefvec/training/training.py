"""Recipe -> artifact, by the method that the recipe names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_prefvec.artifact import Adapter, base_identity, check_output, check_target, resolve_base
from lora_prefvec.inference import LoadedBase, load_base
from lora_prefvec.recipe import Recipe
from lora_prefvec.training.adapter import check_targets
from lora_prefvec.training.made import Loaded, Made, write
from lora_prefvec.training.methods import METHODS
from lora_prefvec.training.run import Job, total_steps
from lora_prefvec.training.trainer import remove_folder
from lora_prefvec.training.work import begin, check_data, claim_work, completed
from lora_prefvec.vector import PreferenceVector


class Method(Protocol):
    """What a file of `methods/` offers."""

    def runs(self, recipe: Recipe) -> tuple[str, ...]:
        """The names of its training runs, in order."""

    def load(self, recipe: Recipe) -> Any:
        """The recipe's data, as `Loaded`."""

    def prepare(self, recipe: Recipe, loaded: Any, base: LoadedBase) -> Any:
        """The data as the base meets them: rendered, with reference log-probabilities."""

    def make(self, job: Job, prepared: Any) -> Made:
        """Train, and hand over what came out."""


@dataclass(frozen=True)
class Trained:
    """What `train` wrote.

    Args:
        folder: the artifact.
        vector: its adapter; what it was made from lies in subfolders, a pair's as `positive` and `negative`.
        metrics: what was measured on held-out rows.
    """

    folder: Path
    vector: PreferenceVector
    metrics: dict[str, float | None]


def train(
    recipe: Recipe, out: str | Path, *, resume: bool = False, force: bool = False, base: LoadedBase | None = None
) -> Trained:
    """Train what a recipe describes and write it to `out`.

    Work in progress lies in a hidden folder beside `out`; after a kill at any moment, `resume` ends in the same adapter
    as an unbroken run, bit for bit on a CPU.

    Args:
        base: a base that is loaded already, as the recipe asks for it; several recipes can share one.
        resume: go on with an unfinished run.
        force: replace `out`, and throw an unfinished run away unless `resume`.

    Raises:
        InputError: bad recipe, data, base or place; nothing was trained.
        Interrupted: Ctrl-C; a checkpoint is written.
        RunError: the loss is no longer a number, or the device has too little memory.
    """
    method = method_of(recipe)
    if resume and not force and (complete := completed(check_target(out, force=True), recipe, method.runs(recipe))):
        return _read(complete)
    target = check_output(out, force)
    work = claim_work(target, recipe, resume=resume, force=force)
    loaded: Loaded = method.load(recipe)
    check_data(work, loaded.hashes)
    if base is None:
        base = load_base(
            resolve_base(recipe.base.id, recipe.base.revision),
            quantization=recipe.base.quantization,
            compute_dtype=recipe.training.compute_dtype,
        )
    check_targets(base.model, recipe.lora)
    identity = base_identity(recipe.base.id, recipe.base.revision, recipe.base.quantization)
    prepared = method.prepare(recipe, loaded, base)
    begin(work, recipe, loaded.hashes)
    job = Job(recipe, base, identity, work)
    made = method.make(job, prepared)
    write(target, job, made, force=force)
    remove_folder(work)
    return Trained(target, made.vector, made.metrics)


def plan(recipe: Recipe) -> dict[str, object]:
    """What `train` would do, after reading all data and no weights.

    Raises:
        InputError: bad data.
    """
    method = method_of(recipe)
    loaded: Loaded = method.load(recipe)
    runs = len(method.runs(recipe))
    # Where not all runs take the same steps, the method knows how many there are.
    steps = (
        method.steps(recipe, loaded)
        if hasattr(method, "steps")
        else runs * total_steps(recipe.training, len(loaded.train))
    )
    return {
        "preference": recipe.preference,
        "method": recipe.method.name,
        "base": recipe.base.id,
        "training_pairs": len(loaded.train),
        "held_out_pairs": len(loaded.held_out),
        "runs": runs,
        "steps": steps,
    }


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names."""
    found: Method = METHODS[recipe.method.name]
    return found


def _read(adapter: Adapter) -> Trained:
    return Trained(adapter.path, adapter.vector, adapter.provenance.metrics if adapter.provenance else {})
