"""How vectors lie: their sizes, spectra, angles, and where in the depth of a model they pull against each other.

Everything is computed on the dense deltas, but from the factors: r x r work per module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lora_prefvec.vector.delta import LowRankDelta, gram
from lora_prefvec.vector.preference_vector import PreferenceVector, check_module

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
# The order in which a token meets them; files have them in any order.
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_of(module: str) -> int | None:
    """The layer a module belongs to, its first number: 3 for `model.layers.3.mlp.up_proj`; None for `lm_head`."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def type_of(module: str) -> str:
    """The module's type, its last word that is no number.

    `up_proj` for `model.layers.3.mlp.up_proj`, `gate_up_proj` for the fourth expert `...experts.gate_up_proj.3`.
    """
    return next((part for part in reversed(module.split(".")) if not part.isdecimal()), module)


def module_norms(vector: PreferenceVector) -> dict[str, float]:
    """Module -> Frobenius norm of its delta, in the vector's order."""
    return {name: delta.norm() for name, delta in vector.deltas.items()}


def layer_norms(vector: PreferenceVector) -> dict[int | None, float]:
    """Layer -> Frobenius norm of all its deltas; modules outside the layers come last, under None."""
    return _by_depth(_grouped(module_norms(vector), layer_of))


def type_norms(vector: PreferenceVector) -> dict[str, float]:
    """Module type (`q_proj`) -> Frobenius norm of its deltas over all layers."""
    return _grouped(module_norms(vector), type_of)


def norm_grid(vector: PreferenceVector) -> tuple[list[int | None], list[str], Tensor]:
    """Layers (depth first, None last), module types, and the Frobenius norm of each cell, [layers, types] float64.

    0.0 where a layer has no such module, or has it unchanged.
    """
    norms = _grouped(module_norms(vector), lambda name: (layer_of(name), type_of(name)))
    layers = list(_by_depth({layer: None for layer, _ in norms}))
    place = {kind: i for i, kind in enumerate(_ORDER)}
    types = sorted(dict.fromkeys(kind for _, kind in norms), key=lambda kind: place.get(kind, len(place)))
    cells = [[norms.get((layer, kind), 0.0) for kind in types] for layer in layers]
    return layers, types, torch.tensor(cells, dtype=torch.float64).reshape(len(layers), len(types))


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): between 1 and their number.

    0.0 for a spectrum of zeros.
    """
    total = float(spectrum.sum())
    if total == 0:
        return 0.0
    shares = spectrum.double() / total
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


def energy_kept(spectra: Iterable[Tensor]) -> Tensor:
    """The part of the squared norm that the best rank-k approximation of every module keeps, for k = 1, 2, ..., [r].

    Eckart and Young (1936): it is the part of the squared singular values up to the k-th. 1.0 throughout for zeros.

    Args:
        spectra: singular values of each module, largest first.
    """
    squares = [values.double().square() for values in spectra]
    total = torch.zeros(max((len(one) for one in squares), default=0), dtype=torch.float64)
    for one in squares:
        total[: len(one)] += one.to(total.device)
    kept = total.cumsum(0)
    return kept / kept[-1] if len(kept) and kept[-1] > 0 else torch.ones_like(kept)


def subspace_interference(vectors: Sequence[PreferenceVector], *, rank: int = 8, modules: int = 32) -> dict[str, float]:
    """Subspace task interference (STI) of each of the largest modules, largest first; its mean is one figure for a set.

    Per module, with U [out, K] and V [in, K] the leading `rank` singular vectors of every delta side by side and S
    the diagonal of their singular values:

        STI = || (U^T U - I) S (V^T V - I) ||_1, the sum of absolute entries

    (Gargiulo et al., Task Singular Vectors, arXiv 2412.00081). It is 0 where the vectors change subspaces at right
    angles, and grows with their overlap and, unlike a cosine, with their size. The defaults are those of the
    preference-vector paper (arXiv 2504.20106, Table 16): rank 8, on the 32 modules of the largest norm, which is the
    mean over the vectors.

    Args:
        rank: of the truncated singular value decompositions.
        modules: how many of the modules are looked at.

    Raises:
        InputError: a module has two shapes.
    """
    grams = _module_grams(vectors)
    size = {name: float(inner.diagonal().clamp(min=0).sqrt().mean()) for name, inner in grams.items()}
    largest = sorted(size, key=lambda name: -size[name])[:modules]
    return {
        name: _interference([vector.deltas[name] for vector in vectors if name in vector.deltas], rank)
        for name in largest
    }


def _interference(deltas: Sequence[LowRankDelta], rank: int) -> float:
    parts = [_leading(delta, rank) for delta in deltas]
    U, S, V = (torch.cat([part[i] for part in parts], dim=-1) for i in range(3))
    own = torch.eye(len(S), dtype=torch.float64, device=S.device)
    return float((((U.T @ U - own) * S) @ (V.T @ V - own)).abs().sum())


def _leading(delta: LowRankDelta, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] and V [in, k] of the delta's leading k <= rank singular values that are not zero."""
    left, values, right = delta.svd()
    # Where the singular value is zero, the direction is arbitrary, and would overlap by chance.
    k = min(rank, int((values > values[0] * torch.finfo(torch.float32).eps).sum()))
    return left[:, :k], values[:k], right[:, :k]


def cosine_matrix(vectors: Sequence[PreferenceVector]) -> Tensor:
    """Cosine of every two of k vectors, [k, k], float64; 0.0 where one is zero.

    Raises:
        InputError: a module has two shapes.
    """
    k = len(vectors)
    return _cosines(sum(_module_grams(vectors).values(), torch.zeros(k, k, dtype=torch.float64)))


def module_cosines(vectors: Sequence[PreferenceVector]) -> dict[str, Tensor]:
    """Module -> cosine of every two of k vectors within that module, [k, k], float64; 0.0 where one is zero there.

    Raises:
        InputError: a module has two shapes.
    """
    return {name: _cosines(inner) for name, inner in _module_grams(vectors).items()}


def layer_cosines(vectors: Sequence[PreferenceVector]) -> dict[int | None, Tensor]:
    """Layer -> cosine of every two of k vectors within that layer, [k, k], float64.

    It shows where in the depth vectors interfere: a negative entry undoes, a positive one doubles. Modules outside the
    layers come last, under None.

    Raises:
        InputError: a module has two shapes.
    """
    grams: dict[int | None, Tensor] = {}
    for name, inner in _module_grams(vectors).items():
        layer = layer_of(name)
        grams[layer] = grams[layer] + inner if layer in grams else inner
    return {layer: _cosines(inner) for layer, inner in _by_depth(grams).items()}


def _module_grams(vectors: Sequence[PreferenceVector]) -> dict[str, Tensor]:
    """Module -> inner products of its deltas, [k, k] float64 on the CPU; a vector without the module has zeros."""
    names = dict.fromkeys(name for vector in vectors for name in vector.deltas)
    grams = {}
    for name in names:
        having = [i for i, vector in enumerate(vectors) if name in vector.deltas]
        deltas = [vectors[i].deltas[name] for i in having]
        for delta in deltas[1:]:
            check_module(name, deltas[0], delta)
        place = torch.nn.functional.one_hot(torch.tensor(having), len(vectors)).double()
        grams[name] = place.T @ gram(deltas) @ place
    return grams


def _cosines(inner: Tensor) -> Tensor:
    norms = inner.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, inner / scale, 0.0).clamp(-1.0, 1.0)


def _grouped(norms: dict[str, float], key: Callable[[str], Key]) -> dict[Key, float]:
    groups: dict[Key, list[float]] = {}
    for name, norm in norms.items():
        groups.setdefault(key(name), []).append(norm)
    return {group: math.hypot(*members) for group, members in groups.items()}


def _by_depth(values: dict[int | None, Value]) -> dict[int | None, Value]:
    return dict(sorted(values.items(), key=lambda item: math.inf if item[0] is None else item[0]))
