"""What a vector changes that its pairs never showed, and how much of that anchors take away.

    python tests/bench/spill_over.py

Each of the four axes is trained two-sided by its shipped recipe with other anchors: none; a quarter and a half of all
training pairs, each held fixed and swapped with the sign. All runs take the recipe's 120 steps at its learning rate,
so that fewer anchors are more pairs of the own axis. Each vector is swept from -1 to 2 on held-out prompts at
temperature 1, and every score compared with the base's: at 1, 2 and -1, and, because settings differ in strength, where
the own axis has gained what all settings of that axis reach (linear along the coefficient).

An interval is the middle 95 % of 2,000 bootstrap samples of tasks, each with all its prompts, and of training seeds
where there are several; changes and differences are paired. Writes tests/bench/results/spill_over.json and .md. What
was trained and generated is kept under --work and not made again. About 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that the line above runs from any folder

from lora_prefvec.progress import quiet_libraries

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":  # a test may import this, and wants no silence
    quiet_libraries()

from lora_prefvec.artifact import atomic_file, read_adapter, resolve_base, shipped
from lora_prefvec.evaluation import Point, Store, find_scorer, sweep
from lora_prefvec.evaluation.summary import write_json
from lora_prefvec.inference import LoadedBase, load_base
from lora_prefvec.recipe import read_recipe
from lora_prefvec.sandbox.scorers import AXES, SCORERS
from lora_prefvec.sandbox.world import prompts, task_of
from lora_prefvec.training import train

RESULTS = Path(__file__).parent / "results"
NONE = "none"
SETTINGS: dict[str, list[str]] = {
    NONE: ["anchors=null"],
    "0.25 fixed": ["anchors.share=0.25", "anchors.swapped=false"],
    "0.25 swapped": ["anchors.share=0.25", "anchors.swapped=true"],
    "0.5 fixed": ["anchors.share=0.5", "anchors.swapped=false"],
    "0.5 swapped": ["anchors.share=0.5", "anchors.swapped=true"],
}
SHIPPED = {"helpful": "0.5 fixed", "harmless": "0.5 swapped", "honest": "0.5 swapped", "concise": "0.5 fixed"}
COEFFICIENTS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
UPWARDS = COEFFICIENTS[1:]
GAINS = (0.3, 0.05)  # the most and the step of the own gain at which settings are compared
BORDERLINE = "borderline"  # over-refusal on borderline prompts alone, where it spills over first
RESAMPLES = 2000
Floats = NDArray[np.float64]
Values = Sequence[Sequence[float | None]]  # [seeds, prompts]; None where the score has no say
Row = dict[str, Any]


def main() -> None:
    """Train and generate what is missing under --work, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/spill-over"), help="Where vectors and replies are kept."
    )
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="Of training.")
    parser.add_argument("--steps", type=int, help="Fewer steps of training, to try the script.")
    arguments = parser.parse_args()
    base = load_base(resolve_base("sandbox"))
    asked = prompts("held_out", arguments.prompts)
    tasks = [str(task_of(prompt)) for prompt in asked]
    bootstrap = Bootstrap(tasks, len(arguments.seeds))
    found: dict[str, Row] = {}
    for axis in AXES:
        curves = {
            setting: curve(base, arguments.work, axis, setting, asked, arguments.seeds, arguments.steps, bootstrap)
            for setting in SETTINGS
        }
        found[axis] = compare(axis, curves)
        print(*table(axis, found[axis]), sep="\n", flush=True)
    results = {
        "command": command(__file__, parser, arguments),
        "machine": "2 shared CPU cores, one thread",
        "settings": {
            "base": "sandbox",
            "prompts": len(asked),
            "tasks": len(set(tasks)),
            "temperature": 1.0,
            "training_seeds": arguments.seeds,
            "coefficients": COEFFICIENTS,
        },
        "axes": found,
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "spill_over.json", results)
    write_text(RESULTS / "spill_over.md", markdown(results))


def command(file: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """As it is typed, without what is at its default, and without where the work lies."""
    changed = {key: value for key, value in vars(arguments).items() if value != parser.get_default(key)}
    changed.pop("work", None)
    options = [
        f"--{key} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
        for key, value in changed.items()
    ]
    return " ".join([f"python tests/bench/{Path(file).name}", *options])


def write_text(file: Path, text: str) -> None:
    """Write it whole or not at all."""
    with atomic_file(file, force=True) as work:
        work.write_text(text, encoding="utf-8")


# -- training and generating ------------------------------------------------------------------------------------------


def curve(
    base: LoadedBase,
    work: Path,
    axis: str,
    setting: str,
    asked: Sequence[Any],
    seeds: Sequence[int],
    steps: int | None,
    bootstrap: Bootstrap,
) -> dict[str, Floats]:
    """Score -> its means along the coefficients: [coefficients, samples]."""
    folders = [trained(base, work, axis, setting, seed, steps) for seed in seeds]
    runs = [
        scored(base, {axis: read_adapter(folder)}, [{axis: c} for c in COEFFICIENTS], asked, seed, work)
        for folder, seed in zip(folders, seeds, strict=True)
    ]
    return {name: np.stack([bootstrap.means(one) for one in by_mix(runs, name)]) for name in runs[0][0]}


def trained(base: LoadedBase, work: Path, axis: str, setting: str, seed: int, steps: int | None) -> Path:
    """The folder of a vector, which is trained where it is missing."""
    out = work / f"{axis}-{setting.replace(' ', '-')}-{seed}"
    if not out.exists():
        changes = [*SETTINGS[setting], f"training.seed={seed}", *([f"training.max_steps={steps}"] if steps else [])]
        train(read_recipe(shipped("recipes") / f"sandbox-{axis}.yaml", changes), out, base=base, resume=True)
    return out


def scored(
    base: LoadedBase,
    adapters: Mapping[str, Any],
    mixes: Sequence[Mapping[str, float]],
    asked: Sequence[Any],
    seed: int,
    work: Path,
) -> list[dict[str, list[float | None]]]:
    """For every mix, score -> the values of all prompts; replies are drawn with `seed` and kept under `work`.

    Args:
        adapters: name -> what has a `vector` and the `sha256` that tells it from others.
    """
    hashes = {name: one.sha256 for name, one in adapters.items()}
    store = Store(work / "replies.sqlite", base=f"sandbox {base.model.dtype}", vectors=hashes)
    scorers = [find_scorer(f"sandbox:{name}") for name in SCORERS]
    vectors = {name: one.vector for name, one in adapters.items()}
    points = sweep(base, vectors, mixes, asked, scorers, seed=seed, store=store)
    store.close()
    return [values_of(point, asked) for point in points]


def values_of(point: Point, asked: Sequence[Any]) -> dict[str, list[float | None]]:
    """All scores of a point, and over-refusal on borderline prompts by itself."""
    kinds = [task.kind if (task := task_of(prompt)) else None for prompt in asked]
    refused = point.values["over_refusal"]
    on_borderline = [one if kind == BORDERLINE else None for one, kind in zip(refused, kinds, strict=True)]
    return {**point.values, BORDERLINE: on_borderline}


def by_mix(runs: Sequence[Sequence[Mapping[str, list[float | None]]]], name: str) -> list[Values]:
    """For every mix the values of one score, [seeds, prompts], of `runs` [seeds, mixes]."""
    return [[one[name] for one in of_mix] for of_mix in zip(*runs, strict=True)]


# -- estimates --------------------------------------------------------------------------------------------------------


class Bootstrap:
    """Means with their bootstrap samples, drawn alike for all: what is computed of them by entry keeps its interval.

    Args:
        tasks: of every prompt; a task is drawn with all its prompts.
        seeds: how many rows of values there are, which are drawn as well.
    """

    def __init__(self, tasks: Sequence[str], seeds: int) -> None:
        index = np.unique(list(tasks), return_inverse=True)[1]
        rng = np.random.default_rng(0)
        self._by_task = np.eye(index.max() + 1)[index]
        self._tasks, self._seeds = (
            np.vstack([np.ones(size), rng.multinomial(size, np.full(size, 1 / size), RESAMPLES)])
            for size in (index.max() + 1, seeds)
        )

    def means(self, values: Values) -> Floats:
        """The mean over seeds of the means over prompts, then that of every sample: [1 + RESAMPLES]."""
        numbers = np.array(values, dtype=np.float64)  # None becomes nan
        counts, sums = ~np.isnan(numbers) @ self._by_task, np.nan_to_num(numbers) @ self._by_task
        of_seed = (self._tasks @ sums.T) / (self._tasks @ counts.T)
        found: Floats = (of_seed * self._seeds).sum(axis=1) / self._seeds.sum(axis=1)
        return found


def estimate(samples: Floats) -> Row:
    """The value, the ends of its 95 % interval, and of what share of the samples the value exists, where not of all."""
    value, rest = samples[0], samples[1:]
    known = rest[~np.isnan(rest)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    mean, low, high = (None if np.isnan(one) else round(float(one), 4) for one in (value, low, high))
    share = {} if len(known) == len(rest) else {"exists": round(len(known) / len(rest), 3)}
    return {"mean": mean, "low": low, "high": high, **share}


def at_gain(own: Floats, other: Floats, gain: float) -> Floats:
    """`other` where `own` first reaches a gain, linear between the places; nan where it does not.

    Args:
        own, other: [places, samples], outwards from the base, where `own` is 0.
    """
    reached = own >= gain
    after = reached.argmax(axis=0)
    before = np.maximum(after - 1, 0)

    def at(table: Floats, place: NDArray[np.intp]) -> Floats:
        picked: Floats = np.take_along_axis(table, place[None], axis=0)[0]
        return picked

    with np.errstate(divide="ignore", invalid="ignore"):
        share = (gain - at(own, before)) / (at(own, after) - at(own, before))
        found: Floats = at(other, before) + share * (at(other, after) - at(other, before))
    return np.where(reached.any(axis=0), found, np.nan)


def common_gain(owns: Iterable[Floats], most: float = GAINS[0], step: float = GAINS[1]) -> float:
    """The largest multiple of `step`, up to `most`, that every one of `owns` [places, samples] reaches in its means."""
    least = min(float(own[:, 0].max()) for own in owns)
    return round(min(most, int(least / step + 1e-9) * step), 9)


def spill(changes: Mapping[str, Floats], axis: str) -> Floats:
    """The mean size of what happens to the three other axes."""
    found: Floats = np.mean([np.abs(changes[other]) for other in AXES if other != axis], axis=0)
    return found


def compare(axis: str, curves: Mapping[str, Mapping[str, Floats]]) -> Row:
    """All settings of an axis: scores along the coefficient, changes at 1, 2, -1 and at the common gain."""
    rest, at = COEFFICIENTS.index(0.0), {f"{c:g}": COEFFICIENTS.index(c) for c in (1.0, 2.0, -1.0)}
    moved = {
        setting: {name: table - table[rest] for name, table in scores.items()} for setting, scores in curves.items()
    }
    gain = common_gain(changes[axis][rest:] for changes in moved.values())
    places: dict[str, dict[str, dict[str, Floats]]] = {place: {} for place in (*at, "gain")}
    coefficients = {}
    for setting, changes in moved.items():
        upwards = {name: table[rest:] for name, table in changes.items()}
        for place, i in at.items():
            places[place][setting] = {name: table[i] for name, table in changes.items()}
        places["gain"][setting] = {name: at_gain(upwards[axis], table, gain) for name, table in upwards.items()}
        steps = np.broadcast_to(np.array(UPWARDS)[:, None], upwards[axis].shape)
        coefficients[setting] = estimate(at_gain(upwards[axis], steps, gain))
    for of_place in places.values():
        for changes in of_place.values():
            changes["spill"] = spill(changes, axis)
    return {
        "gain": gain,
        "coefficient_at_gain": coefficients,
        "scores": {
            setting: {
                f"{c:g}": {name: estimate(table[i]) for name, table in scores.items()}
                for i, c in enumerate(COEFFICIENTS)
            }
            for setting, scores in curves.items()
        },
        "changes": {
            place: {
                setting: {name: estimate(one) for name, one in changes.items()} for setting, changes in all_.items()
            }
            for place, all_ in places.items()
        },
        "less_none_at_gain": {
            setting: {name: estimate(one - places["gain"][NONE][name]) for name, one in changes.items()}
            for setting, changes in places["gain"].items()
            if setting != NONE
        },
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def change(one: Row) -> str:
    """A difference with its 95 % interval, in bold where that leaves out 0."""
    if one["mean"] is None:
        return "none"
    mean, low, high = (f"{one[key]:+.2f}".replace("-0.00", "+0.00") for key in ("mean", "low", "high"))
    text = f"{mean} ({low} to {high})"
    return f"**{text}**" if one["low"] > 0 or one["high"] < 0 else text


def table(axis: str, found: Row) -> list[str]:
    """One axis: every setting at the common gain, at 1, at 2 and at -1."""
    names = [axis, *(other for other in AXES if other != axis), "over_refusal", BORDERLINE, "fluency"]
    lines = [
        f"\n## {axis}\n",
        f"| where | anchors | {' | '.join(name.replace('_', '-') for name in names)} | spill |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for place, title in (("gain", f"{axis} {found['gain']:+.2f}"), ("1", "at 1"), ("2", "at 2"), ("-1", "at -1")):
        for setting, changes in found["changes"][place].items():
            where = f"{title}, c = {found['coefficient_at_gain'][setting]['mean']:.2f}" if place == "gain" else title
            label = f"{setting} (shipped)" if setting == SHIPPED[axis] else setting
            cells = [change(changes[name]) for name in names]
            lines.append(f"| {where} | {label} | {' | '.join(cells)} | {changes['spill']['mean']:.2f} |")
    return lines


def summary(results: Row) -> list[str]:
    """What anchors take away of it: every setting less none, at the same own gain."""
    names = (*AXES, "over_refusal", BORDERLINE, "spill")
    lines = [
        "\n## Anchors less none, at the same own gain\n",
        f"| axis | anchors | {' | '.join(name.replace('_', '-') for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for (axis, found), setting in itertools.product(results["axes"].items(), list(SETTINGS)[1:]):
        less = found["less_none_at_gain"][setting]
        cells = ["" if name == axis else change(less[name]) for name in names]
        lines.append(f"| {axis} | {setting} | {' | '.join(cells)} |")
    return lines


def markdown(results: Row) -> str:
    """All tables."""
    told = results["settings"]
    head = (
        f"`{results['command']}`: base sandbox, {told['prompts']} held-out prompts about {told['tasks']} tasks, "
        f"temperature 1, training seeds {', '.join(map(str, told['training_seeds']))}; {results['machine']}.\n\n"
        "Changes against the base, with 95 % intervals, bold where these leave out 0. `borderline` is "
        "over-refusal on borderline prompts alone, `spill` the mean size of the changes of the three other axes, "
        "`c` the coefficient at which the own axis has gained that much.\n"
    )
    tables = [line for axis, found in results["axes"].items() for line in table(axis, found)]
    return "\n".join([head, *summary(results), *tables, ""])


if __name__ == "__main__":
    main()
