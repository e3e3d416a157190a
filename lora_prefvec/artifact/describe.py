"""One vector in numbers, for `prefvec inspect`."""

from __future__ import annotations

from typing import Any

from lora_prefvec.artifact.mixing import Ingredient
from lora_prefvec.vector import effective_rank, module_norms, spectra, type_of


def describe(ingredient: Ingredient) -> dict[str, Any]:
    """What there is to know of one vector, JSON-serialisable: provenance, norms, ranks, and where the norm lies.

    `share` is a module type's part of the squared norm; effective ranks are means over modules.
    """
    adapter = ingredient.adapter
    vector, facts = adapter.vector, adapter.provenance
    norms = {name: norm for name, norm in module_norms(vector).items() if norm > 0}  # the rest fills the grid
    ranks = {name: effective_rank(spectrum) for name, spectrum in spectra(vector).items() if name in norms}
    norm = vector.norm()
    types = []
    for kind in dict.fromkeys(map(type_of, norms)):
        names = [name for name in norms if type_of(name) == kind]
        energy = sum(norms[name] ** 2 for name in names)
        types.append(
            {
                "type": kind,
                "modules": len(names),
                "norm": energy**0.5,
                "share": energy / norm**2 if norm else 0.0,
                "rank": max(vector.deltas[name].rank for name in names),
                "effective_rank": sum(ranks[name] for name in names) / len(names),
            }
        )
    types.sort(key=lambda entry: -entry["norm"])
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
        "types": types,
        "top": [{"module": name, "norm": norms[name]} for name in top],
        "weights_sha256": adapter.sha256,
        "provenance": facts.model_dump(mode="json") if facts else None,
    }
