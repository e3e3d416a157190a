"""Rows from beyond a local file: installed sources (`name:part`) and data sets of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lora_prefvec.errors import InputError, nearest

PAIRS = "lora_prefvec.pairs"
RATED = "lora_prefvec.rated"
Served = TypeVar("Served")
INSTALLED = re.compile(r"(?P<name>[\w.-]+):(?P<part>.+)")
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<part>[^@]+))?(@(?P<revision>[^@]+))?")


def read_installed(
    name: str, part: str, kind: type[Served], *, group: str = PAIRS, split: str, rows: int | None, seed: int
) -> list[Served]:
    """What an installed package serves under the entry point `name` of a group: pairs, or rated replies.

    Raises:
        InputError: no such entry point, or one that cannot be loaded or gives something else.
    """
    known = {entry.name: entry for entry in entry_points(group=group)}
    if name not in known:
        what = "pairs" if group == PAIRS else "rated replies"
        raise InputError(f"no installed source of {what} is called {name!r}", nearest(name, known))
    try:
        serve = known[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the source {name!r} ({known[name].value}) cannot be loaded: {error}") from None
    served = list(serve(part, split=split, rows=rows, seed=seed))
    if not all(isinstance(one, kind) for one in served):
        raise InputError(f"the source {name!r} ({known[name].value}) gave something that is no {kind.__name__}")
    return served


def read_hub(source: str, split: str) -> tuple[Iterator[dict[str, Any]], str | None]:
    """The rows of `owner/name[/part][@revision]` on the Hub, and the commit they are from.

    `part` is a configuration, or else a folder of the data set: `Anthropic/hh-rlhf/helpful-base`. No code of the
    data set is run.

    Raises:
        InputError: no such id, no access, no network, or no such revision, part or split.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(
            f"{source!r} is no file, no installed source and no Hub id",
            "Name a file (.json, .jsonl, .csv, .parquet), name:part, or owner/name[@revision].",
        )
    import datasets

    name, part, revision = match["id"], match["part"], match["revision"]
    try:
        try:
            rows = datasets.load_dataset(name, part, split=split, revision=revision)
        except ValueError as error:
            if part is None or not str(error).startswith("BuilderConfig"):
                raise
            rows = datasets.load_dataset(name, data_dir=part, split=split, revision=revision)
    except (ConnectionError, TimeoutError):
        raise InputError(
            f"data set {source}: the Hub cannot be reached, and there is no local copy",
            "Check the network, or download the data and name the file.",
        ) from None
    except Exception as error:
        # What the library raises here (OSError, ValueError, RuntimeError and its own) differs by version; each says
        # in its first line what is wrong with the id, the access, the revision, the part or the split.
        line = " ".join(str(error).split("\n", 1)[0].split()).rstrip(".")
        raise InputError(f"data set {source}, split {split!r}: {line[:300]}") from None
    return iter(rows), _commit(rows) or revision


def _commit(rows: Any) -> str | None:
    """The commit in the addresses of the files that were downloaded."""
    for address in rows.info.download_checksums or ():
        if found := re.search(r"@([0-9a-f]{40})/", address):
            return found[1]
    return None
