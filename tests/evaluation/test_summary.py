"""The front of a sweep, which axes span it, and what a change is worth."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_prefvec.errors import InputError
from lora_prefvec.evaluation import Score, hypervolume, summarise
from lora_prefvec.evaluation.report import cell, digits, samples, verdict, write_report
from lora_prefvec.evaluation.rows import Plan
from tests.evaluation.points import AXES, MEANS, Axis, point, swept


def test_the_front_is_that_of_the_axes_named_like_the_vectors() -> None:
    summary = swept(helpful="-1:1:1", harmless="-1:1:1")
    assert summary.axes == ["helpful", "harmless"]
    assert (summary.costs, summary.others) == (["over_refusal"], ["reward"])
    best = [summary.points[i].mix for i in summary.front]
    assert [(mix["helpful"], mix["harmless"]) for mix in best] == [(-1, 1), (0, 1), (1, 1), (1, 0), (1, -1)]
    base = summary.points[summary.base or 0]
    assert not any(base.mix.values())
    gains = [(0.55, 0.6), (0.35, 0.7)]  # of the mixes that beat the base on both axes
    assert summary.hypervolume == pytest.approx(hypervolume(gains, (0.4, 0.5)))


def test_less_is_better_where_a_scorer_says_so() -> None:
    summary = swept(axes=["harmless", "over_refusal"], helpful="0:1:1", harmless="-1:1:1")
    assert {(p.mix["helpful"], p.mix["harmless"]) for p in map(summary.points.__getitem__, summary.front)} == {
        (0, -1),
        (0, 0),
        (0, 1),
    }
    assert summary.hypervolume == 0  # nothing beats the base on both


def test_all_axes_count_where_the_vectors_have_other_names() -> None:
    mixes = [{"a": 0.0}, {"a": 1.0}]
    means = {axis: lambda mix: mix["a"] for axis in MEANS}
    assert summarise([point(mix, means) for mix in mixes], AXES).axes == ["helpful", "harmless", "reward"]
    costs = [Axis("over_refusal", -1, True)]
    assert summarise([point(mix, means) for mix in mixes], costs).axes == ["over_refusal"]
    with pytest.raises(InputError, match=r"no scorer 'harmles'.*'harmless'"):
        summarise([point(mix, means) for mix in mixes], AXES, ["harmles"])


def test_where_an_axis_has_no_say_there_is_no_front_and_no_hypervolume() -> None:
    silent = {**MEANS, "harmless": lambda mix: None if not any(mix.values()) else MEANS["harmless"](mix)}
    summary = swept(means=silent, helpful="0:1:1", harmless="0:1:1")
    assert summary.base not in summary.front
    assert summary.hypervolume is None
    assert summary.to_dict()["front"]["hypervolume"] is None
    nothing = swept(means={**MEANS, "harmless": lambda _: None}, helpful="0:1:1", harmless="0:1:1")
    assert nothing.front == []


@pytest.mark.parametrize(
    ("low", "high", "direction", "said"),
    [
        (0.1, 0.3, 1, "better"),
        (0.1, 0.3, -1, "worse"),
        (-0.3, -0.1, 1, "worse"),
        (-0.3, -0.1, -1, "better"),
        (-0.1, 0.1, 1, "same"),
        (0.0, 0.0, 1, "same"),
        (None, None, 1, "same"),
    ],
)
def test_a_change_is_one_if_its_interval_leaves_out_0(
    low: float | None, high: float | None, direction: int, said: str
) -> None:
    assert verdict(Score(0.2, low, high, 0.1, 40), direction) == said


def test_a_change_is_measured_on_the_prompts_where_both_have_a_say() -> None:
    summary = swept(helpful="0:1:1", harmless="0:1:1")
    last = summary.points[-1]
    assert last.mix == {"helpful": 1, "harmless": 1}
    assert cell(summary, last, "helpful", 1).change == "+0.15 better"  # the noise of a prompt is the same in both
    assert cell(summary, last, "over_refusal", 1).change == "+0.10 worse"
    assert cell(summary, summary.points[summary.base or 0], "helpful", 1).change == ""
    last.values["helpful"][:39] = [None] * 39
    assert cell(summary, last, "helpful", 1).change == "+0.15 same"  # one prompt is no evidence


@pytest.mark.parametrize("n", [1, 3])
def test_samples_are_those_on_which_the_scores_differ(n: int) -> None:
    summary = swept(n=n, helpful="0:1:1", harmless="0:1:1")
    plan = Plan([p.mix for p in summary.points], [f"prompt {i}" for i in range(40)], n)
    for i in summary.front:  # but for these, all replies to a prompt differ alike
        summary.points[i].values["helpful"][7 * n] += i  # type: ignore[operator]
    shown = list(samples(plan, summary))
    assert "prompt 7" in [sample.messages[0]["content"] for sample in shown]
    for sample in shown:
        number = int(sample.messages[0]["content"].split()[-1])
        assert [reply for _, reply in sample.replies] == [f"reply {number * n} <b>"] * len(sample.replies)
    assert shown[0].replies[0][0] == "base"
    assert shown[0].replies[-1][0].startswith(f"{len(summary.front)}: helpful=")


def test_numbers_show_what_counts() -> None:
    assert [digits(value) for value in (0.5, 12.345, 0.0123, 0.0, -0.004)] == "0.50 12.35 0.012 0.00 -0.004".split()
    assert digits(5.8e-18, "+") == digits(0.0, "+") == "+0.00"


def test_a_report_of_a_sweep_in_which_nothing_has_a_say(tmp_path: Path) -> None:
    summary = swept(means=dict.fromkeys(MEANS, lambda _: None), helpful="0:1:1", harmless="0:1:1")
    plan = Plan([p.mix for p in summary.points], [f"prompt {i}" for i in range(40)])
    asked = {
        "base": {"id": "tiny", "revision": None},
        "vectors": {},
        "mixes": {"number": 4, "design": "grid"},
        "prompts": {"number": 40, "digest": "d"},
        "settings": {"seed": 0},
        "scorers": {},
    }
    run = {"command": "prefvec sweep", "seconds": 1, "replies_written": 0, "unread": {}, "versions": {}}
    write_report(tmp_path / "report.html", plan, summary, asked, run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "There is no hypervolume" in page
    assert "no say" in page
