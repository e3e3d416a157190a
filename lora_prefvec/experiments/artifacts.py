"""Every artifact of a comparison, trained once under the hash of its recipe, and the points that it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_prefvec.artifact import Adapter, ConditionFacts, read_adapter
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.experiments.spec import AskedSpec, Comparison, MethodSpec, MixSpec, OneSpec, WeightsSpec
from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import CpoSpec, Recipe, WeightedSpec, read_recipe
from lora_prefvec.training import lattice, train, with_weights


@dataclass(frozen=True)
class Place:
    """One setting of a method's knob.

    Args:
        knob: what is set: coefficients, weights, or what the prompt asks for.
        mix: adapter, by its name in `Method.adapters`, -> coefficient.
        condition: what the prompt asks for; None for an adapter that is not asked.
    """

    knob: dict[str, float]
    mix: dict[str, float]
    condition: dict[str, float] | None = None


@dataclass(frozen=True)
class Method:
    """A method with one training seed, trained.

    Args:
        adapters: name -> what was trained.
        places: all settings of its knob.
        facts: how a conditional adapter is asked.
    """

    name: str
    seed: int
    adapters: dict[str, Adapter]
    places: list[Place]
    facts: ConditionFacts | None = None
    trained: list[Adapter] = field(default_factory=list)


def recipes_of(spec: MethodSpec, seed: int, find: Callable[[str], Path], factor: float = 1.0) -> dict[str, Recipe]:
    """The recipes that a method needs, by the name of what they make.

    Args:
        factor: multiplies their learning rates.

    Raises:
        InputError: a recipe is missing or wrong.
    """

    def read(reference: str, overrides: Sequence[str]) -> Recipe:
        return with_rate(read_recipe(find(reference), [*overrides, f"training.seed={seed}"]), factor)

    if isinstance(spec, MixSpec):
        return {name: read(one.recipe, one.set) for name, one in spec.vectors.items()}
    recipe = read(spec.recipe, spec.set)
    if isinstance(spec, WeightsSpec):
        if not isinstance(recipe.method, WeightedSpec):
            raise InputError(
                f"{spec.recipe} has no weights: its method is {recipe.method.name}", "Give it another knob, or none."
            )
        points = spec.points
        grid = lattice(list(recipe.method.objectives), points) if isinstance(points, int) else points
        main = getattr(recipe.method, "main", None)  # MODPO divides by that weight
        return {
            " ".join(f"{name}={weight:g}" for name, weight in weights.items()): with_weights(recipe, weights)
            for weights in grid
            if main is None or weights[main]
        }
    return {recipe.preference: recipe}


def with_rate(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with its learning rates times a factor; a reward model keeps its own."""
    spec, method = recipe.training, recipe.method
    training = spec.model_copy(update={"learning_rate": spec.learning_rate * factor})
    if isinstance(method, CpoSpec) and method.sft_learning_rate:
        method = method.model_copy(update={"sft_learning_rate": method.sft_learning_rate * factor})
    return recipe.model_copy(update={"training": training, "method": method})


def tried(spec: MethodSpec) -> MethodSpec:
    """What is trained of a method to try a learning rate: of a grid of weights only those of the recipe."""
    return OneSpec(knob="none", recipe=spec.recipe, set=spec.set) if isinstance(spec, WeightsSpec) else spec


def check_bases(comparison: Comparison, recipes: dict[str, Recipe]) -> None:
    """Raises InputError where a recipe is about another base than the comparison."""
    for recipe in recipes.values():
        if recipe.base != comparison.base:
            raise InputError(
                f"a recipe for {recipe.preference} has the base {recipe.base.id} ({recipe.base.quantization}), and "
                f"the comparison {comparison.base.id} ({comparison.base.quantization})",
                "All methods are compared on one base.",
            )


def folder_of(recipe: Recipe, store: Path) -> Path:
    """Where the artifact of a recipe lies: methods and comparisons that need the same one share it."""
    digest = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12]
    return store / f"{recipe.preference}-{recipe.method.name}-{digest}"


def make(name: str, spec: MethodSpec, seed: int, recipes: dict[str, Recipe], store: Path, base: LoadedBase) -> Method:
    """Train what is missing of a method, and lay out the settings of its knob."""
    made = {key: _trained(recipe, folder_of(recipe, store), base) for key, recipe in recipes.items()}
    trained = list(made.values())
    if isinstance(spec, MixSpec):
        parts = {key: _part(made[key], one.part) for key, one in spec.vectors.items()}
        return Method(name, seed, parts, [Place(mix, mix) for mix in spec.points()], trained=trained)
    if isinstance(spec, WeightsSpec):
        weights = [recipe.method.weights for recipe in recipes.values() if isinstance(recipe.method, WeightedSpec)]
        places = [Place(dict(one), {key: 1.0}) for key, one in zip(made, weights, strict=True)]
        return Method(name, seed, made, places, trained=trained)
    ((key, adapter),) = made.items()
    if isinstance(spec, AskedSpec):
        adapter = _part(adapter, spec.part)
        facts = adapter.provenance.condition if adapter.provenance else None
        if facts is None:
            raise InputError(f"{spec.recipe} makes no adapter that can be asked", "Give it another knob, or none.")
        places = [Place(asked, {key: 1.0}, asked) for asked in spec.ask]
        return Method(name, seed, {key: adapter}, places, facts, trained)
    return Method(name, seed, made, [Place({}, {key: 1.0})], trained=trained)


def _trained(recipe: Recipe, folder: Path, base: LoadedBase) -> Adapter:
    if not (folder / "prefvec.json").is_file():
        train(recipe, folder, resume=True, base=base)
    return read_adapter(folder)


def _part(adapter: Adapter, part: str | None) -> Adapter:
    if part is None:
        return adapter
    inside = adapter.path / part
    if not inside.is_dir():
        held = [entry.parent.name for entry in adapter.path.glob("*/prefvec.json")]
        raise InputError(f"{adapter.path} holds no adapter {part!r} inside", nearest(part, held))
    return read_adapter(inside)
