"""The folder of a sweep: what it did so far, and what it found."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from lora_prefvec.artifact import check_target
from lora_prefvec.errors import InputError, Interrupted
from lora_prefvec.evaluation.front import hypervolume
from lora_prefvec.evaluation.plots import pyplot
from lora_prefvec.evaluation.report import write_report
from lora_prefvec.evaluation.rows import Loader, Plan
from lora_prefvec.evaluation.scorers import Scorer
from lora_prefvec.evaluation.store import Store
from lora_prefvec.evaluation.summary import Summary, summarise, write_json, write_rows
from lora_prefvec.evaluation.sweep import complete, points

STORE, ROWS, SUMMARY, REPORT = "store.sqlite", "results.parquet", "summary.json", "report.html"


def check_folder(folder: Path, asked: Mapping[str, Any], force: bool) -> None:
    """Whether a sweep may write to a folder: a new one, one of a sweep that has not ended, or of this very one.

    Args:
        asked: what the sweep is, as JSON holds it.
        force: replace the results of another sweep; what it wrote and scored is used where this one asks the same.

    Raises:
        InputError: it may not.
    """
    place = check_target(folder, force=True)
    if not place.exists():
        return
    if not place.is_dir():
        raise InputError(f"{folder} is a file, and a sweep writes a folder", "Choose another --out.")
    if any(place.iterdir()) and not (place / STORE).is_file():
        raise InputError(f"{folder} holds files, and no sweep", "Choose another --out.")
    with suppress(OSError, ValueError, KeyError):
        before = json.loads((place / SUMMARY).read_text(encoding="utf-8"))["asked"]
        differs = [name for name in asked if before.get(name) != json.loads(json.dumps(asked[name]))]
        if differs and not force:
            raise InputError(
                f"{folder} holds a sweep of other {' and '.join(differs)}",
                "Choose another --out; or --force replaces its results, and takes over the replies that are the same.",
            )


def open_store(folder: Path, asked: Mapping[str, Any]) -> Store:
    """The store of a sweep's folder, which is made where there is none.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}", "Choose another --out.") from None
    vectors = {name: f"{one['sha256']} {one['filter']}" for name, one in asked["vectors"].items()}
    return Store(folder / STORE, base=json.dumps(asked["base"], sort_keys=True), vectors=vectors)


def fill_folder(
    folder: Path,
    plan: Plan,
    scorers: Sequence[Scorer],
    load: Loader,
    asked: Mapping[str, Any],
    *,
    command: str,
    axes: Sequence[str] = (),
    batch_size: int = 64,
) -> Summary:
    """Do what a sweep still lacks, and write what it found: `results.parquet`, `report.html`, and last `summary.json`.

    Args:
        load: the base and its mixer; called only if something is missing that needs them.
        asked: `base`, `vectors` (each with `sha256` and `filter`) and whatever else tells this sweep from others.
        command: that makes this sweep again.
        axes: as `summarise` takes them.

    Raises:
        InputError, RunError: as `evaluate`; what was done is kept. Or a package is missing, which is told first.
        Interrupted: Ctrl-C; likewise.
    """
    pyplot()
    hypervolume([], [])
    started = time.monotonic()
    with closing(open_store(folder, asked)) as store:
        keys = plan.keys(store)
        before = len(store.replies(keys))
        try:
            unread = complete(plan, scorers, load, store, batch_size=batch_size)
        except KeyboardInterrupt:
            known = f"{len(store.replies(keys))} of {len(set(keys))} replies are in {folder}"
            raise Interrupted(known, "The same command goes on.") from None
        summary = summarise(points(plan, scorers, store), scorers, axes)
    run = {
        "command": command,
        "seconds": round(time.monotonic() - started, 1),
        "replies_written": len(set(keys)) - before,
        "unread": unread,
        "versions": versions(),
    }
    write_rows(folder / ROWS, plan, summary.points)
    write_report(folder / REPORT, plan, summary, asked, run)
    write_json(folder / SUMMARY, {"asked": asked, "run": run, **summary.to_dict()})
    return summary


def versions() -> dict[str, str]:
    """Of what a reply or a score may depend on."""
    found = {"python": python_version()}
    for package in ("lora-prefvec", "torch", "transformers", "bitsandbytes", "moocore"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
