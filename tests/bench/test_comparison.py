"""What became of the hopes, on two made-up methods."""

from __future__ import annotations

from typing import Any

from tests.bench.comparison import hopes


def run(method: str, seed: int, hypervolume: float, knobs: list[dict[str, float]], **more: Any) -> dict[str, Any]:
    points = [{"knob": knob, "scores": {axis: {"mean": value} for axis, value in knob.items()}} for knob in knobs]
    cost = {"flops": 10.0, "one_more": 100, **more}
    return {
        "method": method,
        "seed": seed,
        "hypervolume": hypervolume,
        "spearman": {"b": 1.0},
        "points": points,
        "cost": cost,
    }


def test_what_became_of_the_hopes() -> None:
    runs = []
    for seed in (0, 1):
        runs += [
            run("mixed vectors", seed, 0.3, [{"a": 1.0, "b": 2.0}], flops=5.0, one_more=20),
            run("mixed pairs", seed, 0.4, [{"a": 1.0, "b": 2.0}]),
            run("RACO", seed, 0.1 + 0.1 * seed, [{"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 0.5}], one_more=200),
            run("DPO-LW", seed, 0.15, [{"a": 0.5, "b": 0.5}]),
        ]
    found = {
        hope: (seen, seeds) for hope, _, seen, seeds in hopes({"comparison": {"axes": ["x:a", "b"]}, "runs": runs})
    }
    assert found["mixed vectors: b follows its knob"] == ("1.000 ± 0.000", "1.000 1.000")
    assert "mixed vectors: a follows its knob" not in found
    assert found["RACO less DPO-LW on a, equal weights"][1] == "0.000 0.000"
    assert found["mixed vectors: hypervolume over the best that retrains"][1] == "2.000 1.500"
    assert found["two-sided vectors over pairs: hypervolume"][1] == "0.750 0.750"
    assert found["two-sided vectors over pairs: training FLOPs"][1] == "0.500 0.500"
    assert found["one more preference: tokens of a vector over RACO's front"][1] == "0.100 0.100"
    assert found["one more preference: tokens of a vector over DPO-LW's front"][1] == "0.200 0.200"
