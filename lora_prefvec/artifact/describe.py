"""Vectors in numbers, for `prefvec inspect`: each alone, and how several lie to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, takewhile
from typing import Any

from torch import Tensor

from lora_prefvec.artifact.mixing import Ingredient
from lora_prefvec.vector import (
    PreferenceVector,
    cosine_matrix,
    effective_rank,
    energy_kept,
    layer_cosines,
    layer_of,
    module_norms,
    norm_grid,
    subspace_interference,
    type_of,
)


def describe(ingredient: Ingredient) -> dict[str, Any]:
    """What there is to know of one vector, JSON-serialisable: provenance, norms, ranks, and where the norm lies.

    `share` is a group's part of the squared norm; `rank` the largest of its modules, `effective_rank` their mean.
    `energy` maps ranks 1, 2, 4, ... to the part of the squared norm that truncation to it keeps; `spectrum` holds the
    root mean square over the modules of the first, second, ... singular value; `grid` the norm by layer and type.
    """
    adapter = ingredient.adapter
    vector, facts = adapter.vector, adapter.provenance
    norms = {name: norm for name, norm in module_norms(vector).items() if norm > 0}  # the rest fills the grid
    values = {name: spectrum for name, spectrum in vector.spectrum().items() if name in norms}
    ranks = {name: effective_rank(spectrum) for name, spectrum in values.items()}
    norm = math.hypot(*norms.values())

    def group(names: list[str]) -> dict[str, Any]:
        size = math.hypot(*(norms[name] for name in names))
        return {
            "modules": len(names),
            "norm": size,
            "share": (size / norm) ** 2,
            "rank": max(vector.deltas[name].rank for name in names),
            "effective_rank": sum(ranks[name] for name in names) / len(names),
        }

    by_type: dict[str, list[str]] = {}
    by_layer: dict[int | None, list[str]] = {}
    for name in norms:
        by_type.setdefault(type_of(name), []).append(name)
        by_layer.setdefault(layer_of(name), []).append(name)
    layers, types, cells = norm_grid(vector)
    kept = energy_kept(values.values())
    top = sorted(norms, key=lambda name: -norms[name])[:5]
    return {
        "ref": ingredient.ref,
        "preference": facts.preference if facts else None,
        "kind": facts.kind if facts else "plain PEFT adapter",
        "base": vector.identity.id if vector.identity else None,
        "norm": norm,
        "rank": vector.rank,
        "effective_rank": sum(ranks.values()) / max(len(ranks), 1),
        "modules": len(norms),
        "types": sorted(
            ({"type": kind, **group(names)} for kind, names in by_type.items()), key=lambda entry: -entry["norm"]
        ),
        "layers": [{"layer": layer, **group(by_layer[layer])} for layer in layers if layer in by_layer],
        "grid": {"layers": layers, "types": types, "norms": cells.tolist()},
        "energy": {rank: float(kept[rank - 1]) for rank in powers_of_two(len(kept))},
        "spectrum": _mean_spectrum(list(values.values())),
        "top": [{"module": name, "norm": norms[name]} for name in top],
        "weights_sha256": adapter.sha256,
        "provenance": facts.model_dump(mode="json") if facts else None,
    }


def compare(vectors: Sequence[PreferenceVector]) -> dict[str, Any]:
    """How several vectors lie to each other, JSON-serialisable.

    `cosines` is the matrix over the whole model; `interference` has, by layer, the cosine of every pair (`pairs` says
    which); `subspace_interference` is the mean STI of the largest modules, `by_module` its terms.

    Raises:
        InputError: a module has two shapes.
    """
    pairs = list(combinations(range(len(vectors)), 2))
    by_module = subspace_interference(vectors)
    return {
        "cosines": cosine_matrix(vectors).tolist(),
        "pairs": pairs,
        "interference": [
            {"layer": layer, "cosines": [float(cosines[i, j]) for i, j in pairs]}
            for layer, cosines in layer_cosines(vectors).items()
        ],
        "subspace_interference": {
            "mean": sum(by_module.values()) / max(len(by_module), 1),
            "by_module": by_module,
        },
    }


def powers_of_two(end: int) -> list[int]:
    """1, 2, 4, ... below `end`, and `end` itself; nothing for 0."""
    below = takewhile(lambda rank: rank < end, (2**power for power in range(end)))
    return [*below, end] if end else []


def _mean_spectrum(values: list[Tensor]) -> list[float]:
    length = max((len(one) for one in values), default=0)
    squares = [sum(float(one[i]) ** 2 for one in values if i < len(one)) for i in range(length)]
    return [math.sqrt(square / len(values)) for square in squares]
