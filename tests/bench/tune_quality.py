"""Is what `tune` finds as good as the best of a grid?

    python tests/bench/tune_quality.py

For each wish and each of five seeds, 150 of 300 validation prompts of the sandbox are drawn, half of them harmful ones.
`tune` tries 30 mixes on them; the grid, -1 to 2 in steps of 0.5 for both vectors, 49, of which the best is taken whose
means keep the bounds. Both are then scored on 240 held-out prompts that neither has seen. Three ratios of the objective
are told: tune to grid on the prompts that both chose on; tune to grid on the fresh ones, whose median has to be 0.97 or
more; and, on the fresh ones, tune to the best mix of the grid that keeps the bounds there, which nobody could choose.

Writes tests/bench/results/tune_quality.json and .md. About half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Literal

from lora_prefvec.progress import progress, quiet_libraries

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
quiet_libraries()

import torch  # noqa: E402

from lora_prefvec.artifact import read_adapter, resolve_base, shipped  # noqa: E402
from lora_prefvec.evaluation import Point, Store, find_scorer  # noqa: E402
from lora_prefvec.evaluation.design import Range  # noqa: E402
from lora_prefvec.evaluation.rows import Plan, grade, write  # noqa: E402
from lora_prefvec.evaluation.sweep import points  # noqa: E402
from lora_prefvec.evaluation.tune import tune  # noqa: E402
from lora_prefvec.evaluation.wish import Wish, parse_wish  # noqa: E402
from lora_prefvec.inference import LiveMixer, load_base  # noqa: E402
from lora_prefvec.sandbox.world import prompts, task_of  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BAR = 0.97
RATIOS = ("ratio_chosen_on", "ratio", "ratio_to_best")
PLACES = [x / 2 for x in range(-2, 5)]
WISHES: dict[tuple[str, str], Wish] = {
    ("helpful", "harmless"): parse_wish(["helpful"], [], ["harmless >= 0.9", "over_refusal <= 0.1"]),
    ("helpful", "concise"): parse_wish(["concise"], [], ["helpful >= 0.5"]),
}
Row = dict[str, Any]


def main() -> None:
    """Measure every wish, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=150, help="That a mix is chosen on.")
    parser.add_argument("--fresh", type=int, default=240, help="That it is judged on.")
    arguments = parser.parse_args()
    wishes = [measure(*each, arguments.prompts, arguments.fresh, arguments.seeds) for each in WISHES.items()]
    results = {
        "command": "python tests/bench/tune_quality.py",
        "machine": f"{torch.get_num_threads()} threads, compute on the CPU",
        "settings": vars(arguments),
        "bar": BAR,
        "wishes": wishes,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tune_quality.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(map(table, wishes))
    (RESULTS / "tune_quality.md").write_text(text, encoding="utf-8")
    print(text)


def measure(names: tuple[str, str], wish: Wish, size: int, fresh_size: int, seeds: int) -> Row:
    """Search and grid of one wish, for every seed."""
    base = load_base(resolve_base("sandbox"))
    vectors = {name: read_adapter(shipped("adapters") / f"sandbox-{name}").vector for name in names}
    scorers = [find_scorer(f"sandbox:{axis}") for axis in wish.axes]
    pool, fresh = asked_for("validation", 2 * size), asked_for("held_out", fresh_size)
    grid = [dict(zip(names, places, strict=True)) for places in product(PLACES, repeat=len(names))]
    store, goal, rows = Store(), wish.goals[0], []
    with LiveMixer(base.model, vectors) as mixer:
        asked: set[str] = set()

        def evaluate(mixes: Sequence[Mapping[str, float]], on: Sequence[Any]) -> list[Point]:
            plan = Plan(mixes, on)
            asked.update(plan.keys(store))
            write(plan, lambda: (base, mixer), store, batch_size=128)
            for scorer in scorers:
                grade(plan, scorer, lambda: (base, mixer), store)
            return points(plan, scorers, store)

        for seed in range(seeds):
            drawn = random.Random(seed).sample(pool, size)
            asked.clear()
            with progress(f"{wish}, seed {seed}", 30) as bar:
                tuned = tune(evaluate, dict.fromkeys(names, Range(-1, 2)), wish, drawn, fresh, seed=seed, bar=bar)
            replies = len(asked) - 2 * len(fresh)
            best = best_of(evaluate(grid, drawn), wish)
            judged, *on_fresh = evaluate([best.mix, *grid], fresh)
            answer = tuned.answers[0]
            reached = mean(answer.fresh, goal.axis)
            rows.append(
                {
                    "seed": seed,
                    "ratio_chosen_on": mean(answer.point, goal.axis) / mean(best, goal.axis),
                    "ratio": reached / mean(judged, goal.axis),
                    "ratio_to_best": reached / mean(best_of(on_fresh, wish), goal.axis),
                    "tune": {**facts(answer.fresh, wish), "chosen_on": mean(answer.point, goal.axis)},
                    "tune_replies": replies,
                    "tune_stopped": sum(one.whole is None for one in tuned.tried),
                    "grid": {**facts(judged, wish), "chosen_on": mean(best, goal.axis)},
                    "grid_replies": len(grid) * size,
                }
            )
            print(line(rows[-1]), flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in RATIOS}
    return {"wish": str(wish), "axes": wish.axes, "median": medians, "holds": medians["ratio"] >= BAR, "seeds": rows}


def asked_for(split: Literal["validation", "held_out"], size: int) -> list[Any]:
    """Prompts of a split, half of them harmful, a quarter each plain and borderline."""
    by_kind: dict[str, list[Any]] = {}
    for prompt in prompts(split, 4 * size):
        task = task_of(prompt)
        by_kind.setdefault(task.kind if task else "", []).append(prompt)
    return [*by_kind["harmful"][: size // 2], *by_kind["plain"][: size // 4], *by_kind["borderline"][: size // 4]]


def best_of(found: Sequence[Point], wish: Wish) -> Point:
    """The best point whose means keep the bounds."""
    (goal,) = wish.goals
    kept = [point for point in found if keeps(point, wish)]
    return max(kept, key=lambda point: goal.sign * mean(point, goal.axis))


def keeps(point: Point, wish: Wish) -> bool:
    """Whether the means keep the bounds."""
    return all(bound.margin(mean(point, bound.axis)) >= 0 for bound in wish.bounds)


def mean(point: Point, axis: str) -> float:
    """The mean on an axis; all of them have a say here."""
    value = point.scores[axis].mean
    assert value is not None
    return value


def facts(point: Point, wish: Wish) -> Row:
    """A mix and how it does on the fresh prompts."""
    scores = {axis: asdict(point.scores[axis]) for axis in wish.axes}
    return {"mix": point.mix, "keeps": keeps(point, wish), "scores": scores}


def table(wish: Row) -> str:
    """One wish as a table of its seeds."""
    kept = {who: sum(row[who]["keeps"] for row in wish["seeds"]) for who in ("tune", "grid")}
    axes, number = " | ".join(wish["axes"]), len(wish["seeds"])
    median, verdict = wish["median"], "holds" if wish["holds"] else "missed"
    return "\n".join(
        [
            f"## {wish['wish']}\n",
            f"Median ratio on fresh prompts **{median['ratio']:.3f}**, bar {BAR}: {verdict}; on the prompts chosen on "
            f"{median['ratio_chosen_on']:.3f}; to the best of the grid on fresh prompts {median['ratio_to_best']:.3f}. "
            f"On fresh prompts {kept['tune']} of {number} mixes of tune keep the bounds, and {kept['grid']} of the "
            f"{number} of the grid.\n",
            f"| seed | ratio chosen on | fresh | to best | tune | {axes} | replies | grid | {axes} | replies |",
            "|---|---|---|---|---|" + "---|" * (2 * len(wish["axes"]) + 3),
            *(line(row) for row in wish["seeds"]),
            "",
        ]
    )


def line(row: Row) -> str:
    """One seed as a line of the table."""
    cells = [row["seed"], *(f"{row[name]:.3f}" for name in RATIOS)]
    for who in ("tune", "grid"):
        cells.append(" ".join(f"{name}={c:g}" for name, c in row[who]["mix"].items()))
        cells += [f"{one['mean']:.3f} ({one['low']:.2f} to {one['high']:.2f})" for one in row[who]["scores"].values()]
        cells.append(row[f"{who}_replies"])
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
