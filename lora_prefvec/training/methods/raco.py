"""RACO (arXiv 2602.02495): conflict-averse gradients for DPO on several objectives, clipped by the user's weights.

With g_i the gradient of objective i over all trainable parameters, H = (<g_i, g_j>), weights w, b = H w, g0 = sum w_i
g_i and s = c |g0|, Algorithm 1 takes

    p* = argmin over the simplex of  b'p + s sqrt(p'Hp)        (CAGrad, arXiv 2110.14048, with user weights)
    p~ = min(p*, w), entry by entry, not renormalised          (the clip)
    G0 = g0 + s G_p~ / |G_p~|,  G_p = sum p_i g_i

so that G0 = sum a_i g_i with a = w + (s / |G_p~|) p~. c = 0 is DPO-LW, and without the clip it is CAGrad.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

from lora_prefvec.errors import InputError
from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import LoraSpec, RacoSpec, Recipe, TrainingSpec
from lora_prefvec.training import adapter
from lora_prefvec.training.made import Made
from lora_prefvec.training.methods.dpo_lw import load, runs
from lora_prefvec.training.methods.dpo_lw import prepare as prepare_weighted
from lora_prefvec.training.objectives import RUN, ObjectivesTrainer, train_rows
from lora_prefvec.training.rows import PreparedRows, Rows
from lora_prefvec.training.run import Job

__all__ = ["Step", "conflict_averse", "load", "make", "prepare", "runs", "solve"]

INSIDE = 1e-9  # of the simplex: what is nearer to an edge is on it
STEPS = "conflicts.jsonl"


class Step(NamedTuple):
    """How one gradient was corrected; each entry is [m].

    Attributes:
        p_star: the minimiser.
        p_clipped: after the clip; p_star without one.
        coefficients: a, with G0 = sum a_i g_i.
    """

    p_star: Tensor
    p_clipped: Tensor
    coefficients: Tensor


def solve(H: Tensor, weights: Tensor, c: float, *, clip: bool = True) -> Step:
    """Algorithm 1 on the Gram matrix of the objectives' gradients.

    Args:
        H: [m, m], inner products of the gradients.
        weights: [m], on the simplex.
        c: radius, from 0 to below 1.
    """
    H, w = H.double().cpu(), weights.double().cpu()
    size = H.trace()
    if c == 0 or not size > 0:
        return Step(w, w, w)
    H = H / size  # the solution does not depend on the scale, and gradients of a LoRA may be as small as 1e-8
    s = c * _length(H, w)
    if s == 0:
        return Step(w, w, w)
    p_star = conflict_averse(H, w, c)
    p = torch.minimum(p_star, w) if clip else p_star
    length = _length(H, p)
    return Step(p_star, p, w + (s / length) * p if length > 0 else w)


def conflict_averse(H: Tensor, w: Tensor, c: float) -> Tensor:
    """The minimiser of h(p) = b'p + s sqrt(p'Hp) over the simplex, b = H w and s = c sqrt(w'Hw): [m], float64.

    h is convex, so its minimum is the least of its stationary points on the faces of the simplex. On the inside of a
    face with k corners p = H^-1 (nu 1 - b) / (nu A - B), where A nu^2 - 2 B nu + C = s^2, A = 1'H^-1 1, B = 1'H^-1 b
    and C = b'H^-1 b, all on that face. Where H is singular there, the same value is met on a smaller face.
    """
    m, b = len(w), H @ w
    s = c * _length(H, w)
    best, least = torch.zeros(m, dtype=H.dtype), float("inf")
    for k in range(1, m + 1):
        for face in combinations(range(m), k):
            for inside in _stationary(H[list(face)][:, list(face)], b[list(face)], s):
                p = torch.zeros(m, dtype=H.dtype).index_copy(0, torch.tensor(face), inside)
                value = float(b @ p + s * _length(H, p))
                if value < least:
                    best, least = p, value
    return best


def _stationary(H: Tensor, b: Tensor, s: Tensor) -> list[Tensor]:
    """Where h is stationary inside of a face, and the face's point at which the combined gradient vanishes."""
    k = len(b)
    one = torch.ones(k, dtype=H.dtype)
    if k == 1:
        return [one]
    found = []
    values, vectors = torch.linalg.eigh(H)
    still = vectors[:, 0] / vectors[:, 0].sum()  # p'Hp has a kink where it is 0
    if values[0] <= 1e-12 * values[-1]:
        if bool((still > INSIDE).all()):
            found.append(still)
        return found
    inverse = (vectors / values) @ vectors.T
    A, B, C = one @ inverse @ one, one @ inverse @ b, b @ inverse @ b
    under = B * B - A * (C - s * s)
    if under < 0:
        return found
    for root in ((B + under.sqrt()) / A, (B - under.sqrt()) / A):
        p = inverse @ (root * one - b)
        total = p.sum()  # nu A - B, the length of which is that of the combined gradient: it has to be positive
        if total > 0 and bool((p > INSIDE * total).all()):
            found.append(p / total)
    return found


def _length(H: Tensor, p: Tensor) -> Tensor:
    return (p @ H @ p).clamp(min=0).sqrt()


class RacoTrainer(ObjectivesTrainer):
    """Gradients of all objectives from one forward, corrected for each optimiser step or for each micro-batch."""

    def __init__(
        self,
        base: LoadedBase,
        lora: LoraSpec,
        spec: TrainingSpec,
        method: RacoSpec,
        dataset: Dataset,
        folder: Path,
    ) -> None:
        super().__init__(base, lora, spec, list(method.weights.values()), dataset, folder)
        self.method = method
        self._gradients: list[list[Tensor]] = []  # of every objective, for every parameter
        self._micro_batch = 0  # of the step, from 0; its last where whole steps are solved
        self._steps = folder / STEPS

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward, a backward for each objective, and their combination in place of the sum's gradient."""
        model.train()
        with self.maybe_activation_offload_context:
            losses = self.objective_losses(model, self._prepare_inputs(inputs))
            self.check(losses)
            parameters = list(adapter.trainable(self.model).values())
            found = [
                list(torch.autograd.grad(loss, parameters, retain_graph=place + 1 < len(losses)))
                for place, loss in enumerate(losses)
            ]
        parts: int = self.current_gradient_accumulation_steps
        for gradients in found:
            for gradient in gradients:
                gradient /= parts
        if self.method.solve == "micro_batch":
            self._write(parameters, found)
        else:
            if not self._gradients:
                self._gradients = found
            else:
                for total, new in zip(self._gradients, found, strict=True):
                    torch._foreach_add_(total, new)
            if self.accelerator.sync_gradients:
                self._write(parameters, self._gradients)
                self._gradients = []
        self._micro_batch = 0 if self.accelerator.sync_gradients else self._micro_batch + 1
        return (self.weights * losses).sum().detach() / parts

    def _write(self, parameters: Sequence[Tensor], gradients: list[list[Tensor]]) -> None:
        """Adds the corrected gradient to `.grad`. Every process holds the mean over all of them."""
        if self.accelerator.num_processes > 1:
            gradients = [[self.accelerator.reduce(one, "mean") for one in each] for each in gradients]
        m = len(gradients)
        H = torch.empty(m, m, dtype=torch.float64)
        for i in range(m):
            for j in range(i + 1):
                inner = sum((a.double() * b.double()).sum() for a, b in zip(gradients[i], gradients[j], strict=True))
                H[i, j] = H[j, i] = float(inner)
        step = solve(H, self.weights, self.method.c, clip=self.method.clip)
        self._log(H, step)
        for place, parameter in enumerate(parameters):
            parts = [float(a) * each[place] for a, each in zip(step.coefficients, gradients, strict=True)]
            total = torch.stack(parts).sum(dim=0)
            parameter.grad = total if parameter.grad is None else parameter.grad + total

    def _log(self, H: Tensor, step: Step) -> None:
        norms = H.diagonal().sqrt()
        cosines = H / (norms[:, None] * norms).clamp(min=1e-300)
        line = {
            "step": self.state.global_step,
            "micro_batch": self._micro_batch,
            "p_star": step.p_star.tolist(),
            "p_clipped": step.p_clipped.tolist(),
            "coefficients": step.coefficients.tolist(),
            "norms": norms.tolist(),
            "cosines": [cosines[i, j].item() for i, j in combinations(range(len(H)), 2)],
        }
        with self._steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, float]:
        """Over all steps, the mean place of p* and angle of the gradients, and the median ratio of their lengths."""
        names, steps = list(self.method.objectives), read_steps(self._steps)
        found = {"interior_share": fmean([float(min(one["p_star"]) > INSIDE) for one in steps])}
        for place, name in enumerate(names):
            found[f"p_star.{name}"] = fmean([one["p_star"][place] for one in steps])
            found[f"p_clipped.{name}"] = fmean([one["p_clipped"][place] for one in steps])
        for place, pair in enumerate(combinations(names, 2)):
            found[f"cosine.{'.'.join(pair)}"] = fmean([one["cosines"][place] for one in steps])
        ratios = [max(one["norms"]) / min(one["norms"]) for one in steps if min(one["norms"]) > 0]
        if ratios:  # a batch in which an objective only has ties gives it no gradient
            found["norm_ratio"] = median(ratios)
        return found


def read_steps(log: Path) -> list[dict[str, Any]]:
    """A line for every corrected gradient; of the steps that a resumed run took again, those of the last time."""
    read = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    lines = {(line["step"], line["micro_batch"]): line for line in read}
    return [lines[place] for place in sorted(lines)]


def prepare(recipe: Recipe, rows: Rows, base: LoadedBase) -> PreparedRows:
    """As for a weighted sum.

    Raises:
        InputError: the base computes in float16, whose loss scaling these gradients would bypass.
    """
    if base.model.dtype == torch.float16:
        raise InputError("RACO does not train in float16", "Set training.compute_dtype=float32 or bfloat16.")
    return prepare_weighted(recipe, rows, base)


def make(job: Job, prepared: PreparedRows) -> Made:
    """Train by the corrected gradient; how the gradients lay at every step stays with the adapter."""
    spec = job.recipe.method
    assert isinstance(spec, RacoSpec)

    def trainer(folder: Path) -> RacoTrainer:
        return RacoTrainer(job.base, job.recipe.lora, job.recipe.training, spec, prepared.dataset, folder)

    made = train_rows(job, prepared, trainer)
    steps = read_steps(job.work / RUN / STEPS)
    return replace(made, files={STEPS: "".join(f"{json.dumps(step)}\n" for step in steps)})
