"""From a source to its pairs, or its rated replies: the two functions that recipes and verbs call."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora_prefvec.data.files import read_file, suffix_of
from lora_prefvec.data.forms import ascii_safe, choose_form, columns_of, convert
from lora_prefvec.data.messages import EQUAL
from lora_prefvec.data.pairs import Pair, PairSet
from lora_prefvec.data.rated import RATED_FORMS, RatedReplies, RatedSet, convert_rated, detect_rated
from lora_prefvec.data.sources import INSTALLED, RATED, read_hub, read_installed
from lora_prefvec.errors import InputError, nearest

LOOKED_AT = 100  # rows by which the form is detected
COLUMNS = ("prompt", "chosen", "rejected")


def load(
    source: str | Path,
    *,
    split: str = "train",
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    attribute: str | None = None,
    margin: float = 0.0,
    rows: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> PairSet:
    """Read preference pairs.

    >>> pairs = load("helpful.jsonl.gz")
    >>> pairs = load("PKU-Alignment/PKU-SafeRLHF", form="pku-saferlhf:harmless", rows=2000)

    Args:
        source: a local file (.json, .jsonl, .csv, .gz of these, .parquet); `name:part` of an installed source, such as
            `sandbox:helpful`; or `owner/name[/part][@revision]` on the Hub.
        split: of a Hub data set, or of a JSON object that holds several lists.
        form: one of `forms.FORMS`, with `:attribute` where it has several; detected where left out.
        columns: our name (prompt, chosen, rejected) -> the file's.
        attribute: what to prefer by, of a form that holds several preferences.
        margin: least difference of the two ratings (or of `score_chosen` and `score_rejected`).
        rows: keep so many pairs, drawn with `seed`, in the order of the source; all where there are fewer.
        strict: a row that cannot become a pair is an error.

    Raises:
        InputError: the source, form, columns, attribute or split does not exist, the file is malformed, there is no
            pair in it, or (strict) a row is none.
    """
    name = str(source)
    if not (margin >= 0 and math.isfinite(margin)):
        raise InputError(f"the margin {margin} is no number from 0 up", "Give for example 1.")
    if rows is not None and rows < 1:
        raise InputError(f"cannot take {rows} rows", "Give a number from 1 up, or leave it out for all.")
    path = Path(name).expanduser()
    installed = INSTALLED.fullmatch(name)
    if installed and not path.exists() and not suffix_of(path):
        if form or columns or attribute or margin:
            raise InputError(
                f"{name} serves pairs, not rows in a published form", "Leave out form, columns, attribute and margin."
            )
        served = read_installed(installed["name"], installed["part"], Pair, split=split, rows=rows, seed=seed)
        if not served:
            raise InputError(f"{name}, split {split!r}, has no pairs")
        return PairSet(served, installed["name"], name, rows_read=len(served))
    raw, head, revision = _opened(name, split)
    if columns:
        _check_columns(columns, head, name)
        head = [_renamed(row, columns) for row in head]
        raw = (_renamed(row, columns) for row in raw)
    kind, attribute = choose_form(form, attribute, head, name)
    found = _collect(chain(head, raw), kind, attribute, margin, name, strict=strict)
    if not found.pairs:
        raise _no_pairs(found, kind, head)
    pairs = found.pairs
    if rows is not None and rows < len(pairs):
        pairs = [pairs[index] for index in sorted(random.Random(seed).sample(range(len(pairs)), rows))]
    return replace(found, pairs=pairs, revision=revision)


def load_rated(
    source: str | Path,
    *,
    split: str = "train",
    form: str | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> RatedSet:
    """Read rated replies; sources are those of `load`, forms are those of `rated.RATED_FORMS`.

    Args:
        rows: keep so many prompts, drawn with `seed`, in the order of the source; all where there are fewer.

    Raises:
        InputError: the source, form or split does not exist, the file is malformed, or no row holds rated replies.
    """
    name = str(source)
    path = Path(name).expanduser()
    installed = INSTALLED.fullmatch(name)
    if installed and not path.exists() and not suffix_of(path):
        served = read_installed(
            installed["name"], installed["part"], RatedReplies, group=RATED, split=split, rows=rows, seed=seed
        )
        if not served:
            raise InputError(f"{name}, split {split!r}, has no rated replies")
        return RatedSet(served, installed["name"], name, rows_read=len(served))
    raw, head, revision = _opened(name, split)
    kind = form or detect_rated(head)
    if kind is None:
        raise InputError(
            f"{name}: no rated replies found in its columns ({columns_of(head)})",
            "Give each row a prompt, chosen, rejected and signs such as {helpful: 1, harmless: -1}; 0 is a tie.",
        )
    if kind not in RATED_FORMS:
        raise InputError(f"unknown form of rated replies {kind!r}", nearest(kind, RATED_FORMS))
    groups: list[RatedReplies] = []
    skipped: Counter[str] = Counter()
    rows_read = 0
    for used, outcome in convert_rated(chain(head, raw), kind):
        rows_read += used
        if isinstance(outcome, str):
            skipped[outcome] += used
        else:
            groups.append(outcome)
    if not groups:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(4))
        raise InputError(
            f"{name}: none of {rows_read} rows holds rated replies, read as {kind}: {reasons}; its columns: "
            f"{columns_of(head)}",
            "Name another form in the recipe: data.form.",
        )
    if rows is not None and rows < len(groups):
        groups = [groups[index] for index in sorted(random.Random(seed).sample(range(len(groups)), rows))]
    return RatedSet(groups, kind, name, revision, dict(skipped.most_common()), rows_read)


def _opened(name: str, split: str) -> tuple[Iterator[Any], list[Any], str | None]:
    """The rows of a file or Hub data set behind its first ones, these, and the commit they are from."""
    path, revision = Path(name).expanduser(), None
    if path.exists() or suffix_of(path):
        raw: Iterator[Any] = read_file(path, split)
    else:
        raw, revision = read_hub(name, split)
    head = list(islice(raw, LOOKED_AT))
    if not head:
        raise InputError(f"{name} is empty: it has no rows", "Name a data set with at least one row.")
    return raw, head, revision


def _collect(
    rows: Iterator[Any], kind: str, attribute: str | None, margin: float, source: str, *, strict: bool
) -> PairSet:
    pairs: list[Pair] = []
    skipped: Counter[str] = Counter()
    first_rows: dict[str, int] = {}
    rows_read = 0
    for first, used, outcome in convert(rows, kind, attribute, margin):
        rows_read += used
        if isinstance(outcome, Pair):
            pairs.append(outcome)
            continue
        if strict:
            raise InputError(f"{source}: row {first}: {outcome}", "Mend or remove the row, or read without --strict.")
        skipped[outcome] += used
        first_rows.setdefault(outcome, first)
    form = f"{kind}:{attribute}" if attribute else kind
    return PairSet(pairs, form, source, skipped=dict(skipped.most_common()), rows_read=rows_read, first_rows=first_rows)


def _no_pairs(found: PairSet, kind: str, head: list[Any]) -> InputError:
    if set(found.skipped) == {EQUAL}:
        return InputError(
            f"{found.source}: chosen equals rejected in all {found.rows_read} rows",
            "Check which columns hold the two replies.",
        )
    reasons = ", ".join(f"{reason} ({count})" for reason, count in list(found.skipped.items())[:4])
    return InputError(
        f"{found.source}: none of {found.rows_read} rows could become a pair, read as {kind}: {reasons}; "
        f"its columns: {columns_of(head)}",
        "Name another form with --form, or the columns with --columns.",
    )


def _check_columns(columns: Mapping[str, str], head: list[Any], source: str) -> None:
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise InputError(
                f"a column mapping has no {ours!r}", f"It maps {', '.join(COLUMNS)} to columns of the data."
            )
        if not any(isinstance(row, Mapping) and theirs in row for row in head):
            known = {ascii_safe(str(name)) for row in head if isinstance(row, Mapping) for name in row}
            hint = nearest(theirs, known)
            raise InputError(f"{source} has no column {theirs!r}", hint or f"Its columns: {columns_of(head)}.")


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with only its other columns kept, so that a mapped form is never mistaken for another one."""
    if not isinstance(row, Mapping):
        return row
    taken = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    return {name: value for name, value in row.items() if name not in columns.values()} | taken
