"""The ways in which `sums.py` makes one vector of several.

| rule | the vector |
|---|---|
| sum | every vector at 1 |
| projected out | in every module, each vector without its part in the span of the others |
| shared once | what several vectors share in their row and column spaces counts once |
| shared left out | and not at all |
| span merge | the method `span` of `merge`: signs elected and a disjoint mean in a shared basis |
| tuned, whole; tuned, layers | a coefficient for each vector; for its early, middle and late layers: found by `tune` |
| RACO | a coefficient for each vector and module, down RACO's direction on a batch of each axis' training pairs |
| mean loss | the same down the gradient of the mean loss |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_prefvec.artifact import shipped
from lora_prefvec.evaluation import Point, Store, estimate, evaluate, find_scorer
from lora_prefvec.evaluation.design import Range
from lora_prefvec.evaluation.summary import write_json
from lora_prefvec.evaluation.tune import tune
from lora_prefvec.evaluation.wish import Bound, Goal, Wish
from lora_prefvec.inference import LiveMixer, LoadedBase, pair_log_probs, render_pairs
from lora_prefvec.inference.log_probs import collate, fused_head
from lora_prefvec.recipe import read_recipe
from lora_prefvec.sandbox.scorers import SCORERS
from lora_prefvec.sandbox.world import prompts
from lora_prefvec.training.methods.raco import solve
from lora_prefvec.training.prepare import load_pairs
from lora_prefvec.vector import Filter, PreferenceVector, layer_of, merge
from lora_prefvec.vector.delta import LowRankDelta, combine, gram

LAYERS = {"early": (0, 0), "middle": (1, 2), "late": (3, 3)}  # of the sandbox's four
WHOLE = {"whole": (0, 3)}
MOST = 1.5  # that a coefficient may become in a search
EVALUATIONS, CHOSEN_ON = 30, 160  # mixes of a search, and validation prompts
PAIRS, STEPS, STRIDE = 64, 15, 0.05  # of the descent: pairs per objective, steps, root mean square of one step
RADIUS = 0.4  # RACO's c, that of its recipe
SUM = "sum"
Weights = dict[str, list[float]]  # module -> the coefficient of every vector


class Task(NamedTuple):
    """What a rule may use.

    Args:
        axes: of the combination, in the order of `vectors`.
        work: where what it searched for is kept.
    """

    base: LoadedBase
    axes: tuple[str, ...]
    vectors: list[PreferenceVector]
    hashes: list[str]
    work: Path


def weighted(vectors: Sequence[PreferenceVector], weights: Weights) -> PreferenceVector:
    """The sum of vectors that have a coefficient in every module."""
    deltas = {
        name: combine([(w, vector.deltas[name]) for w, vector in zip(own, vectors, strict=True)])
        for name, own in weights.items()
    }
    return PreferenceVector(deltas, vectors[0].identity)


def freed(vectors: Sequence[PreferenceVector]) -> Weights:
    """In every module the sum of what each vector is outside the span of all others.

    With P the inverse of the vectors' inner products, that part of vector i is sum_j P_ij D_j / P_ii. For two vectors
    it is `project_out(per_module=True)` both ways.
    """
    found = {}
    for name in vectors[0].deltas:
        inverse = torch.linalg.inv(gram([vector.deltas[name] for vector in vectors]))
        found[name] = (inverse / inverse.diagonal()[:, None]).sum(dim=0).tolist()
    return found


def shared(vectors: Sequence[PreferenceVector], *, keep: bool) -> PreferenceVector:
    """The sum, in which what several vectors share counts once, or not at all.

    In every module, the sum of the projectors onto the vectors' column spaces has eigenvectors U and eigenvalues n: in
    how many of these spaces a direction lies. With V and m of the row spaces, entry (a, b) of U^T sum(D_i) V is shared
    by min(n_a, m_b) vectors, by which it is divided, or where that is above 1.5 left out.
    """
    deltas = {}
    for name in vectors[0].deltas:
        members = [vector.deltas[name] for vector in vectors]
        columns, u = _holders([one.B for one in members])
        rows, v = _holders([one.A.T for one in members])
        core = u.T @ sum(one.dense().double() for one in members) @ v
        sharers = torch.minimum(columns[:, None], rows[None]).clamp(min=1)
        core = core / sharers if keep else core * (sharers < 1.5)
        left, s, right = torch.linalg.svd(core, full_matrices=False)
        deltas[name] = LowRankDelta(((right.T * s).T @ v.T).float(), (u @ left).float())
    return PreferenceVector(deltas, vectors[0].identity)


def _holders(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """In how many of the column spaces each direction of their span lies, and these directions: [k], [n, k]."""
    bases = [torch.linalg.qr(factor.double())[0] for factor in factors]
    u, s, _ = torch.linalg.svd(torch.cat(bases, dim=1), full_matrices=False)
    return s.square(), u


def tuned(task: Task, parts: Mapping[str, tuple[int, int]]) -> Weights:
    """Coefficients of every vector's parts, found by `tune` on validation prompts.

    Wanted is the largest mean over the axes of the combination, with no more over-refusal than the base and a fluency
    of at least 0.97.
    """
    keys = {f"{axis}@{part}": (i, layers) for i, axis in enumerate(task.axes) for part, layers in parts.items()}
    vectors = {key: task.vectors[i].filtered(Filter(layers=layers)) for key, (i, layers) in keys.items()}
    hashes = {key: f"{task.hashes[i]}:{layers}" for key, (i, layers) in keys.items()}
    asked = prompts("validation", CHOSEN_ON)
    scorers = [find_scorer(f"sandbox:{name}") for name in SCORERS]
    store = Store(task.work / "searched.sqlite", base=f"sandbox {task.base.model.dtype}", vectors=hashes)
    with LiveMixer(task.base.model, vectors) as mixer:

        def own(mixes: Sequence[Mapping[str, float]], on: Sequence[Any]) -> list[Point]:
            return [with_own(one, task.axes) for one in evaluate(task.base, mixer, mixes, on, scorers, store=store)]

        (base,) = own([{}], asked)
        bounds = (Bound("over_refusal", -1, base.scores["over_refusal"].mean or 0.0), Bound("fluency", 1, 0.97))
        ranges = dict.fromkeys(keys, Range(0.0, MOST))
        mix = tune(own, ranges, Wish((Goal("own"),), bounds), asked, asked, evaluations=EVALUATIONS).answers[0].mix
    store.close()

    def part_of(module: str) -> str:
        layer = layer_of(module) or 0
        return next(part for part, (first, last) in parts.items() if first <= layer <= last)

    return {name: [mix[f"{axis}@{part_of(name)}"] for axis in task.axes] for name in task.vectors[0].deltas}


def with_own(point: Point, axes: Sequence[str]) -> Point:
    """A point with one score more: `own`, whose mean is the mean of the axes' means."""
    tables = [point.values[axis] for axis in axes]
    size = len(tables[0])
    scales = [size / len(axes) / max(sum(one is not None for one in values), 1) for values in tables]
    own: list[float | None] = [
        sum(scale * (one or 0.0) for scale, one in zip(scales, ones, strict=True)) for ones in zip(*tables, strict=True)
    ]
    return replace(point, scores={**point.scores, "own": estimate(own)}, values={**point.values, "own": own})


def descended(task: Task, *, c: float) -> Weights:
    """Coefficients of every vector in every module, from 1 down the conflict-averse gradient of the axes' DPO losses.

    Each step has the same length, after which all coefficients are scaled so that the vector has the norm of the sum.

    Args:
        c: RACO's radius; 0 is the gradient of the mean loss.
    """
    names = list(task.vectors[0].deltas)
    objectives = [Objective.of(task.base, axis) for axis in task.axes]
    inner = torch.stack([gram([vector.deltas[name] for vector in task.vectors]) for name in names])  # [m, k, k]
    gates = torch.ones(len(names), len(task.vectors), requires_grad=True)
    weights = torch.full((len(objectives),), 1 / len(objectives))

    def squared() -> float:
        at = gates.detach().double()
        return float(torch.einsum("mi,mij,mj->", at, inner, at))

    length = squared()
    with gated(task.base.model, task.vectors, gates):
        for _ in range(STEPS):
            found = [torch.autograd.grad(one.loss(task.base), gates)[0].flatten().double() for one in objectives]
            table = torch.stack(found)
            step = (solve(table @ table.T, weights, c).coefficients @ table).view_as(gates).float()
            with torch.no_grad():
                gates -= STRIDE * step / step.square().mean().sqrt()
                gates *= (length / squared()) ** 0.5
    return dict(zip(names, gates.tolist(), strict=True))


class Objective(NamedTuple):
    """A batch of pairs of one axis."""

    batch: dict[str, Tensor]
    reference: Tensor
    beta: float

    @classmethod
    def of(cls, base: LoadedBase, axis: str) -> Objective:
        """The first training pairs of the shipped recipe."""
        recipe = read_recipe(shipped("recipes") / f"sandbox-{axis}.yaml")
        some = load_pairs(recipe).train[:PAIRS]
        rendered = render_pairs(some, base.tokenizer, max_prompt_tokens=512, max_reply_tokens=512).pairs
        pad = base.tokenizer.pad_token_id
        reference = pair_log_probs(base.model, rendered, pad_token_id=pad)
        return cls(collate(rendered, pad, base.device), reference, recipe.training.beta)

    def loss(self, base: LoadedBase) -> Tensor:
        """DPO's, of the model as it is now."""
        with fused_head(base.model):
            log_probs = base.model(**self.batch, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
        chosen, rejected = (log_probs.view(2, -1) - self.reference.T).unbind()
        return nn.functional.softplus(-self.beta * (chosen - rejected)).mean()


@contextmanager
def gated(model: nn.Module, vectors: Sequence[PreferenceVector], gates: Tensor) -> Iterator[None]:
    """Adds the vectors with `gates` [modules, vectors], through which gradients flow."""

    def hook(place: int, deltas: Sequence[LowRankDelta]) -> Callable[..., Tensor]:
        down, up = torch.cat([one.A for one in deltas]), torch.cat([one.B for one in deltas], dim=1).T
        ranks = torch.tensor([one.rank for one in deltas])

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            gate = gates[place].repeat_interleave(ranks)
            return output + ((inputs[0].float() @ down.T * gate) @ up).to(output.dtype)

        return add

    handles = [
        model.get_submodule(name).register_forward_hook(hook(place, [vector.deltas[name] for vector in vectors]))
        for place, name in enumerate(vectors[0].deltas)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def found_by(search: Callable[[Task], Weights], name: str) -> Callable[[Task], PreferenceVector]:
    """The rule of that name: the sum with coefficients that are searched for once."""

    def make(task: Task) -> PreferenceVector:
        file = weights_file(task, name)
        if not file.is_file():
            write_json(file, search(task))
        return weighted(task.vectors, json.loads(file.read_text(encoding="utf-8")))

    return make


def weights_file(task: Task, rule: str) -> Path:
    """Where a rule that searches keeps what it found."""
    return task.work / f"{'+'.join(task.axes)} {rule}.json"


def by_layer(weights: Weights) -> list[list[float]]:
    """The mean coefficient of every vector in every layer: [layers, vectors]."""
    layers: dict[int, list[list[float]]] = {}
    for name, own in weights.items():
        layers.setdefault(layer_of(name) or 0, []).append(own)
    return [[round(fmean(column), 2) for column in zip(*layers[layer], strict=True)] for layer in sorted(layers)]


SEARCHES: dict[str, Callable[[Task], Weights]] = {
    "tuned, whole": lambda task: tuned(task, WHOLE),
    "tuned, layers": lambda task: tuned(task, LAYERS),
    "RACO": lambda task: descended(task, c=RADIUS),
    "mean loss": lambda task: descended(task, c=0.0),
}
RULES: dict[str, Callable[[Task], PreferenceVector]] = {
    SUM: lambda task: merge([(1.0, one) for one in task.vectors]).vector,
    "projected out": lambda task: weighted(task.vectors, freed(task.vectors)),
    "shared once": lambda task: shared(task.vectors, keep=True),
    "shared left out": lambda task: shared(task.vectors, keep=False),
    "span merge": lambda task: (
        merge(
            [(1.0, one) for one in task.vectors], "span", rank=sum(one.rank for one in task.vectors), density=1.0
        ).vector
    ),
    **{name: found_by(search, name) for name, search in SEARCHES.items()},
}
