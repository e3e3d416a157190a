"""Measurements as files: JSON, Markdown tables, and a picture of how cost grows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_prefvec.artifact import atomic_file
from lora_prefvec.bench.measure import Growth, Row
from lora_prefvec.evaluation.plots import DASHES, MARKERS, pyplot, save

COLUMNS = ["work", "ours", "peer", "figure", "bar", "result"]


def cells(row: Row, *, judged: bool = True) -> list[str]:
    """A row as text, under `COLUMNS`; the result is left open where the shapes are not those of the bar."""
    sense = {"at least": ">=", "at most": "<="}[row.sense]
    of = row.of if row.of == "x" else f" {row.of}".rstrip()
    peer = "-" if row.peer is None else quantity(row.peer, row.unit)
    return [
        row.work,
        quantity(row.ours, row.unit),
        peer,
        f"{number(row.figure)}{of}",
        f"{sense} {number(row.bar)}{of}",
        ("pass" if row.passed else "miss") if judged else "-",
    ]


def quantity(value: float, unit: str) -> str:
    """`7.3 ms`, `12 s`, `412 MB`."""
    if unit == "s" and value < 1:
        return f"{number(1000 * value)} ms"
    return f"{number(value)} {unit}".rstrip()


def number(value: float) -> str:
    """Three significant digits, thousands with a comma."""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e9 else f"{value:.3g}"


def to_json(rows: Sequence[Row], grown: Sequence[Growth], machine: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """All that was measured."""
    return {
        "machine": dict(machine),
        "quick": quick,
        "rows": [row.to_dict() for row in rows],
        "growth": [asdict(one) for one in grown],
    }


def write(
    file: Path, command: str, rows: Sequence[Row], grown: Sequence[Growth], machine: Mapping[str, Any], quick: bool
) -> list[Path]:
    """Write `file` as JSON and the tables beside it as Markdown; with growth a picture too. Replaces older ones.

    Raises:
        InputError: a file cannot be written, or matplotlib is missing and there is growth to draw.
    """
    files = [file, file.with_suffix(".md")]
    if grown:
        files.append(file.with_suffix(".png"))
        plot(files[-1], grown)
    texts = [
        json.dumps(to_json(rows, grown, machine, quick), indent=2) + "\n",
        markdown(command, rows, grown, machine, quick),
    ]
    for path, text in zip(files, texts, strict=False):
        with atomic_file(path, force=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return files


def markdown(
    command: str, rows: Sequence[Row], grown: Sequence[Growth], machine: Mapping[str, Any], quick: bool = False
) -> str:
    """The tables for a reader."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [f"# `{command}`", "", facts, "", *_table(COLUMNS, [cells(row, judged=not quick) for row in rows]), ""]
    lines += [f"- {row.work}: {row.note}" for row in rows if row.note]
    for one in grown:
        header = [one.across, *(f"{name}, {one.unit}" for name in one.lines)]
        body = [
            [number(place), *("-" if values[i] is None else f"{values[i]:.3g}" for values in one.lines.values())]
            for i, place in enumerate(one.places)
        ]
        lines += ["", f"## {one.title}", "", *_table(header, body)]
    return "\n".join(lines).rstrip() + "\n"


def plot(file: Path, grown: Sequence[Growth]) -> None:
    """A panel for each, both axes logarithmic, so that a slope of one is cost in proportion.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, len(grown), figsize=(5.6 * len(grown), 4.4), squeeze=False, layout="constrained")
    for panel, one in zip(panels[0], grown, strict=True):
        for index, (name, values) in enumerate(one.lines.items()):
            known = [(place, value) for place, value in zip(one.places, values, strict=True) if value is not None]
            panel.plot(*zip(*known, strict=True), marker=MARKERS[index], linestyle=DASHES[index], label=name)
        panel.set_title(one.title, fontsize=11)
        panel.set_xlabel(one.across)
        panel.set_ylabel({"s": "seconds", "MB": "peak memory, MB"}[one.unit])
        panel.set_xscale("log")
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        few = high < 20 * low  # decades: their parts then need names too
        panel.yaxis.set_major_formatter(lambda value, _: number(value))
        panel.yaxis.set_minor_formatter(lambda value, _, few=few: number(value) if few else "")
        panel.set_xticks(list(one.places), [number(place) for place in one.places])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    save(figure, file)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
