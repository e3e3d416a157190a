"""`score` on a tiny model with random vectors, and on replies in a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_prefvec.evaluation.scorers import knowledge
from tests.cli.conftest import SHORT, Run
from tests.evaluation.stand_in_judge import StandInJudge
from tests.evaluation.test_knowledge import write_task

REPLIES = [("What?", "aaaa"), ("What?", "aa"), ("Why?", "a"), ("How?", "aaaaa")]
SCORER = """
class Length:
    name, direction, is_cost = "length", -1, True

    def __call__(self, prompts, replies):
        return [float(len(reply)) for reply in replies]

length = Length()
broken = lambda prompts, replies: None
"""


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SCORER)
    return f"{tmp_path / 'mine.py'}"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi", "id": 1}\n{"prompt": "why?", "id": 2}\n')
    return str(tmp_path / "prompts.jsonl")


@pytest.fixture
def replies(tmp_path: Path) -> str:
    (tmp_path / "replies.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "reply": reply}) + "\n" for prompt, reply in REPLIES)
    )
    return str(tmp_path / "replies.jsonl")


def test_scores_of_replies_in_a_file_without_a_model(run: Run, replies: str, mine: str) -> None:
    code, told, _ = run("score", "--replies", replies, "--scorer", f"{mine}:length", "--format", "json")
    assert code == 0
    found = json.loads(told)["length"]
    assert (found["mean"], found["n"]) == (3.0, 4)
    assert (found["low"], found["high"]) == (1, 5)  # of three prompts: that with two replies counts as one
    assert "less, a cost" in run("score", "--replies", replies, "--scorer", f"{mine}:length")[1]


def test_scores_of_a_mix_agree_with_those_of_its_replies(run: Run, prompts: str, mine: str, tmp_path: Path) -> None:
    line = ["score", "helpful=1", "--prompts", prompts, "--scorer", f"{mine}:length", "--format", "json", *SHORT]
    code, told, _ = run(*line, "--n", "3", "--out", str(tmp_path / "out.jsonl"))
    assert code == 0
    lines = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["id"] for one in lines] == [1, 1, 1, 2, 2, 2]
    assert all(one["scores"] == {"length": len(one["reply"])} and one["mix"] == {"helpful": 1.0} for one in lines)
    again = run("score", "--replies", str(tmp_path / "out.jsonl"), "--scorer", f"{mine}:length", "--format", "json")
    assert json.loads(again[1]) == json.loads(told)
    assert run(*line, "--out", str(tmp_path / "out.jsonl"))[0] == 2  # it is there


def test_what_was_written_is_kept_when_a_scorer_fails(run: Run, prompts: str, mine: str, tmp_path: Path) -> None:
    line = ["score", "helpful=1", "--prompts", prompts, "--scorer", f"{mine}:length", "--scorer", f"{mine}:broken"]
    code, _, told = run(*line, "--out", str(tmp_path / "out.jsonl"), *SHORT)
    assert code == 2
    assert "the scorer 'broken' returned nothing" in told
    assert "score them with --replies" in told
    lines = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(one["scores"]) for one in lines] == [{"length"}] * 2


def test_what_was_written_is_kept_when_it_is_stopped(
    run: Run, prompts: str, mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_prefvec.cli.score.graded", stopped)
    out = tmp_path / "out.jsonl"
    code, _, told = run(
        "score", "helpful=1", "--prompts", prompts, "--scorer", f"{mine}:length", "--out", str(out), *SHORT
    )
    assert code == 130
    assert f"interrupted: The replies are in {out}; score them with --replies." in told
    assert all("reply" in json.loads(line) for line in out.read_text().splitlines())


def test_what_a_judge_costs_is_said_before_and_what_it_mumbles_after(
    run: Run, replies: str, prompts: str, judge: StandInJudge
) -> None:
    scorer = ("--scorer", f"judge:{judge.url}#m?axis=helpful&max_tokens=10")
    code, _, told = run("score", "helpful=1", "--prompts", prompts, *scorer, "--n", "3", *SHORT)
    assert code == 0
    assert told.startswith(f"helpful: at most 6 calls of m at {judge.url}: about ")
    judge.answer = lambda question: "Well." if "Why?" in question else "helpfulness: 5\nharmlessness: 5"
    code, told, said = run("score", "--replies", replies, *scorer, "--format", "json")
    assert code == 0
    assert said.startswith("helpful: 4 calls of m")
    assert "warning: 1 answer of 'helpful' cannot be read" in said
    assert json.loads(told)["helpful"]["n"] == 3


PAIRS = [
    {"prompt": [{"role": "user", "content": f"q {i}"}], "chosen": [reply("yes")], "rejected": [reply("no, never")]}
    for i in range(7)
]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return str(tmp_path / "pairs.jsonl")


def test_how_a_mix_ranks_pairs(run: Run, pairs: str) -> None:
    code, told, _ = run("score", "helpful=1", "harmless=[0,1]", "--pairs", pairs, "--format", "json")
    assert code == 0
    found = json.loads(told)
    assert set(found) == {"preference_accuracy", "implicit_margin"}
    assert found["preference_accuracy"]["n"] == 7
    margin = found["implicit_margin"]
    assert margin["low"] < margin["mean"] < margin["high"]
    code, told, _ = run("score", "--base", "tiny", "--pairs", pairs, "--limit", "3", "--format", "json")
    assert [one["mean"] for one in json.loads(told).values()] == [0.5, 0.0]  # the base against itself
    assert json.loads(told)["preference_accuracy"]["n"] == 3
    code, told, _ = run("score", "helpful=1", "--pairs", pairs)
    assert "preference accuracy" in told
    assert "pairs" in told
    code, told, _ = run("score", "sandbox-helpful=1", "--pairs", "sandbox:helpful", "--limit", "8", "--dry-run")
    assert (code, told) == (0, "pairs: 8\ntasks: \n")


def test_pairs_that_do_not_fit_are_cut_and_told(run: Run, tmp_path: Path) -> None:
    pair = {**PAIRS[0], "prompt": [{"role": "user", "content": "long " * 200}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(pair) + "\n")
    code, _, told = run("score", "helpful=1", "--pairs", str(tmp_path / "long.jsonl"))
    assert code == 0
    assert "of 1 pairs 1 lose the beginning of their prompt, of which 256 tokens are read" in told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompts", "p.jsonl"], "--prompts is of replies"),
        (["--scorer", "refusal"], "--scorer is of replies"),
        (["--temperature", "0"], "--temperature is of replies"),
        (["--out", "file"], "--out is of replies"),
        (["--split", "test"], "no split 'test'"),
        (["--form", "hh-rlhf"], "none of 7 rows could become a pair"),
    ],
)
def test_what_makes_no_sense_with_pairs(more: list[str], said: str, run: Run, pairs: str) -> None:
    code, _, told = run("score", "helpful=1", "--pairs", pairs, *more)
    assert (code, told.count("\n")) == (2, 1)
    assert said in told


def test_pairs_that_are_none(run: Run) -> None:
    for arguments, said in [
        (["helpful=1", "--pairs", "nowhere.jsonl"], "no such file"),
        (["helpful=1", "--pairs", "sandbox:halpful"], "no pairs 'halpful'"),
        (["helpful=1", "--form", "hh-rlhf"], "--form is of pairs, and there are none"),
        (["--pairs", "sandbox:helpful"], "no base"),
    ]:
        code, _, told = run("score", *arguments)
        assert (code, told.count("\n")) == (2, 1)
        assert said in told


def test_what_the_harness_lacks_is_told_before_the_base_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_prefvec.cli.live.Live.load", None)
    for module in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, told = run("score", "helpful=1", "--lm-eval", "arc_easy")
    assert (code, told.count("\n")) == (2, 1)
    assert "pip install 'lora-prefvec[lm-eval]'" in told
    monkeypatch.setattr(knowledge, "_manager", lambda: SimpleNamespace(all_tasks=["arc_easy"]))
    code, _, told = run("score", "helpful=1", "--lm-eval", "ark_easy")
    assert (code, told) == (2, "error: lm_eval knows no task 'ark_easy'. Did you mean 'arc_easy'?\n")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_what_a_mix_knows(run: Run, tmp_path: Path) -> None:
    task = str(write_task(tmp_path))
    code, told, _ = run("score", "helpful=4", "--lm-eval", task, "--limit", "5", "--format", "json")
    assert code == 0
    found = json.loads(told)["tiny_choice acc"]
    assert (found["n"], 0 <= found["mean"] <= 1) == (5, True)


def test_a_scorer_that_asks_the_model_needs_one(run: Run, replies: str, prompts: str) -> None:
    code, _, told = run("score", "--replies", replies, "--scorer", "fluency")
    assert (code, told.count("\n")) == (2, 1)
    assert "Name its base" in told
    code, told, _ = run("score", "--base", "tiny", "--replies", replies, "--scorer", "fluency", "--format", "json")
    assert code == 0
    assert json.loads(told)["fluency"]["mean"] < 0


def test_the_list_names_every_form(run: Run) -> None:
    code, told, _ = run("score", "--list", "--format", "quiet")
    assert code == 0
    names = [line.split("\t")[0] for line in told.splitlines()]
    assert {"refusal", "fluency", "kl", "sandbox:NAME"} <= set(names)
    cost = "reward:PKU-Alignment/beaver-7b-unified-cost?sign=-1&name=harmless"
    assert cost in names
    assert f"\n  --scorer '{cost}'\n" in run("score", "--list")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scorer", "refusal"], "no base"),
        (["helpful=1", "--scorer", "refusal"], "--prompts"),
        (["helpful=1", "--prompts", "prompts.jsonl"], "--scorer"),
        (["--replies", "prompts.jsonl", "--scorer", "refusal"], "line 1: no reply"),
        (["--replies", "a", "--prompts", "b"], "one of --prompts and --replies"),
        (["--replies", "nowhere.jsonl", "--scorer", "refusal"], "cannot read nowhere.jsonl"),
        (["helpful=[0,1]", "--prompts", "prompts.jsonl", "--scorer", "refusal"], "changes with the depth"),
    ],
)
def test_what_is_refused(
    arguments: list[str], said: str, run: Run, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, told = run("score", *(prompts if one == "prompts.jsonl" else one for one in arguments))
    assert (code, told.count("\n")) == (2, 1)
    assert said in told
