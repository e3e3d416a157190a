"""Writing the adapter folder in the canonical form, at once or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_prefvec.artifact.atomic import atomic_folder, check_target
from lora_prefvec.artifact.canonical import Grid, factors, grid
from lora_prefvec.artifact.card import model_card
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.artifact.peft_config import FILE as CONFIG
from lora_prefvec.artifact.provenance import FILE as PROVENANCE
from lora_prefvec.artifact.provenance import Provenance
from lora_prefvec.artifact.reference import SANDBOX, resolve_base
from lora_prefvec.artifact.weights import SafetensorsWriter, dtype_name, file_sha256
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Written:
    """What `write_adapter` wrote, or would write.

    Args:
        rank: of every module; engines ask for it (vLLM: `--max-lora-rank`).
        size: of the weights in bytes.
        cast_error: norm of what the cast to `dtype` changed, relative to the vector's norm; 0.0 for float32.
        incomplete: modules that SGLang needs and whose shape is unknown without the base.
    """

    rank: int
    modules: int
    size: int
    cast_error: float
    incomplete: list[str]


def plan_adapter(vector: PreferenceVector, *, dtype: torch.dtype = torch.float32, base: Path | None = None) -> Written:
    """What `write_adapter` would write with the same arguments; writes nothing.

    Raises:
        InputError: the vector is empty, does not fit its base or overflows `dtype`.
    """
    return _plan(vector, dtype, base)[0]


def write_adapter(
    target: str | Path,
    vector: PreferenceVector,
    provenance: Provenance,
    *,
    recipe: str | None = None,
    mix: str | None = None,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    base: Path | None = None,
) -> Written:
    """Write a vector as the canonical adapter folder, which appears only when it is complete.

    Args:
        force: replace an existing folder.
        recipe, mix, dtype, base: as `fill_adapter` takes them.

    Raises:
        InputError: the target exists or cannot be written, the disk is full, or as `plan_adapter`.
    """
    check_target(target, force)
    plan, layout = _plan(vector, dtype, base)
    with atomic_folder(target, force) as work:
        _fill(work, vector, provenance, layout, dtype, {"recipe.yaml": recipe, "mix.yaml": mix})
    return plan


def fill_adapter(
    folder: Path,
    vector: PreferenceVector,
    provenance: Provenance,
    *,
    recipe: str | None = None,
    mix: str | None = None,
    dtype: torch.dtype = torch.float32,
    base: Path | None = None,
) -> str:
    """Write the files of an adapter into a folder that `atomic_folder` gave; returns the SHA-256 of the weights.

    Args:
        provenance: its `weights_sha256` is filled in, and its `base` where it has none and the vector has.
        recipe, mix: text of `recipe.yaml` or `mix.yaml`.
        dtype: of the factors: float32, bfloat16 or float16.
        base: folder of the base, for its layers and shapes; found by the vector's identity where it is at hand.

    Raises:
        InputError: as `plan_adapter`.
    """
    layout = _plan(vector, dtype, base)[1]
    return _fill(folder, vector, provenance, layout, dtype, {"recipe.yaml": recipe, "mix.yaml": mix})


def _fill(
    folder: Path,
    vector: PreferenceVector,
    provenance: Provenance,
    layout: Grid,
    dtype: torch.dtype,
    made_by: dict[str, str | None],
) -> str:
    _write_weights(folder / WEIGHTS, vector, layout, dtype)
    sha256 = file_sha256(folder / WEIGHTS)
    facts = provenance.model_copy(update={"weights_sha256": sha256, "base": provenance.base or vector.identity})
    texts = {
        **made_by,
        "README.md": model_card(facts, rank=layout.rank, modules=len(layout.shapes)),
        PROVENANCE: facts.to_json(),
        CONFIG: _config(layout, facts.base),
    }
    for name, text in texts.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return sha256


def _plan(vector: PreferenceVector, dtype: torch.dtype, base: Path | None) -> tuple[Written, Grid]:
    layout = grid(vector, base or _local_base(vector.identity))
    count = sum(layout.rank * (rows + columns) for rows, columns in layout.shapes.values())
    error = _cast_error(vector, layout, dtype)
    return Written(layout.rank, len(layout.shapes), count * dtype.itemsize, error, layout.incomplete), layout


def _write_weights(path: Path, vector: PreferenceVector, layout: Grid, dtype: torch.dtype) -> None:
    name_of = dtype_name(dtype)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, (rows, columns) in layout.shapes.items():
        shapes[f"{_PREFIX}{module}.lora_A.weight"] = (name_of, (layout.rank, columns))
        shapes[f"{_PREFIX}{module}.lora_B.weight"] = (name_of, (rows, layout.rank))
    with SafetensorsWriter(path, shapes, {"format": "pt"}) as file:
        for module in layout.shapes:
            delta = factors(vector, module, layout)
            for factor in (delta.A, delta.B):
                file.write(factor.to(dtype))


def _cast_error(vector: PreferenceVector, layout: Grid, dtype: torch.dtype) -> float:
    """Norm of what the cast changes, over the norm of the vector.

    Raises:
        InputError: a value overflows `dtype`.
    """
    if dtype == torch.float32:
        return 0.0
    changed, whole = 0.0, 0.0
    for module in vector.deltas:
        exact = factors(vector, module, layout)
        A, B = exact.A.to(dtype), exact.B.to(dtype)
        if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise InputError(
                f"{module} overflows {str(dtype).removeprefix('torch.')}", "Write it as float32 or bfloat16."
            )
        # (B + b)(A + a) - BA = b A + (B + b) a, without the cancellation of a difference of two products
        a, b = A.float() - exact.A, B.float() - exact.B
        difference = LowRankDelta(torch.cat([exact.A, a]), torch.cat([b, B.float()], dim=1))
        changed += difference.norm() ** 2
        whole += exact.norm() ** 2
    return float((changed / whole) ** 0.5) if whole else 0.0


def _local_base(identity: BaseIdentity | None) -> Path | None:
    """The base's folder where it is on this machine anyway: embedded or in the Hub's cache; nothing is fetched."""
    if identity is None:
        return None
    if identity.id == SANDBOX:
        return resolve_base(SANDBOX)
    if "/" not in identity.id:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(identity.id, "config.json", revision=identity.revision)
    except ValueError:
        return None  # an id that the Hub could not have
    return Path(found).parent if isinstance(found, str) else None


def _config(layout: Grid, identity: BaseIdentity | None) -> str:
    """`adapter_config.json`: only keys that PEFT has had for long, or it and transformers would warn."""
    config: dict[str, object] = {
        "alpha_pattern": {},
        "base_model_name_or_path": identity.id if identity else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": layout.rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": layout.rank,
        "rank_pattern": {},
        "revision": identity.revision if identity else None,
        "target_modules": layout.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
