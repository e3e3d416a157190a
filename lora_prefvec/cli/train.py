"""`prefvec train`: recipe -> artifact, or one artifact for each of several weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_prefvec.cli.options import writes
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.recipe import Recipe


@click.command()
@click.argument("recipe")
@writes("Folder of the artifact that is made; with --weights, of several.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: training.beta=0.2")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped or killed.")
@click.option(
    "--weights",
    multiple=True,
    metavar="N | NAME=W,...",
    help="Train one adapter for each weights of the objectives: an even grid of N, or as named, several times.",
)
def train(
    recipe: str,
    out_: Path,
    force: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
    resume: bool,
    weights: tuple[str, ...],
) -> None:
    """Train what RECIPE describes, a YAML file or the name of a shipped recipe.

    \b
    prefvec train sandbox-helpful --out helpful
    prefvec train my-recipe.yaml --out concise --set training.beta=0.2
    prefvec train sandbox-raco --out front --weights 5
    """
    from lora_prefvec.recipe import read_recipe

    parsed = read_recipe(find_recipe(recipe), overrides)
    grid = parse_weights(parsed, weights)
    if dry_run:
        from lora_prefvec.artifact import check_output, resolve_base
        from lora_prefvec.inference.base import check_causal_lm
        from lora_prefvec.training import plan

        check_output(out_, force)
        check_causal_lm(resolve_base(parsed.base.id, parsed.base.revision))
        foretold = {"out": str(out_), **plan(parsed)}
        out.result({**foretold, "weights": grid} if grid else foretold)
        return
    from lora_prefvec.training import train as train_one
    from lora_prefvec.training import train_grid

    if grid:
        made = train_grid(parsed, out_, grid, resume=resume, force=force)
        names = list(grid[0])
        measured = [f"held_out_accuracy.{name}" for name in names]
        rows = [
            [str(one.folder), *(weights[name] for name in names), *(one.metrics.get(name) for name in measured)]
            for weights, one in zip(grid, made, strict=True)
        ]
        out.table(["out", *names, *(name.replace("_", " ") for name in measured)], rows)
        return
    trained = train_one(parsed, out_, resume=resume, force=force)
    metrics = {name: value for name, value in trained.metrics.items() if value is not None}
    kind = "vector" if parsed.method.name == "preference_vector" else "adapter"
    lines = [f"{parsed.preference}: {kind} of rank {trained.vector.rank} in {trained.folder}"]
    lines += [f"  {name.replace('_', ' ')}: {value:g}" for name, value in metrics.items()]
    lines.append(f"Talk to it: prefvec chat {out_}=1.0")
    out.result({"out": str(trained.folder), "rank": trained.vector.rank, **metrics}, text="\n".join(lines))


def parse_weights(recipe: Recipe, given: Sequence[str]) -> list[dict[str, float]]:
    """`--weights` as weights: a number is an even grid over the recipe's objectives.

    Raises:
        InputError: they are neither a number nor NAME=W,..., or not such that the recipe's method could train them.
    """
    from lora_prefvec.recipe import ModpoSpec, WeightedSpec
    from lora_prefvec.training import lattice, with_weights

    grid: list[dict[str, float]] = []
    for one in given:
        if one.isdigit() and isinstance(recipe.method, WeightedSpec):
            points = lattice(list(recipe.method.objectives), int(one))
            if isinstance(recipe.method, ModpoSpec):  # divides by the weight of its main objective
                points = [point for point in points if point[recipe.method.main]]
            grid += points
            continue
        try:
            pairs = [part.split("=") for part in one.split(",")]
            grid.append({name: float(weight) for name, weight in pairs})
        except ValueError:
            raise InputError(f"--weights {one!r} says no weights", "Write 5, or helpful=0.3,harmless=0.7.") from None
    for point in grid:
        with_weights(recipe, point)
    return grid


def find_recipe(name: str) -> Path:
    """A recipe file as given, or the shipped recipe of that name.

    Raises:
        InputError: there is neither.
    """
    from lora_prefvec.artifact import shipped

    if Path(name).is_file():
        return Path(name)
    recipes = shipped("recipes")
    if (recipes / f"{name}.yaml").is_file():
        return recipes / f"{name}.yaml"
    raise InputError(f"there is no recipe {name!r}", nearest(name, {file.stem for file in recipes.glob("*.yaml")}))
