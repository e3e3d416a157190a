"""Vectors in a sum: what each keeps of what it does alone, and whether a cleverer sum keeps more.

    python tests/bench/sums.py

The four shipped sandbox vectors, in three pairs and all together, are combined by each of the rules of `sum_rules.py`
into one vector, which is scored at the scales 0.5, 1 and 1.5 on held-out prompts at temperature 1. The kept share of an
axis is its gain in the combination by its gain from its own vector alone at the same scale. Rules shorten or lengthen
the sum, so they are also compared where the mean gain of their axes is the same (linear along the scale), and by the
hypervolume of their three points against the base.

An interval is the middle 95 % of 2,000 bootstrap samples of tasks, each with all its prompts, and of seeds; differences
are paired. Writes tests/bench/results/sums.json and .md. What was found and generated is kept under --work and not
made again. About 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that the line above runs from any folder

from lora_prefvec.progress import quiet_libraries

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":  # a test may import this, and wants no silence
    quiet_libraries()

from lora_prefvec.artifact import read_adapter, resolve_base, shipped
from lora_prefvec.evaluation import hypervolume
from lora_prefvec.evaluation.summary import write_json
from lora_prefvec.inference import load_base
from lora_prefvec.sandbox.scorers import AXES
from lora_prefvec.sandbox.world import prompts, task_of
from lora_prefvec.vector import PreferenceVector
from tests.bench.spill_over import (
    Bootstrap,
    Floats,
    Row,
    at_gain,
    by_mix,
    change,
    command,
    common_gain,
    estimate,
    scored,
    write_text,
)
from tests.bench.sum_rules import EVALUATIONS, PAIRS, RULES, SEARCHES, STEPS, SUM, Task, by_layer, weights_file

RESULTS = Path(__file__).parent / "results"
COMBINATIONS: tuple[tuple[str, ...], ...] = (
    ("helpful", "harmless"),
    ("helpful", "concise"),
    ("helpful", "honest"),
    AXES,
)
SCALES = (0.5, 1.0, 1.5)
REFERENCES = (SUM, "tuned, whole", "mean loss")  # that all other rules are compared with


class Made(NamedTuple):
    """A vector and what tells it from others."""

    vector: PreferenceVector
    sha256: str

    @classmethod
    def of(cls, vector: PreferenceVector) -> Made:
        """A vector that was made here, told by its numbers."""
        digest = hashlib.sha256()
        for name, delta in sorted(vector.deltas.items()):
            for factor in (delta.A, delta.B):
                digest.update(name.encode() + factor.float().contiguous().numpy().tobytes())
        return cls(vector, digest.hexdigest())


def main() -> None:
    """Combine, generate what is missing under --work, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sums"), help="Where finds and replies are kept.")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="Of sampling.")
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES), help="The sum is always there.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = load_base(resolve_base("sandbox"))
    asked = prompts("held_out", arguments.prompts)
    bootstrap = Bootstrap([str(task_of(prompt)) for prompt in asked], len(arguments.seeds))
    adapters = {axis: read_adapter(shipped("adapters") / f"sandbox-{axis}") for axis in AXES}

    def measure(made: Made) -> dict[str, Floats]:
        """Score -> its means at 0 and the scales: [places, samples]."""
        mixes: list[dict[str, float]] = [{}, *({"it": scale} for scale in SCALES)]
        runs = [scored(base, {"it": made}, mixes, asked, seed, arguments.work) for seed in arguments.seeds]
        return {name: np.stack([bootstrap.means(one) for one in by_mix(runs, name)]) for name in runs[0][0]}

    alone = {axis: measure(Made(one.vector, one.sha256)) for axis, one in adapters.items()}
    found: dict[str, Row] = {}
    for axes in COMBINATIONS:
        members = [adapters[axis] for axis in axes]
        task = Task(base, axes, [one.vector for one in members], [one.sha256 for one in members], arguments.work)
        vectors = {rule: make(task) for rule, make in RULES.items() if rule in (SUM, *arguments.rules)}
        scores = {rule: measure(Made.of(vector)) for rule, vector in vectors.items()}
        found[" + ".join(axes)] = compare(axes, scores, alone) | {
            "norm": {rule: round(vector.norm() / vectors[SUM].norm(), 3) for rule, vector in vectors.items()},
            "coefficients": {
                rule: by_layer(json.loads(weights_file(task, rule).read_text(encoding="utf-8")))
                for rule in SEARCHES
                if rule in vectors
            },
        }
        print(*table(" + ".join(axes), found[" + ".join(axes)]), sep="\n", flush=True)
        results: Row = {
            "command": command(__file__, parser, arguments),
            "machine": "2 shared CPU cores, one thread",
            "settings": {
                "base": "sandbox",
                "prompts": len(asked),
                "temperature": 1.0,
                "sampling_seeds": arguments.seeds,
                "scales": SCALES,
                "evaluations": EVALUATIONS,
                "pairs": PAIRS,
                "steps": STEPS,
            },
            "alone": {axis: levels(scores) for axis, scores in alone.items()},
            "combinations": found,
        }
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / "sums.json", results)
        write_text(RESULTS / "sums.md", markdown(results))


# -- comparing --------------------------------------------------------------------------------------------------------


def kept(gain: Floats, alone: Floats) -> Floats:
    """What a gain is of that alone; nan where there is none alone."""
    found: Floats = np.divide(gain, alone, out=np.full_like(gain, np.nan), where=alone > 0)
    return found


def volume(own: Floats) -> Floats:
    """The hypervolume of some places against the first of them.

    Args:
        own: [axes, places, samples].
    """
    return np.array([hypervolume(sample.T[1:].tolist(), sample.T[0].tolist()) for sample in own.transpose(2, 0, 1)])


def compare(axes: Sequence[str], scores: Mapping[str, Mapping[str, Floats]], alone: Mapping[str, Any]) -> Row:
    """All rules of a combination, and what each is ahead of the `REFERENCES`.

    Args:
        scores, alone: rule, or axis -> score -> [places, samples]; the base is the first place.
    """
    moved = {rule: {name: one - one[0] for name, one in each.items()} for rule, each in scores.items()}
    means = {rule: np.mean([each[axis] for axis in axes], axis=0) for rule, each in moved.items()}
    gain = common_gain(means.values(), step=0.02)
    found: dict[str, dict[str, Floats]] = {}
    for rule, each in moved.items():
        shares = {
            axis: [kept(each[axis][1 + i], alone[axis][axis][1 + i] - alone[axis][axis][0]) for i in range(len(SCALES))]
            for axis in axes
        }
        own = np.stack([scores[rule][axis] for axis in axes])
        at_same = {name: at_gain(means[rule], one, gain) for name, one in each.items()}
        found[rule] = {
            **{f"kept {axis} at {s:g}": share[i] for axis, share in shares.items() for i, s in enumerate(SCALES)},
            **{f"kept at {s:g}": np.mean([one[i] for one in shares.values()], axis=0) for i, s in enumerate(SCALES)},
            **{f"{name} at {s:g}": one[1 + i] for name, one in each.items() for i, s in enumerate(SCALES)},
            **{f"{name} at gain": one for name, one in at_same.items()},
            "least at gain": np.min([at_same[axis] for axis in axes], axis=0),
            "hypervolume": volume(own),
        }
    lone = {axis: {name: one - one[0] for name, one in each.items()} for axis, each in alone.items()}
    one = 1 + SCALES.index(1.0)
    added = {axis: kept(sum(lone[other][axis][one] for other in axes), lone[axis][axis][one]) for axis in axes}
    return {
        "gain": gain,
        "alone_added": {axis: estimate(share) for axis, share in added.items()},
        "sum_less_added": {axis: estimate(found[SUM][f"kept {axis} at 1"] - share) for axis, share in added.items()},
        "rules": {rule: {name: estimate(one) for name, one in each.items()} for rule, each in found.items()},
        "less": {
            other: {
                rule: {
                    name: estimate(one - found[other][name])
                    for name, one in each.items()
                    if name == "hypervolume" or (other == SUM and name.endswith(" at gain"))
                }
                for rule, each in found.items()
                if rule != other
            }
            for other in REFERENCES
            if other in found
        },
    }


def levels(scores: Mapping[str, Floats]) -> Row:
    """At 0 and every scale, all scores."""
    return {
        f"{place:g}": {name: estimate(one[i]) for name, one in scores.items()} for i, place in enumerate((0.0, *SCALES))
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def share(one: Row) -> str:
    """A kept share with its interval."""
    return f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def table(name: str, found: Row) -> list[str]:
    """One combination: kept shares and costs at 1, what is ahead of the sum, and all at the same mean gain."""
    axes = name.split(" + ")
    scales = ", ".join(map("{:g}".format, SCALES))
    lines = [
        f"\n## {name}\n",
        f"| rule | norm | {' | '.join(f'{axis} kept' for axis in axes)} | mean kept at {scales} | over-refusal "
        f"| fluency | hypervolume | {' | '.join(f'less {other}' for other in found['less'])} |",
        "|---|---|" + "---|" * (len(axes) + 4 + len(found["less"])),
    ]
    for rule, each in found["rules"].items():
        cells = [
            f"{found['norm'][rule]:.2f}",
            *(share(each[f"kept {axis} at 1"]) for axis in axes),
            ", ".join(f"{each[f'kept at {scale:g}']['mean']:.2f}" for scale in SCALES),
            change(each["over_refusal at 1"]),
            change(each["fluency at 1"]),
            f"{each['hypervolume']['mean']:.4f}",
            *(small(less[rule]["hypervolume"]) if rule in less else "" for less in found["less"].values()),
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    extra = len(found["less"]) + 4
    for label, each, written in (
        ("alone, added", found["alone_added"], share),
        ("sum less that", found["sum_less_added"], change),
    ):
        lines.append(f"| {label} | | {' | '.join(written(each[axis]) for axis in axes)} |{' |' * extra}")
    others = [axis for axis in AXES if axis not in axes]
    names = [*axes, "least", *others, "over_refusal", "borderline", "fluency"]
    lines += [
        f"\nLess the sum, where the mean gain of the axes is {found['gain']:+.2f}; the sum itself against the base:\n",
        f"| rule | {' | '.join(one.replace('_', '-') for one in names)} |",
        "|---|" + "---|" * len(names),
    ]
    for rule, each in {SUM: found["rules"][SUM], **found["less"][SUM]}.items():
        lines.append(f"| {rule} | {' | '.join(change(each[f'{one} at gain']) for one in names)} |")
    if found["coefficients"]:
        lines.append("\nCoefficients that were found, layer by layer, each the mean over its modules:\n")
    for rule, layers in found["coefficients"].items():
        told = (f"{axis} {', '.join(f'{layer[i]:.2f}' for layer in layers)}" for i, axis in enumerate(axes))
        lines.append(f"- {rule}: {'; '.join(told)}")
    return lines


def small(one: Row) -> str:
    """A small difference with its interval, in bold where that leaves out 0."""
    text = f"{one['mean']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"
    return f"**{text}**" if one["low"] > 0 or one["high"] < 0 else text


def markdown(results: Row) -> str:
    """All tables."""
    told = results["settings"]
    head = (
        f"`{results['command']}`: base sandbox, shipped vectors, {told['prompts']} held-out prompts, temperature 1, "
        f"sampling seeds {', '.join(map(str, told['sampling_seeds']))}; {results['machine']}.\n\n"
        "A kept share is the gain in the combination by that of the vector alone at the same scale, here 1; `norm` is "
        "against the sum's; over-refusal and fluency are changes against the base at 1; 95 % intervals, "
        "changes and differences in bold where these leave out 0. A longer sum has its three points farther out, which "
        "the hypervolume rewards; the second tables do not. `alone, added` is what would be kept if the changes that "
        "the vectors make alone, spill-over among them, just added up.\n"
    )
    return "\n".join(
        [head, *(line for name, found in results["combinations"].items() for line in table(name, found)), ""]
    )


if __name__ == "__main__":
    main()
