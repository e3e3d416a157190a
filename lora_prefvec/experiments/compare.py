"""Methods side by side: train what is missing, sweep each knob, and say what each front is worth and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_prefvec.artifact import check_condition, conditioned, resolve_base
from lora_prefvec.evaluation import Point, Scorer, Store, evaluate, find_scorer, front, hypervolume, spearman
from lora_prefvec.experiments.artifacts import Method, Place, check_bases, make, recipes_of
from lora_prefvec.experiments.spec import Comparison
from lora_prefvec.inference import LiveMixer, load_base
from lora_prefvec.output import out

Prompts = Sequence[Any]
STORE = "replies.sqlite"


@dataclass(frozen=True)
class Cost:
    """What it takes to cover a front.

    Args:
        seconds: of training, on the machine that trained.
        tokens: that training read.
        flops: about; see `flops`.
        adapters: files to keep.
        size: of them, in bytes.
        one_more: training tokens of one more preference, over those of the whole front: the method's own price of a
            new wish. None where the method has no such notion.
    """

    seconds: float
    tokens: int
    flops: float
    adapters: int
    size: int
    one_more: float | None


@dataclass(frozen=True)
class Run:
    """A method with one training seed, measured.

    Args:
        points: one for each place of the knob.
        hypervolume: of the front against the base, in the product of the axes' units.
        spearman: axis -> rank correlation of its own knob with its score; only of knobs that are called as an axis.
    """

    method: str
    seed: int
    places: list[Place]
    points: list[Point]
    front: list[int]
    hypervolume: float
    spearman: dict[str, float]
    cost: Cost


@dataclass(frozen=True)
class Compared:
    """A finished comparison: the base's own point, and every method with every seed."""

    comparison: Comparison
    base: Point
    runs: list[Run]

    def of(self, method: str) -> list[Run]:
        """The runs of one method, by seed."""
        return [run for run in self.runs if run.method == method]


def compare(comparison: Comparison, folder: Path, prompts: Prompts, find: Callable[[str], Path]) -> Compared:
    """Run a comparison in a folder; what is trained or written there already is not done again.

    Args:
        prompts: that every method answers.
        find: a recipe's name -> its file.

    Raises:
        InputError: a recipe, scorer or condition is wrong; told before anything is trained where it can be.
        Interrupted, RunError: as training.
    """
    scorers = [find_scorer(one) for one in [*comparison.axes, *comparison.costs]]
    wanted = [
        (name, spec, seed, recipes_of(spec, seed, find))
        for seed in comparison.seeds
        for name, spec in comparison.methods.items()
    ]
    for _, _, _, recipes in wanted:
        check_bases(comparison, recipes)
    base = load_base(
        resolve_base(comparison.base.id, comparison.base.revision), quantization=comparison.base.quantization
    )
    parameters = sum(one.numel() for one in base.model.parameters())
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    axes = scorers[: len(comparison.axes)]
    runs: list[Run] = []
    start: Point | None = None
    for name, spec, seed, recipes in wanted:
        method = make(name, spec, seed, recipes, folder / "artifacts", base)
        for place in method.places:
            if method.facts and place.condition:
                check_condition(method.facts, place.condition)
        store = Store(
            folder / STORE,
            base=f"{comparison.base.id} {comparison.base.quantization}",
            vectors={key: adapter.sha256 for key, adapter in method.adapters.items()},
        )
        out.note(f"{name}, seed {seed}: {len(method.places)} points")
        with LiveMixer(base.model, {key: one.vector for key, one in method.adapters.items()}) as mixer:
            settings = comparison.sweep.model_dump(include={"n", "max_new_tokens", "temperature", "seed"})
            ask = partial(evaluate, base, mixer, prompts=prompts, scorers=scorers, store=store, **settings)
            if start is None:
                (start,) = ask(mixes=[{}])
            points = _swept(method, ask)
        store.close()
        runs.append(measured(method, points, start, axes, parameters))
    assert start is not None
    return Compared(comparison, start, runs)


def _swept(method: Method, ask: Callable[..., list[Point]]) -> list[Point]:
    """A point for each place: mixes of one prompt in mixed batches, conditions one after another."""
    facts = method.facts
    if facts is None:
        return ask(mixes=[place.mix for place in method.places])
    return [
        ask(mixes=[place.mix], turned=partial(conditioned, facts, place.condition or {}))[0] for place in method.places
    ]


def measured(method: Method, points: list[Point], base: Point, axes: Sequence[Scorer], parameters: int) -> Run:
    """What the points of a method come to."""
    reference = gains(base, axes)
    values = [gains(point, axes) for point in points]
    names = [axis.name for axis in axes]
    correlations = {}
    for axis, name in zip(axes, names, strict=True):
        knobs = [place.knob.get(name) for place in method.places]
        if None not in knobs and len({*knobs}) > 1:
            scores = [axis.direction * (point.scores[name].mean or 0.0) for point in points]
            correlations[name] = along(method.places, name, scores)
    return Run(
        method.name,
        method.seed,
        method.places,
        points,
        front(values),
        hypervolume(values, reference),
        correlations,
        cost_of(method, parameters),
    )


def along(places: Sequence[Place], name: str, scores: Sequence[float]) -> float:
    """Spearman's correlation of one part of the knob with a score: the mean over lines on which the rest stands still.

    Where the other parts follow from this one, as weights that sum to 1, there is one line.
    """
    lines: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for number, place in enumerate(places):
        rest = tuple(sorted((key, value) for key, value in place.knob.items() if key != name))
        lines.setdefault(rest, []).append(number)
    if all(len(line) == 1 for line in lines.values()):
        lines = {(): list(range(len(places)))}
    found = [
        spearman([places[i].knob[name] for i in line], [scores[i] for i in line])
        for line in lines.values()
        if len(line) > 1
    ]
    return sum(found) / len(found)


def gains(point: Point, axes: Sequence[Scorer]) -> list[float]:
    """The means of a point on the axes, turned so that more is better; an axis without a say is the worst there is."""
    means = [point.scores[axis.name].mean for axis in axes]
    return [
        axis.direction * mean if mean is not None else float("-inf") for axis, mean in zip(axes, means, strict=True)
    ]


def cost_of(method: Method, parameters: int) -> Cost:
    """What it took to train all that a method's front needs."""
    known = [one.provenance for one in method.trained if one.provenance]
    facts = [one.training for one in known if one.training]
    tokens = [one.tokens or 0 for one in facts]
    passes = [len(one.objectives) if one.method == "raco" else 1 for one in known]
    mixes = all(place.knob == place.mix for place in method.places)
    total = sum(tokens)
    return Cost(
        seconds=sum(one.wall_seconds or 0.0 for one in facts),
        tokens=total,
        flops=sum(flops(count, parameters, times) for count, times in zip(tokens, passes, strict=True)),
        adapters=len(method.trained),
        size=sum(file.stat().st_size for one in method.trained for file in one.path.rglob("*.safetensors")),
        one_more=(total / len(tokens) if mixes else float(total)) if total else None,
    )


def flops(tokens: int, parameters: int, backward_passes: int = 1) -> float:
    """Floating-point operations of training an adapter on a frozen base: 2 N for each token forward, and 2 N for each
    backward pass, which asks the base for the gradient of its activations alone (Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1; the adapter's own are left out)."""
    return 2.0 * parameters * tokens * (1 + backward_passes)


def table(compared: Compared) -> tuple[list[str], list[list[Any]]]:
    """One line per method: hypervolume over the seeds, correlations, what broke along the front, and what it took."""
    costs = [name.rpartition(":")[2] for name in compared.comparison.costs]
    axes = [name.rpartition(":")[2] for name in compared.comparison.axes]
    columns = [
        "method",
        "hypervolume",
        "seeds",
        *(f"rho {axis}" for axis in axes),
        *(f"{cost} along the front" for cost in costs),
        "adapters",
        "MB",
        "tokens",
        "TFLOP",
        "seconds",
    ]
    rows: list[list[Any]] = []
    for name in compared.comparison.methods:
        runs = compared.of(name)
        volumes = [run.hypervolume for run in runs]
        first = runs[0].cost
        rows.append(
            [
                name,
                f"{mean(volumes):.4f}",
                " ".join(f"{volume:.4f}" for volume in volumes),
                *(_shown([run.spearman.get(axis) for run in runs]) for axis in axes),
                *(_worst(runs, cost) for cost in costs),
                first.adapters,
                round(first.size / 1e6, 2),
                round(mean([run.cost.tokens for run in runs])),
                round(mean([run.cost.flops for run in runs]) / 1e12, 2),
                round(mean([run.cost.seconds for run in runs])),
            ]
        )
    return columns, rows


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def _shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.2f}" if known else "-"


def _worst(runs: Sequence[Run], cost: str) -> str:
    """The range of a cost over the points of all fronts."""
    found = [run.points[i].scores[cost].mean for run in runs for i in run.front]
    known = [value for value in found if value is not None]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def to_dict(compared: Compared) -> dict[str, Any]:
    """For JSON: every point of every run."""

    def scores(point: Point) -> Mapping[str, Any]:
        return {
            name: {"mean": one.mean, "low": one.low, "high": one.high, "n": one.n} for name, one in point.scores.items()
        }

    return {
        "comparison": compared.comparison.model_dump(mode="json"),
        "base": scores(compared.base),
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "hypervolume": run.hypervolume,
                "spearman": run.spearman,
                "cost": vars(run.cost),
                "points": [
                    {"knob": place.knob, "scores": scores(point), "front": number in run.front}
                    for number, (place, point) in enumerate(zip(run.places, run.points, strict=True))
                ],
            }
            for run in compared.runs
        ],
    }
