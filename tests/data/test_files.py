from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_prefvec.data import files, load
from lora_prefvec.errors import InputError
from tests.data.strategies import texts

ROWS = [{"prompt": f"q{i} é", "chosen": f" a{i}\n", "rejected": f' b{i}, "quoted"'} for i in range(5)]


def as_csv(rows: list[dict[str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_jsonl(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


WRITTEN = {
    "list.json": json.dumps(ROWS, indent=1),
    "object.json": json.dumps({"version": 1, "data": ROWS}),
    "splits.json": json.dumps({"train": ROWS, "test": ROWS[:1]}),
    "lines.json": as_jsonl(ROWS),
    "rows.jsonl": as_jsonl(ROWS),
    "blank lines.jsonl": "\n" + as_jsonl(ROWS).replace("\n", "\r\n\r\n"),
    "rows.csv": as_csv(ROWS),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_files(tmp_path: Path, name: str, mark: str, packed: bool) -> None:
    data = (mark + WRITTEN[name]).encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    found = load(path)
    assert [pair.as_dict() for pair in found.pairs] == ROWS
    assert (found.form, found.rows_read, found.skipped, found.source) == ("trl-standard", 5, {}, str(path))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": reply}]}
        for reply in "ab"
    ]
    rows = [row | {"rejected": [{"role": "assistant", "content": "c"}], "score_chosen": 1.0} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = load(tmp_path / "rows.parquet")
    assert found.form == "trl-conversational"
    assert [pair.chosen[0]["content"] for pair in found.pairs if pair.conversational] == ["a", "b"]  # type: ignore[index]


@given(st.lists(st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    kinds = {"a.jsonl": as_jsonl(rows), "a.json": json.dumps(rows, ensure_ascii=False), "a.csv": as_csv(rows)}
    for name, text in kinds.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert list(files.read_file(tmp_path / name, "train")) == rows


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rubbish_is_rows_or_one_clear_line(tmp_path: Path, data: bytes) -> None:
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


BAD = {
    "malformed.jsonl": (as_jsonl(ROWS[:2]) + '{"prompt": "q", \n', "malformed JSON in line 3, column"),
    "malformed.json": ('[\n{"prompt": "q"},\n{"prompt" "q"}]', "malformed JSON in line 3, column 11"),
    "list.jsonl": ("[1, 2]\n", r"line 1 holds no object.*name a JSON list \.json"),
    "scalar.json": ("3", "holds no list of rows"),
    "object.json": ('{"prompt": "q"}', "holds no list of rows"),
    "lists.json": ('{"test": [], "dev": []}', "no split 'train'. It has: 'test', 'dev'"),
    "digits.json": ("[" + "1" * 5000 + "]", "JSON beyond what can be read"),
    "deep.jsonl": ("[" * 100000, "JSON beyond what can be read, from line 1"),
    "empty.json": ("", "is empty"),
    "empty.jsonl": ("\n\n", "is empty"),
    "no rows.json": ("[]", "is empty"),
    "header.csv": ("prompt,chosen,rejected\n", "is empty"),
    "empty.csv": ("", "is empty"),
    "twice.csv": ("prompt,chosen,chosen\na,b,c\n", "names a column twice"),
    "ragged.csv": ("prompt,chosen,rejected\na,b,c\na,b,c,d\n", "ends in line 3 has 4 cells, the header 3"),
    "quotes.csv": ('prompt,chosen,rejected\n"a,b,c\n', "malformed CSV"),
    "rows.txt": ("text", r"Read are \.json, \.jsonl"),
    "weights.pkl": ("text", r"Read are \.json, \.jsonl"),
    "no parquet.parquet": ("text", "cannot read .* as Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_jsonl(ROWS[:1]).encode() + '{"prompt": "\xe9"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"line 2 is not UTF-8 text\. Save the file as UTF-8"):
        load(path)
    path.write_bytes(as_jsonl(ROWS).encode("utf-16"))
    with pytest.raises(InputError, match="line 1 is not UTF-8"):
        load(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode() * 9)[:-40])
    with pytest.raises(InputError, match="damaged"):
        load(path)
    path.write_text(as_jsonl(ROWS))  # named .gz and not packed: read as it is
    assert len(load(path)) == 5


@pytest.mark.parametrize("name", ["bomb.jsonl", "bomb.csv", "bomb.json"])
def test_no_line_and_no_document_fills_the_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 2**20)
    monkeypatch.setattr(files, "MAX_JSON", 2**20)
    (tmp_path / name).write_bytes(gzip.compress(b"[" + b" " * 2**21))
    with pytest.raises(InputError, match=r"longer than 1 MiB|larger than 0 GiB"):
        load(tmp_path / name)


def test_long_cells_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a" * 300_000, "rejected": "b"}]
    (tmp_path / "long.csv").write_text(as_csv(rows))
    assert len(load(tmp_path / "long.csv").pairs[0].chosen) == 300_000


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "helpful.jsonl").write_text(as_jsonl(ROWS))
    with pytest.raises(InputError, match=r"is a folder\. Name one file"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"no such file.*Did you mean 'helpful\.jsonl'"):
        load(tmp_path / "helpfull.jsonl")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nowhere" / "rows.json")


def test_splits_of_files(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(WRITTEN["splits.json"])
    assert len(load(tmp_path / "splits.json", split="test")) == 1
    with pytest.raises(InputError, match=r"no split 'dev'\. It has: 'train', 'test'"):
        load(tmp_path / "splits.json", split="dev")
    for name in ("list.json", "object.json", "lines.json", "rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text(WRITTEN[name])
        with pytest.raises(InputError, match="no split 'test': a file is one split"):
            load(tmp_path / name, split="test")
