"""Rows of a local file: JSON, JSONL, CSV, each also gzipped, and Parquet.

Files are untrusted: they are parsed, never executed or unpickled, and no single line may fill the memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lora_prefvec.errors import InputError, nearest

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
GZIP_MAGIC = b"\x1f\x8b"
MAX_LINE = 16 * 2**20  # bytes of one line, decompressed
MAX_JSON = 2**30  # bytes of one JSON document, decompressed: it is parsed as a whole


def suffix_of(path: Path) -> str:
    """The kind of a file by its name, `.gz` aside; empty where it is none that is read here."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_file(path: Path, split: str) -> Iterator[Any]:
    """The rows of a local file, one by one.

    Raises:
        InputError: no such file, a kind that is not read, not UTF-8, malformed (with the line), or no such split.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder", "Name one file in it.")
    if not path.exists():
        siblings = [file.name for file in path.parent.glob("*") if suffix_of(file)] if path.parent.is_dir() else []
        raise InputError(f"no such file: {path}", nearest(path.name, siblings))
    kind = suffix_of(path)
    if not kind or not path.is_file():
        raise InputError(f"{path} is no file of pairs", f"Read are {', '.join(SUFFIXES)}, and .gz of these.")
    if split != "train" and kind != ".json":
        raise _no_split(path, split)
    if kind == ".parquet":
        return _parquet(path)
    if kind == ".json":
        return _json(path, split)
    return _jsonl(path, _lines(path)) if kind == ".jsonl" else _csv(path)


def _no_split(path: Path, split: str) -> InputError:
    return InputError(
        f"{path} has no split {split!r}: a file is one split, 'train'", "Leave the split out, or name another file."
    )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, decompressed where they are gzipped, whatever its name says."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    with stream:
        magic = stream.read(2)
        stream.seek(0)
        if magic == GZIP_MAGIC:
            with gzip.open(stream) as unpacked:
                yield unpacked
        else:
            yield stream


def _read(path: Path, stream: IO[bytes] | gzip.GzipFile, size: int, *, line: bool) -> bytes:
    try:
        return stream.readline(size) if line else stream.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}", "The file is damaged; fetch it again.") from None


def _decode(path: Path, data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: {where} is not UTF-8 text", "Save the file as UTF-8.") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, their ends kept, a byte order mark dropped."""
    with _open(path) as stream:
        number = 1
        while data := _read(path, stream, MAX_LINE + 1, line=True):
            if len(data) > MAX_LINE:
                raise InputError(
                    f"{path}: line {number} is longer than {MAX_LINE // 2**20} MiB",
                    "JSONL and CSV hold one row a line; name a file that is one JSON document .json.",
                )
            text = _decode(path, data, f"line {number}")
            yield text.removeprefix("\ufeff") if number == 1 else text
            number += 1


def _parse(path: Path, text: str, line: int) -> Any:
    """JSON text that begins on `line`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: malformed JSON in {place}: {error.msg}", "Mend the line.") from None
    except (ValueError, RecursionError):
        # A number of thousands of digits, or thousands of brackets: valid JSON that Python will not build.
        raise InputError(f"{path}: JSON beyond what can be read, from line {line}", "Mend the line.") from None


def _jsonl(path: Path, lines: Iterator[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _parse(path, line.rstrip(), number)
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}: line {number} holds no object", "JSONL has one {...} a line; name a JSON list .json."
                )
            yield row


def _json(path: Path, split: str) -> Iterator[Any]:
    """A list of rows, an object with one list, an object of splits; or JSONL, which is often named .json."""
    with _open(path) as stream:
        data = _read(path, stream, MAX_JSON + 1, line=False)
    if len(data) > MAX_JSON:
        raise InputError(f"{path} is larger than {MAX_JSON // 2**30} GiB as JSON", "Save it as JSONL.")
    text = _decode(path, data, "it").removeprefix("\ufeff")
    del data
    if not text.strip():
        return iter(())
    try:
        document = _parse(path, text, 1)
    except InputError:
        if not _first_line_is_object(text):
            raise
        if split != "train":
            raise _no_split(path, split) from None
        return _jsonl(path, iter(text.splitlines(keepends=True)))
    return iter(_rows(path, document, split))


def _first_line_is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _rows(path: Path, document: Any, split: str) -> list[Any]:
    if isinstance(document, list):
        if split != "train":
            raise _no_split(path, split)
        return document
    items = document.items() if isinstance(document, dict) else ()
    lists = {name: value for name, value in items if isinstance(value, list)}
    if split in lists:
        return lists[split]
    if len(lists) == 1 and split == "train":
        return next(iter(lists.values()))
    if len(lists) > 1:
        known = ", ".join(repr(name[:40]) for name in list(lists)[:12])
        raise InputError(f"{path} has no split {split!r}", f"It has: {known}.")
    if split != "train":
        raise _no_split(path, split)
    raise InputError(f"{path} holds no list of rows", 'Save the rows as [{...}, {...}] or {"data": [...]}.')


def _csv(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(MAX_LINE)  # the default of 128 kB is less than a long reply
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise InputError(f"{path}: its first line names a column twice", "Give every column its own name.")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{path}: the row that ends in line {reader.line_num} has {len(cells)} cells, "
                    f"the header {len(header)}",
                    "Put cells with commas or line breaks in double quotes.",
                )
            if cells:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: malformed CSV in line {reader.line_num}: {error}", "Mend the line.") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        line = str(error).split("\n", 1)[0]
        raise InputError(f"cannot read {path} as Parquet: {line}", "The file is damaged or no Parquet.") from None
