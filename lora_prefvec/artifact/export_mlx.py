"""A mix as MLX-LM's own adapter folder (mlx-lm `tuner/utils.py`, `load_adapters`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_prefvec.artifact.atomic import atomic_folder
from lora_prefvec.artifact.base_facts import Base
from lora_prefvec.artifact.canonical import Grid, factors
from lora_prefvec.artifact.provenance import FILE as PROVENANCE
from lora_prefvec.artifact.provenance import Provenance
from lora_prefvec.artifact.weights import SafetensorsWriter, dtype_name, file_sha256
from lora_prefvec.artifact.writing import cast_error
from lora_prefvec.errors import InputError
from lora_prefvec.vector import PreferenceVector

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
_FOLD = "Fold the mix into the base (prefvec fold), or leave that module out."


@dataclass(frozen=True)
class MlxPlan:
    """What `write_mlx` will write.

    Args:
        names: module -> its name in MLX; modules whose delta is zero are left out.
        rank: of every module, the shorter ones filled with zeros.
        size: of the factors in bytes.
        cast_error: norm of what the cast to `dtype` changes, relative to the vector's norm; 0.0 for float32.
    """

    names: dict[str, str]
    layout: Grid
    dtype: torch.dtype
    size: int
    cast_error: float

    @property
    def rank(self) -> int:
        return self.layout.rank


def plan_mlx(vector: PreferenceVector, base: Base | None, dtype: torch.dtype = torch.float32) -> MlxPlan:
    """Find a place for every module, or refuse the whole.

    Args:
        base: is asked only where embedding or head are changed; None will do for all else.

    Raises:
        InputError: the vector is empty, a module has no place, or a value overflows `dtype`.
    """
    used = {module: delta for module, delta in vector.deltas.items() if delta.norm() > 0}
    if not used:
        raise InputError("the mix changes no module, so there is nothing to write", "Give a coefficient that is not 0.")
    names = {module: _name(module, base) for module in used}
    rank = max(delta.rank for delta in used.values())
    layout = Grid({module: delta.shape for module, delta in used.items()}, rank, [], [])
    size = sum(rank * sum(shape) for shape in layout.shapes.values()) * dtype.itemsize
    error = cast_error(((module, factors(vector, module, layout)) for module in used), dtype)
    return MlxPlan(names, layout, dtype, size, error)


def write_mlx(
    target: str | Path, vector: PreferenceVector, plan: MlxPlan, provenance: Provenance, *, force: bool = False
) -> None:
    """Write a vector as an MLX-LM adapter folder, which appears only when it is complete.

    Raises:
        InputError: the target exists or cannot be written, or the disk is full.
    """
    name_of = dtype_name(plan.dtype)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, (rows, columns) in plan.layout.shapes.items():
        shapes[f"{plan.names[module]}.lora_a"] = (name_of, (columns, plan.rank))
        shapes[f"{plan.names[module]}.lora_b"] = (name_of, (plan.rank, rows))
        if _is_embedding(module):  # looked up by rows: [vocab, r] and [r, hidden]
            shapes[f"{plan.names[module]}.lora_a"] = (name_of, (rows, plan.rank))
            shapes[f"{plan.names[module]}.lora_b"] = (name_of, (plan.rank, columns))
    with atomic_folder(target, force) as work:
        with SafetensorsWriter(work / WEIGHTS, shapes, {"format": "mlx"}) as file:
            for module in plan.names:
                delta = factors(vector, module, plan.layout)
                parts = (delta.B, delta.A) if _is_embedding(module) else (delta.A.T, delta.B.T)
                for part in parts:
                    file.write(part.to(plan.dtype))
        config = {
            "fine_tune_type": "lora",
            "lora_parameters": {
                "dropout": 0.0,
                "keys": sorted(plan.names.values()),
                "rank": plan.rank,
                "scale": 1.0,  # it is folded into the factors; left out, MLX would take 20
            },
            "num_layers": -1,  # all
        }
        (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        facts = provenance.model_copy(
            update={"weights_sha256": file_sha256(work / WEIGHTS), "base": provenance.base or vector.identity}
        )
        (work / PROVENANCE).write_text(facts.to_json(), encoding="utf-8")


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] == "embed_tokens"


def _name(module: str, base: Base | None) -> str:
    """What MLX calls a module; the same as transformers, but for the text part of a multimodal model.

    Raises:
        InputError: MLX cannot apply a change of it.
    """
    leaf = module.rpartition(".")[2]
    if ".experts" in module:
        raise InputError(f"{module} cannot be exported: MLX stacks the experts of a layer", _FOLD)
    if leaf in {"embed_tokens", "lm_head"}:
        if base is None:
            problem = f"{module} cannot be exported before it is known whether head and embedding are tied"
            raise InputError(problem, "Name the base with --base.")
        if base.tied:
            why = "MLX would apply it in the head too" if leaf == "embed_tokens" else "MLX finds no head of its own"
            raise InputError(f"{module} cannot be exported: embedding and head are tied, and {why}", _FOLD)
    if module.startswith("model.language_model."):
        return "language_model.model." + module.removeprefix("model.language_model.")
    return module
