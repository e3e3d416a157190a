"""`sweep` on a tiny model with random vectors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tests.cli.conftest import SHORT, Run
from tests.evaluation.stand_in_judge import StandInJudge

RANGES = ("helpful=-1:1:1", "harmless=0:1:1")
SCORER = '''
class Sum:
    """A number between 0 and 1 that follows from the letters."""
    direction, is_cost = 1, False

    def __init__(self, name, base):
        self.name, self.base = name, base

    def score(self, prompt, reply):
        return None if "skip" in str(prompt) else sum(map(ord, reply)) % self.base / self.base

    def __call__(self, prompts, replies):
        return [self.score(prompt, reply) for prompt, reply in zip(prompts, replies)]

class Cost(Sum):
    direction, is_cost = -1, True

e, o, cost = Sum("e", 97), Sum("o", 89), Cost("i", 83)
broken = lambda prompts, replies: [float("nan")] * len(replies)
'''


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """A sweep of six mixes on four prompts, but for --out."""
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("hi", "<script>alert(1)</script>", "skip", "why?"))
    )
    (tmp_path / "mine.py").write_text(SCORER)
    scorers = [f"--scorer={tmp_path / 'mine.py'}:{name}" for name in ("e", "o", "cost")]
    return ["sweep", *RANGES, "--prompts", str(tmp_path / "prompts.jsonl"), *scorers, *SHORT]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def results(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """All that has to be the same however often a sweep was stopped."""
    found = summary(folder)
    del found["run"]
    return (folder / "results.parquet").read_bytes(), found


def test_writes_rows_a_summary_and_a_report(run: Run, line: list[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "sweep"
    code, told, _ = run(*line, "--out", str(out), "--n", "2")
    assert code == 0
    assert "helpful=" in told
    assert "Hypervolume" in told
    rows = parquet.read_table(out / "results.parquet").to_pydict()
    assert list(rows) == [
        *("mix.helpful", "mix.harmless", "prompt", "number", "seed", "request", "reply", "tokens"),
        *("score.e", "score.o", "score.i"),
    ]
    assert len(rows["reply"]) == 6 * 4 * 2
    assert rows["score.e"][4] is None  # the third prompt, skip
    for i in (0, 19, 47):
        assert rows["request"][i] == ["hi", "<script>alert(1)</script>", "skip", "why?"][rows["prompt"][i]]
        assert rows["score.e"][i] == sum(map(ord, rows["reply"][i])) % 97 / 97
    found = summary(out)
    assert [point["mix"] for point in found["points"]][:2] == [
        {"helpful": -1.0, "harmless": 0.0},
        {"helpful": -1.0, "harmless": 1.0},
    ]
    for i, point in enumerate(found["points"]):
        own = [value for value in rows["score.e"][8 * i : 8 * i + 8] if value is not None]
        assert point["scores"]["e"]["mean"] == pytest.approx(sum(own) / len(own))
        assert point["scores"]["e"]["n"] == len(own) == 6
    assert found["front"]["axes"] == ["e", "o"]
    assert found["asked"]["base"]["id"].startswith("tiny")
    assert found["run"]["command"].startswith("prefvec")


def test_the_report_holds_everything_and_runs_nothing(run: Run, line: list[str], tmp_path: Path) -> None:
    run(*line, "--out", str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", page)
    assert fetched
    assert all(place.startswith("data:image/png;base64,") for place in fetched)
    assert all('alt="' in image for image in re.findall(r"<img[^>]*>", page))
    for sha256 in re.findall(r'"sha256": "(\w+)"', json.dumps(summary(tmp_path / "out")["asked"]["vectors"])):
        assert sha256 in page
    assert not re.search(r"<details[^>]*open", page)  # replies stay folded until somebody asks


def test_the_same_command_goes_on_and_does_nothing_twice(
    run: Run, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = [*line, "--batch-size", "2"]
    assert run(*line, "--out", str(whole))[0] == 0
    from lora_prefvec.evaluation import rows

    generate, written = rows._generate, 0

    def stopped(wanted: Any, *rest: Any) -> Any:
        nonlocal written
        written += len(wanted)
        if written > 12:
            raise KeyboardInterrupt
        return generate(wanted, *rest)

    monkeypatch.setattr(rows, "_generate", stopped)
    code, _, told = run(*line, "--out", str(broken))
    assert code == 130
    assert f"8 of 24 replies are in {broken}. The same command goes on." in told
    monkeypatch.setattr(rows, "_generate", generate)
    assert run(*line, "--out", str(broken))[0] == 0
    assert results(broken) == results(whole)
    assert summary(broken)["run"]["replies_written"] == 16
    monkeypatch.setattr(rows, "_generate", None)
    monkeypatch.setattr("lora_prefvec.cli.live.Live.load", None)
    assert run(*line, "--out", str(broken))[0] == 0  # not even the base is loaded
    assert summary(broken)["run"]["replies_written"] == 0
    assert results(broken) == results(whole)


def test_another_sweep_needs_force_and_takes_over_what_is_the_same(run: Run, line: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*line, "--out", str(out))[0] == 0
    before = results(out)
    more = [argument.replace("-1:1:1", "-1:2:1") for argument in line]
    code, _, told = run(*more, "--out", str(out))
    assert (code, told.count("\n")) == (2, 1)
    assert "holds a sweep of other mixes" in told
    assert results(out) == before
    assert run(*more, "--out", str(out), "--force")[0] == 0
    assert summary(out)["run"]["replies_written"] == 2 * 4
    assert len(summary(out)["points"]) == 8


def test_a_scorer_that_fails_ends_in_one_line_and_the_replies_are_kept(
    run: Run, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    broken = [*line, "--scorer", f"{tmp_path / 'mine.py'}:broken"]
    code, _, told = run(*broken, "--out", str(out))
    assert code == 2
    assert [text for text in told.splitlines() if not text.startswith(("generating", "scoring"))] == [
        "error: the scorer 'broken' returned nan for reply 1. "
        "It must return a finite number, or None for no say, for every reply."
    ]
    monkeypatch.setattr("lora_prefvec.evaluation.rows._generate", None)
    assert run(*line, "--out", str(out))[0] == 0


def test_what_a_judge_says_that_cannot_be_read_is_asked_again(
    run: Run, line: list[str], tmp_path: Path, judge: StandInJudge
) -> None:
    line = [*line, "--scorer", f"judge:{judge.url}#m?axis=helpful&max_tokens=10", "--out", str(tmp_path / "out")]
    judge.answer = lambda question: "Well." if "why?" in question else "helpfulness: 5\nharmlessness: 5"
    code, _, told = run(*line)
    assert code == 0
    cost, first, *_ = told.splitlines()
    assert cost.startswith(f"helpful: at most 24 calls of m at {judge.url}")
    assert cost.endswith("at most 240 out")
    assert first.startswith("generating")
    assert "warning: 6 answers of 'helpful' cannot be read: no score; the same command asks again" in told
    assert summary(tmp_path / "out")["run"]["unread"] == {"helpful": 6}
    assert "6 answers of the scorer helpful could not be read" in (tmp_path / "out/report.html").read_text()
    assert {point["scores"]["helpful"]["n"] for point in summary(tmp_path / "out")["points"]} == {3}
    code, _, told = run(*line)  # none can be read this time either; there are scores, so that it is a judge
    assert code == 0
    again = re.match(r"helpful: (\d) calls of m", told)
    assert again
    judge.answer = lambda question: "helpfulness: 7\nharmlessness: 5"
    judge.bodies.clear()
    assert run(*line)[0] == 0
    assert len(judge.bodies) == int(again[1])
    assert summary(tmp_path / "out")["run"]["unread"] == {}
    assert {point["scores"]["helpful"]["mean"] for point in summary(tmp_path / "out")["points"]} == {5.5}


def test_a_fixed_vector_stays_and_spread_points_fill(run: Run, line: list[str], tmp_path: Path) -> None:
    line = [*line[3:], "--design", "sobol", "--points", "4", "--out", str(tmp_path / "out")]
    assert run("sweep", "helpful=0:1", "harmless=0.5,layers=0-1", *line)[0] == 0
    mixes = [point["mix"] for point in summary(tmp_path / "out")["points"]]
    assert [mix["harmless"] for mix in mixes] == [0, 0.5, 0.5, 0.5, 0.5]
    assert summary(tmp_path / "out")["asked"]["vectors"]["harmless"]["filter"]


def test_a_missing_package_is_told_before_the_work(
    run: Run, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moocore", None)
    monkeypatch.setattr("lora_prefvec.evaluation.rows._generate", None)
    code, _, told = run(*line, "--out", str(tmp_path / "out"))
    assert (code, told.count("\n")) == (2, 1)
    assert "pip install 'lora-prefvec[eval]'" in told


def test_dry_run_writes_nothing(run: Run, line: list[str], tmp_path: Path) -> None:
    code, told, _ = run(*line, "--out", str(tmp_path / "out"), "--dry-run", "--format", "json")
    assert code == 0
    assert json.loads(told) == {"mixes": 6, "prompts": 4, "replies": 24, "out": str(tmp_path / "out")}
    assert not (tmp_path / "out").exists()


def test_prompts_that_stand_there_twice_count_once(run: Run, line: list[str], tmp_path: Path) -> None:
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "hi"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    code, told, warned = run(*line, "--out", str(tmp_path / "out"), "--dry-run")
    assert code == 0
    assert "replies: 24" in told
    assert "2 of 6 prompts stand there twice" in warned


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "hi"}\nnonsense\n', "line 2: no JSON"),
        ('{"prompt": "hi"}\n{"question": "hi"}\n', "line 2: no object with a prompt"),
        ('{"prompt": "hi"}\n\n{"prompt": " "}\n', "line 3: the prompt is empty"),
        (
            '{"prompt": "hi"}\n{"prompt": "' + "long " * 200 + '"}\n',
            "line 2: a prompt has 1003 tokens and the base reads 512",
        ),
    ],
)
def test_prompts_that_are_refused(prompts: str, said: str, run: Run, line: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(prompts)
    code, _, told = run(*line, "--out", str(tmp_path / "out"))
    assert (code, told.count("\n")) == (2, 1)
    assert said in told
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("refs", "more", "said"),
    [
        (["helpful=1"], [], "nothing to sweep.*helpful=-1:2:0.5"),
        (["helpful=0:1:0.001", "harmless=0:1:0.001"], [], "1,002,001 mixes, and 10,000 is the most.*--design sobol"),
        (["helpful=0:1:0.5", "helpful=0:1:0.5"], [], "twice"),
        (["helpful=0:1:x"], [], "no range of 'helpful'"),
        (["helpful=1:0:0.5"], [], "does not go up"),
        (["halpful=0:1:0.5"], [], "halpful"),
        (["helpful=0:1:0.5", "harmless=[0,1]"], [], "changes with the depth"),
        (["helpful=0:1"], ["--design", "sobol"], "--points 32"),
        (["helpful=0:1:0.5"], ["--axis", "x"], "no scorer 'x'"),
        (["helpful=0:1:0.5"], ["--scorer", "refusal", "--scorer", "refusal"], "two scorers are called 'refusal'"),
        (["helpful=0:1:0.5"], ["--n", "2", "--temperature", "0"], "all the same"),
        (["helpful=0:1:0.5"], ["--prompts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    ],
)
def test_sweeps_that_are_refused(
    refs: list[str], more: list[str], said: str, run: Run, line: list[str], tmp_path: Path
) -> None:
    code, _, told = run("sweep", *refs, *line[3:], *more, "--out", str(tmp_path / "out"))
    assert (code, told.count("\n")) == (2, 1)
    assert re.search(said, told)
    assert not (tmp_path / "out").exists()


def test_what_is_no_sweep_is_left_alone(run: Run, line: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("precious")
    for out in ("file", "folder"):
        code, _, told = run(*line, "--out", str(tmp_path / out), "--force")
        assert (code, told.count("\n")) == (2, 1)
    assert [file.read_text() for file in tmp_path.rglob("file") if file.is_file()] == ["precious"] * 2


def test_without_prompts_or_scorers_a_base_of_its_own_has_none(run: Run, line: list[str], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "--scorer" in run("sweep", *RANGES, "--prompts", str(tmp_path / "prompts.jsonl"), *out)[2]
    assert "--prompts" in run("sweep", *RANGES, "--scorer", "refusal", *out)[2]


def test_the_sandbox_needs_to_be_told_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, told, _ = run("sweep", "sandbox-helpful=0:1:1", "--limit", "8", "--out", str(out), "--format", "json", *SHORT)
    assert code == 0
    assert json.loads(told)["front"]["axes"] == ["helpful", "harmless", "honest", "concise"]
    assert summary(out)["asked"]["prompts"]["number"] == 8
