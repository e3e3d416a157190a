"""What a comparison found, on paper: a table, every point as JSON, and all fronts in one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

from lora_prefvec.artifact import atomic_file
from lora_prefvec.evaluation.plots import DASHES, MARKERS, pyplot, save, spoken
from lora_prefvec.experiments.compare import Compared, Run, Worth, against, best_rate, table, to_dict


def write_report(folder: Path, compared: Compared, command: str) -> list[Path]:
    """Write `summary.json`, `report.md` and `fronts.png`, each whole or not at all, replacing older ones.

    Raises:
        InputError: matplotlib is not installed.
    """
    picture, summary, report = folder / "fronts.png", folder / "summary.json", folder / "report.md"
    draw_fronts(picture, compared)
    with atomic_file(summary, force=True) as work:
        work.write_text(json.dumps(to_dict(compared), indent=2) + "\n", encoding="utf-8")
    with atomic_file(report, force=True) as work:
        work.write_text(markdown(compared, command), encoding="utf-8")
    return [report, summary, picture]


def markdown(compared: Compared, command: str) -> str:
    """The table and the points of every front."""
    spec = compared.comparison
    columns, rows = table(compared)
    seeds = ", ".join(map(str, spec.seeds))
    lines = [
        f"# {spec.name}",
        "",
        f"`{command}`: base {spec.base.id} ({spec.base.quantization}), training seeds {seeds}, {spec.sweep.limit} "
        f"prompts of {spec.sweep.prompts}, {spec.sweep.n} replies to each at temperature {spec.sweep.temperature:g}.",
        "",
        "Hypervolume is that of the front against the base's own point, the mean over the seeds with Student's 95 % "
        "interval; rho is Spearman's correlation of a knob with its score. Adapters, bytes, tokens, operations and "
        "seconds are what one seed takes to cover the front; one more preference takes a vector of its own, or the "
        "whole front anew.",
        "",
        *_markdown(columns, rows),
        "",
        "![fronts](fronts.png)",
    ]
    columns, rows = against(compared, next(iter(spec.methods)))
    lines += ["", *_markdown(columns, rows)]
    if spec.rates:
        factors = [f"x{factor:g}" for factor in spec.rates.factors]
        lines += [
            "",
            f"Learning rates are those of the recipes times the factor with the greatest hypervolume on "
            f"{spec.rates.limit} prompts of {spec.rates.prompts}, seed {spec.seeds[0]}:",
            "",
            *_markdown(
                ["method", *factors, "chosen"], [_rates(name, one) for name, one in compared.rates.items() if one]
            ),
        ]
    axes = _names(spec.axes)
    for name in spec.methods:
        points = [
            [run.seed, _knob(run, i), *(_mean(run, i, axis) for axis in (*axes, *_names(spec.costs)))]
            for run in compared.of(name)
            for i in sorted(run.front, key=lambda i: run.points[i].scores[axes[0]].mean or 0.0)
        ]
        lines += ["", f"## {name}", "", *_markdown(["seed", "knob", *axes, *_names(spec.costs)], points)]
    return "\n".join(lines) + "\n"


def draw_fronts(file: Path, compared: Compared) -> None:
    """Every method's points, large on its front, the base as a star: over two axes with a line along each seed's front,
    over more a panel for each two of them, without lines, since there a front is no curve."""
    pairs = list(combinations(_names(compared.comparison.axes), 2))
    columns = min(len(pairs), 3)
    rows = math.ceil(len(pairs) / columns)
    size = (8.4, 6.2) if len(pairs) == 1 else (4.4 * columns, 3.8 * rows + 0.8)
    figure, panels = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, pair in zip_longest(panels.flat, pairs):
        if pair:
            _draw_panel(panel, compared, pair, lines=len(pairs) == 1)
        else:
            panel.set_axis_off()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, file)


def _draw_panel(panel: Any, compared: Compared, pair: tuple[str, str], *, lines: bool) -> None:
    large, small = (7, 4) if lines else (5, 3)
    for number, name in enumerate(compared.comparison.methods):
        colour, marker, dash = f"C{number % 10}", MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        for turn, run in enumerate(compared.of(name)):
            located = [tuple(point.scores[axis].mean for axis in pair) for point in run.points]
            panel.plot(*zip(*located, strict=True), marker, color=colour, markersize=small, alpha=0.35)
            best = sorted(located[i] for i in run.front)
            panel.plot(
                *zip(*best, strict=True),
                marker,
                color=colour,
                linestyle=dash if lines else "none",
                markersize=large,
                label=name if turn == 0 else None,
            )
    at = [compared.base.scores[axis].mean for axis in pair]
    panel.plot(*([value] for value in at), "*", color="black", markersize=2 * large, label="base")
    panel.set_xlabel(spoken(pair[0]))
    panel.set_ylabel(spoken(pair[1]))
    panel.grid(alpha=0.25)


def _rates(name: str, worth: Mapping[float, Worth]) -> list[Any]:
    return [name, *(f"{one.hypervolume:.4f}" for one in worth.values()), f"x{best_rate(worth):g}"]


def _knob(run: Run, place: int) -> str:
    return " ".join(f"{name}={value:g}" for name, value in run.places[place].knob.items()) or "-"


def _mean(run: Run, place: int, axis: str) -> str:
    score = run.points[place].scores[axis]
    if score.mean is None:
        return "-"
    return f"{score.mean:.3f}" + (f" ({score.low:.2f} to {score.high:.2f})" if score.low is not None else "")


def _names(references: Sequence[str]) -> list[str]:
    return [one.rpartition(":")[2] for one in references]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
