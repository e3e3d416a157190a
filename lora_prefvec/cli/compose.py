"""`extract`, `compose`, `fold`, `inspect`: from adapters to vectors, mixes, dense models, and what lies in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_prefvec.cli.options import writes
from lora_prefvec.errors import InputError
from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.artifact import Dtype, Ingredient, Provenance
    from lora_prefvec.vector import PreferenceVector

Command = TypeVar("Command", bound=Callable[..., Any])


def of_type(help_: str) -> Callable[[Command], Command]:
    """`--dtype` of what is written."""
    return click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help=help_)


def allow_mismatch(help_: str) -> Callable[[Command], Command]:
    """`--allow-mismatch`, which every refusal of a mismatch names."""
    return click.option("--allow-mismatch", is_flag=True, help=help_)


@click.command()
@click.argument("positive")
@click.argument("negative")
@writes("Folder for the vector.")
@of_type("Type of the factors; float32 where left out.")
@allow_mismatch("Take adapters of different bases, or with changed weights.")
def extract(
    positive: str, negative: str, out_: Path, dtype: Dtype | None, allow_mismatch: bool, force: bool, dry_run: bool
) -> None:
    """The vector of a pair: POSITIVE (labels as given) minus NEGATIVE (swapped), exactly.

    \b
    prefvec extract runs/helpful/positive runs/helpful/negative --out adapters/helpful
    """
    from lora_prefvec.artifact import check_target, extract_provenance, open_mix
    from lora_prefvec.vector import extract as difference

    check_target(out_, force)
    plus, minus = open_mix([(positive, 1.0), (negative, -1.0)], allow_mismatch=allow_mismatch)
    vector = difference(plus.adapter.vector, minus.adapter.vector)
    facts = extract_provenance(plus, minus, vector)
    recipe = plus.adapter.path / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    write(out_, vector, facts, [plus, minus], dtype or "float32", force, dry_run, recipe=text)


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF=COEF...")
@writes("Folder for the mix.")
@of_type("Type of the factors; float32, or that of the mix.yaml, where left out.")
@allow_mismatch("Take vectors of different bases, or with changed weights.")
def compose(
    refs: tuple[str, ...], out_: Path, dtype: Dtype | None, allow_mismatch: bool, force: bool, dry_run: bool
) -> None:
    """A mix as one adapter, exactly: factors side by side, coefficients folded in.

    The mix.yaml that it writes makes it again.

    \b
    prefvec compose helpful=1 harmless=0.5 --out mixes/gentle
    prefvec compose mixes/gentle/mix.yaml --out mixes/again
    """
    from lora_prefvec.artifact import check_target, mix_file, mix_provenance, open_mix, read_mix_file, reopen_mix
    from lora_prefvec.artifact import compose as combine
    from lora_prefvec.vector import parse_reference

    check_target(out_, force)
    if len(refs) == 1 and refs[0].endswith((".yaml", ".yml")):
        ingredients = reopen_mix(refs[0], allow_mismatch=allow_mismatch)
        dtype = dtype or read_mix_file(refs[0]).dtype
    else:
        ingredients = open_mix([parse_reference(ref) for ref in refs], allow_mismatch=allow_mismatch)
    vector = combine(ingredients)
    dtype = dtype or "float32"
    text = mix_file(ingredients, vector, out_, dtype).to_yaml()
    write(out_, vector, mix_provenance(ingredients, vector, "mix"), ingredients, dtype, force, dry_run, mix=text)


@click.command()
@click.argument("base")
@click.argument("refs", nargs=-1, required=True, metavar="REF=COEF...")
@writes("Folder for the model.")
@of_type("Type of the weights; as in the base where left out.")
@allow_mismatch("Fold vectors of another base, or with changed weights.")
def fold(
    base: str,
    refs: tuple[str, ...],
    out_: Path,
    dtype: Dtype | None,
    allow_mismatch: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """A mix folded into the dense weights of BASE: a model that needs no adapter.

    \b
    prefvec fold sandbox helpful=1 harmless=0.5 --out models/gentle
    """
    import torch

    from lora_prefvec.artifact import (
        check_same_base,
        check_target,
        identity_of,
        mix_provenance,
        open_mix,
        plan_fold,
        resolve_base,
    )
    from lora_prefvec.artifact import compose as combine
    from lora_prefvec.artifact import fold as fold_into
    from lora_prefvec.progress import progress
    from lora_prefvec.vector import parse_reference

    check_target(out_, force)
    folder = resolve_base(base)
    identity = identity_of(folder, base)
    ingredients = open_mix([parse_reference(ref) for ref in refs], allow_mismatch=allow_mismatch)
    for ingredient in ingredients if not allow_mismatch else []:
        fix = "Fold into the base of the vector, or go on at your own risk with --allow-mismatch."
        check_same_base((ingredient.ref, ingredient.adapter.vector.identity), (base, identity), fix)
    vector = combine(ingredients)
    plan = plan_fold(folder, vector, getattr(torch, dtype) if dtype else None)
    result = {"out": str(out_), "base": identity.id, "modules": len(vector.deltas), "bytes": plan.size}
    what = f"{identity.id} {mix_text(ingredients)}, {len(vector.deltas)} matrices changed, {shown_size(plan.size)}"
    if dry_run:
        out.result({"dry_run": True, **result}, text=f"would write {out_}: {what}")
        return
    facts = mix_provenance(ingredients, vector, "fold").model_copy(update={"base": identity})
    protect(out_, [folder, *(ingredient.adapter.path for ingredient in ingredients)])
    with progress("folding", plan.tensors) as bar:
        kept = fold_into(plan, vector, out_, facts, force=force, advance=bar.advance)
    out.result({**result, "delta_kept": kept}, text=f"wrote {out_}: {what}. {kept:.1%} of the delta kept by the type")
    if kept < 0.8:
        out.warn(f"rounding took {1 - kept:.0%} of the delta; --dtype float32 keeps it")


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@allow_mismatch("Compare vectors of different bases, or with changed weights.")
def inspect(refs: tuple[str, ...], allow_mismatch: bool) -> None:
    """Norms, ranks, cosines and provenance of vectors.

    \b
    prefvec inspect helpful
    prefvec inspect helpful harmless concise
    """
    from lora_prefvec.artifact import describe, open_mix
    from lora_prefvec.vector import cosine_matrix

    found = open_mix([(ref, 1.0) for ref in refs], allow_mismatch=allow_mismatch)
    reports = [describe(ingredient) for ingredient in found]
    cosines = cosine_matrix([ingredient.adapter.vector for ingredient in found]).tolist()
    if out.format == "json":
        out.result({"vectors": reports, "cosines": cosines} if len(found) > 1 else reports[0])
        return
    if len(found) == 1:
        show_one(reports[0], found[0])
        return
    columns = ["vector", "preference", "kind", "base", "norm", "rank", "effective rank", "modules"]
    keys = ["ref", "preference", "kind", "base", "norm", "rank", "effective_rank", "modules"]
    rows = [[str(entry[key]).replace("_", " ") if key == "kind" else entry[key] for key in keys] for entry in reports]
    out.table(columns, rows, title="vectors")
    rows = [[ref, *(round(cosine, 4) for cosine in line)] for ref, line in zip(refs, cosines, strict=True)]
    out.table(["cosine", *refs], rows, title="cosines of the dense deltas")


def show_one(entry: dict[str, Any], ingredient: Ingredient) -> None:
    """One vector for a reader: facts, module types, largest modules."""
    if out.format == "human":
        for name, value in facts_of(entry, ingredient.adapter.provenance):
            print(f"{name:<15} {value}")
    keys = ["type", "modules", "norm", "share", "rank", "effective_rank"]
    rows = [
        [*(kind[key] for key in keys[:3]), f"{kind['share']:.1%}", *(kind[key] for key in keys[4:])]
        for kind in entry["types"]
    ]
    note = "share: of the squared norm; effective rank: exp of the spectrum's entropy, mean over the modules"
    out.table(["module type", "modules", "norm", "share", "rank", "effective rank"], rows, note=note)
    if out.format == "human":
        out.table(["largest modules", "norm"], [[module["module"], module["norm"]] for module in entry["top"]])


def facts_of(entry: dict[str, Any], facts: Provenance | None) -> list[tuple[str, str]]:
    """Provenance as lines of name and value."""
    lines = [("vector", entry["ref"]), ("kind", str(entry["kind"]).replace("_", " "))]
    if facts:
        lines.append(("preference", facts.preference or "-"))
        made = [facts.method or "", {"pair": "two runs", "two": "one two-sided run"}.get(facts.sides or "", "")]
        lines.append(("method", ", ".join(filter(None, made)) or "-"))
    base = facts.base if facts else None
    lines.append(("base", (entry["base"] or "unknown") + (f"@{base.revision[:12]}" if base and base.revision else "")))
    if facts and facts.data:
        rows = f", {facts.data.rows:,} pairs" if facts.data.rows is not None else ""
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
            ("made from", f"{one.coefficient:+g} x {one.name} ({(one.sha256 or 'unknown')[:12]})")
            for one in facts.parents
        ]
        lines += [(name, "-" if value is None else f"{value:.4g}") for name, value in facts.metrics.items()]
    lines.append(("weights", f"SHA-256 {entry['weights_sha256'][:12]}..."))
    return [
        *lines,
        ("norm", f"{entry['norm']:.4g}"),
        ("rank", f"{entry['rank']} ({entry['effective_rank']:.1f} effective)"),
    ]


def write(
    target: Path,
    vector: PreferenceVector,
    facts: Provenance,
    ingredients: list[Ingredient],
    dtype: Dtype,
    force: bool,
    dry_run: bool,
    *,
    recipe: str | None = None,
    mix: str | None = None,
) -> None:
    """Write a vector as an adapter, or say what would be written."""
    import torch

    from lora_prefvec.artifact import plan_adapter, write_adapter

    protect(target, [ingredient.adapter.path for ingredient in ingredients])
    kind: torch.dtype = getattr(torch, dtype)
    if dry_run:
        plan = plan_adapter(vector, dtype=kind)
    else:
        plan = write_adapter(target, vector, facts, recipe=recipe, mix=mix, dtype=kind, force=force)
    what = f"{mix_text(ingredients)}, rank {plan.rank} on {plan.modules} modules, {shown_size(plan.size)}"
    result = {"out": str(target), "kind": facts.kind, "norm": vector.norm(), **asdict(plan)}
    text = f"{'would write' if dry_run else 'wrote'} {target}: {what}"
    out.result({"dry_run": dry_run, **result}, text=text)
    if plan.cast_error:
        out.note(f"{dtype} changes the vector by {plan.cast_error:.2%} of its norm")
    if plan.incomplete:
        missing = plan.incomplete[0]
        out.warn(f"{missing} is left out, as its shape is unknown without the base; SGLang cannot serve the folder")


def protect(target: Path, sources: Sequence[Path]) -> None:
    """Refuse to replace a folder by something that is made from what lies in it."""
    place = target.expanduser().resolve()
    for source in sources:
        if place in source.resolve().parents:
            raise InputError(f"replacing {target} would remove {source}, which is read", "Choose another --out.")


def mix_text(ingredients: Sequence[Ingredient]) -> str:
    """`+1 helpful -0.5 harmless`."""
    return " ".join(f"{ingredient.coefficient:+g} {ingredient.name}" for ingredient in ingredients)


def shown_size(size: int) -> str:
    """Bytes as a person reads them."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if size >= unit), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
