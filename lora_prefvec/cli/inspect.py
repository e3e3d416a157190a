"""`inspect`: what lies in a vector, and how several lie to each other, as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.artifact import Provenance

PAIRS_SHOWN = 6  # of the cosines by layer: more columns than that no line holds
VECTORS_SHOWN = 8  # of the norms by layer


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option("--allow-mismatch", is_flag=True, help="Compare vectors of different bases, or with changed weights.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="DIR_OR_FILE",
    help="Draw it: one picture each in a folder, or all in one FILE.png.",
)
def inspect(refs: tuple[str, ...], allow_mismatch: bool, plot: Path | None) -> None:
    """Norms, ranks, spectra and provenance of a vector; cosines and interference of several.

    \b
    prefvec inspect helpful
    prefvec inspect helpful harmless concise --plot pictures
    """
    from lora_prefvec.artifact import compare, describe, open_mix

    found = open_mix([(ref, 1.0) for ref in refs], allow_mismatch=allow_mismatch)
    vectors = [ingredient.adapter.vector for ingredient in found]
    reports = [describe(ingredient) for ingredient in found]
    drawn: list[Path] = []
    if plot is not None:
        from lora_prefvec.evaluation import plot_vectors

        drawn = plot_vectors(plot, dict(zip(refs, vectors, strict=True)))
    pictures = {"pictures": [str(file) for file in drawn]} if drawn else {}
    if len(found) == 1:
        if out.format == "json":
            out.result({**reports[0], **pictures})
        else:
            show_one(reports[0], found[0].adapter.provenance)
    else:
        between = compare(vectors)
        if out.format == "json":
            out.result({"vectors": reports, **between, **pictures})
        else:
            show_several(reports, between)
    for file in drawn:
        out.note(f"drew {file}")


def show_one(entry: dict[str, Any], facts: Provenance | None) -> None:
    """One vector for a reader: facts, module types, layers, energy by rank, largest modules."""
    if out.format == "human":
        lines = facts_of(entry, facts)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"{name:<{width}} {value}")
    keys = ["modules", "norm", "share", "rank", "effective_rank"]
    columns = [key.replace("_", " ") for key in keys]
    for label, groups, note in (
        ("module type", [(kind["type"], kind) for kind in entry["types"]], ""),
        (
            "layer",
            [(layer_name(layer["layer"]), layer) for layer in entry["layers"]],
            "share: of the squared norm; effective rank: exp of the spectrum's entropy, mean over the modules",
        ),
    ):
        rows = [
            [name, *(f"{group[key]:.1%}" if key == "share" else group[key] for key in keys)] for name, group in groups
        ]
        out.table([label, *columns], rows, note=note)
    show_energy([entry])
    if out.format == "human":
        out.table(["largest modules", "norm"], [[module["module"], module["norm"]] for module in entry["top"]])


def show_several(reports: Sequence[dict[str, Any]], between: dict[str, Any]) -> None:
    """Several vectors for a reader: each in a line, their angles, and where in the depth they meet."""
    names = [entry["ref"] for entry in reports]
    numbers = [str(i) for i in range(1, len(names) + 1)]
    keys = ["ref", "preference", "kind", "base", "norm", "rank", "effective_rank", "modules"]
    columns = ["vector", *(key.replace("_", " ") for key in keys[1:])]
    rows = [[str(entry[key]).replace("_", " ") if key == "kind" else entry[key] for key in keys] for entry in reports]
    if len({entry["base"] for entry in reports}) == 1 and out.format == "human":
        rows, columns = [[*row[:3], *row[4:]] for row in rows], [*columns[:3], *columns[4:]]
        print(f"base  {reports[0]['base'] or 'unknown'}")
    out.table(["", *columns], [[number, *row] for number, row in zip(numbers, rows, strict=True)], title="vectors")
    rows = [
        [number, name, *(round(cosine, 4) for cosine in line)]
        for number, name, line in zip(numbers, names, between["cosines"], strict=True)
    ]
    out.table(["", "vector", *numbers], rows, title="cosines of the dense deltas")
    kinds = list(dict.fromkeys(kind["type"] for entry in reports for kind in entry["types"]))
    by_kind = [{kind["type"]: kind["norm"] for kind in entry["types"]} for entry in reports]
    out.table(["module type", *numbers], [[kind, *(one.get(kind) for one in by_kind)] for kind in kinds], title="norms")
    show_energy(reports)
    show_layers(reports, between)
    figure = between["subspace_interference"]
    modules = f"mean of the {len(figure['by_module'])} largest modules, rank 8"
    if out.format == "human":
        print(f"subspace task interference  {figure['mean']:.4g}  ({modules})")
    else:
        out.table(["sti", "value"], [["subspace task interference", figure["mean"]]])


def show_energy(reports: Sequence[dict[str, Any]]) -> None:
    """What truncation keeps: ranks across, vectors down."""
    ranks = sorted({rank for entry in reports for rank in entry["energy"]})
    if not ranks:
        return
    rows = [[entry["ref"], *(f"{entry['energy'].get(rank, 1.0):.1%}" for rank in ranks)] for entry in reports]
    out.table(["energy kept at rank", *map(str, ranks)], rows)


def show_layers(reports: Sequence[dict[str, Any]], between: dict[str, Any]) -> None:
    """Norms and cosines by layer; of many pairs the one that opposes most."""
    norms = [{layer["layer"]: layer["norm"] for layer in entry["layers"]} for entry in reports]
    numbers = [str(i) for i in range(1, len(reports) + 1)] if len(reports) <= VECTORS_SHOWN else []
    labels = [f"{i + 1}·{j + 1}" for i, j in between["pairs"]]
    many = len(labels) > PAIRS_SHOWN
    rows = []
    for entry in between["interference"]:
        sizes = [one.get(entry["layer"]) for one in norms] if numbers else []
        cosines = entry["cosines"]
        worst = min(range(len(cosines)), key=cosines.__getitem__)
        shown = [labels[worst], f"{cosines[worst]:+.3f}"] if many else [f"{cosine:+.3f}" for cosine in cosines]
        rows.append([layer_name(entry["layer"]), *sizes, *shown])
    angles = ["worst pair", "its cosine"] if many else labels
    note = "a negative cosine undoes, a positive one doubles"
    title = f"{'norms and ' if numbers else ''}cosines of pairs by layer"
    out.table(["layer", *numbers, *angles], rows, title=title, note=note)


def layer_name(layer: int | None) -> str:
    """A layer's number, or what lies outside the layers."""
    return "outside" if layer is None else str(layer)


def facts_of(entry: dict[str, Any], facts: Provenance | None) -> list[tuple[str, str]]:
    """Provenance as lines of name and value."""
    from lora_prefvec.artifact import told
    from lora_prefvec.vector import written_coefficient

    lines = [("vector", entry["ref"]), ("kind", str(entry["kind"]).replace("_", " "))]
    if facts:
        lines.append(("preference", facts.preference or "-"))
        made = [facts.method or "", {"pair": "two runs", "two": "one two-sided run"}.get(facts.sides or "", "")]
        lines.append(("method", ", ".join(filter(None, made)) or "-"))
        if facts.condition:
            lines.append(("conditions", told(facts.condition)))
    base = facts.base if facts else None
    lines.append(("base", (entry["base"] or "unknown") + (f"@{base.revision[:12]}" if base and base.revision else "")))
    if facts and facts.data:
        rows = f", {facts.data.rows:,} {facts.counted}" if facts.data.rows is not None else ""
        lines.append(("data", f"{facts.data.id}{rows}{', swapped' if facts.data.swapped else ''}"))
    if facts and facts.training:
        names = {"beta": "beta", "learning_rate": "lr", "steps": "steps", "seed": "seed"}
        said = [
            f"{short} {getattr(facts.training, name):g}"
            for name, short in names.items()
            if getattr(facts.training, name) is not None
        ]
        lines.append(("training", ", ".join(said) or "-"))
    if facts:
        lines += [
            ("made from", f"{written_coefficient(one.coefficient)} x {one.name} ({(one.sha256 or 'unknown')[:12]})")
            for one in facts.parents
        ]
        lines += [(name, "-" if value is None else f"{value:.4g}") for name, value in facts.metrics.items()]
    lines.append(("weights", f"SHA-256 {entry['weights_sha256'][:12]}..."))
    return [
        *lines,
        ("norm", f"{entry['norm']:.4g}"),
        ("rank", f"{entry['rank']} ({entry['effective_rank']:.1f} effective)"),
    ]
