"""A sweep as one HTML page that holds everything it shows: no scripts, and nothing that is fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lora_prefvec.artifact import atomic_file
from lora_prefvec.evaluation.design import Kind
from lora_prefvec.evaluation.plots import are_shares, draw_curve, draw_front, draw_table, picture, spoken
from lora_prefvec.evaluation.rows import Plan
from lora_prefvec.evaluation.scorers import Message, messages_of
from lora_prefvec.evaluation.slices import curve, table
from lora_prefvec.evaluation.statistics import Score, estimate
from lora_prefvec.evaluation.summary import Summary
from lora_prefvec.evaluation.sweep import Point

PAIRS = 6  # of axes or of vectors that get a picture
SAMPLED = 5  # points of the front whose replies are shown
PROMPTS = 8  # whose replies are shown


@dataclass(frozen=True)
class Figure:
    """A picture, what it is called, and its PNG as a data URI."""

    title: str
    source: str


@dataclass(frozen=True)
class Cell:
    """A score for a reader.

    Args:
        text: the mean and its interval.
        change: against the base, on the prompts on which both have a say; with a verdict.
    """

    text: str
    change: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt, and (mix, reply) of some points."""

    messages: Sequence[Message]
    replies: list[tuple[str, str]]


def write_report(file: Path, plan: Plan, summary: Summary, asked: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write the page, replacing an older one.

    Args:
        asked: what the sweep is, see `fill_folder`.
        run: how it was run: `command`, `seconds`, `versions`.

    Raises:
        InputError: matplotlib is not installed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    places = Environment(
        loader=PackageLoader("lora_prefvec.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [scorer.name for scorer in summary.scorers]
    design = asked["mixes"]["design"]
    page = places.get_template("report.html").render(
        summary=summary,
        plan=plan,
        asked=asked,
        run=run,
        names=names,
        base=flat(asked["base"]),
        spoken=spoken,
        direction={one.name: "more" if one.direction > 0 else "less" for one in summary.scorers},
        cells=[{name: cell(summary, point, name, plan.n) for name in names} for point in summary.points],
        fronts=list(front_figures(summary)),
        curves=list(curve_figures(summary, design, plan.n)),
        tables=list(table_figures(summary, design, plan.n)),
        samples=list(samples(plan, summary)),
        cut=sum(point.cut for point in summary.points) / len(plan.rows),
    )
    with atomic_file(file, force=True) as work:
        work.write_text(page, encoding="utf-8")


def cell(summary: Summary, point: Point, axis: str, n: int) -> Cell:
    """One score, and what it is against that of the base."""
    score = point.scores[axis]
    if score.mean is None:
        return Cell("no say")
    text = digits(score.mean)
    if score.low is not None and score.high is not None:
        text += f" ({digits(score.low)} to {digits(score.high)})"
    base = None if summary.base is None else summary.points[summary.base]
    if base is None or base is point:
        return Cell(text)
    change = difference(point, base, axis, n)
    direction = next(scorer.direction for scorer in summary.scorers if scorer.name == axis)
    if change.mean is None:
        return Cell(text)
    return Cell(text, f"{digits(change.mean, '+')} {verdict(change, direction)}")


def digits(value: float, sign: str = "-") -> str:
    """Two digits behind the point, or two that count where it is small; what only rounding left of 0 is 0."""
    value = 0.0 if abs(value) < 1e-12 else value
    return format(value, f"{sign}.2f" if abs(value) >= 0.1 or not value else f"{sign}.2g")


def difference(point: Point, base: Point, axis: str, n: int) -> Score:
    """How much more one point has than another, reply by reply."""
    pairs = zip(point.values[axis], base.values[axis], strict=True)
    return estimate([None if a is None or b is None else a - b for a, b in pairs], n)


def verdict(change: Score, direction: int) -> str:
    """What a change is worth; its interval decides whether there is one."""
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "same"
    return "better" if change.low * direction > 0 else "worse"


def front_figures(summary: Summary) -> Iterator[Figure]:
    """The front over each two of its axes."""
    for x, y in list(combinations(summary.axes, 2))[:PAIRS]:
        yield figure(f"{spoken(x)} and {spoken(y)}", draw_front, summary, x, y)


def curve_figures(summary: Summary, design: Kind, n: int) -> Iterator[Figure]:
    """Scores along every vector that varies: those between 0 and 1 in one picture, every other in its own."""
    for name in summary.varied:
        found = curve(summary, name, design, n)
        unit = [axis for axis, scores in found.scores.items() if are_shares([one.mean or 0 for one in scores])]
        for axes in [unit, *([axis] for axis in found.scores if axis not in unit)]:
            if axes:
                yield figure(f"{', '.join(map(spoken, axes))} along {name}", draw_curve, found, axes)


def table_figures(summary: Summary, design: Kind, n: int) -> Iterator[Figure]:
    """Every score over each two vectors that vary."""
    directions = {scorer.name: scorer.direction for scorer in summary.scorers}
    for x, y in list(combinations(summary.varied, 2))[:PAIRS] if design != "line" else []:
        found = table(summary, x, y, design, n)
        for axis in found.scores:
            if any(score.mean is not None for score in found.scores[axis].values()):
                yield figure(f"{spoken(axis)} over {x} and {y}", draw_table, found, axis, directions[axis])


def figure(title: str, draw: Any, *arguments: Any) -> Figure:
    """A picture of one panel."""
    png = base64.b64encode(picture(draw, *arguments)).decode("ascii")
    return Figure(title, f"data:image/png;base64,{png}")


def samples(plan: Plan, summary: Summary) -> Iterator[Sample]:
    """Replies of the base and of points along the front, on the prompts on which their scores differ most."""
    count = min(SAMPLED, len(summary.front))
    spread = [summary.front[round(i * (len(summary.front) - 1) / max(count - 1, 1))] for i in range(count)]
    shown = list(dict.fromkeys([*([] if summary.base is None else [summary.base]), *spread]))
    for prompt in telling(plan, summary, shown):
        replies = [(name(summary, i), summary.points[i].replies[prompt * plan.n]) for i in shown]
        yield Sample(messages_of(plan.prompts[prompt]), replies)


def telling(plan: Plan, summary: Summary, shown: Sequence[int]) -> list[int]:
    """The prompts on which the scores of some points differ most, as many for each axis and cost."""
    found: dict[int, None] = {}
    names = [*summary.axes, *summary.costs] or [scorer.name for scorer in summary.scorers]
    for axis in names:
        spreads = {}
        for prompt in range(len(plan.prompts)):
            values = [summary.points[i].values[axis][prompt * plan.n] for i in shown]
            known = [value for value in values if value is not None]
            spreads[prompt] = max(known) - min(known) if known else -1.0
        ordered = sorted((prompt for prompt in spreads if prompt not in found), key=lambda prompt: -spreads[prompt])
        found.update(dict.fromkeys(ordered[: max(1, PROMPTS // len(names))]))
    return sorted(found)


def name(summary: Summary, index: int) -> str:
    """What the page calls a point."""
    if index == summary.base:
        return "base"
    number = f"{summary.front.index(index) + 1}: " if index in summary.front else ""
    return number + mix_text(summary.points[index].mix)


def flat(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts without those that are not known, and one level deep."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        inner = {f"{key} {name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
        found.update((name, str(one)) for name, one in inner.items() if one is not None)
    return found


def mix_text(mix: Mapping[str, float]) -> str:
    """A mix as it is typed."""
    return " ".join(f"{name}={value:g}" for name, value in mix.items())
