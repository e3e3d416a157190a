"""Pictures of a sweep; readable without colour: lines have markers and dashes, cells and points their numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_prefvec.artifact import atomic_file
from lora_prefvec.errors import require_extra
from lora_prefvec.evaluation.slices import Curve, Table
from lora_prefvec.evaluation.summary import Summary

MARKERS = "osD^vP*X"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2, 1, 2))]
NUMBERED = 12  # cells in a row that still hold their numbers; more are drawn with level lines
LEAST = 0.1  # of the largest of some scores, for them to be drawn from 0 to 1
LABELLED = 20  # points of a front that still hold their numbers


def control_plot(file: Path, curves: Sequence[Curve]) -> None:
    """Scores along one coefficient each: a panel per vector, a line per axis, bands for the 95 % intervals.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure, panels = pyplot().subplots(
        1, len(curves), figsize=(4.6 * len(curves), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, one in zip(panels[0], curves, strict=True):
        draw_curve(panel, one, list(one.scores))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, file)


def front_plot(file: Path, summary: Summary) -> None:
    """The first two axes of a front, see `draw_front`, with the mixes that its numbers stand for.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure, panel = pyplot().subplots(figsize=(8.4, 5.2), layout="constrained")
    draw_front(panel, summary, summary.axes[0], summary.axes[1])
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    blank = panel.plot([], [], " ")[0]
    mixes = [", ".join(f"{summary.points[i].mix[name]:g}" for name in summary.varied) for i in summary.front]
    keys = [f"{number}: ({mix})" for number, mix in enumerate(mixes, start=1)]
    title = f"({', '.join(summary.varied)})"
    figure.legend([blank] * len(keys), keys, loc="outside right upper", handlelength=0, frameon=False, title=title)
    save(figure, file)


def draw_curve(panel: Any, curve: Curve, axes: Sequence[str]) -> None:
    """A line per axis along one coefficient, the vector's own axis thicker."""
    for index, axis in enumerate(axes):
        known = [
            (place, score.mean, score.low, score.high)
            for place, score in zip(curve.places, curve.scores[axis], strict=True)
            if score.mean is not None
        ]
        if not known:
            continue
        places, means, lows, highs = zip(*known, strict=True)
        own = axis in curve.name
        panel.plot(
            places,
            means,
            marker=MARKERS[index % len(MARKERS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=2.6 if own else 1.3,
            markersize=6 if own else 4,
            label=spoken(axis),
        )
        if None not in lows:
            panel.fill_between(places, lows, highs, alpha=0.12)
    panel.axvline(0.0, color="0.7", linewidth=0.8, zorder=0)
    panel.set_title(f"{curve.name}{f' ({curve.others})' if curve.others else ''}", fontsize=11)
    panel.set_xlabel(f"coefficient of {curve.name}")
    if are_shares([one.mean or 0.0 for axis in axes for one in curve.scores[axis]]):
        panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("score" if len(axes) > 1 else spoken(axes[0]))
    panel.grid(alpha=0.25)


def draw_front(panel: Any, summary: Summary, x: str, y: str) -> None:
    """Every mix as a point over two axes; those of the front carry their numbers, the base is a star."""
    located = [(point.scores[x].mean, point.scores[y].mean) for point in summary.points]
    numbers = {index: number for number, index in enumerate(summary.front, start=1)}
    rest = [at for i, at in enumerate(located) if i not in numbers and i != summary.base and None not in at]
    panel.plot([x for x, _ in rest], [y for _, y in rest], "o", color="0.75", markersize=5, label="other mixes")
    best = [located[i] for i in summary.front]
    line = "s-" if len(summary.axes) == 2 else "s"  # over three axes and more, no line goes around the front
    panel.plot([x for x, _ in best], [y for _, y in best], line, color="0.25", markersize=4, linewidth=1.2)
    step = -(-len(best) // LABELLED)
    labelled = [summary.front[number - 1] for number in numbers.values() if (number - 1) % step == 0]
    circles = [located[i] for i in labelled]
    panel.plot([x for x, _ in circles], [y for _, y in circles], "o", color="tab:blue", markersize=13, label="front")
    for index in labelled:
        text = str(numbers[index])
        panel.annotate(text, located[index], ha="center", va="center", color="white", fontsize=8, weight="bold")
    if summary.base is not None and None not in located[summary.base]:
        panel.plot(*([value] for value in located[summary.base]), "*", color="tab:red", markersize=16, label="base")
    directions = {scorer.name: scorer.direction for scorer in summary.scorers}
    panel.set_xlabel(f"{spoken(x)} ({'more' if directions[x] > 0 else 'less'} is better)")
    panel.set_ylabel(f"{spoken(y)} ({'more' if directions[y] > 0 else 'less'} is better)")
    panel.margins(0.1)
    panel.grid(alpha=0.25)


def draw_table(panel: Any, table: Table, axis: str, direction: int) -> None:
    """The scores of one axis over two coefficients, bright where they are better: numbers in cells, or level lines.

    The cells of the front are framed and carry their numbers, or have a dot where cells are many; that of the base has
    a dashed frame; those without a mix are hatched.
    """
    import numpy as np

    cells = np.full((len(table.rows), len(table.columns)), np.nan)
    for (column, row), score in table.scores[axis].items():
        cells[row, column] = np.nan if score.mean is None else score.mean
    low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
    span = (0.0, 1.0) if are_shares([low, high]) else (low, high)
    colours = "viridis" if direction > 0 else "viridis_r"
    panel.set_facecolor("0.96")
    panel.patch.set(hatch="xx", edgecolor="0.75")
    image = panel.imshow(cells, origin="lower", aspect="auto", cmap=colours, vmin=span[0], vmax=span[1])
    if max(cells.shape) <= NUMBERED:
        for (row, column), value in np.ndenumerate(cells):
            if not np.isnan(value):
                text = f"{value:.2f}" if abs(value) >= LEAST or not value else f"{value:.2g}"
                panel.text(column, row, text, ha="center", va="center", color=ink(image, value), fontsize=9)
        for (column, row), number in table.front.items():
            colour = ink(image, cells[row, column])
            frame(panel, column, row, colour, "-")
            panel.text(column - 0.44, row + 0.42, str(number), va="top", color=colour, fontsize=8, weight="bold")
    else:
        if min(cells.shape) > 1 and low < high:
            panel.clabel(panel.contour(cells, levels=6, colors="white", linewidths=1), fontsize=8)
        for column, row in table.front:
            panel.plot(column, row, "o", color=ink(image, cells[row, column]), markersize=3)
    if table.base is not None:
        column, row = table.base
        frame(panel, column, row, ink(image, cells[row, column]), "--")
    panel.figure.colorbar(image, ax=panel, pad=0.02)
    ticks(panel.set_xticks, table.columns)
    ticks(panel.set_yticks, table.rows)
    panel.set_xlabel(f"coefficient of {table.x}")
    panel.set_ylabel(f"coefficient of {table.y}")
    better = "more" if direction > 0 else "less"
    panel.set_title(f"{spoken(axis)}: {better} is better{f' ({table.others})' if table.others else ''}", fontsize=11)


def are_shares(means: Sequence[float]) -> bool:
    """Whether scores are drawn from 0 to 1: unless they leave that, or all lie so near 0 that nothing would be seen."""
    return min(means) >= 0 and max(means) <= 1 and not 0 < max(means) < LEAST


def ink(image: Any, value: float) -> str:
    """Black or white, whichever shows on the colour of a value."""
    red, green, blue, _ = image.to_rgba(value)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def frame(panel: Any, column: int, row: int, colour: str, dash: str) -> None:
    """A line around a cell."""
    xs, ys = [-0.46, 0.46, 0.46, -0.46, -0.46], [-0.46, -0.46, 0.46, 0.46, -0.46]
    panel.plot([column + x for x in xs], [row + y for y in ys], linestyle=dash, color=colour, linewidth=1.4)


def ticks(set_ticks: Any, places: Sequence[float]) -> None:
    """At most twelve places along an axis."""
    step = -(-len(places) // NUMBERED)
    set_ticks(range(0, len(places), step), [f"{place:.3g}" for place in places[::step]])


def spoken(axis: str) -> str:
    """The name of an axis for a reader."""
    return axis.replace("_", " ")


def picture(draw: Any, *arguments: Any, size: tuple[float, float] = (5.4, 4.2)) -> bytes:
    """A PNG of one panel, which `draw(panel, *arguments)` fills.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    draw(panel, *arguments)
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    plt.close(figure)
    return buffer.getvalue()


def pyplot() -> Any:
    """matplotlib.pyplot with a backend that needs no screen."""
    try:
        import matplotlib
    except ImportError:
        raise require_extra("matplotlib", "plots") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    """Write a figure as PNG, whole or not at all, replacing an older one."""
    with atomic_file(file, force=True) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot().close(figure)
