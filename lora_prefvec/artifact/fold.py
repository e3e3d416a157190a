"""Fold: a vector added to the dense weights of a base, tensor by tensor, so that one tensor at a time is in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_prefvec.artifact.atomic import atomic_folder, check_target
from lora_prefvec.artifact.canonical import base_shapes, check_fits
from lora_prefvec.artifact.provenance import FILE as PROVENANCE
from lora_prefvec.artifact.provenance import Provenance, read_json
from lora_prefvec.artifact.weights import (
    FLOATS,
    SafetensorsWriter,
    TensorSpec,
    checkpoint_files,
    dtype_name,
    load_tensor,
    read_header,
)
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector

# Everything of a base's folder that is neither weights nor about an adapter: config, tokenizer, templates, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("*.index.json", "adapter_config.json", "quantize_config.json", PROVENANCE)


@dataclass(frozen=True)
class FoldPlan:
    """What a fold writes.

    Args:
        files: new weight file -> the file of the base that it comes from.
        dtype: type of the floating-point tensors; None keeps each as it is.
        tensors: how many there are, for a progress bar.
        size: of the weights in bytes.
    """

    base: Path
    files: dict[str, Path]
    dtype: torch.dtype | None
    tensors: int
    size: int


def plan_fold(base: Path, vector: PreferenceVector, dtype: torch.dtype | None = None) -> FoldPlan:
    """Check that a vector can be folded into a base, from headers alone.

    Args:
        base: the folder of a model with float32, bfloat16 or float16 weights in safetensors.

    Raises:
        InputError: the base is quantised or has no safetensors, or the vector is empty or does not fit it.
    """
    if not vector.deltas:
        raise InputError(
            "the vector changes no module, so there is nothing to fold", "Give a coefficient that is not 0."
        )
    if read_json(base / "config.json").get("quantization_config"):
        raise InputError(f"{base.name} is quantised, and a delta would be lost in it", "Fold into the original base.")
    files = checkpoint_files(base)
    specs = [spec for file in files for spec in _tensors(file).values()]
    if not specs:
        raise InputError(f"{base.name} holds no tensors", "Give the folder of a base model.")
    check_fits(vector, base_shapes(base))
    size = sum(
        math.prod(spec.shape) * dtype.itemsize if dtype and spec.dtype in FLOATS else spec.size for spec in specs
    )
    return FoldPlan(base, {file.name: file for file in files}, dtype, len(specs), size)


def fold(
    plan: FoldPlan,
    vector: PreferenceVector,
    target: str | Path,
    provenance: Provenance,
    *,
    force: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> float:
    """Write base + vector as a model that transformers loads, with the base's config, tokenizer and templates.

    Args:
        provenance: gets the metric `delta_kept` and is written as `prefvec.json` beside the model.
        advance: called after each tensor.

    Returns:
        The part of the delta that the written type kept: 1 - |W' - W - delta| / |delta| over all modules, W being the
        base's weights in that type; 0.0 where rounding outweighs the delta.

    Raises:
        InputError: the target exists or cannot be written, the disk is full, or a weight overflows its type.
    """
    check_target(target, force)
    with atomic_folder(target, force) as work:
        lost = whole = 0.0
        for name, file in plan.files.items():
            tensors = _tensors(file)
            layout = {key: (_dtype(spec, plan.dtype), spec.shape) for key, spec in tensors.items()}
            with SafetensorsWriter(work / name, layout, {"format": "pt"}) as writer:
                for key, spec in tensors.items():
                    delta = vector.deltas.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
                    if delta is not None:
                        folded, error, norm = _add(key, load_tensor(spec), delta, FLOATS[_dtype(spec, plan.dtype)])
                        lost, whole = lost + error, whole + norm
                        writer.write(folded)
                    elif _dtype(spec, plan.dtype) != spec.dtype:
                        writer.write(load_tensor(spec).to(plan.dtype))
                    else:
                        writer.copy(spec)
                    advance()
        kept = max(0.0, 1 - math.sqrt(lost / whole)) if whole else 1.0
        _copy_rest(plan, work)
        facts = provenance.model_copy(update={"metrics": {**provenance.metrics, "delta_kept": kept}})
        (work / PROVENANCE).write_text(facts.to_json(), encoding="utf-8")
    return kept


def _add(name: str, weight: Tensor, delta: LowRankDelta, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """W + delta in `dtype`, with the squared norms of what rounding took and of the delta."""
    dense = delta.dense().float().cpu()
    folded = (weight.float() + dense).to(dtype)
    if not bool(torch.isfinite(folded).all()):
        raise InputError(f"{name} overflows {dtype_name(dtype)}", "Fold with --dtype bfloat16 or float32.")
    error = folded.float() - weight.to(dtype).float() - dense
    return folded, float(error.norm()) ** 2, float(dense.norm()) ** 2


def _copy_rest(plan: FoldPlan, work: Path) -> None:
    """Config, tokenizer, templates and licence; the index of the shards; the type, where it was changed."""
    for path in sorted({path for pattern in _COPIED for path in plan.base.glob(pattern)}):
        if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(path, work / path.name)
    if plan.files.keys() != {"model.safetensors"}:
        index = read_json(plan.base / "model.safetensors.index.json")
        index["metadata"] = {"total_size": plan.size}
        _write_json(work / "model.safetensors.index.json", index)
    if plan.dtype is not None:
        config = read_json(plan.base / "config.json")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or key in part):
                part[key] = str(plan.dtype).removeprefix("torch.")
        _write_json(work / "config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(file: Path) -> dict[str, TensorSpec]:
    """The tensors of a file in the order in which they lie there, so that it is read from front to back."""
    return dict(sorted(read_header(file)[0].items(), key=lambda item: item[1].start))


def _dtype(spec: TensorSpec, dtype: torch.dtype | None) -> str:
    """The safetensors type that a tensor is written in."""
    return dtype_name(dtype) if dtype is not None and spec.dtype in FLOATS else spec.dtype
