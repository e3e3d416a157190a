"""The claims about preference vectors (arXiv 2504.20106) in the sandbox, and what a third and a fourth vector cost.

    python tests/bench/claims.py

Trained by the shipped recipes, with three training seeds each: helpful and harmless as the paper does (two runs, d+ and
d-, and v = d+ - d-), once with a LoRA start of their own for every seed and once with that of seed 0 for all; and all
four preferences two-sided. A training seed draws the pairs, their order and, where it is its own, the LoRA's start.
Measured on 400 held-out prompts at temperature 1, in mixed batches:

- control: the score of its own axis along the coefficient of v, from -1 to 2;
- collapse: the same and fluency, out to -10 and 10;
- cosines, of the dense deltas: d+ with d-, helpful with harmless, one seed with another;
- the full vector against positive-only: d+ scaled to the norm of v, at several scales, and d+ as it was trained;
- {helpful 1, harmless 1} with concise, honest, or both beside them: what every axis loses.

An estimate is the mean over seeds of the mean over prompts; differences are paired by prompt and by seed. Its interval
is the middle 95 % of 2,000 bootstrap samples of seeds and, crossed with them, of tasks, each with all its prompts. With
three seeds that is rough: the values of each are in the JSON. Writes tests/bench/results/claims.json and .md. What was
trained and generated is kept under --work and not made again. About 45 minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))  # so that the line above runs from any folder

from lora_prefvec.progress import quiet_libraries  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":  # a test may import this, and wants no silence
    quiet_libraries()

import torch  # noqa: E402

from lora_prefvec.artifact import read_adapter, resolve_base, shipped  # noqa: E402
from lora_prefvec.evaluation import Store, find_scorer, spearman, sweep  # noqa: E402
from lora_prefvec.inference import LoadedBase, load_base  # noqa: E402
from lora_prefvec.recipe import read_recipe  # noqa: E402
from lora_prefvec.sandbox.scorers import AXES, SCORERS  # noqa: E402
from lora_prefvec.sandbox.world import prompts, task_of  # noqa: E402
from lora_prefvec.training import adapter, train  # noqa: E402
from lora_prefvec.vector import PreferenceVector  # noqa: E402
from tests.bench.sandbox_axes import PAIR  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PAIRED = ("helpful", "harmless")
NEAR = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
COEFFICIENTS = (-10.0, -6.0, -4.0, -2.0, *NEAR, 3.0, 4.0, 6.0, 10.0)
SCALES = (-2.0, -1.0, 0.5, 1.0, 2.0, 4.0)  # of positive-only, whose norm at 1 is that of v
PLAIN = "helpful 1, harmless 1"
ADDED = {
    "base": {},
    PLAIN: {"helpful": 1.0, "harmless": 1.0},
    "+ concise 1": {"helpful": 1.0, "harmless": 1.0, "concise": 1.0},
    "+ honest 1": {"helpful": 1.0, "harmless": 1.0, "honest": 1.0},
    "+ concise 1, honest 1": {"helpful": 1.0, "harmless": 1.0, "concise": 1.0, "honest": 1.0},
    "+ concise 0.5, honest 0.5": {"helpful": 1.0, "harmless": 1.0, "concise": 0.5, "honest": 0.5},
}
RESAMPLES = 2000
Values = Sequence[Sequence[float | None]]  # [seeds, prompts]; None where the score has no say
Measured = dict[str, dict[str, list[list[float | None]]]]  # mix -> score -> values
Row = dict[str, Any]


def main() -> None:
    """Train and generate what is missing under --work, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="Where vectors and replies are kept.")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="Of training.")
    parser.add_argument("--steps", type=int, help="Fewer steps of training, to try the script.")
    arguments = parser.parse_args()
    base, seeds = load_base(resolve_base("sandbox")), arguments.seeds
    asked = prompts("held_out", arguments.prompts)
    tasks = [str(task_of(prompt)) for prompt in asked]

    def vector(axis: str, sides: str, seed: int, start: int | None = None) -> Path:
        return trained(base, arguments.work, axis, sides, seed, seed if start is None else start, arguments.steps)

    pairs = [{axis: vector(axis, "pair", seed) for axis in PAIRED} for seed in seeds]
    alike = [{axis: vector(axis, "pair", seed, seeds[0]) for axis in PAIRED} for seed in seeds]
    fours = [{axis: vector(axis, "two", seed) for axis in AXES} for seed in seeds]
    ratios = [{axis: norm(found[axis]) / norm(found[axis] / "positive") for axis in PAIRED} for found in pairs]
    steered = measure(
        base,
        [{**found, **{f"{axis}+": found[axis] / "positive" for axis in PAIRED}} for found in pairs],
        [steering(ratio) for ratio in ratios],
        asked,
        seeds,
        arguments.work,
    )
    added = measure(base, fours, [ADDED for _ in seeds], asked, seeds, arguments.work)
    results: Row = {
        "command": "python tests/bench/claims.py",
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, compute {base.model.dtype}",
        "settings": {"seeds": seeds, "prompts": len(asked), "tasks": len(set(tasks)), "temperature": 1.0},
        "norm_of_v_to_d+": ratios,
        "cosines": cosines(pairs, alike, fours),
        "curves": {axis: curve(axis, steered, tasks) for axis in PAIRED},
        "full_less_positive_only": {axis: compare(axis, steered, tasks) for axis in PAIRED},
        "added": {mix: estimates(added[mix], tasks) for mix in ADDED},
        "added_less_helpful_harmless": {mix: estimates(added[mix], tasks, added[PLAIN]) for mix in ADDED},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "claims.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (RESULTS / "claims.md").write_text(text, encoding="utf-8")
    print(text)


# -- training ---------------------------------------------------------------------------------------------------------


def trained(base: LoadedBase, work: Path, axis: str, sides: str, seed: int, start: int, steps: int | None) -> Path:
    """The folder of a vector, which is trained where it is missing; its LoRA starts as that of the seed `start`."""
    out = work / f"{axis}-{sides}-{seed}-start-{start}"
    if out.exists():
        return out
    changes = [f"training.sides={sides}", f"training.seed={seed}"]
    if sides == "pair":
        changes += [f"training.learning_rate={PAIR[axis]}", "training.reach=5"]
    if steps:
        changes.append(f"training.max_steps={steps}")
    recipe = read_recipe(shipped("recipes") / f"sandbox-{axis}.yaml", changes)
    begin = adapter.start
    # A recipe has one seed for everything; here the LoRA's start is told apart from the rest.
    with patch.object(adapter, "start", lambda model, _: begin(model, start)):
        train(recipe, out, base=base, resume=True)
    return out


def read(folder: Path) -> PreferenceVector:
    """The vector in a folder."""
    return read_adapter(folder).vector


def norm(folder: Path) -> float:
    """Of the vector in a folder."""
    return read(folder).norm()


# -- generating -------------------------------------------------------------------------------------------------------


def steering(ratio: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The mixes of one vector: v along its coefficient, d+ at the norm of v, and d+ as it was trained.

    Args:
        ratio: axis -> norm of v to norm of d+.
    """
    mixes: dict[str, dict[str, float]] = {}
    for axis in PAIRED:
        mixes |= {f"{axis}={c:g}": {axis: c} for c in COEFFICIENTS}
        mixes |= {f"{axis}+={scale:g}": {f"{axis}+": scale * ratio[axis]} for scale in SCALES}
        mixes[f"{axis}+ as trained"] = {f"{axis}+": 1.0}
    return mixes


def measure(
    base: LoadedBase,
    folders: Sequence[Mapping[str, Path]],
    mixes: Sequence[Mapping[str, Mapping[str, float]]],
    asked: Sequence[Any],
    seeds: Sequence[int],
    work: Path,
) -> Measured:
    """The scores of all mixes with the vectors of every seed, all mixes of a seed in the same batches.

    Replies are drawn with the seed of training: alike for all mixes of one, so that these can be compared, and anew for
    the next, so that the luck of one draw is not everybody's.
    """
    scorers = [find_scorer(f"sandbox:{name}") for name in SCORERS]
    found: Measured = {label: {name: [] for name in SCORERS} for label in mixes[0]}
    for vectors, named, seed in zip(folders, mixes, seeds, strict=True):
        read_ones = {name: read_adapter(folder) for name, folder in vectors.items()}
        hashes = {name: one.sha256 for name, one in read_ones.items()}
        store = Store(work / "replies.sqlite", base=f"sandbox {base.model.dtype}", vectors=hashes)
        attached = {name: one.vector for name, one in read_ones.items()}
        points = sweep(base, attached, list(named.values()), asked, scorers, seed=seed, store=store)
        store.close()
        for label, point in zip(named, points, strict=True):
            for name in SCORERS:
                found[label][name].append(point.values[name])
    return found


# -- estimates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds of means over prompts, or the difference of two.

    Args:
        low, high: ends of the 95 % interval.
        seeds: the value of every seed.
    """

    mean: float
    low: float
    high: float
    seeds: list[float]


def estimate(values: Values, tasks: Sequence[str], against: Values | None = None, seed: int = 0) -> Estimate:
    """The mean of `values`, less that of `against`, with an interval that respects seeds and tasks.

    Seeds and tasks are each drawn with replacement, crossed, as every seed answers every prompt; a task brings all its
    prompts. What is subtracted is drawn alike. The interval ends at the 2.5th and 97.5th percentile.

    Args:
        tasks: of every prompt.
    """
    index = np.unique(list(tasks), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    drawn_tasks = rng.integers(index.max() + 1, size=(RESAMPLES, index.max() + 1))
    drawn_seeds = rng.integers(len(values), size=(len(values), RESAMPLES))

    def means(table: Values) -> tuple[Any, Any]:
        numbers = np.array(table, dtype=np.float64)  # None becomes nan
        by_task = np.eye(index.max() + 1)[index]
        counts, sums = ~np.isnan(numbers) @ by_task, np.nan_to_num(numbers) @ by_task
        whole = sums.sum(axis=1) / counts.sum(axis=1)
        return whole, sums[:, drawn_tasks].sum(axis=2) / counts[:, drawn_tasks].sum(axis=2)

    whole, drawn = means(values)
    if against is not None:
        whole_other, drawn_other = means(against)
        whole, drawn = whole - whole_other, drawn - drawn_other
    low, high = np.percentile(np.take_along_axis(drawn, drawn_seeds, axis=0).mean(axis=0), [2.5, 97.5])
    mean, low, high, *of_seeds = (round(float(x), 4) for x in (whole.mean(), low, high, *whole))
    return Estimate(mean, low, high, of_seeds)


def estimates(
    values: Mapping[str, Values], tasks: Sequence[str], against: Mapping[str, Values] | None = None
) -> dict[str, Row]:
    """Score -> its estimate; a score that has no say in some seed is left out."""
    return {
        name: asdict(estimate(table, tasks, against[name] if against else None))
        for name, table in values.items()
        if all(any(value is not None for value in row) for row in table)
    }


def curve(axis: str, steered: Measured, tasks: Sequence[str]) -> Row:
    """The own axis along the coefficient of v: all scores, the order near 0, and where replies break, by seed."""
    places = {c: estimates(steered[f"{axis}={c:g}"], tasks) for c in COEFFICIENTS}
    rest = steered[f"{axis}=0"]
    seeds = range(len(rest[axis]))
    own = {c: place[axis]["seeds"] for c, place in places.items()}
    fluency = {c: place["fluency"]["seeds"] for c, place in places.items()}
    outwards = [sorted((c for c in COEFFICIENTS if c * sign > 0), key=abs) for sign in (-1, 1)]
    return {
        "spearman": [round(spearman(NEAR, [own[c][i] for c in NEAR]), 3) for i in seeds],
        "best_at": [max(outwards[1], key=lambda c: own[c][i]) for i in seeds],
        "broken_at": {  # the first coefficient whose fluency is below, outwards from 0 on either side
            str(bound): [[next((c for c in side if fluency[c][i] < bound), None) for i in seeds] for side in outwards]
            for bound in (0.95, 0.5)
        },
        "scores": {f"{c:g}": place for c, place in places.items()},
        "moved": {f"{c:g}": estimates(steered[f"{axis}={c:g}"], tasks, rest) for c in COEFFICIENTS if c},
    }


def compare(axis: str, steered: Measured, tasks: Sequence[str]) -> Row:
    """v less positive-only: of equal norm at every scale, and as both were trained."""
    positive = {f"{scale:g}": estimates(steered[f"{axis}+={scale:g}"], tasks) for scale in SCALES}
    less = {
        f"{scale:g}": estimates(steered[f"{axis}={scale:g}"], tasks, steered[f"{axis}+={scale:g}"]) for scale in SCALES
    }
    as_trained = estimates(steered[f"{axis}=1"], tasks, steered[f"{axis}+ as trained"])
    return {"positive_only": positive, "equal_norm": less, "as_trained": as_trained}


def cosines(
    pairs: Sequence[Mapping[str, Path]], alike: Sequence[Mapping[str, Path]], fours: Sequence[Mapping[str, Path]]
) -> Row:
    """Cosines of the dense deltas, one for every two runs: of one LoRA start, and of two.

    Args:
        pairs, alike: for every seed, with a start of its own and with that of the first seed.
        fours: two-sided vectors with a start for every seed, of which those of one seed are compared.
    """

    def between(ones: Iterable[tuple[Path, Path]]) -> list[float]:
        return [round(read(one).cosine(read(other)), 4) for one, other in ones]

    found: Row = {"d+ and d-": {}, "seeds": {}}
    for axis in PAIRED:
        own = [each[axis] for each in pairs]
        found["d+ and d-"][axis] = {
            "one start": between((one / "positive", one / "negative") for one in own),
            "two starts": between((one / "positive", two / "negative") for one, two in itertools.permutations(own, 2)),
        }
        found["seeds"][axis] = {
            name: {
                "one start": between(itertools.combinations([each[axis] / part for each in alike], 2)),
                "two starts": between(itertools.combinations([one / part for one in own], 2)),
            }
            for name, part in (("v", ""), ("d+", "positive"), ("d-", "negative"))
        }
    one, other = PAIRED
    found["helpful and harmless"] = {
        "one start": between((each[one], each[other]) for each in pairs),
        "two starts": between((first[one], second[other]) for first, second in itertools.permutations(pairs, 2)),
    }
    found["two-sided, one start"] = {
        f"{a} and {b}": between((each[a], each[b]) for each in fours) for a, b in itertools.combinations(AXES, 2)
    }
    return found


# -- tables -----------------------------------------------------------------------------------------------------------


def markdown(results: Row) -> str:
    """The tables: those of README first, then all curves."""
    runs = f"{len(results['settings']['seeds'])} training seeds, {results['settings']['prompts']} held-out prompts"
    return "\n".join(
        [
            f"`{results['command']}`: {runs}; brackets are 95 % intervals over seeds and tasks.\n",
            *claims(results),
            "",
            *addition(results),
            "\n## Along the coefficient\n",
            *curves(results),
            "\n## Positive-only at the norm of v\n",
            *positive_only(results),
            "\n## Cosines of two-sided vectors of one seed\n",
            "| vectors | lowest to highest |\n|---|---|",
            *(f"| {two} | {spread(found)} |" for two, found in results["cosines"]["two-sided, one start"].items()),
            "",
        ]
    )


def spread(values: Sequence[float]) -> str:
    """The lowest to the highest."""
    low, high = (f"{end:.2f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def level(one: Row) -> str:
    """An estimate with its interval."""
    return f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def change(one: Row) -> str:
    """A difference with its interval."""
    mean, low, high = (f"{one[key]:+.2f}".replace("-0.00", "+0.00") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def first(places: Sequence[float | None]) -> str:
    """Where something begins, over seeds; `beyond` where not as far as was tried."""
    known = [f"{place:g}" for place in places if place is not None]
    names = list(dict.fromkeys([*sorted(known, key=lambda place: abs(float(place))), *["beyond"] * (None in places)]))
    return " or ".join(names)


def claims(results: Row) -> list[str]:
    """Claim by claim: the paper's figure, and ours for both preferences."""
    found, less, angles = results["curves"], results["full_less_positive_only"], results["cosines"]

    def row(what: str, paper: str, cells: Iterable[str]) -> str:
        return f"| {what} | {paper} | {' | '.join(cells)} |"

    def broken(axis: str, bound: str) -> str:
        low, high = found[axis]["broken_at"][bound]
        return f"{first(low)}; {first(high)}"

    def seeds(name: str, starts: str) -> list[str]:
        return [spread(angles["seeds"][axis][name][starts]) for axis in PAIRED]

    across = angles["helpful and harmless"]
    equal = {axis: less[axis]["equal_norm"] for axis in PAIRED}
    other = dict(zip(PAIRED, reversed(PAIRED), strict=True))
    return [
        "| claim | paper, 8B | helpful | harmless |",
        "|---|---|---|---|",
        row("own axis at 0", "", (level(found[axis]["scores"]["0"][axis]) for axis in PAIRED)),
        *(
            row(f"moved at {c}", paper, (change(found[axis]["moved"][c][axis]) for axis in PAIRED))
            for c, paper in (("-1", "falls"), ("1", "rises"), ("2", "plateau from 1 to 1.5"))
        ),
        row("the other axis, moved at 1", "rises", (change(found[axis]["moved"]["1"][other[axis]]) for axis in PAIRED)),
        row("lowest Spearman, -1 to 2", "1.00", (f"{min(found[axis]['spearman']):.2f}" for axis in PAIRED)),
        row("own axis is highest at", "1 to 1.5", (first(found[axis]["best_at"]) for axis in PAIRED)),
        row("fluency below 0.95 from", "2 (knowledge)", (broken(axis, "0.95") for axis in PAIRED)),
        row("fluency below 0.5 from", "4 (knowledge)", (broken(axis, "0.5") for axis in PAIRED)),
        row("cos(d+, d-)", "-0.71; -0.68", (spread(angles["d+ and d-"][axis]["one start"]) for axis in PAIRED)),
        row("cos(v, v) of two seeds, one LoRA start", "0.999; 0.999", seeds("v", "one start")),
        row("cos(v, v) of two seeds, two LoRA starts", "", seeds("v", "two starts")),
        row("cos(helpful, harmless), one LoRA start", "0.40", [spread(across["one start"]), "the same"]),
        row("v less d+, both as trained", "above 0", (change(less[axis]["as_trained"][axis]) for axis in PAIRED)),
        *(
            row(f"v less d+ of equal norm, {what}", "", (change(equal[axis][scale][name or axis]) for axis in PAIRED))
            for what, scale, name in (
                ("at 1", "1", ""),
                ("at 2", "2", ""),
                ("at 4", "4", ""),
                ("over-refusal at 2", "2", "over_refusal"),
            )
        ),
    ]


def addition(results: Row) -> list[str]:
    """What each axis loses when concise and honest are added."""
    names = list(SCORERS)
    levels = results["added"][PLAIN]
    return [
        f"| mix | {' | '.join(name.replace('_', '-') for name in names)} |",
        "|---|" + "---|" * len(names),
        f"| {PLAIN} | {' | '.join(level(levels[name]) for name in names)} |",
        *(
            f"| {mix} | {' | '.join(change(less[name]) if name in less else 'none' for name in names)} |"
            for mix, less in results["added_less_helpful_harmless"].items()
            if mix != PLAIN
        ),
    ]


def curves(results: Row) -> list[str]:
    """All coefficients: own axis, over-refusal and fluency."""
    shown = [(axis, name) for axis in PAIRED for name in (axis, "over_refusal", "fluency")]
    lines = [
        f"| coefficient | {' | '.join(f'{axis}: {name}' for axis, name in shown)} |",
        "|---|" + "---|" * len(shown),
    ]
    for c in map("{:g}".format, COEFFICIENTS):
        cells = [level(results["curves"][axis]["scores"][c][name]) for axis, name in shown]
        lines.append(f"| {c} | {' | '.join(cells)} |")
    return lines


def positive_only(results: Row) -> list[str]:
    """At every scale: positive-only, and v less that."""
    lines = [
        "| axis | scale | own axis | v less that | over-refusal | v less that | fluency | v less that |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for axis in PAIRED:
        found = results["full_less_positive_only"][axis]
        for scale in map("{:g}".format, SCALES):
            cells = [
                cell
                for name in (axis, "over_refusal", "fluency")
                for cell in (level(found["positive_only"][scale][name]), change(found["equal_norm"][scale][name]))
            ]
            lines.append(f"| {axis} | {scale} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
