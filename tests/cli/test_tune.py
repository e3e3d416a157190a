"""`tune` on a tiny model with random vectors, and on the sandbox."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_prefvec.artifact import read_mix_file
from tests.cli.conftest import SHORT, Run
from tests.evaluation.stand_in_judge import StandInJudge

SCORER = '''
class Sum:
    """A number between 0 and 1 that follows from the letters."""
    direction, is_cost = 1, False

    def __init__(self, name, base):
        self.name, self.base = name, base

    def __call__(self, prompts, replies):
        return [sum(map(ord, reply)) % self.base / self.base for reply in replies]

e, o = Sum("e", 97), Sum("o", 89)
mute = Sum("mute", 1)
mute.__class__ = type("Mute", (Sum,), {"__call__": lambda self, prompts, replies: [None] * len(replies)})
broken = lambda prompts, replies: [float("nan")] * len(replies)
'''
TEXTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """A search over two vectors, but for the wish and --out."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    (tmp_path / "mine.py").write_text(SCORER)
    scorers = [f"--scorer={tmp_path / 'mine.py'}:{name}" for name in ("e", "o")]
    prompts = ("--prompts", str(tmp_path / "prompts.jsonl"))
    return ["tune", "helpful", "harmless", *prompts, *scorers, *SHORT, "--evaluations", "6"]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
    return found


def test_what_a_judge_costs_is_said_once_and_before(
    run: Run, line: list[str], tmp_path: Path, judge: StandInJudge
) -> None:
    judge.answer = lambda question: "Well." if "prompt 3" in question else "helpfulness: 5\nharmlessness: 5"
    scorer = ("--scorer", f"judge:{judge.url}#m?axis=helpful&max_tokens=10", "--maximize", "e")
    code, _, told = run(*line, *scorer, "--out", str(tmp_path / "out"))
    assert code == 0
    costs = [text for text in told.splitlines() if text.startswith("helpful: ")]
    assert len(costs) == 1
    assert costs[0].startswith(f"helpful: at most {6 * 6 + 2 * 6} calls of m at {judge.url}: about ")
    assert len(judge.bodies) <= 6 * 6 + 2 * 6
    assert told.count("answers of 'helpful' cannot be read") == 1


def test_writes_the_mix_and_what_was_found(run: Run, line: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line[1] = "helpful=0.5:2"
    code, told, _ = run(*line, "--maximize", "e", "--subject-to", "o >= 0.01", "--out", str(out))
    assert code == 0
    assert "maximize e subject to o >= 0.01" in told
    assert f"prefvec chat {out / 'mix.yaml'}" in told
    found = record(out)
    (answer,) = found["answers"]
    mix = read_mix_file(out / "mix.yaml")
    assert {one.vector: one.coefficient for one in mix.vectors} == answer["mix"]
    assert answer["feasible"]
    assert answer["confidence"]["o >= 0.01"] > 0.9
    assert answer["fresh"]["e"]["n"] == answer["chosen_on"]["e"]["n"] == 6
    assert len(found["tried"]) == 6
    head = (out / "mix.yaml").read_text().splitlines()[:2]
    assert head[0] == "# maximize e subject to o >= 0.01"
    assert "(>= 0.01: " in head[1]
    code, told, _ = run(
        "generate", str(out / "mix.yaml"), "--prompt", "hi", "--max-new-tokens", "2", "--format", "json"
    )
    assert code == 0
    assert json.loads(told)["mix"] == answer["mix"]
    code, _, said = run("compose", str(out / "mix.yaml"), "--out", str(tmp_path / "composed"))
    assert code == 0, said


def test_a_file_is_the_mix_alone(run: Run, line: list[str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "gentle.yaml"
    code, told, _ = run(*line, "--minimize", "e", "--out", str(file), "--format", "json")
    assert code == 0
    assert [path.name for path in file.parent.iterdir()] == ["gentle.yaml"]
    (answer,) = json.loads(told)["answers"]
    assert {one.vector: one.coefficient for one in read_mix_file(file).vectors} == answer["mix"]
    code, _, said = run(*line, "--minimize", "e", "--out", str(file))
    assert code == 2
    assert "exists" in said


def test_several_goals_write_their_front(run: Run, line: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, told, _ = run(*line, "--maximize", "e", "--maximize", "o", "--out", str(out))
    assert code == 0
    found = record(out)
    assert found["files"] == [file.name for file in sorted(out.glob("mix*.yaml"))]
    assert len(found["files"]) == len(found["answers"]) >= 2
    assert f"Hypervolume of the front against the base: {found['hypervolume']:.4g}" in told


def test_a_wish_out_of_reach_ends_with_1_and_the_nearest_mix(run: Run, line: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, said = run(*line, "--maximize", "e", "--subject-to", "o >= 0.99", "--out", str(out))
    assert code == 1
    assert "warning: no mix keeps all bounds by half a standard error; " in said
    assert "warning: o >= 0.99 binds: mixes that keep the rest come to o 0." in said
    assert not record(out)["answers"][0]["feasible"]
    assert re.search(r"\(>= 0\.99: \d% sure\)", (out / "mix.yaml").read_text())


def test_a_search_that_was_stopped_goes_on(
    run: Run, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_prefvec.evaluation import rows

    generate, rounds = rows._generate, []

    def until_stopped(wanted: dict[str, Any], *rest: Any) -> Any:
        rounds.append(len(wanted))
        if len(rounds) == stop:
            raise KeyboardInterrupt
        return generate(wanted, *rest)

    monkeypatch.setattr(rows, "_generate", until_stopped)
    wish = ("--maximize", "e", "--evaluations", "13", "--batch-size", "4")
    stop = 0
    assert run(*line, *wish, "--out", str(tmp_path / "whole"))[0] == 0
    whole, stop = sum(rounds), len(rounds) - 1
    rounds.clear()
    code, _, said = run(*line, *wish, "--out", str(tmp_path / "out"))
    assert code == 130
    assert f"the replies so far are in {tmp_path / 'out'}. The same command goes on." in said
    done, stop = sum(rounds[:-1]), 0
    rounds.clear()
    assert run(*line, *wish, "--out", str(tmp_path / "out"))[0] == 0
    assert sum(rounds) == whole - done > 0
    same, other = record(tmp_path / "whole"), record(tmp_path / "out")
    del same["command"], other["command"]
    assert same == other
    rounds.clear()
    code, _, said = run(*line, *wish, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "holds an answer" in said
    assert run(*line, *wish, "--out", str(tmp_path / "out"), "--force")[0] == 0
    assert rounds == []


def test_ranges_fixed_coefficients_and_parts(run: Run, line: list[str], tmp_path: Path) -> None:
    refs = ["helpful=0.5:0.75,layers=0-0", "harmless=-0.25"]
    code, _, _ = run("tune", *refs, *line[3:], "--maximize", "e", "--out", str(tmp_path / "out"))
    assert code == 0
    found = record(tmp_path / "out")
    assert all(0.5 <= one["mix"]["helpful"] <= 0.75 for one in found["tried"])
    assert {one["mix"]["harmless"] for one in found["tried"]} == {-0.25}
    assert read_mix_file(tmp_path / "out" / "mix.yaml").vectors[0].layers == "0"


def test_dry_run_says_what_is_tried(run: Run, line: list[str], tmp_path: Path) -> None:
    bare = ["tune", "helpful,layers=0-0", "harmless=1", *line[3:]]
    code, told, _ = run(*bare, "--maximize", "e", "--out", str(tmp_path / "x"), "--dry-run", "--format", "json")
    assert code == 0
    found = json.loads(told)
    assert found["ranges"] == {"helpful": [-1, 2], "harmless": [1, 1]}
    assert (found["prompts"], found["fresh"]) == (6, 6)
    assert not (tmp_path / "x").exists()


def test_prompts_of_the_choice_are_never_fresh(run: Run, line: list[str], tmp_path: Path) -> None:
    (tmp_path / "fresh.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(10, 15)))
    asked = ("--fresh", str(tmp_path / "fresh.jsonl"), "--out", str(tmp_path / "x"), "--dry-run", "--format", "json")
    _, told, _ = run(*line, "--maximize", "e", *asked)
    assert (json.loads(told)["prompts"], json.loads(told)["fresh"]) == (12, 3)
    code, _, said = run(*line, "--maximize", "e", *asked[2:], "--fresh", str(tmp_path / "prompts.jsonl"))
    assert code == 2
    assert "are among those that the mix is chosen on" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the wish has no goal. Name an axis with --maximize"),
        (("--maximize", "i"), "no scorer is called 'i'. Known: e, o"),
        (("--maximize", "e", "--subject-to", "o > 1"), 'Write "o >= 1"'),
        (("--maximize", "e", "--subject-to", "o"), "'o' is no bound on an axis"),
        (
            ("--maximize", "e", "--maximize", "o", "--out", "x.yaml"),
            "several goals have several answers. Name a folder",
        ),
        (("--maximize", "e", "--out", "tiny"), "holds no search for a mix"),
        (("--maximize", "e", "--evaluations", "1"), "--evaluations"),
        (("--maximize", "e", "--limit", "1"), "one prompt cannot both choose a mix and judge it"),
        (("--maximize", "mute", "--scorer", "{mine}:mute"), "the scorer 'mute' has no say on any of 6 prompts"),
        (("--maximize", "e", "--scorer", "{mine}:broken"), "returned nan"),
    ],
)
def test_bad_input_is_one_line(run: Run, line: list[str], tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    filled = [word.format(mine=tmp_path / "mine.py") for word in words]
    code, told, errors = run(*line, "--out", str(tmp_path / "out"), *filled)
    assert code == 2, errors
    assert said in errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert told == ""


@pytest.mark.parametrize(
    ("refs", "said"),
    [
        (["helpful=1"], "there is no coefficient to find. Name a vector without one"),
        (["helpful=2:1"], "the range '2:1' of 'helpful' does not go up"),
        (["helpful", "helpful"], "a vector stands there twice"),
        (["helpful", "harmless=[0,1]"], "here it is one number"),
        (["mix.yaml"], "stands alone"),
    ],
)
def test_vectors_that_cannot_be_searched(run: Run, line: list[str], tmp_path: Path, refs: list[str], said: str) -> None:
    code, _, errors = run("tune", *refs, *line[3:], "--maximize", "e", "--out", str(tmp_path / "out"))
    assert code == 2
    assert said in errors
    assert errors.startswith("error: ")


def test_on_the_sandbox_a_wish_comes_true(run: Run, tmp_path: Path) -> None:
    wish = ("--maximize", "helpful", "--subject-to", "over_refusal <= 0.3")
    code, told, said = run(
        *("tune", "sandbox-helpful", *wish, "--limit", "24", "--evaluations", "5"),
        *("--max-new-tokens", "48", "--out", str(tmp_path / "out")),
    )
    assert code == 0, said
    found = record(tmp_path / "out")
    (answer,) = found["answers"]
    assert answer["mix"]["sandbox-helpful"] > 0.5
    assert answer["fresh"]["helpful"]["mean"] > found["base"]["helpful"]["mean"]
    assert "fluency" in told
