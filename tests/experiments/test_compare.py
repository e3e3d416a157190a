"""Methods side by side on a tiny base: what is trained, what is shared, what comes out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_prefvec.artifact import read_adapter
from lora_prefvec.cli.main import main
from lora_prefvec.evaluation.statistics import Score
from lora_prefvec.evaluation.sweep import Point
from lora_prefvec.experiments.artifacts import Place
from lora_prefvec.experiments.compare import Worth, along, best_rate, flops, gains, interval
from lora_prefvec.experiments.spec import MixSpec
from lora_prefvec.sandbox import load_scorer
from tests.training.methods.test_weighing import rated_file
from tests.training.tiny import QUICK, hidden, write_pairs

SCORER = """
def length(prompts, replies):
    return [float(len(reply)) for reply in replies]

def spread(prompts, replies):
    return [float(len(set(reply))) for reply in replies]
"""
Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lora_prefvec.cli.main.quiet_libraries", lambda: None)
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    rated_file(tmp_path / "rated.jsonl")
    common = {
        "base": {"id": str(tiny_llama)},
        "held_out": 8,
        "lora": {"rank": 4, "alpha": 8},
        "training": {**QUICK, "max_steps": 2},
    }
    warm = {"preference": "warm", "data": {"source": "pairs.jsonl"}, **common}
    both = {
        "preference": "both",
        "data": {"source": "rated.jsonl"},
        "method": {"name": "raco", "objectives": {"warm": 0.5, "short": 0.5}},
        **common,
    }
    (tmp_path / "warm.yaml").write_text(yaml.safe_dump(warm))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
    (tmp_path / "scorers.py").write_text(SCORER)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {n}"}) for n in range(6)))
    comparison = {
        "name": "tiny",
        "base": {"id": str(tiny_llama)},
        "axes": ["scorers.py:length", "scorers.py:spread"],
        "sweep": {"prompts": "prompts.jsonl", "limit": 6, "max_new_tokens": 4},
        "methods": {
            "mixed": {"knob": "coefficients", "vectors": {"length": {"recipe": "warm.yaml"}}, "coefficients": [0, 1]},
            "RACO": {"knob": "weights", "recipe": "both.yaml", "points": 2},
            "one": {"knob": "none", "recipe": "warm.yaml"},
        },
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(comparison))
    return tmp_path


@pytest.fixture
def compare(place: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    def run(*arguments: str, **changes: Any) -> tuple[int, str, str]:
        content = yaml.safe_load((place / "compare.yaml").read_text()) | changes
        (place / "compare.yaml").write_text(yaml.safe_dump(content))
        code = main(["compare", "compare.yaml", "--out", "out", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_of_more_than_two_axes_each_two_have_a_panel(
    compare: Compare, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("lora_prefvec.experiments.report.save", lambda figure, file: drawn.append(figure))
    (place / "scorers.py").write_text(SCORER + "".join(SCORER.replace("(prompts", f"{n}(prompts") for n in range(2)))
    axes = [f"scorers.py:{name}" for name in ("length", "spread", "length0", "spread0", "length1")]
    code, _, error = compare("--only", "one", axes=axes)
    assert code == 0, error
    panels = drawn[0].axes
    assert len({(panel.get_xlabel(), panel.get_ylabel()) for panel in panels if panel.axison}) == 10
    assert len(panels) == 12  # two of four rows of three are left over
    assert all(line.get_linestyle() == "None" for panel in panels for line in panel.lines)


def test_every_artifact_is_trained_once_and_a_second_run_does_nothing(
    compare: Compare, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told, _ = compare("--dry-run", "--format", "json")
    assert (code, json.loads(told)["to_train"]) == (0, 3)  # two of RACO; the vector serves two methods
    code, told, error = compare("--format", "json")
    assert code == 0, error
    rows = {row["method"]: row for row in json.loads(told)}
    assert [rows[name]["adapters"] for name in ("mixed", "RACO", "one")] == [1, 2, 1]
    assert rows["mixed"]["tokens"] == rows["one"]["tokens"] > 0
    assert len(list((place / "out" / "artifacts").iterdir())) == 3
    assert hidden(place / "out" / "artifacts") == []
    summary = json.loads((place / "out" / "summary.json").read_text())
    assert [len(run["points"]) for run in summary["runs"]] == [2, 2, 1]
    assert summary["runs"][0]["points"][0]["scores"] == summary["base"]  # nothing of anything is the base
    assert (place / "out" / "fronts.png").stat().st_size > 10_000
    assert "## RACO" in (place / "out" / "report.md").read_text()
    monkeypatch.setattr("lora_prefvec.experiments.artifacts.train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr("lora_prefvec.evaluation.rows._generate", lambda *_: pytest.fail("written"))
    assert compare("--format", "json")[1] == told


def test_only_some_of_the_methods(compare: Compare, place: Path) -> None:
    code, told, error = compare("--only", "one", "--format", "json")
    assert code == 0, error
    assert [row["method"] for row in json.loads(told)] == ["one"]
    code, _, error = compare("--only", "raco")
    assert (code, error.count("\n")) == (2, 1)
    assert "has no method 'raco'. Known: RACO, mixed, one." in error


def test_a_second_seed_is_a_run_of_its_own(compare: Compare, place: Path) -> None:
    methods = {"one": {"knob": "none", "recipe": "warm.yaml"}}
    code, _, error = compare(seeds=[0, 1], methods=methods)
    assert code == 0, error
    runs = json.loads((place / "out" / "summary.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert len(list((place / "out" / "artifacts").iterdir())) == 2


def test_each_method_gets_the_best_of_the_rates(compare: Compare, place: Path) -> None:
    rates = {"factors": [0.5, 4], "prompts": "other.jsonl", "limit": 3}
    (place / "other.jsonl").write_text("\n".join(json.dumps({"prompt": f"ask {n}"}) for n in range(3)))
    code, told, _ = compare("--dry-run", "--format", "json", "--artifacts", "made", rates=rates)
    assert (code, json.loads(told)["to_train"]) == (0, 3 + 2 + 2)  # the vector and RACO's own weights, at two rates
    methods: dict[str, Any] = {
        "RACO": {"knob": "weights", "recipe": "both.yaml", "points": [{"warm": 0.25, "short": 0.75}]}
    }
    kept = {"one": {"knob": "none", "recipe": "warm.yaml", "rates": False}}
    told = compare("--dry-run", "--format", "json", "--artifacts", "made", methods=methods | kept)[1]
    assert json.loads(told)["to_train"] == 2 + 2
    code, _, error = compare("--artifacts", "made", methods=methods)
    assert code == 0, error
    found = json.loads((place / "out" / "summary.json").read_text())["rates"]["RACO"]
    assert set(found["hypervolume"]) == {"0.5", "4"}
    assert f"| x{found['factor']:g} |" in (place / "out" / "report.md").read_text()
    learned = []
    for folder in (place / "made").iterdir():
        facts = read_adapter(folder).provenance
        assert facts
        assert facts.training
        (warm,) = (one.weight for one in facts.objectives if one.name == "warm")
        learned.append((warm, round(facts.training.learning_rate / QUICK["learning_rate"], 6)))
    assert sorted(learned) == [(0.25, found["factor"]), (0.5, 0.5), (0.5, 4.0)]


def test_of_rates_of_equal_room_the_one_with_the_greater_gain_is_taken() -> None:
    assert best_rate({0.5: Worth(0.0, -0.1), 1.0: Worth(0.0, 0.2), 2.0: Worth(0.0, 0.1)}) == 1
    assert best_rate({0.5: Worth(0.0, 0.9), 1.0: Worth(0.1, 0.2)}) == 1
    assert best_rate({}) == 1


def test_the_interval_over_seeds_is_students() -> None:
    assert interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"  # 4.303 / sqrt(3)
    assert interval([1.0], 2) == "1.00"


def test_mixes_whose_coefficients_sum_to_a_number() -> None:
    parts = {"a": {"recipe": "x"}, "b": {"recipe": "y"}}
    given = {"knob": "coefficients", "vectors": parts, "coefficients": [0, 0.5, 1, 2], "sum_to": 2}
    assert MixSpec.model_validate(given).points() == [{"a": 0, "b": 2}, {"a": 1, "b": 1}, {"a": 2, "b": 0}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"one": {"knob": "none", "recipe": "nowhere"}}}, "there is no recipe 'nowhere'"),
        ({"methods": {"one": {"knob": "weights", "recipe": "warm.yaml"}}}, "its method is preference_vector"),
        ({"methods": {"one": {"knob": "slider", "recipe": "warm.yaml"}}}, "methods.one"),
        ({"axes": ["scorers.py:length"]}, "axes"),
        ({"axes": ["scorers.py:length", "scorers.py:nothing"]}, "nothing"),
        ({"rates": {"factors": [0], "prompts": "prompts.jsonl"}}, "rates.factors.0"),
        (
            {"methods": {"one": {"knob": "weights", "recipe": "both.yaml", "points": [{"warm": 0.5, "short": 0.6}]}}},
            "sum to 1.1, not to 1",
        ),
        ({"seeds": [1, 1]}, "a seed stands there twice"),
        ({"base": {"id": "sandbox"}}, "All methods are compared on one base"),
        ({"sweep": {"prompts": "none.jsonl"}}, "none.jsonl"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_trained(
    changes: dict[str, Any], said: str, compare: Compare, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_prefvec.experiments.artifacts.train", lambda *_, **__: pytest.fail("trained"))
    code, told, error = compare(**changes)
    assert (code, told) == (2, "")
    assert said in error.splitlines()[-1]
    assert error.count("error: ") == 1


def test_a_knob_is_followed_where_the_others_stand_still() -> None:
    places = [Place({"a": a, "b": b}, {}) for b in (0.0, 1.0) for a in (0.0, 1.0, 2.0)]
    assert along(places, "a", [0, 1, 2, 5, 6, 7]) == pytest.approx(1)
    assert along(places, "a", [0, 1, 2, 7, 6, 5]) == pytest.approx(0)
    weights = [Place({"a": w, "b": 1 - w}, {}) for w in (0.0, 0.5, 1.0)]
    assert along(weights, "b", [2, 1, 0]) == pytest.approx(1)
    asked = [Place({"a": a}, {}) for a in (1.0, 2.0, 3.0)] + [Place(one, {}) for one in ({}, {"b": 1.0}, {"b": 5.0})]
    assert along(asked, "a", [1, 2, 3, 9, 0, 7]) == pytest.approx(1)
    assert along(asked, "b", [1, 2, 3, 9, 0, 7]) is None
    constant = [Place({"a": 5.0, "b": b}, {}) for b in (1.0, 2.0, 3.0)]
    assert along(constant, "a", [1, 2, 3]) is None  # one level alone says nothing
    assert along(constant, "b", [1, 2, 3]) == pytest.approx(1)


def test_an_axis_without_a_say_is_the_worst() -> None:
    score = Score(0.5, None, None, None, 3)
    point = Point({}, [], {"helpful": score, "over_refusal": score, "honest": Score(None, None, None, None, 0)})
    axes = [load_scorer(name) for name in ("helpful", "over_refusal", "honest")]
    assert gains(point, axes) == [0.5, -0.5, float("-inf")]


def test_operations_of_a_frozen_base() -> None:
    assert flops(10, 100) == 4000
    assert flops(10, 100, backward_passes=3) == 8000
