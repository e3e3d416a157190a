from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lora_prefvec.cli.data import data_command
from lora_prefvec.data import load
from lora_prefvec.errors import InputError
from lora_prefvec.output import out

SECRET = "xyzzy"
ROWS = [{"prompt": f"{SECRET} {i}", "chosen": f"{SECRET} good {i}", "rejected": SECRET} for i in range(4)]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [*ROWS, ROWS[0], {"prompt": SECRET, "chosen": "", "rejected": SECRET}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(autouse=True)
def _human(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "format", "human")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data_command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_report_says_what_is_there_and_shows_no_text(pairs_file: Path) -> None:
    result = run(pairs_file)
    assert result.exit_code == 0
    for said in (
        "trl-standard (detected)",
        "rows read       6",
        "5 on 4 prompts",
        "empty response",
        "100.0%",
        "1 pairs repeat",
        load(pairs_file).sha256,
        "--form trl-conversational",
    ):
        assert said in result.output
    assert SECRET not in result.output


def test_json_is_one_document(pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "format", "json")
    result = run(pairs_file, "--form", "trl-conversational")
    data = json.loads(result.stdout)
    assert (data["form"], data["form_detected"], data["rows_read"], data["pairs"]) == (
        "trl-conversational",
        False,
        6,
        5,
    )
    assert data["skipped"] == {"empty response": 1}
    assert data["first_skipped_rows"] == {"empty response": 6}
    assert data["characters"]["rejected"] == {"median": 5, "p95": 5, "max": 5}
    assert data["tokens"] is None
    assert SECRET not in result.output


def test_quiet_prints_values_only(pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "format", "quiet")
    lines = run(pairs_file).output.splitlines()
    assert "5" in lines
    assert load(pairs_file).sha256 in lines


def test_columns_and_margin(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("question,good,bad,score_chosen,score_rejected\nq,a,b,3,1\nq,c,d,2,2\n")
    result = run(path, "--columns", "prompt=question, chosen=good,rejected=bad", "--margin", "1")
    assert "1 on 1 prompts" in result.output
    assert "tie" in result.output
    for wrong in ("prompt", "prompt=", "=question"):
        with pytest.raises(InputError, match="cannot read --columns"):
            run(path, "--columns", wrong)


def test_strict_and_what_load_refuses_end_in_one_line(pairs_file: Path) -> None:
    with pytest.raises(InputError, match="row 6: empty response"):
        run(pairs_file, "--strict")
    with pytest.raises(InputError, match="no split 'test'"):
        run(pairs_file, "--split", "test")


def test_written_pairs_are_read_back_as_they_are(pairs_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert f"Would write 5 pairs to {target}" in run(pairs_file, "--out", target, "--dry-run").output
    assert not target.exists()
    assert f"Wrote 5 pairs to {target}" in run(pairs_file, "--out", target).output
    assert load(target, strict=True).sha256 == load(pairs_file).sha256
    with pytest.raises(InputError, match="exists"):
        run(pairs_file, "--out", target)
    run(pairs_file, "--out", target, "--force", "--form", "trl-conversational")
    assert load(target).form == "trl-conversational"


def test_tokens_are_counted_as_training_will_see_them(
    pairs_file: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from lora_prefvec.inference.render import render

    monkeypatch.setattr(out, "format", "json")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    counts = json.loads(run(pairs_file, "--form", "trl-conversational", "--tokenizer", tiny_llama).stdout)["tokens"]
    rendered = [render(pair, tokenizer) for pair in load(pairs_file, form="trl-conversational").pairs]
    for place, part in enumerate(("prompt", "chosen", "rejected")):
        assert counts[part]["max"] == max(len(ids[place]) for ids in rendered)


def test_a_tokenizer_that_is_none(pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds no tokenizer"):
        run(pairs_file, "--tokenizer", tmp_path / "folder")
    with pytest.raises(InputError, match="no folder 'no such folder'"):
        run(pairs_file, "--tokenizer", "no such folder")
