"""`generate` on a tiny model with random vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import SHORT, Run


def test_the_base_is_that_of_the_vector(run: Run) -> None:
    code, told, _ = run("generate", "helpful=1", "--prompt", "hi", *SHORT)
    assert code == 0
    assert told.strip()
    assert run("generate", "helpful=1", "--base", "tiny", "--prompt", "hi", *SHORT)[1] == told
    assert run("generate", "./adapters/helpful", "--prompt", "hi", *SHORT)[1] == told
    assert run("generate", "helpful=0.5", "./adapters/helpful=0.5", "--prompt", "hi", *SHORT)[1] == told
    assert run("generate", "helpful=-1", "--prompt", "hi", *SHORT)[1] != told
    assert run("generate", "helpful=1", "--prompt", "hi", "--seed", "1", *SHORT)[1] != told


def test_coefficient_zero_is_the_base(run: Run) -> None:
    base = run("generate", "--base", "tiny", "--quantization", "none", "--prompt", "hi", *SHORT)
    assert run("generate", "helpful=0", "--prompt", "hi", *SHORT) == base


@pytest.mark.parametrize(
    ("direction", "mix"),
    [
        ("helpful=3,harmless=-4", {"helpful": 1.2, "harmless": -0.4}),
        ("helpful,harmless@90", {"helpful": 0.0, "harmless": 0.5}),
        ("harmless=-7", {"helpful": 0.0, "harmless": -0.5}),
    ],
)
def test_a_direction_turns_a_mix(direction: str, mix: dict[str, float], run: Run) -> None:
    line = ["generate", "helpful=2", "harmless=0.5", "--prompt", "hi", "--format", "json", *SHORT]
    code, told, _ = run(*line, "--direction", direction)
    assert code == 0
    assert json.loads(told)["mix"] == pytest.approx(mix, abs=1e-9)


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        ("helpfull=1", "no vector of the mix is for 'helpfull'. Did you mean 'helpful'?"),
        ("helpful=0", "a direction of length 0 points nowhere"),
        ("helpful", "'helpful' is no direction"),
    ],
)
def test_a_wrong_direction_is_one_line(direction: str, said: str, run: Run) -> None:
    code, _, error = run("generate", "helpful=2", "--prompt", "hi", *SHORT, "--direction", direction)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error


def test_formats(run: Run) -> None:
    plain = run("generate", "helpful=1", "--prompt", "hi", *SHORT)[1]
    answer = json.loads(run("generate", "helpful=1", "--prompt", "hi", "--format", "json", *SHORT)[1])
    assert answer == {"reply": plain[:-1], "mix": {"helpful": 1.0}}
    assert run("generate", "helpful=1", "--prompt", "hi", "--format", "quiet", *SHORT)[1] == plain


def test_a_file_of_prompts(run: Run, place: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "[/b] hi", "id": 7}\n\n{"messages": [{"role": "user", "content": "Why?"}]}\n', encoding="utf-8"
    )
    target = tmp_path / "replies.jsonl"
    line = ["generate", "helpful=1", "--prompts", str(prompts), *SHORT]
    assert run(*line, "--out", str(target), "--dry-run")[0] == 0
    assert not target.exists()
    assert run(*line, "--out", str(target))[0] == 0
    records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [list(record) for record in records] == [["prompt", "id", "reply", "mix"], ["messages", "reply", "mix"]]
    code, table, _ = run(*line, "--format", "json")
    assert code == 0
    assert json.loads(table) == [
        {"prompt": prompt, "reply": record["reply"]}
        for prompt, record in zip(["[/b] hi", "Why?"], records, strict=True)
    ]
    assert "[/b] hi" in run(*line)[1]
    code, _, told = run(*line, "--out", str(target))
    assert (code, told) == (2, f"error: {target} exists. Choose another --out, or replace it with --force.\n")
    assert run(*line, "--out", str(target), "--force")[0] == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no prompt"),
        ("hi\n", "line 1: no JSON"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "line 2: no object with a prompt"),
        ('{"prompt": 3}\n', "line 1: no object with a prompt"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: no object with a prompt"),
        ('{"messages": []}\n', "line 1: no object with a prompt"),
        ("3\n", "line 1: no object with a prompt"),
        (
            '{"prompt": "a"}\n\n{"prompt": "a", "mix": {"helpfull": 1}}\n',
            "line 3: there is no vector 'helpfull' in",
        ),
        ('{"prompt": "a", "mix": "helpful=1"}\n', "line 1: the mix is 'helpful=1'. Write an object such as {"),
        ('{"prompt": "a", "mix": {"helpful": "1"}}\n', "line 1: the coefficient of 'helpful' is '1'. Write a number"),
        ('{"prompt": "a", "mix": {"helpful": NaN}}\n', "line 1: the coefficient 'nan' of 'helpful' is no finite"),
        ('{"prompt": "a", "mix": {"helpful": []}}\n', "line 1: the coefficient of 'helpful' is []"),
        ('{"prompt": "a", "seed": 1.5}\n', "line 1: the seed is 1.5. Write a whole number"),
        ('{"prompt": "a", "temperature": true}\n', "line 1: the temperature is True. Write a number"),
        ('{"prompt": "a", "top_p": 2}\n', "line 1: top-p 2 is not in (0, 1]"),
        ('{"prompt": "a", "max_new_tokens": 0}\n', "line 1: 0 new tokens are no reply"),
        (
            '{"prompt": "a"}\n{"prompt": "' + "y" * 600 + '"}\n',
            "line 2: a prompt has 603 tokens and the base reads 512",
        ),
        ("\udcff", "is no UTF-8 text"),
    ],
)
def test_a_wrong_file_of_prompts(run: Run, tmp_path: Path, text: str, problem: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text, encoding="utf-8", errors="surrogateescape")
    code, _, told = run("generate", "helpful=1", "--prompts", str(prompts))
    assert code == 2
    assert told.startswith(f"error: {prompts}")
    assert problem in told
    assert told.count("\n") == 1


def test_a_base_that_is_not_the_vectors(run: Run, other: Path) -> None:
    line = ["generate", "helpful=1", "--base", "other", "--prompt", "hi", *SHORT]
    code, _, told = run(*line)
    assert code == 2
    assert told.count("\n") == 1
    for part in ("helpful", "'tiny'", "'other'", "chat template", "--allow-mismatch"):
        assert part in told
    assert run(*line, "--allow-mismatch")[0] == 0


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["generate", "helpful=1"], "give one of --prompt and --prompts"),
        (["generate", "--prompt", "hi"], "there is no base to talk to. Name one with --base"),
        (["generate", "tiny", "helpful=1", "--prompt", "hi"], "tiny is a base and no vector. Write --base tiny."),
        (["generate", "helpfull=1", "--prompt", "hi"], "Did you mean 'helpful'?"),
        (["generate", "helpful=abc", "--prompt", "hi"], "'abc'"),
        (["generate", "helpful=nan", "--prompt", "hi"], "'nan'"),
        (["generate", "helpful=1", "--prompt", "hi", "--temperature", "nan"], "temperature nan"),
        (["generate", "helpful=1", "--prompt", "hi", "--resume"], "--resume goes on with a file. Name it with --out."),
        (["generate", "helpful=1", "--prompt", "y" * 600], "a prompt has 603 tokens and the base reads 512"),
    ],
)
def test_a_wrong_line(run: Run, line: list[str], problem: str) -> None:
    code, told, error = run(*line)
    assert (code, told) == (2, "")
    assert error.startswith("error: ")
    assert problem in error
    assert error.count("\n") == 1


def test_a_vector_whose_base_is_elsewhere(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = str(place / "adapters" / "helpful")
    monkeypatch.chdir(tmp_path)
    code, _, told = run("generate", vector, "--prompt", "hi")
    assert code == 2
    assert "the base 'tiny'" in told
    assert told.endswith("was trained on was not found. Name its folder or Hub id with --base.\n")


def jsonl(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_the_same_alone_and_among_others(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In bfloat16 the rounding depends on the shape of the batch, and may decide between two tokens.
    monkeypatch.setattr("lora_prefvec.inference.base.best_dtype", lambda _: torch.float32)
    own = {"prompt": "Why is it so?", "mix": {"harmless": -1.5}, "seed": 7, "max_new_tokens": 24}
    others = [
        {"prompt": "hi", "id": 1},
        {"prompt": "hi", "mix": {}, "temperature": 0},
        own,
        {"prompt": "a" * 90, "mix": {"helpful": [0, 1], "harmless": 1}, "top_p": 0.5, "max_new_tokens": 40},
    ]
    line = ["generate", "helpful=1", "harmless=0", *SHORT]
    among = tmp_path / "among.jsonl"
    assert run(*line, "--prompts", jsonl(tmp_path / "p", *others), "--out", str(among))[0] == 0
    alone = json.loads(run(*line, "--prompts", jsonl(tmp_path / "q", own), "--format", "json")[1])
    told = run("generate", "harmless=-1.5", "--prompt", own["prompt"], "--seed", "7", "--max-new-tokens", "24")[1]
    replies = read(among)
    assert [{k: v for k, v in record.items() if k not in ("reply", "mix")} for record in replies] == [
        {k: v for k, v in record.items() if k != "mix"} for record in others
    ]
    assert replies[2]["reply"] == alone[0]["reply"] == told[:-1]
    assert [record["mix"] for record in replies] == [
        {"helpful": 1.0, "harmless": 0.0},
        {},
        {"harmless": -1.5},
        {"helpful": [0.0, 1.0], "harmless": 1.0},
    ]
    assert alone[0]["mix"] == {"harmless": -1.5}
    base = run("generate", "--base", "tiny", "--quantization", "none", "--prompt", "hi", "--temperature", "0", *SHORT)
    assert base[1] == replies[1]["reply"] + "\n"


def test_what_was_written_before_ctrl_c_is_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_prefvec.inference import ContinuousBatch

    prompts = jsonl(tmp_path / "p", *({"prompt": f"Say {i}"} for i in range(5)))
    target = tmp_path / "deep" / "replies.jsonl"
    line = ["generate", "helpful=1", "--prompts", prompts, "--batch-size", "2", *SHORT]
    step, steps, last = ContinuousBatch.step, 0, 0

    def counted(batch: ContinuousBatch) -> Any:
        nonlocal steps
        steps += 1
        if steps == last:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", counted)
    assert run(*line, "--out", str(tmp_path / "whole.jsonl"))[0] == 0
    whole, steps, last = steps, 0, 10
    gathered = target.with_name("replies.jsonl.partial")
    code, _, told = run(*line, "--out", str(target))
    assert (code, told) == (130, f"interrupted: 2 of 5 replies are in {gathered}. Go on with --resume.\n")
    assert not target.exists()
    code, _, told = run(*line, "--out", str(target))
    assert code == 2
    assert "holds 2 replies of a run that was stopped. Go on with --resume, or begin anew with --force." in told
    code, _, told = run(*line, "--temperature", "0.5", "--out", str(target), "--resume")
    assert code == 2
    assert "answers other prompts, mixes or settings" in told
    with gathered.open("a") as file:
        file.write('{"line": 3, "rep')  # a kill in the middle of a line
    steps, last = 0, 0
    assert run(*line, "--out", str(target), "--resume")[0] == 0
    assert steps < whole  # it wrote only what was missing
    assert read(target) == read(tmp_path / "whole.jsonl")
    assert not gathered.exists()


def test_where_nothing_was_written_nothing_is_left(run: Run, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "p", {"prompt": "hi"}, {"prompt": "y" * 600})
    line = ["generate", "helpful=1", "--prompts", prompts]
    assert "line 2: a prompt has 603 tokens" in run(*line, "--out", str(tmp_path / "replies.jsonl"))[2]
    assert [file.name for file in tmp_path.iterdir()] == ["p"]
    assert "cannot write to" in run(*line, "--out", str(tmp_path / "p" / "replies.jsonl"))[2]


def test_a_mix_file_is_a_mix(run: Run, place: Path, tmp_path: Path) -> None:
    greedy = ["--prompt", "hi", "--temperature", "0", "--max-new-tokens", "24"]
    for name, refs in {
        "plain": ["helpful=1.5", "harmless=-0.5"],
        "deep": ["helpful=[0,2]", "harmless=1,modules=mlp"],
        "parts": ["helpful=1,layers=0", "helpful=-2,layers=1", "helpful=0.5,layers=1"],
    }.items():
        folder = tmp_path / name
        assert run("compose", *refs, "--out", str(folder))[0] == 0
        file = run("generate", str(folder / "mix.yaml"), *greedy)
        assert file[0] == 0
        assert file == run("generate", *refs, *greedy)
        assert file[1] == run("generate", str(folder), *greedy)[1]
        assert file[1] != run("generate", "helpful=0", *greedy)[1]
    mix = json.loads(run("generate", str(tmp_path / "parts" / "mix.yaml"), *greedy, "--format", "json")[1])["mix"]
    assert sorted(mix.values()) == [-1.5, 1.0]


def test_a_mix_file_that_is_no_live_mix(run: Run, tmp_path: Path) -> None:
    assert run("compose", "helpful=1", "harmless=1", "--rank", "1", "--out", str(tmp_path / "m"))[0] == 0
    file = str(tmp_path / "m" / "mix.yaml")
    code, _, told = run("generate", file, "--prompt", "hi")
    assert (code, told.count("\n")) == (2, 1)
    assert "mix.yaml asks for rank 1, and a live mix is the plain sum. Compose it first (prefvec compose " in told
    assert "is a whole mix, and stands alone" in run("generate", file, "helpful=1", "--prompt", "hi")[2]
    assert "cannot be mixed live" in run("generate", "helpful=[0,1],layers=0", "--prompt", "hi")[2]


def test_the_base_that_a_plain_adapter_names_by_its_path(run: Run, place: Path, tmp_path: Path) -> None:
    line = ["generate", "helpful", "--quantization", "none", "--prompt", "hi", "--temperature", "0", *SHORT]
    told = run(*line)[1]
    for file in (place / "adapters" / "helpful").iterdir():
        if file.name != "prefvec.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    file, line[1] = tmp_path / "adapter_config.json", str(tmp_path)
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(place / "tiny")}))
    assert run(*line)[1] == told
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(place)}))
    assert "was trained on was not found. Name its folder" in run(*line)[2]  # a folder, and no model
