from __future__ import annotations

import gzip
import json
from collections import Counter
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_prefvec.data import Pair, load, sources
from lora_prefvec.errors import InputError

ROWS = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def preference(shared_dir: Path) -> Path:
    return shared_dir / "data" / "preference"


@pytest.mark.parametrize("name", ["hh_helpful_base", "hh_harmless_base"])
def test_hh_rlhf_converts_row_for_row(preference: Path, name: str) -> None:
    found = load(preference / "raw" / f"{name}.raw200.jsonl.gz", strict=True)
    expected = rows_of(preference / "raw" / f"{name}.raw200.expected.jsonl.gz")
    assert found.form == "hh-rlhf"
    assert [pair.as_dict() for pair in found.pairs] == expected
    assert found.sha256 == load(preference / "raw" / f"{name}.raw200.expected.jsonl.gz").sha256


def test_hh_rlhf_edge_cases_are_skipped_for_the_stated_reason(preference: Path, tmp_path: Path) -> None:
    path = preference / "raw" / "hh_edge_cases.jsonl.gz"
    with pytest.raises(InputError, match=r"none of 77 rows could become a pair, read as hh-rlhf.*subset, line, reason"):
        load(path)
    edge = rows_of(path)
    for row in edge:
        with pytest.raises(InputError) as caught:
            load(write(tmp_path / "edge.jsonl", [row]), form="hh-rlhf", strict=True)
        assert f"row 1: {row['reason'].replace('_', ' ')}" in str(caught.value)
    good = {
        name: rows_of(preference / "raw" / "hh_helpful_base.raw200.jsonl.gz")[0][name]
        for name in ("chosen", "rejected")
    }
    found = load(write(tmp_path / "edge.jsonl", [*edge, good]))
    assert found.skipped == dict(Counter(row["reason"].replace("_", " ") for row in edge))
    assert found.rows_read == 78 == len(found) + sum(found.skipped.values())
    assert {
        edge[number - 1]["reason"].replace("_", " "): number for number in found.first_rows.values()
    } == found.first_rows


def test_sharegpt_converts_row_for_row(preference: Path) -> None:
    found = load(preference / "raw" / "llamafactory_dpo_en_sharegpt_60.jsonl.gz", strict=True)
    expected = load(preference / "llamafactory_dpo_en_300.jsonl.gz").pairs[:60]
    assert found.form == "sharegpt"

    def stripped(pair: Pair) -> Any:  # the converted file has white space at the ends of turns removed
        return [[(turn["role"], turn["content"].strip()) for turn in part] for part in pair.as_dict().values()]  # type: ignore[index]

    assert [stripped(pair) for pair in found.pairs] == [stripped(pair) for pair in expected]


def test_every_converted_file_loads_whole(preference: Path) -> None:
    names = sorted(path.name for path in preference.glob("*.jsonl.gz") if "kto" not in path.name)
    for name in names:
        found = load(preference / name, strict=True)
        assert found.form == "trl-conversational"
        assert found.rows_read == len(found) == len(rows_of(preference / name))


def test_ultrafeedback_scores_that_tie(preference: Path) -> None:
    path = preference / "ultrafeedback_1k.train.jsonl.gz"
    assert load(path).skipped == {}
    assert load(path, margin=0.01).skipped == {"tie": 110}


def test_pandalm_through_a_column_mapping(preference: Path) -> None:
    path = preference / "raw" / "pandalm_human_raw.jsonl.gz"
    with pytest.raises(InputError, match=r"no preference pairs found in its columns \(idx, .*response1"):
        load(path)
    columns = {"prompt": "instruction", "chosen": "response1", "rejected": "response2"}
    found = load(path, columns=columns)
    assert found.form == "trl-standard"
    assert sum(count for reason, count in found.skipped.items() if reason.endswith("is not a string")) == 6
    assert found.rows_read == 999 == len(found) + sum(found.skipped.values())


def test_unpaired_data_are_refused(preference: Path) -> None:
    with pytest.raises(InputError, match=r"\(prompt, completion, label\)"):
        load(preference / "llamafactory_kto_en_300.jsonl.gz")


def test_column_mapping(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "a": row["chosen"], "b": row["rejected"], "chosen": 3} for row in ROWS]
    path = write(tmp_path / "rows.jsonl", rows)
    found = load(path, columns={"prompt": "question", "chosen": "a", "rejected": "b"})
    assert [pair.as_dict() for pair in found.pairs] == ROWS
    assert found.sha256 == load(write(tmp_path / "plain.jsonl", ROWS)).sha256
    with pytest.raises(InputError, match=r"no column 'questoin'\. Did you mean 'question'"):
        load(path, columns={"prompt": "questoin"})
    with pytest.raises(InputError, match="a column mapping has no 'reply'"):
        load(path, columns={"reply": "a"})


def test_a_mapping_may_exchange_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    (first, *_) = load(path, columns={"chosen": "rejected", "rejected": "chosen"}).pairs
    assert first == Pair("q0", "b0", "a0")


def test_rows_are_drawn_by_the_seed_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "q"}])
    whole = load(path)
    drawn = load(path, rows=7, seed=1)
    places = [whole.pairs.index(pair) for pair in drawn.pairs]
    assert places == sorted(set(places))
    assert len(places) == 7
    assert drawn.pairs == load(path, rows=7, seed=1).pairs != load(path, rows=7, seed=2).pairs
    assert (drawn.rows_read, drawn.skipped) == (21, {"missing column 'chosen'": 1})
    assert load(path, rows=100).pairs == whole.pairs


def test_strict_names_the_first_row_and_its_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"chosen": ""}, ROWS[0] | {"chosen": 3}])
    assert load(path).skipped == {"empty response": 1, "chosen is not a string": 1}
    with pytest.raises(InputError, match="row 21: empty response"):
        load(path, strict=True)


def test_chosen_equal_to_rejected_everywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row | {"rejected": row["chosen"]} for row in ROWS])
    with pytest.raises(InputError, match="chosen equals rejected in all 20 rows"):
        load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1.0}, "margin -1.0"),
        ({"margin": float("nan")}, "margin nan"),
        ({"rows": 0}, "cannot take 0 rows"),
        ({"margin": 1.0}, "no score_chosen and score_rejected"),
        ({"form": "hh-rlhf"}, "none of 20 rows .* read as hh-rlhf: no Human: and Assistant: turns"),
        ({"attribute": "honesty"}, "form trl-standard has no attributes"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "rows.jsonl", ROWS), **options)


def served(part: str, *, split: str = "train", rows: int | None = None, seed: int = 0) -> list[Any]:
    """An installed source for these tests."""
    if part == "broken":
        return ["no pair"]
    return [] if part == "nothing" else [Pair(f"{part} {split} {seed} {i}", "a", "b") for i in range(rows or 3)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [("test", f"{__name__}:served"), ("gone", "no_such_module:load")]
    found = [EntryPoint(name, value, sources.PAIRS) for name, value in points]
    monkeypatch.setattr(sources, "entry_points", lambda group: found if group == sources.PAIRS else [])


@pytest.mark.usefixtures("installed")
def test_installed_sources() -> None:
    found = load("test:anchors-helpful", split="eval", rows=2, seed=5)
    assert [pair.prompt for pair in found.pairs] == ["anchors-helpful eval 5 0", "anchors-helpful eval 5 1"]
    assert (found.form, found.source, found.rows_read) == ("test", "test:anchors-helpful", 2)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("tset:x", {}, "no installed source of pairs is called 'tset'. Did you mean 'test'"),
        ("gone:x", {}, "'gone' .* cannot be loaded"),
        ("test:broken", {}, "something that is no Pair"),
        ("test:nothing", {}, "has no pairs"),
        ("test:x", {"form": "hh-rlhf"}, "Leave out form"),
        ("neither", {}, "no file, no installed source and no Hub id"),
        ("a/b@", {}, "no file, no installed source and no Hub id"),
    ],
)
def test_installed_sources_that_do_not_serve(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(source, **options)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets.load_dataset`, with `owner/name` served from a folder on this machine."""
    import datasets

    folder = tmp_path / "owner-name"
    for part, rows in (("a-base", ROWS[:4]), ("b-base", ROWS[4:])):  # two folders, as in hh-rlhf
        (folder / part).mkdir(parents=True)
        write(folder / part / "train.jsonl", rows)
        write(folder / part / "test.jsonl", rows[:2])
    real = datasets.load_dataset

    def load_dataset(name: str, config: str | None = None, **options: Any) -> Any:
        assert "trust_remote_code" not in options
        if name != "owner/name":
            raise ConnectionError("no route")
        options.pop("revision")
        return real(str(folder), config, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return folder


@pytest.mark.usefixtures("hub")
def test_hub_data_sets() -> None:
    found = load("owner/name@main", split="test")
    assert [pair.as_dict() for pair in found.pairs] == [*ROWS[:2], *ROWS[4:6]]
    assert (found.form, found.source, found.revision) == ("trl-standard", "owner/name@main", "main")
    assert len(load("owner/name/a-base")) == 4
    with pytest.raises(InputError, match=r"split 'dev': Unknown split \"dev\"\. Should be one of \['train', 'test'\]"):
        load("owner/name", split="dev")
    with pytest.raises(InputError, match="data set owner/name/nowhere"):
        load("owner/name/nowhere")
    with pytest.raises(InputError, match=r"data set a/b: the Hub cannot be reached"):
        load("a/b")


def test_the_commit_of_a_hub_data_set_is_found_in_what_was_fetched() -> None:
    address = f"hf://datasets/owner/name@{'ab' * 20}/train.jsonl"
    rows = SimpleNamespace(info=SimpleNamespace(download_checksums={address: {"num_bytes": 1}}))
    assert sources._commit(rows) == "ab" * 20
