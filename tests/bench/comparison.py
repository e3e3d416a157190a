"""Methods side by side on the sandbox, and what became of what we hoped.

    python tests/bench/comparison.py

Runs the shipped comparisons as `prefvec compare` does, and writes tests/bench/results/comparison_NAME.md, .json and
.png for each. What is trained and written stays in --work, so that a second run goes on where the first was stopped.
`prefvec compare` with `--only` and the same folders lets two processes share the work.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_prefvec.cli.main import main as prefvec
from lora_prefvec.evaluation import hypervolume, spearman
from lora_prefvec.experiments import interval

RESULTS = Path(__file__).parent / "results"
COMPARISONS = ("helpful-harmless", "helpful-concise", "helpful-honest", "four-axes")
RETRAINING = ("RACO", "DPO-LW", "MODPO")
Summary = dict[str, Any]
Run = dict[str, Any]


def main() -> None:
    """Compare, judge, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/comparison"), help="Where all that is made is kept.")
    parser.add_argument("--only", nargs="*", default=COMPARISONS, choices=COMPARISONS)
    parser.add_argument("--methods", nargs="*", default=[], metavar="METHOD", help="Of each comparison these alone.")
    arguments = parser.parse_args()
    for name in arguments.only:
        folder = arguments.work / name
        line = ["compare", f"compare/{name}", *(word for one in arguments.methods for word in ("--only", one))]
        if prefvec([*line, "--out", str(folder), "--artifacts", str(arguments.work / "artifacts")]):
            raise SystemExit(1)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        report = (folder / "report.md").read_text(encoding="utf-8").partition("\n## ")[0]
        given = report.split("`", 2)[1]  # the command, as it was given here
        report = report.replace(given, shlex.join(["prefvec", *line]), 1)
        to = RESULTS / f"comparison_{name}"
        shutil.copyfile(folder / "fronts.png", to.with_suffix(".png"))
        report = report.replace("fronts.png", to.with_suffix(".png").name)
        to.with_suffix(".md").write_text(report + "\n\n" + judged(summary), encoding="utf-8")
        content = {"machine": f"one thread, {platform.machine()}", **rounded(summary)}
        to.with_suffix(".json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def judged(summary: Summary) -> str:
    """What became of each hope, as a table."""
    lines = ["| hope | bar | seen | every seed |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(one)} |" for one in hopes(summary))]) + "\n"


def hopes(summary: Summary) -> Iterator[tuple[str, str, str, str]]:
    """Hope, bar, what was seen with its interval over the seeds, and the seeds; those that the methods allow."""
    methods: dict[str, list[Run]] = {}
    for run in summary["runs"]:
        methods.setdefault(run["method"], []).append(run)
    axes = [axis.rpartition(":")[2] for axis in summary["comparison"]["axes"]]
    mixed, pairs = methods["mixed vectors"], methods.get("mixed pairs")
    for method in ("mixed vectors", "CPO"):
        for axis in axes:
            values = [run["spearman"][axis] for run in methods.get(method, []) if axis in run["spearman"]]
            if values:
                yield f"{method}: {axis} follows its knob", "Spearman at least 0.9", *told(values)
    for method in ("DPA before sampling", "DPA after round 1", "DPA"):
        if method in methods:
            first, second = axes
            found = [[(one["knob"][second], means(one)) for one in run["points"]] for run in methods[method]]
            for axis, sign in ((first, -1), (second, 1)):
                values = [sign * spearman([at for at, _ in run], [mean[axis] for _, mean in run]) for run in found]
                yield f"{method}: {axis} follows the angle", "Spearman at least 0.9", *told(values)
            values = [hypervolume([[mean[axis] for axis in axes] for _, mean in run], [0.0, 0.0]) for run in found]
            yield f"{method}: hypervolume from 0", "grows with the rounds", *told(values)
    if {"RACO", "DPO-LW"} <= methods.keys():
        for axis in axes:
            both = zip(*(map(balanced, methods[name]) for name in ("RACO", "DPO-LW")), strict=True)
            yield (
                f"RACO less DPO-LW on {axis}, equal weights",
                "at least 0",
                *told([a[axis] - b[axis] for a, b in both]),
            )
    rivals = [methods[name] for name in RETRAINING if name in methods]
    for name in ("mixed vectors", "mixed vectors at 5 points"):
        if name in methods and rivals:
            best = [max(run["hypervolume"] for run in runs) for runs in zip(*rivals, strict=True)]
            ratios = [run["hypervolume"] / at for run, at in zip(methods[name], best, strict=True) if at]
            yield f"{name}: hypervolume over the best that retrains", "at least 1", *told(ratios)
    if pairs:
        for what, key, bar in (("hypervolume", None, "at least 0.98"), ("training FLOPs", "flops", "at most 0.55")):
            values = [
                worth(one, key) / worth(two, key) for one, two in zip(mixed, pairs, strict=True) if worth(two, key)
            ]
            yield f"two-sided vectors over pairs: {what}", bar, *told(values)
    for name in RETRAINING:
        if name in methods:
            values = [
                one["cost"]["one_more"] / two["cost"]["one_more"] for one, two in zip(mixed, methods[name], strict=True)
            ]
            yield f"one more preference: tokens of a vector over {name}'s front", "at most 0.2", *told(values)


def worth(run: Run, key: str | None) -> float:
    """A cost of a run, or its hypervolume."""
    return float(run["cost"][key] if key else run["hypervolume"])


def balanced(run: Run) -> dict[str, float]:
    """The scores, by axis, of the point where all weights are alike."""
    (point,) = [one for one in run["points"] if len({round(weight, 6) for weight in one["knob"].values()}) == 1]
    return means(point)


def means(point: dict[str, Any]) -> dict[str, float]:
    """The scores of a point, by axis."""
    return {axis: score["mean"] for axis, score in point["scores"].items()}


def told(values: Sequence[float]) -> tuple[str, str]:
    """The mean with its interval, and every value."""
    return interval(values, 3), " ".join(f"{value:.3f}" for value in values)


def rounded(content: Any) -> Any:
    """The same with four digits behind the point."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 4) if isinstance(content, float) else content


if __name__ == "__main__":
    main()
