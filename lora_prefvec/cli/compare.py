"""`prefvec compare`: methods side by side, their fronts and what they cost."""

from __future__ import annotations

from pathlib import Path

import click

from lora_prefvec.cli.measure import command_line, find_questions
from lora_prefvec.cli.train import find_recipe
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.output import out

NARROW = ("seeds", "MB", "tokens", "seconds")  # left out of a terminal's table


@click.command()
@click.argument("file")
@click.option("--out", "out_", type=click.Path(path_type=Path), required=True, help="Folder of all that is made.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path),
    help="Folder of all that is trained, which several comparisons may share; in OUT where left out.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="METHOD",
    help="Of FILE's methods this one; may be given again. Processes with methods of their own may share a folder.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be trained.")
def compare(file: str, out_: Path, artifacts: Path | None, only: tuple[str, ...], dry_run: bool) -> None:
    """Methods side by side, as FILE says: fronts, hypervolumes, and what each took.

    FILE is a YAML file or the name of a shipped one.

    Trains what is missing, sweeps each method's knob over the same prompts, and reports. A comparison that was stopped
    goes on with the same command, and what is trained already is shared by all methods and by later comparisons there.
    Where FILE asks for it, each method first gets the best of several learning rates.

    \b
    prefvec compare compare/helpful-harmless --out comparison
    """
    from lora_prefvec.experiments import compare as run
    from lora_prefvec.experiments import read_comparison, table, write_report
    from lora_prefvec.experiments.artifacts import folder_of, recipes_of, tried

    comparison = read_comparison(find_comparison(file))
    for name in only:
        if name not in comparison.methods:
            raise InputError(f"{file} has no method {name!r}", nearest(name, comparison.methods))
    if only:
        methods = {name: spec for name, spec in comparison.methods.items() if name in only}
        comparison = comparison.model_copy(update={"methods": methods})
    questions = find_questions(comparison.sweep.prompts, comparison.sweep.limit, comparison.base.id)
    rates, artifacts = comparison.rates, artifacts or out_ / "artifacts"
    validation = find_questions(rates.prompts, rates.limit, comparison.base.id) if rates else []
    if dry_run:  # whatever rates win, there will be as many artifacts
        specs = list(comparison.methods.values())
        asked = [(spec, seed, 1.0) for spec in specs for seed in comparison.seeds]
        factors = rates.factors if rates else []
        asked += [(tried(spec), comparison.seeds[0], factor) for spec in specs if spec.rates for factor in factors]
        wanted = {
            folder_of(recipe, artifacts)
            for spec, seed, factor in asked
            for recipe in recipes_of(spec, seed, find_recipe, factor).values()
        }
        missing = [folder for folder in wanted if not (folder / "prefvec.json").is_file()]
        out.result({"artifacts": len(wanted), "to_train": len(missing), "prompts": len(questions), "out": str(out_)})
        return
    compared = run(
        comparison,
        out_,
        [one.record for one in questions],
        find_recipe,
        validation=[one.record for one in validation],
        artifacts=artifacts,
    )
    written = write_report(out_, compared, command_line())
    columns, rows = table(compared)
    if out.format == "human":  # the whole of it is in the report
        kept = [i for i, column in enumerate(columns) if not column.endswith("front") and column not in NARROW]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    out.table(columns, rows)
    if out.format == "human":
        print(f"Report: {written[0]}")


def find_comparison(name: str) -> Path:
    """A comparison's file as given, or the shipped one of that name.

    Raises:
        InputError: there is neither.
    """
    from lora_prefvec.artifact import shipped

    recipes = shipped("recipes")
    known = {f"compare/{file.stem}": file for file in (recipes / "compare").glob("*.yaml")}
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise InputError(f"there is no comparison {name!r}", nearest(name, known))
    return known[name]
