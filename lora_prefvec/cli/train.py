"""`prefvec train`: recipe -> adapters and vector."""

from __future__ import annotations

from pathlib import Path

import click

from lora_prefvec.cli.options import writes
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.output import out


@click.command()
@click.argument("recipe")
@writes("Folder of the vector that is made.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe: training.beta=0.2")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped or killed.")
def train(recipe: str, out_: Path, force: bool, dry_run: bool, overrides: tuple[str, ...], resume: bool) -> None:
    """Train a preference vector from RECIPE, a YAML file or the name of a shipped recipe.

    \b
    prefvec train sandbox-helpful --out helpful
    prefvec train my-recipe.yaml --out concise --set training.beta=0.2
    """
    from lora_prefvec.recipe import read_recipe

    parsed = read_recipe(find_recipe(recipe), overrides)
    if dry_run:
        from lora_prefvec.artifact import check_output, resolve_base
        from lora_prefvec.inference.base import check_causal_lm
        from lora_prefvec.training import plan

        check_output(out_, force)
        check_causal_lm(resolve_base(parsed.base.id, parsed.base.revision))
        out.result({"out": str(out_), **plan(parsed)})
        return
    from lora_prefvec.training import train as train_vector

    trained = train_vector(parsed, out_, resume=resume, force=force)
    accuracy = {name: value for name, value in trained.metrics.items() if value is not None}
    lines = [f"{parsed.preference}: vector of rank {trained.vector.rank} in {trained.folder}"]
    lines += [f"  {name.replace('_', ' ')}: {value:g}" for name, value in accuracy.items()]
    lines.append(f"Talk to it: prefvec chat {out_}=1.0")
    out.result({"out": str(trained.folder), "rank": trained.vector.rank, **accuracy}, text="\n".join(lines))


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
