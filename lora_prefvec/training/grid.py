"""Methods whose weights are fixed when they train: one adapter for each of several weights, on one resident base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from pydantic import ValidationError

from lora_prefvec.artifact import resolve_base
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.inference import LoadedBase, load_base
from lora_prefvec.recipe import Recipe, WeightedSpec
from lora_prefvec.training.training import Trained, train

MOST_POINTS = 200


def lattice(names: Sequence[str], points: int) -> list[dict[str, float]]:
    """Evenly spaced weights that sum to 1, `points` of them along every edge of the simplex.

    >>> [one["a"] for one in lattice(["a", "b"], 3)]
    [0.0, 0.5, 1.0]

    Raises:
        InputError: fewer than two points, or more weights than anybody trains.
    """
    if points < 2:
        raise InputError(f"a grid of {points} points has no two ends", "Give 2 or more.")
    m, steps = len(names), points - 1
    found = []
    for bars in combinations(range(steps + m - 1), m - 1):  # stars and bars
        ends = [-1, *bars, steps + m - 1]
        found.append({name: (ends[i + 1] - ends[i] - 1) / steps for i, name in enumerate(names)})
        if len(found) > MOST_POINTS:
            raise InputError(
                f"a grid of {points} points for {m} objectives has more than {MOST_POINTS} weights",
                "Give fewer points, or name the weights one by one.",
            )
    return found


def with_weights(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    """The recipe with other weights.

    Raises:
        InputError: its method has no weights, an objective is missing or unknown, or they are none that it can train.
    """
    spec = recipe.method
    if not isinstance(spec, WeightedSpec):
        raise InputError(f"the method {spec.name} has no weights to change", "Leave --weights out.")
    for name in weights:
        if name not in spec.objectives:
            raise InputError(f"the recipe has no objective {name!r}", nearest(name, spec.objectives))
    for name in spec.objectives:
        if name not in weights:
            raise InputError(f"the objective {name!r} has no weight", f"Add {name}=0 or more.")
    content = recipe.model_dump()
    for name, weight in weights.items():
        content["method"]["objectives"][name]["weight"] = weight
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        shown = ",".join(f"{name}={weight:g}" for name, weight in weights.items())
        raise InputError(f"weights {shown}: {said}", "Give weights from 0 up that sum to 1.") from None


def place_of(weights: Mapping[str, float]) -> str:
    """The folder of one point of a grid: `helpful-0.25-harmless-0.75`."""
    return "-".join(f"{name}-{weight:g}" for name, weight in weights.items())


def train_grid(
    recipe: Recipe,
    out: str | Path,
    grid: Sequence[Mapping[str, float]],
    *,
    resume: bool = False,
    force: bool = False,
    base: LoadedBase | None = None,
) -> list[Trained]:
    """Train an adapter for each weights of a grid, in folders below `out`; what is there already `resume` leaves alone.

    Reference log-probabilities are computed once for all of them.

    Raises:
        InputError, Interrupted, RunError: as `train`, before anything is trained where it can be told.
    """
    recipes = {place_of(weights): with_weights(recipe, weights) for weights in grid}
    if base is None:
        base = load_base(
            resolve_base(recipe.base.id, recipe.base.revision),
            quantization=recipe.base.quantization,
            compute_dtype=recipe.training.compute_dtype,
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    return [train(one, Path(out) / place, resume=resume, force=force, base=base) for place, one in recipes.items()]
