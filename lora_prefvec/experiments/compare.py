"""Methods side by side: train what is missing, sweep each knob, and say what each front is worth and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_prefvec.artifact import check_condition, conditioned, resolve_base
from lora_prefvec.evaluation import Point, Scorer, Store, evaluate, find_scorer, front, hypervolume, spearman
from lora_prefvec.experiments.artifacts import Method, Place, check_bases, make, recipes_of, tried
from lora_prefvec.experiments.spec import Comparison, MethodSpec
from lora_prefvec.inference import LiveMixer, LoadedBase, load_base
from lora_prefvec.output import out

Prompts = Sequence[Any]
STORE = "replies.sqlite"
LINE = 3  # places that a rank correlation needs to say anything


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


class Worth(NamedTuple):
    """What the points of a method are worth against the base: their hypervolume, and the greatest sum of gains."""

    hypervolume: float
    gain: float


@dataclass(frozen=True)
class Run:
    """A method with one training seed, measured.

    Args:
        points: one for each place of the knob.
        hypervolume: of the front against the base, in the product of the axes' units.
        spearman: axis -> rank correlation of its own knob with its score, see `along`; only of knobs that are called as
            an axis.
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
    """A finished comparison: the base's own point, and every method with every seed.

    Args:
        rates: method -> factor of its learning rates -> what it was worth on the validation prompts.
    """

    comparison: Comparison
    base: Point
    runs: list[Run]
    rates: dict[str, dict[float, Worth]]

    def of(self, method: str) -> list[Run]:
        """The runs of one method, by seed."""
        return [run for run in self.runs if run.method == method]


@dataclass(frozen=True)
class Ground:
    """What all methods of a comparison stand on.

    Args:
        store: the file of all replies and scores.
        artifacts: folder of all that is trained.
    """

    comparison: Comparison
    base: LoadedBase
    scorers: list[Scorer]
    store: Path
    artifacts: Path
    find: Callable[[str], Path]

    @property
    def axes(self) -> list[Scorer]:
        """The scorers over which the fronts lie."""
        return self.scorers[: len(self.comparison.axes)]

    def make(self, name: str, spec: MethodSpec, seed: int, factor: float) -> Method:
        """A method, trained."""
        recipes = recipes_of(spec, seed, self.find, factor)
        method = make(name, spec, seed, recipes, self.artifacts, self.base)
        for place in method.places:
            if method.facts and place.condition:
                check_condition(method.facts, place.condition)
        return method

    def ask(self, prompts: Prompts, method: Method | None = None) -> list[Point]:
        """A point for each place of a method, or the base's own: mixes of one prompt lie in mixed batches, conditions
        are asked one after another."""
        adapters = method.adapters if method else {}
        store = Store(
            self.store,
            base=f"{self.comparison.base.id} {self.comparison.base.quantization}",
            vectors={key: adapter.sha256 for key, adapter in adapters.items()},
        )
        settings = self.comparison.sweep.model_dump(include={"n", "max_new_tokens", "temperature", "seed"})
        with closing(store), LiveMixer(self.base.model, {key: one.vector for key, one in adapters.items()}) as mixer:
            ask = partial(evaluate, self.base, mixer, prompts=prompts, scorers=self.scorers, store=store, **settings)
            if method is None:
                return ask(mixes=[{}])
            if method.facts is None:
                return ask(mixes=[place.mix for place in method.places])
            return [
                ask(mixes=[place.mix], turned=partial(conditioned, method.facts, place.condition or {}))[0]
                for place in method.places
            ]


def compare(
    comparison: Comparison,
    folder: Path,
    prompts: Prompts,
    find: Callable[[str], Path],
    *,
    validation: Prompts = (),
    artifacts: Path | None = None,
) -> Compared:
    """Run a comparison in a folder; what is trained or written there already is not done again.

    Args:
        prompts: that every method answers.
        find: a recipe's name -> its file.
        validation: prompts on which learning rates are chosen, where the comparison chooses any.
        artifacts: folder of all that is trained, which several comparisons may share; in `folder` where left out.

    Raises:
        InputError: a recipe, scorer or condition is wrong; told before anything is trained where it can be.
        Interrupted, RunError: as training.
    """
    scorers = [find_scorer(one) for one in [*comparison.axes, *comparison.costs]]
    for spec in comparison.methods.values():
        check_bases(comparison, recipes_of(spec, comparison.seeds[0], find))
    base = load_base(
        resolve_base(comparison.base.id, comparison.base.revision), quantization=comparison.base.quantization
    )
    parameters = sum(one.numel() for one in base.model.parameters())
    artifacts = artifacts or folder / "artifacts"
    for one in (folder, artifacts):
        one.mkdir(parents=True, exist_ok=True)
    ground = Ground(comparison, base, scorers, folder / STORE, artifacts, find)
    rates = {name: try_rates(ground, name, spec, validation) for name, spec in comparison.methods.items()}
    (start,) = ground.ask(prompts)
    runs: list[Run] = []
    for seed in comparison.seeds:
        for name, spec in comparison.methods.items():
            method = ground.make(name, spec, seed, best_rate(rates[name]))
            out.note(f"{name}, seed {seed}: {len(method.places)} points")
            runs.append(measured(method, ground.ask(prompts, method), start, ground.axes, parameters))
    return Compared(comparison, start, runs, rates)


def try_rates(ground: Ground, name: str, spec: MethodSpec, validation: Prompts) -> dict[float, Worth]:
    """Every factor of the learning rates that are tried, and what it is worth on the validation prompts."""
    rates, seed = ground.comparison.rates, ground.comparison.seeds[0]
    if rates is None or not spec.rates:
        return {}
    (start,) = ground.ask(validation)
    reference, found = gains(start, ground.axes), {}
    for factor in rates.factors:
        method = ground.make(name, tried(spec), seed, factor)
        values = [gains(point, ground.axes) for point in ground.ask(validation, method)]
        best = max(sum(a - b for a, b in zip(one, reference, strict=True)) for one in values)
        found[factor] = Worth(hypervolume(values, reference), best)
        out.note(f"{name}, learning rate x{factor:g}: hypervolume {found[factor].hypervolume:.4f}")
    return found


def best_rate(tried: Mapping[float, Worth]) -> float:
    """The factor of the greatest hypervolume, and among equal ones of the greatest gain; 1 where none was tried."""
    return max(tried, key=lambda factor: tried[factor]) if tried else 1.0


def measured(method: Method, points: list[Point], base: Point, axes: Sequence[Scorer], parameters: int) -> Run:
    """What the points of a method come to."""
    reference = gains(base, axes)
    values = [gains(point, axes) for point in points]
    names = [axis.name for axis in axes]
    correlations = {}
    for axis, name in zip(axes, names, strict=True):
        scores = [axis.direction * (point.scores[name].mean or 0.0) for point in points]
        if (found := along(method.places, name, scores)) is not None:
            correlations[name] = found
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


def along(places: Sequence[Place], name: str, scores: Sequence[float]) -> float | None:
    """Spearman's correlation of one part of the knob with a score: the mean over lines on which the rest stands still.

    Where the other parts follow from this one, as weights that sum to 1, there is one line. None where no line has
    three places, and two values.
    """
    lines: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for number, place in enumerate(places):
        if name in place.knob:
            rest = tuple(sorted((key, value) for key, value in place.knob.items() if key != name))
            lines.setdefault(rest, []).append(number)
    if all(len(line) == 1 for line in lines.values()):
        lines = {(): [number for line in lines.values() for number in line]}
    found = [
        spearman([places[i].knob[name] for i in line], [scores[i] for i in line])
        for line in lines.values()
        if len(line) >= LINE and len({places[i].knob[name] for i in line}) > 1
    ]
    return mean(found) if found else None


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
        "tokens of one more",
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
                interval(volumes, 4),
                " ".join(f"{volume:.4f}" for volume in volumes),
                *(_shown([run.spearman.get(axis) for run in runs]) for axis in axes),
                *(_worst(runs, cost) for cost in costs),
                first.adapters,
                round(first.size / 1e6, 2),
                round(mean([run.cost.tokens for run in runs])),
                round(mean([run.cost.one_more or 0 for run in runs])) or "-",
                round(mean([run.cost.flops for run in runs]) / 1e12, 2),
                round(mean([run.cost.seconds for run in runs])),
            ]
        )
    return columns, rows


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def interval(values: Sequence[float], digits: int) -> str:
    """The mean over the seeds, and Student's 95 % interval of it where there are several."""
    if len(values) < 2:
        return f"{mean(values):.{digits}f}"
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


def against(compared: Compared, name: str) -> tuple[list[str], list[list[Any]]]:
    """Every method's hypervolume over that of one of them, seed by seed."""
    other = [run.hypervolume for run in compared.of(name)]
    rows: list[list[Any]] = []
    for method in compared.comparison.methods:
        ratios = [run.hypervolume / at for run, at in zip(compared.of(method), other, strict=True) if at]
        rows.append([method, interval(ratios, 2) if ratios else "-", " ".join(f"{one:.2f}" for one in ratios)])
    return ["method", f"hypervolume over that of {name}", "seeds"], rows


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
        "rates": {
            name: {"factor": best_rate(worth), "hypervolume": {f"{at:g}": one.hypervolume for at, one in worth.items()}}
            for name, worth in compared.rates.items()
            if worth
        },
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
