"""`generate` and `chat` on a tiny model with random vectors."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_prefvec.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base `tiny` and two vectors of it in `adapters`."""
    from lora_prefvec.artifact import Provenance, identity_of, write_adapter
    from lora_prefvec.inference import load_base
    from tests.helpers import random_vector

    place = tmp_path_factory.mktemp("place")
    (place / "tiny").symlink_to(tiny_llama)
    model = load_base(tiny_llama, quantization="none").model
    for seed, name in enumerate(["helpful", "harmless"]):
        identity = identity_of(place / "tiny", "tiny", "none")
        vector = replace(random_vector(model, rank=2, seed=seed), identity=replace(identity, id="tiny"))
        facts = Provenance(kind="preference_vector", preference=name, sign=1, base=vector.identity)
        write_adapter(place / "adapters" / name, vector, facts, base=tiny_llama)
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in `place`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("lora_prefvec.cli.main.quiet_libraries", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


SHORT = ("--max-new-tokens", "6")


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


@pytest.fixture(scope="module")
def other(place: Path, tiny_llama: Path) -> Path:
    """The same base with another chat template."""
    other = place / "other"
    other.mkdir()
    for file in tiny_llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|user|>", "<|system|>") + " ", encoding="utf-8")
    return other


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
        (["generate", "helpful=1", "--prompt", "y" * 600], "a prompt has 603 tokens and the base reads 512"),
        (["chat"], "there is no base to talk to"),
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


def test_chat(run: Run) -> None:
    code, told, noted = run("chat", "helpful=1", "harmless=0.5", *SHORT, typed="hi\n\n/mix harmless=-1\n/mix\n/help\n")
    assert code == 0
    assert noted.splitlines() == [
        "tiny with helpful=1 harmless=0.5. /help lists the commands, /quit ends.",
        "helpful=1 harmless=-1",
    ]
    assert "\nhelpful=1 harmless=-1\n/mix " in told
    assert told.rstrip().endswith("Ctrl-C stops a reply.")


def turns(told: str) -> list[dict[str, Any]]:
    decoder, found = json.JSONDecoder(), []
    while told.strip():
        value, end = decoder.raw_decode(told.lstrip())
        found.append(value)
        told = told.lstrip()[end:]
    return found


def test_chat_remembers_and_forgets(run: Run) -> None:
    line = ["chat", "helpful=1", "--format", "json", "--max-new-tokens", "12"]
    first, second, again = turns(run(*line, typed="hi\nhi\n/reset\nhi\n/quit\nhi\n")[1])
    assert first == again
    assert second != first
    changed = turns(run(*line, typed="/mix helpful=-2\nhi\n")[1])
    assert changed[0]["mix"] == {"helpful": -2.0}
    assert changed[0]["reply"] != first["reply"]


def test_a_wrong_command_ends_nothing(run: Run) -> None:
    typed = "/mxi helpful=1\n/mix helpfull=1\n/mix helpful=abc\n/mix helpful=inf\n" + "y" * 600 + "\n/mix\n"
    code, told, noted = run("chat", "helpful=1", typed=typed)
    assert code == 0
    assert told == "helpful=1\n"
    problems = [line for line in noted.splitlines() if line.startswith("error: ")]
    for problem, part in zip(
        problems,
        ["Did you mean '/mix'?", "Did you mean 'helpful'?", "'abc'", "'inf'", "/reset begins anew"],
        strict=True,
    ):
        assert part in problem


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[dict[str, str]]] = []

    def interrupted(_: object, messages: list[dict[str, str]], **__: object) -> Iterator[str]:
        heard.append(list(messages))
        yield "half a "
        if len(messages) == 1:
            raise KeyboardInterrupt
        yield "reply"

    monkeypatch.setattr("lora_prefvec.inference.stream", interrupted)
    code, told, noted = run("chat", "helpful=1", typed="hi\ngo on\n")
    assert code == 0
    assert told == "half a \nhalf a reply\n"
    assert "(stopped)" in noted
    assert [message["content"] for message in heard[1]] == ["hi", "half a ", "go on"]


def test_chat_without_a_template_ends_at_once(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _, told = run("chat", "--base", str(tmp_path), typed="hi\n")
    assert code == 2
    assert "has no chat template" in told
