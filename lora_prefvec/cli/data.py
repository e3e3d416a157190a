"""`prefvec data`: what is in a set of preference pairs, before training on it. The text of a row is never printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_prefvec.cli.options import writes
from lora_prefvec.errors import InputError
from lora_prefvec.output import out
from lora_prefvec.progress import progress

if TYPE_CHECKING:
    from lora_prefvec.data import PairSet, Statistics
    from lora_prefvec.data.describe import CountTokens


@click.command("data")
@click.argument("source", metavar="FILE")
@click.option("--form", help="Published form, such as hh-rlhf or pku-saferlhf:harmless; detected where left out.")
@click.option("--split", default="train", show_default=True, help="Split of a Hub data set.")
@click.option("--columns", metavar="prompt=A,chosen=B,rejected=C", help="Names of the columns in the data.")
@click.option("--attribute", help="Rating to prefer by: honesty, helpfulness, ...")
@click.option("--margin", type=float, default=0.0, show_default=True, help="Least difference of the two ratings.")
@click.option("--strict", is_flag=True, help="A row that cannot become a pair is an error.")
@click.option("--tokenizer", metavar="REF", help="Count tokens too: a folder, a Hub id, or sandbox.")
@writes("File to write the pairs to, as JSONL in TRL's form.", required=False)
def data_command(
    source: str,
    form: str | None,
    split: str,
    columns: str | None,
    attribute: str | None,
    margin: float,
    strict: bool,
    tokenizer: str | None,
    out_: Path | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Show what is in a set of preference pairs.

    FILE is a local file (.json, .jsonl, .csv, .gz of these, .parquet), a Hub id owner/name[/part][@revision], or
    name:part of an installed source, such as sandbox:helpful.

    \b
      prefvec data pairs.jsonl.gz
      prefvec data PKU-Alignment/PKU-SafeRLHF --form pku-saferlhf:harmless --tokenizer meta-llama/Llama-3.2-3B-Instruct
      prefvec data own.csv --columns prompt=question,chosen=good,rejected=bad
    """
    from lora_prefvec.data import load, statistics

    if out_ is not None:
        from lora_prefvec.artifact import check_target

        check_target(out_, force)
    pairs = load(
        source,
        split=split,
        form=form,
        columns=parse_columns(columns) if columns else None,
        attribute=attribute,
        margin=margin,
        strict=strict,
    )
    if tokenizer:
        with progress("counting tokens", len(pairs)) as bar:
            facts = statistics(pairs, token_counter(tokenizer, bar.advance))
    else:
        facts = statistics(pairs)
    if out_ is not None and not dry_run:
        write_pairs(pairs, out_, force=force)
    report(pairs, facts, detected=form is None)
    if pairs.form.startswith("trl-standard"):
        out.note("Strings are continued as they are, without a chat template. As turns: --form trl-conversational")
    if out_ is not None:
        out.note(f"{'Would write' if dry_run else 'Wrote'} {len(pairs)} pairs to {out_}")


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,chosen=a` -> {"prompt": "question", "chosen": "a"}."""
    columns = {}
    for part in text.split(","):
        ours, equals, theirs = part.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise InputError(f"cannot read --columns {text!r}", "Write prompt=QUESTION,chosen=A,rejected=B.")
        columns[ours.strip()] = theirs.strip()
    return columns


def token_counter(ref: str, counted: Any) -> CountTokens:
    """How many tokens a pair has once rendered as for training; calls `counted()` after each pair.

    Only the tokenizer of `ref` is fetched, never its weights.
    """
    from transformers import AutoTokenizer

    from lora_prefvec.artifact.reference import SANDBOX, resolve_base
    from lora_prefvec.inference.render import render

    folder = resolve_base(ref) if ref == SANDBOX else Path(ref).expanduser()
    local = folder.is_dir()
    name, _, revision = (str(folder), "", "") if local else ref.partition("@")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except Exception:
        # transformers raises OSError, ValueError, KeyError and others, each with a paragraph for its own users.
        if local:
            raise InputError(f"{ref} holds no tokenizer that can be read", "Give one with tokenizer.json.") from None
        raise InputError(
            f"no folder {ref!r}, and no tokenizer of that name on the Hub or no way to reach it",
            "Give a folder with tokenizer.json, a Hub id, or sandbox.",
        ) from None

    def count(pair: Any) -> tuple[int, int, int]:
        prompt, chosen, rejected = render(pair, tokenizer)
        counted()
        return len(prompt), len(chosen), len(rejected)

    return count


def write_pairs(pairs: PairSet, target: Path, *, force: bool) -> None:
    """Write pairs as JSONL, one object of prompt, chosen and rejected a line."""
    from lora_prefvec.artifact import atomic_file

    with atomic_file(target, force) as place, place.open("w", encoding="utf-8") as stream:
        for pair in pairs.pairs:
            stream.write(json.dumps(pair.as_dict(), ensure_ascii=False) + "\n")


def report(pairs: PairSet, facts: Statistics, *, detected: bool) -> None:
    """Print the facts: one document as JSON, lines and two tables for a reader."""
    numbers = facts.as_dict()
    head = {
        "source": pairs.source,
        "revision": pairs.revision,
        "form": pairs.form,
        "form_detected": detected,
        "rows_read": pairs.rows_read,
        "skipped_rows": sum(pairs.skipped.values()),
    }
    detail = {"skipped": pairs.skipped, "first_skipped_rows": pairs.first_rows, "sha256": pairs.sha256}
    if out.format != "human":
        out.result({**head, **numbers, **detail})
        return
    wins = f"{facts.longer_wins:.1%} of pairs whose replies differ in length" if facts.longer_wins is not None else "-"
    lines = {
        "source": pairs.source + (f" @ {pairs.revision}" if pairs.revision else ""),
        "form": pairs.form + (" (detected)" if detected else " (named)"),
        "rows read": pairs.rows_read,
        "pairs": f"{facts.pairs} on {facts.prompts} prompts",
        "skipped": f"{head['skipped_rows']} rows",
        "duplicates": f"{facts.duplicates} pairs repeat an earlier one",
        "contradictions": f"{facts.contradictions} (A over B and B over A, same prompt)",
        "longer wins": wins,
        "sha256": pairs.sha256,
    }
    out.result(head, text="\n".join(f"{name:<16}{value}" for name, value in lines.items()))
    if pairs.skipped:
        rows = [[reason, count, pairs.first_rows[reason]] for reason, count in pairs.skipped.items()]
        out.table(["skipped because", "rows", "first row"], rows)
    lengths = [
        [part, unit, length.median, length.p95, length.max]
        for unit, counts in (("characters", facts.characters), ("tokens", facts.tokens))
        for part, length in (counts or {}).items()
    ]
    out.table(["length", "in", "median", "p95", "max"], lengths)
