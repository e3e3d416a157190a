"""A language model as a judge, behind a stand-in that is well, slow, busy, down, or talks nonsense."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from lora_prefvec.errors import InputError, PrefvecError, RunError
from lora_prefvec.evaluation.scorers import (
    Prompt,
    Unread,
    answers,
    apply,
    endpoint,
    find_scorer,
    find_scorers,
    fingerprint,
)
from lora_prefvec.evaluation.scorers.rubrics import read_grades, read_refusal, read_winner
from tests.evaluation.stand_in_judge import Failure, StandInJudge, serve

PROMPTS: list[Prompt] = ["How do I clean the bike?", {"prompt": "How do I kill a process?", "label": "safe"}, "Hello"]
REPLIES = ["good: dust it", "bad reply", "so so"]
GRADES = {"good": (9, 8), "bad": (2, 10), "so so": (5, 5)}


def grade(question: str) -> str:
    helpful, harmless = next(grades for word, grades in GRADES.items() if word in question)
    return f"helpfulness: {helpful}\nharmlessness: {harmless}\nreason: so it is"


def busy(_: str) -> Failure:
    return Failure(429, json.dumps({"error": {"message": "too many at once"}}))


@pytest.fixture(autouse=True)
def waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """An empty cache, and nobody waits; the seconds that would have been waited."""
    waited: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None and threading.current_thread().name.startswith("ThreadPoolExecutor"):
                waited.append(timeout)
                return True
            return super().wait(timeout)

    monkeypatch.setenv("PREFVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint.threading, "Event", Event)
    return waited


@pytest.fixture
def judge() -> Iterator[StandInJudge]:
    with serve(StandInJudge(grade)) as running:
        yield running


def reference(judge: StandInJudge, options: str = "axis=helpful") -> str:
    return f"judge:{judge.url}#some/model?{options}"


def scored(judge: StandInJudge, options: str = "axis=helpful") -> list[float | None]:
    return apply(find_scorer(reference(judge, options)), PROMPTS, REPLIES)


# What it asks, and what it makes of the answers


def test_two_grades_for_the_price_of_one(judge: StandInJudge) -> None:
    assert scored(judge, "axis=helpful") == [9.0, 2.0, 5.0]
    assert scored(judge, "axis=harmless") == [8.0, 10.0, 5.0]
    assert len(judge.bodies) == 3
    body = next(body for body in judge.bodies if "clean the bike" in body["messages"][1]["content"])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0.0, 512)
    assert "user: How do I clean the bike?" in body["messages"][1]["content"]
    assert "[begin reply]\ngood: dust it\n[end reply]" in body["messages"][1]["content"]


def test_refusals_in_three_degrees_and_only_where_the_axis_has_a_say(judge: StandInJudge) -> None:
    judge.answer = lambda question: "verdict: partly" if "bad" in question else "verdict: refuses"
    assert scored(judge, "axis=refusal") == [1.0, None, 1.0]
    assert len(judge.bodies) == 2
    assert scored(judge, "axis=over_refusal") == [None, 0.5, None]
    over_refusal = find_scorer(reference(judge, "axis=over_refusal"))
    assert (over_refusal.name, over_refusal.direction, over_refusal.is_cost) == ("over_refusal", -1, True)


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Other replies to the prompts, as `prefvec generate` writes them."""
    file = tmp_path / "base.jsonl"
    records = [{"prompt": PROMPTS[0], "reply": "other 1"}, {**PROMPTS[1], "reply": "other 2"}]  # type: ignore[dict-item]
    records += [{"messages": [{"role": "user", "content": "Hello"}], "reply": "other 3"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_a_comparison_is_made_in_both_orders(judge: StandInJudge, others: Path) -> None:
    def better(question: str) -> str:
        a_is_ours = question.index("other") > question.index("reply B")
        if "good" in question:
            return f"better: {'A' if a_is_ours else 'B'}"
        if "bad" in question:
            return f"better: {'B' if a_is_ours else 'A'}"
        return "better: A"  # whatever stands first

    judge.answer = better
    assert scored(judge, f"axis=harmless&against={others}") == [1.0, 0.0, 0.5]
    assert len(judge.bodies) == 6
    judge.answer = lambda question: "better: tie"
    assert scored(judge, f"axis=helpful&against={others}") == [0.5] * 3
    judge.answer = lambda question: "better: A" if "reply B]\nother" in question else "better: tie"
    assert scored(judge, f"axis=helpful&against={others}&temperature=1") == [0.5] * 3  # won once, drawn once


def test_a_comparison_needs_another_reply_to_every_prompt(judge: StandInJudge, others: Path) -> None:
    scorer = find_scorer(reference(judge, f"axis=helpful&against={others}"))
    assert scorer.name == "helpful-wins"
    with pytest.raises(InputError, match="have none to prompt 2"):
        apply(scorer, [PROMPTS[0], "Something else"], ["a", "b"])
    assert not judge.bodies


@pytest.mark.parametrize(
    ("answer", "grades"),
    [
        ("helpfulness: 8\nharmlessness: 10", (8, 10)),
        ("**Helpfulness**: 7.5/10\n- Harmlessness: **3**\nreason: it is 9 of 10", (7.5, 3)),
        ("1. helpfulness: 1\n2. harmlessness: 2.", (1, 2)),
        ("<think>helpfulness: 1\nharmlessness: 1</think>\nhelpfulness: 6\nharmlessness: 7", (6, 7)),
        ("helpfulness: 11\nharmlessness: 5", None),
        ("helpfulness: 0\nharmlessness: 5", None),
        ("helpfulness: 8", None),
        ("helpfulness: high\nharmlessness: low", None),
        ("8 and 9", None),
        ("", None),
    ],
)
def test_grades_are_read(answer: str, grades: tuple[float, float] | None) -> None:
    assert read_grades(answer) == (grades and {"helpful": grades[0], "harmless": grades[1]})


def test_verdicts_are_read() -> None:
    assert [read_refusal(f"Verdict: {word}.") for word in ("complies", "Partly", "refuses", "no")] == [0, 0.5, 1, None]
    answers = [
        "better: A",
        "**Better:** B",
        "better: Reply A",
        "better: tie\nreason: A",
        "A",
        "better: Ahead",
        "A or B",
    ]
    assert [read_winner(answer) for answer in answers] == [1, 0, 1, 0.5, None, None, None]


# The cache


def test_what_was_answered_is_not_asked_again(judge: StandInJudge) -> None:
    first = scored(judge)
    assert scored(judge) == first
    assert len(judge.bodies) == 3
    assert apply(find_scorer(reference(judge)), [PROMPTS[0]] * 2, [REPLIES[0]] * 2) == [9.0, 9.0]
    assert len(judge.bodies) == 3
    scored(judge, "axis=helpful&temperature=0.5")
    assert len(judge.bodies) == 6


def test_equal_questions_of_one_call_are_asked_once(judge: StandInJudge) -> None:
    assert apply(find_scorer(reference(judge)), ["Hello"] * 5, ["good"] * 5) == [9.0] * 5
    assert len(judge.bodies) == 1


def test_a_broken_file_in_the_cache_is_no_answer(judge: StandInJudge, tmp_path: Path) -> None:
    scored(judge)
    files = list((tmp_path / "cache" / "judge").iterdir())
    assert len(files) == 3
    files[0].write_bytes(b'{"answer": 3}')
    files[1].write_bytes(b"\xff\x00")
    assert scored(judge) == [9.0, 2.0, 5.0]
    assert len(judge.bodies) == 5


def test_a_judge_that_fails_half_way_is_not_paid_twice(judge: StandInJudge) -> None:
    judge.answer = lambda question: Failure(401) if "so so" in question else grade(question)
    with pytest.raises(InputError):
        scored(judge, "axis=helpful&concurrency=1")
    judge.answer = grade
    assert scored(judge) == [9.0, 2.0, 5.0]
    assert len(judge.bodies) == 4


def test_the_cost_is_known_before(judge: StandInJudge, others: Path) -> None:
    scorer = find_scorer(reference(judge))
    assert scorer.cost(PROMPTS, REPLIES).startswith(f"3 calls of some/model at {judge.url}: about ")  # type: ignore[attr-defined]
    assert "at most 1536 out" in scorer.cost(PROMPTS, REPLIES)  # type: ignore[attr-defined]
    assert not judge.bodies
    apply(scorer, PROMPTS[:2], REPLIES[:2])
    assert scorer.cost(PROMPTS, REPLIES).startswith("1 call of")  # type: ignore[attr-defined]
    pairwise = find_scorer(reference(judge, f"axis=helpful&against={others}&max_tokens=none"))
    assert pairwise.cost(PROMPTS, REPLIES).startswith("6 calls of")  # type: ignore[attr-defined]
    assert "no limit" in pairwise.cost(PROMPTS, REPLIES)  # type: ignore[attr-defined]
    ahead = scorer.cost(PROMPTS * 2, [None] * 6)  # type: ignore[attr-defined]
    assert ahead.startswith("at most 6 calls of some/model")
    assert "tokens in beside the replies, at most 3072 out" in ahead
    assert pairwise.cost(PROMPTS, [None] * 3).startswith("at most 6 calls of")  # type: ignore[attr-defined]


# The key


def test_a_key_is_sent_only_where_it_is_named(judge: StandInJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-general")
    monkeypatch.setenv("JUDGE_KEY", "sk-secret ")
    scored(judge)
    assert all("Authorization" not in headers and "authorization" not in headers for headers in judge.headers)
    scored(judge, "axis=helpful&key_env=JUDGE_KEY&max_tokens=none&temperature=none")
    assert {name.lower(): value for name, value in judge.headers[-1].items()}["authorization"] == "Bearer sk-secret"
    assert "temperature" not in judge.bodies[-1]
    assert "max_tokens" not in judge.bodies[-1]


def test_the_key_is_never_shown(
    judge: StandInJudge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    options = "axis=helpful&key_env=JUDGE_KEY"
    scorer = find_scorer(reference(judge, options))
    scored(judge, options)
    judge.answer = lambda _: Failure(401, json.dumps({"error": {"message": "Incorrect API key: sk-secret"}}))
    with pytest.raises(InputError, match=r"answers 401: Incorrect API key: \*\*\*") as refusal:
        apply(scorer, ["New"], ["good"])
    kept = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "cache" / "judge").iterdir())
    told = repr(scorer) + fingerprint(scorer) + str(refusal.value) + "".join(capsys.readouterr()) + kept
    assert "sk-secret" not in told


# Trouble


def test_a_busy_judge_is_asked_again(judge: StandInJudge, waits: list[float]) -> None:
    tries: dict[str, int] = {}

    def answer(question: str) -> str | Failure:
        tries[question] = tries.get(question, 0) + 1
        return grade(question) if tries[question] > 2 else Failure((429, 503)[tries[question] - 1])

    judge.answer = answer
    assert scored(judge) == [9.0, 2.0, 5.0]
    assert len(judge.bodies) == 9
    assert len(waits) == 6
    assert all(0.5 <= wait <= 2.0 for wait in waits)  # up to 1 s, then up to 2


@pytest.mark.parametrize("form", ["number", "date"])
def test_a_judge_that_says_when_to_come_back_is_obeyed(judge: StandInJudge, waits: list[float], form: str) -> None:
    asked = []

    def answer(question: str) -> str | Failure:
        asked.append(question)
        when = "17" if form == "number" else formatdate(endpoint.time.time() + 17, usegmt=True)
        return grade(question) if len(asked) > 1 else Failure(429, headers={"Retry-After": when})

    judge.answer = answer
    assert apply(find_scorer(reference(judge)), ["Hello"], ["good"]) == [9.0]
    assert len(waits) == 1
    assert 10 < waits[0] <= 17


def test_a_judge_that_wants_an_hour_is_given_up(judge: StandInJudge) -> None:
    judge.answer = lambda _: Failure(429, headers={"Retry-After": "3600"})
    with pytest.raises(RunError, match=r"asks to wait 3600 s.*Go on later"):
        apply(find_scorer(reference(judge)), ["Hello"], ["good"])
    assert len(judge.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "attempts", "kind", "told"),
    [
        (busy, 6, RunError, "answers 429: too many at once, 6 times"),
        (lambda _: Failure(500, "<html>oh</html>"), 6, RunError, "answers 500: <html>oh</html>, 6 times"),
        (lambda _: Failure(400, '{"error": {"message": "no max_tokens here"}}'), 1, InputError, "no max_tokens here"),
        (lambda _: Failure(404), 1, InputError, "answers 404"),
        (lambda _: Failure(200, "<html>a proxy's greeting</html>"), 1, RunError, "no chat completion: <html>a proxy"),
        (lambda _: Failure(200, '{"choices": []}'), 1, RunError, "answers no chat completion"),
        (lambda _: Failure(200, "[]"), 1, RunError, "answers no chat completion"),
    ],
)
def test_a_judge_that_cannot_judge(
    judge: StandInJudge, answer: object, attempts: int, kind: type[PrefvecError], told: str
) -> None:
    judge.answer = answer  # type: ignore[assignment]
    with pytest.raises(kind) as refusal:
        apply(find_scorer(reference(judge)), ["Hello"], ["good"])
    assert told in str(refusal.value)
    assert len(judge.bodies) == attempts


def test_a_judge_that_is_down(judge: StandInJudge, waits: list[float]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(RunError, match=r"cannot be reached \(ConnectError\), 6 times"):
            apply(find_scorer(f"judge:{url}#model?axis=helpful"), ["Hello"], ["good"])
    assert len(waits) == 5


def test_a_judge_that_is_too_slow(judge: StandInJudge) -> None:
    judge.pause = 0.5
    with pytest.raises(RunError, match=r"did not answer within 0.05 s, 6 times"):
        apply(find_scorer(reference(judge, "axis=helpful&timeout=0.05")), ["Hello"], ["good"])


def test_answers_that_cannot_be_read_are_no_scores_and_not_kept(judge: StandInJudge, others: Path) -> None:
    judge.answer = lambda question: "Well." if "bad" in question else grade(question)
    assert scored(judge) == [9.0, None, 5.0]
    assert answers(find_scorer(reference(judge)), PROMPTS, REPLIES)[1] == Unread("Well.")
    compared = find_scorer(reference(judge, f"axis=helpful&against={others}"))
    judge.answer = lambda question: "better: A" if "reply A]\nother" in question else "Both."
    assert answers(compared, PROMPTS, REPLIES) == [Unread("Both.")] * 3
    judge.bodies.clear()
    judge.answer = grade
    assert scored(judge) == [9.0, 2.0, 5.0]
    assert len(judge.bodies) == 1


@pytest.mark.parametrize(
    "answer", ["I would rather not.", Failure(200, '{"choices": [{"message": {"content": null}}]}')]
)
def test_a_judge_that_talks_nothing_but_nonsense(judge: StandInJudge, answer: str | Failure) -> None:
    judge.answer = lambda _: answer
    assert scored(judge) == [None] * 3
    prompts = [f"Hello {i}" for i in range(5)]
    with pytest.raises(RunError, match="none of the 5 answers of 'helpful' can be read"):
        apply(find_scorer(reference(judge)), prompts, ["good"] * 5)
    assert len(answers(find_scorer(reference(judge)), prompts, ["good"] * 5, known=True)) == 5


def test_as_many_at_once_as_was_said(judge: StandInJudge) -> None:
    judge.pause = 0.05
    prompts = [f"Hello {i}" for i in range(12)]
    apply(find_scorer(reference(judge, "axis=helpful&concurrency=3")), prompts, ["good"] * 12)
    assert 1 < judge.most_at_once <= 3


# References


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("judge:http://x/v1#m?axis=polite", ["no axis 'polite'", "helpful"]),
        ("judge:http://x/v1#m", ["no axis ''", "over_refusal"]),
        ("judge:http://x/v1?axis=helpful", ["needs a URL and a model", "#MODEL"]),
        ("judge:gpt-4o?axis=helpful", ["needs a URL and a model"]),
        ("judge:http://#m?axis=helpful", ["needs a URL and a model"]),
        ("judge:http://x/v1#m?axis=helpful&temprature=1", ["no option 'temprature'", "Did you mean 'temperature'?"]),
        ("judge:http://x/v1#m?axis=helpful&concurrency=many", ["the concurrency of a judge is 'many'"]),
        ("judge:http://x/v1#m?axis=helpful&concurrency=0", ["the concurrency of a judge is '0'"]),
        ("judge:http://x/v1#m?axis=helpful&timeout=nan", ["the timeout of a judge is 'nan'"]),
        ("judge:http://x/v1#m?axis=helpful&key_env=NOT_SET_ANYWHERE", ["variable NOT_SET_ANYWHERE is empty"]),
        ("judge:http://x/v1#m?axis=helpful&against=nowhere.jsonl", ["nowhere.jsonl cannot be read"]),
        ("judge:http://x/v1#m?axis=refusal&against=nowhere.jsonl", ["no axis 'refusal'"]),
    ],
)
def test_what_is_no_judge(reference: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        find_scorer(reference)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "x"}', '{"reply": "x"}', '"text"'])
def test_a_file_of_other_replies_that_is_none(line: str, tmp_path: Path) -> None:
    file = tmp_path / "others.jsonl"
    file.write_text('{"prompt": "a", "reply": "b"}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=r"others.jsonl, line 2: no object with a prompt and a reply"):
        find_scorer(f"judge:http://x/v1#m?axis=helpful&against={file}")


def test_two_of_one_name_are_refused() -> None:
    judges = [f"judge:http://x/v1#{model}?axis=helpful" for model in "ab"]
    with pytest.raises(InputError, match=r"two scorers are called 'helpful'.*\?name=OTHER"):
        find_scorers(judges)
    assert [one.name for one in find_scorers([judges[0], f"{judges[1]}&name=second"])] == ["helpful", "second"]


def test_judges_are_told_apart(judge: StandInJudge, others: Path) -> None:
    options = ["axis=helpful", "axis=harmless", "axis=refusal", "axis=over_refusal", "axis=helpful&temperature=1"]
    options += [f"axis=helpful&against={others}", f"axis=harmless&against={others}"]
    marks = {fingerprint(find_scorer(reference(judge, option))) for option in options}
    assert len(marks) == len(options)
    assert fingerprint(find_scorer(reference(judge, "axis=helpful&name=x&concurrency=2"))) in marks
