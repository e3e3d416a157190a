"""`sweep`: many mixes over the same prompts, scored; their front, and a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_prefvec.cli.live import Live, Quantization, find_live
from lora_prefvec.cli.measure import asked_scorers, base_facts, command_line, find_questions, loader, measures
from lora_prefvec.cli.options import live_mix, writes
from lora_prefvec.errors import InputError
from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.evaluation import Score, Summary
    from lora_prefvec.evaluation.design import Kind, Range

RANGE = re.compile(r"(?P<ref>.+)=(?P<range>[^=,]*:[^=,]*)(?P<options>(,.*)?)", re.DOTALL)
SHOWN = 64  # mixes that the table on the terminal holds; of more, only the front


@click.command()
@live_mix
@measures
@click.option(
    "--design",
    "kind",
    type=click.Choice(["grid", "sobol", "line"]),
    default="grid",
    show_default=True,
    help="Every combination of steps; points spread evenly; or all ranges gone through together.",
)
@click.option("--points", type=click.IntRange(min=2), help="How many mixes sobol or line try.")
@click.option("--n", type=click.IntRange(min=1), default=1, show_default=True, help="Replies to each prompt.")
@click.option("--axis", "axes", multiple=True, help="A scorer that spans the front; may be given again.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Replies written side by side."
)
@writes("Folder for results.parquet, summary.json and report.html; a sweep that was stopped there goes on.")
def sweep(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    prompts: str | None,
    limit: int | None,
    scorers: tuple[str, ...],
    kind: Kind,
    points: int | None,
    axes: tuple[str, ...],
    batch_size: int,
    out_: Path,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Many mixes over the same prompts, scored; their front, and a report.

    REF=LOW:HIGH:STEP tries a vector at every step, REF=COEF leaves it where it is. The base loads once and writes all
    mixes side by side; its own replies are always among them.

    \b
    prefvec sweep sandbox-helpful=-1:2:0.5 sandbox-harmless=-1:2:0.5 --out sweep
    prefvec sweep helpful=0:2 harmless=0:2 --design sobol --points 32 --prompts p.jsonl --out sweep
    """
    from lora_prefvec.evaluation.design import design
    from lora_prefvec.evaluation.folder import check_folder, fill_folder
    from lora_prefvec.evaluation.rows import Plan
    from lora_prefvec.evaluation.scorers import fingerprint
    from lora_prefvec.evaluation.store import digest
    from lora_prefvec.evaluation.summary import choose_axes

    live, ranges, fixed = find_ranges(refs, base, quantization, allow_mismatch)
    mixes = design(kind, ranges, fixed, points=points, seed=settings["seed"])
    found = asked_scorers(scorers, live.base)
    choose_axes(found, list(ranges), axes)
    questions = find_questions(prompts, limit, live.base)
    plan = Plan(mixes, [one.record for one in questions], **settings)
    asked = {
        "base": base_facts(live),
        "vectors": {
            name: {"ref": one.ref, "sha256": one.adapter.sha256, "filter": str(one.filter)}
            for name, one in live.ingredients.items()
        },
        "mixes": {"design": kind, "number": len(mixes), "digest": digest(mixes)},
        "prompts": {"number": len(questions), "digest": digest(list(plan.prompts))},
        "settings": {**settings, "batch_size": batch_size},
        "scorers": {scorer.name: fingerprint(scorer) for scorer in found},
        "axes": list(axes),
    }
    check_folder(out_, asked, force)
    if dry_run:
        out.result({"mixes": len(mixes), "prompts": len(questions), "replies": len(plan.rows), "out": str(out_)})
        return
    summary = fill_folder(
        out_, plan, found, loader(live, questions), asked, command=command_line(), axes=axes, batch_size=batch_size
    )
    show(summary, out_)


def find_ranges(
    refs: Sequence[str], base: str | None, quantization: Quantization | None, allow_mismatch: bool
) -> tuple[Live, dict[str, Range], dict[str, float]]:
    """The base and vectors, the ranges of those that have one, and the coefficients of the others, both by name.

    Raises:
        InputError: as `find_live` and `parse_range`, or a vector is named twice.
    """
    from lora_prefvec.evaluation.design import parse_range

    matches = [RANGE.fullmatch(ref) for ref in refs]
    terms = [f"{match['ref']}=1{match['options']}" if match else ref for ref, match in zip(refs, matches, strict=True)]
    live = find_live(terms, base, quantization, allow_mismatch)
    if any(matches) and len(live.ingredients) != len(refs):
        raise InputError("a vector stands there twice, or a mix with a range", "Name every vector once.")
    ranges, fixed = {}, {}
    for number, (name, coefficient) in enumerate(live.numbers.items()):
        match = matches[number] if number < len(matches) else None
        if match:
            ranges[name] = parse_range(name, match["range"].strip())
        else:
            fixed[name] = coefficient
    return live, ranges, fixed


def show(summary: Summary, folder: Path) -> None:
    """The mixes with their scores, and what the front is worth."""
    report = folder / "report.html"
    if out.format == "json":
        out.result({**summary.to_dict(), "out": str(folder)})
        return
    names = list(summary.points[0].mix)
    shown = set(range(len(summary.points)))
    if len(shown) > SHOWN:
        shown = {*summary.front, *([] if summary.base is None else [summary.base])}
    axes = [scorer.name for scorer in summary.scorers]
    note = f"front of {', '.join(summary.axes)}: *"
    if len(shown) < len(summary.points):
        note += f"; the other {len(summary.points) - len(shown)} mixes stand in {report}"
    out.table(
        [*map(head, names), *(axis.replace("_", " ") for axis in axes), "front"],
        [
            [*point.mix.values(), *(cell(point.scores[axis]) for axis in axes), mark(summary, i)]
            for i, point in enumerate(summary.points)
            if i in shown
        ],
        note=note,
    )
    if out.format == "human":
        if summary.hypervolume is not None:
            print(f"Hypervolume of the front against the base: {summary.hypervolume:.4g}")
        print(f"Report: {report}")


def head(name: str) -> str:
    """The name of a vector above its coefficients, in as narrow a column as it can have."""
    return f"{name}=".replace("-", "-\n")


def cell(score: Score) -> str | None:
    """A mean with half the width of its interval."""
    if score.mean is None or score.low is None or score.high is None:
        return None if score.mean is None else f"{score.mean:.3g}"
    return f"{score.mean:.2f} ±{(score.high - score.low) / 2:.2f}"


def mark(summary: Summary, index: int) -> str:
    """What a mix is among the others."""
    return " ".join(filter(None, ["*" if index in summary.front else "", "base" if index == summary.base else ""]))
