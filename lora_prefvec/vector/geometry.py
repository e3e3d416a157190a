"""How vectors lie: their sizes, spectra, angles, and where in the depth of a model they pull against each other.

Everything is computed on the dense deltas, but from the factors: r x r work per module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lora_prefvec.vector.preference_vector import PreferenceVector, check_module

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def layer_of(module: str) -> int | None:
    """The layer a module belongs to, its first number: 3 for `model.layers.3.mlp.up_proj`; None for `lm_head`."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def type_of(module: str) -> str:
    """The module's type, its last word: `up_proj` for `model.layers.3.mlp.up_proj`."""
    return module.rpartition(".")[2]


def module_norms(vector: PreferenceVector) -> dict[str, float]:
    """Module -> Frobenius norm of its delta, in the vector's order."""
    return {name: delta.norm() for name, delta in vector.deltas.items()}


def layer_norms(vector: PreferenceVector) -> dict[int | None, float]:
    """Layer -> Frobenius norm of all its deltas; modules outside the layers come last, under None."""
    return _by_depth(_grouped(module_norms(vector), layer_of))


def type_norms(vector: PreferenceVector) -> dict[str, float]:
    """Module type (`q_proj`) -> Frobenius norm of its deltas over all layers."""
    return _grouped(module_norms(vector), type_of)


def spectra(vector: PreferenceVector) -> dict[str, Tensor]:
    """Module -> singular values of its delta, largest first, float64."""
    return {name: delta.spectrum() for name, delta in vector.deltas.items()}


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): between 1 and their number.

    0.0 for a spectrum of zeros.
    """
    total = float(spectrum.sum())
    if total == 0:
        return 0.0
    shares = spectrum.double() / total
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


def cosine_matrix(vectors: Sequence[PreferenceVector]) -> Tensor:
    """Cosine of every two of k vectors, [k, k], float64; 0.0 where one is zero.

    Raises:
        InputError: a module has two shapes.
    """
    k = len(vectors)
    return _cosines(sum(_module_grams(vectors).values(), torch.zeros(k, k, dtype=torch.float64)))


def layer_cosines(vectors: Sequence[PreferenceVector]) -> dict[int | None, Tensor]:
    """Layer -> cosine of every two of k vectors within that layer, [k, k], float64.

    It shows where in the depth vectors interfere: a negative entry undoes, a positive one doubles. Modules outside the
    layers come last, under None.

    Raises:
        InputError: a module has two shapes.
    """
    grams: dict[int | None, Tensor] = {}
    for name, gram in _module_grams(vectors).items():
        layer = layer_of(name)
        grams[layer] = grams[layer] + gram if layer in grams else gram
    return {layer: _cosines(gram) for layer, gram in _by_depth(grams).items()}


def _module_grams(vectors: Sequence[PreferenceVector]) -> dict[str, Tensor]:
    """Module -> inner products of its deltas, [k, k] float64 on the CPU; a vector without the module has zeros."""
    names = dict.fromkeys(name for vector in vectors for name in vector.deltas)
    grams = {}
    for name in names:
        having = [i for i, vector in enumerate(vectors) if name in vector.deltas]
        deltas = [vectors[i].deltas[name] for i in having]
        for delta in deltas[1:]:
            check_module(name, deltas[0], delta)
        # All inner products at once: one product of the stacked factors, then the sum over each r_i x r_j block.
        A = torch.cat([delta.A for delta in deltas]).double()
        B = torch.cat([delta.B for delta in deltas], dim=1).double()
        product = ((B.T @ B) * (A @ A.T)).cpu()
        owner = torch.repeat_interleave(torch.tensor(having), torch.tensor([delta.rank for delta in deltas]))
        member = torch.nn.functional.one_hot(owner, len(vectors)).double()
        grams[name] = member.T @ product @ member
    return grams


def _cosines(gram: Tensor) -> Tensor:
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, gram / scale, 0.0).clamp(-1.0, 1.0)


def _grouped(norms: dict[str, float], key: Callable[[str], Key]) -> dict[Key, float]:
    groups: dict[Key, list[float]] = {}
    for name, norm in norms.items():
        groups.setdefault(key(name), []).append(norm)
    return {group: math.hypot(*members) for group, members in groups.items()}


def _by_depth(values: dict[int | None, Value]) -> dict[int | None, Value]:
    return dict(sorted(values.items(), key=lambda item: math.inf if item[0] is None else item[0]))
