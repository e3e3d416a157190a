"""Fold: vectors added to the dense weights of a base in one pass, written as a model that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lora_prefvec.artifact import nf4
from lora_prefvec.artifact.adding import Buffers, Measured, Target, pieces, work
from lora_prefvec.artifact.atomic import atomic_folder, check_output
from lora_prefvec.artifact.kinds import is_conv1d
from lora_prefvec.artifact.placing import Placement, place
from lora_prefvec.artifact.provenance import FILE as PROVENANCE
from lora_prefvec.artifact.provenance import FoldedModule, FoldFacts, Provenance, read_json
from lora_prefvec.artifact.weights import (
    FLOATS,
    Layout,
    TensorSpec,
    checkpoint_files,
    dtype_name,
    layout_size,
    read_header,
    write_header,
)
from lora_prefvec.artifact.workers import workers
from lora_prefvec.errors import InputError
from lora_prefvec.vector import PreferenceVector

Onto = Literal["original", "nf4"]
LEAST_KEPT = 0.8  # a 4-bit fold that keeps less is refused unless it is asked for

# Everything of a base's folder that is neither weights nor about an adapter: config, tokenizer, templates, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
_LICENCES = ("LICENSE*", "NOTICE*")
_NOT_COPIED = ("*.index.json", "config.json", "adapter_config.json", "quantize_config.json", PROVENANCE)


@dataclass(frozen=True)
class FoldPlan:
    """What a fold writes.

    Args:
        config: the base's `config.json`.
        files: weight file -> its tensors, in the order in which they will lie there.
        dtype: type of the floating-point tensors; None keeps each as it is.
        onto: the base's own weights, or `nf4`, the dequantised ones that training saw.
        to_nf4: whether the result is a 4-bit checkpoint.
        untied: whether embedding and head, one matrix in the base, become two.
        tensors: how many there are, for a progress bar.
        size: of the weights in bytes.
    """

    base: Path
    config: dict[str, Any]
    files: dict[str, list[Target]]
    dtype: torch.dtype | None
    onto: Onto
    to_nf4: bool
    untied: bool
    tensors: int
    size: int

    def layout(self, file: str) -> Layout:
        """The tensors of a file as they are stored."""
        found: Layout = {}
        for target in self.files[file]:
            if target.to_nf4:
                assert target.dtype is not None
                rows, columns = target.source.shape[:: -1 if target.turned else 1]
                found |= nf4.layout(target.name, (rows, columns), target.dtype)
            else:
                found[target.name] = (_stored_as(target), target.source.shape)
        # Readers view the bytes in place, so wide types come first.
        return dict(sorted(found.items(), key=lambda item: -_WIDTHS.get(item[1][0], 8)))


_WIDTHS = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}


def plan_fold(
    base: Path,
    vector: PreferenceVector,
    dtype: torch.dtype | None = None,
    *,
    onto: Onto = "original",
    to_nf4: bool = False,
    training_dtype: torch.dtype = torch.bfloat16,
) -> FoldPlan:
    """Check that a vector can be folded into a base, from headers alone.

    Linear layers, embeddings, head, Conv1D and experts get their deltas. Where embedding and head are one matrix and
    the vector changes one of them, they become two.

    Args:
        base: the folder of a model with float32, bfloat16 or float16 weights in safetensors.
        dtype: of the result; None keeps the base's.
        onto: `nf4` adds the vector to the weights that a base loaded in 4 bits has, in all layers that are quantised.
        to_nf4: write these layers in 4 bits again, as bitsandbytes stores them.
        training_dtype: the compute dtype of training, in which the base's weights were when they were quantised.

    Raises:
        InputError: the base is quantised or has no safetensors, or the vector is empty or does not fit it.
    """
    if not vector.deltas:
        raise InputError(
            "the vector changes no module, so there is nothing to fold", "Give a coefficient that is not 0."
        )
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{base.name} is quantised, and a delta would be lost in it", "Fold into the original base.")
    headers = {file.name: _in_order(read_header(file)[0]) for file in checkpoint_files(base)}
    tensors = {name: spec for header in headers.values() for name, spec in header.items()}
    if not tensors:
        raise InputError(f"{base.name} holds no tensors", "Give the folder of a base model.")
    found = place(vector, tensors, config)
    compare = vector.identity is not None and vector.identity.quantization == "nf4" and onto == "original"

    def target(name: str, spec: TensorSpec) -> Target:
        rounded = nf4.quantises(name, spec)
        return Target(
            name=name,
            source=spec,
            dtype=(dtype or FLOATS[spec.dtype]) if spec.dtype in FLOATS else None,
            places=tuple(found.places.get(name, ())),
            turned=is_conv1d(name.removesuffix(".weight"), config.get("model_type")),
            onto_nf4=training_dtype if onto == "nf4" and rounded else None,
            to_nf4=to_nf4 and rounded,
            compare=training_dtype if compare and rounded else None,
        )

    files = {file: [target(*one) for one in _with_head(header, found)] for file, header in headers.items()}
    plan = FoldPlan(
        base=base,
        config=config,
        files=files,
        dtype=dtype,
        onto=onto,
        to_nf4=to_nf4,
        untied=found.untied is not None,
        tensors=sum(map(len, files.values())),
        size=0,
    )
    return replace(plan, size=sum(layout_size(plan.layout(file)) for file in files))


def fold(
    plan: FoldPlan,
    vector: PreferenceVector,
    target: str | Path,
    provenance: Provenance,
    *,
    accept_loss: bool = False,
    force: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> FoldFacts:
    """Write base + vector as a model that transformers loads, with the base's config, tokenizer and templates.

    Args:
        provenance: gets the section `fold` and the metric `delta_kept`, and is written as `prefvec.json` beside the
            model.
        accept_loss: write a 4-bit checkpoint even where rounding takes more than a fifth of the delta.
        advance: called after each tensor.

    Returns:
        What was done and what survived, as a whole and by module.

    Raises:
        InputError: the target exists or cannot be written, the disk is full, a weight overflows its type, or a 4-bit
            checkpoint would keep less than `LEAST_KEPT` of the delta.
    """
    check_output(target, force)
    with atomic_folder(target, force) as folder:
        facts = _write_weights(plan, vector, folder, advance)
        if plan.to_nf4 and facts.kept < LEAST_KEPT and not accept_loss:
            raise InputError(
                f"rounding to 4 bits would leave {facts.kept:.1%} of the delta, and less than {LEAST_KEPT:.0%} is no "
                "fold worth its name",
                "Fold in 16 bits, keep the adapter beside a 4-bit base, or write it anyway with --accept-loss.",
            )
        metrics = {**provenance.metrics, "delta_kept": facts.kept}
        if facts.distance is not None:
            metrics["base_distance"] = facts.distance
        _copy_rest(plan, folder)
        said = provenance.model_copy(update={"fold": facts, "metrics": metrics})
        (folder / PROVENANCE).write_text(said.to_json(), encoding="utf-8")
        _write_config(plan, folder)  # last: without it nothing loads the folder
    return facts


def _write_weights(plan: FoldPlan, vector: PreferenceVector, folder: Path, advance: Callable[[], None]) -> FoldFacts:
    found: list[Measured] = []
    buffers = Buffers()
    if any(target.whole or target.compare for targets in plan.files.values() for target in targets):
        nf4.prepare()
    with workers() as pool:
        jobs: list[list[Future[Measured]]] = []
        for name, targets in plan.files.items():
            file = folder / name
            offsets = write_header(file, plan.layout(name), {"format": "pt"})
            jobs += [
                [pool.submit(work, piece, vector, file, offsets, buffers) for piece in pieces(target)]
                for target in targets
            ]
        norms = {module: delta.norm() ** 2 for module, delta in vector.deltas.items()}
        for parts in jobs:
            found += [part.result() for part in parts]
            advance()
    return _facts(plan, norms, found)


def _facts(plan: FoldPlan, norms: dict[str, float], found: list[Measured]) -> FoldFacts:
    errors: dict[str, float] = defaultdict(float)
    distances: dict[str, float] = defaultdict(float)
    for one in found:
        if one.module:
            errors[one.module] += one.error
            distances[one.module] += one.distance
    # Modules that NF4 leaves alone have no distance.
    far = [module for module in norms if distances[module]]
    modules = {
        module: FoldedModule(
            kept=_kept(errors[module], norm),
            distance=math.sqrt(distances[module] / norm) if norm and distances[module] else None,
        )
        for module, norm in norms.items()
    }
    whole = sum(norms[module] for module in far)
    return FoldFacts(
        onto=plan.onto,
        dtype="nf4" if plan.to_nf4 else str(plan.dtype).removeprefix("torch.") if plan.dtype else "base",
        kept=_kept(sum(errors.values()), sum(norms.values())),
        distance=math.sqrt(sum(distances[module] for module in far) / whole) if whole else None,
        untied=plan.untied,
        modules=modules,
    )


def _kept(error: float, norm: float) -> float:
    return max(0.0, 1 - math.sqrt(error / norm)) if norm else 1.0


def _copy_rest(plan: FoldPlan, folder: Path) -> None:
    """Tokenizer, templates, generation config and licence; the index of the shards."""
    for path in sorted({path for pattern in (*_COPIED, *_LICENCES) for path in plan.base.glob(pattern)}):
        if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
            place = folder / path.relative_to(plan.base)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
    if plan.files.keys() != {"model.safetensors"}:
        weights = {tensor: file for file in plan.files for tensor in plan.layout(file)}
        index = {"metadata": {"total_size": plan.size}, "weight_map": dict(sorted(weights.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_config(plan: FoldPlan, folder: Path) -> None:
    """The base's `config.json`, byte for byte where nothing in it changes."""
    if not (plan.dtype or plan.untied or plan.to_nf4):
        shutil.copyfile(plan.base / "config.json", folder / "config.json")
        return
    config = dict(plan.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    text = config.get("text_config")
    for part in [config, text] if isinstance(text, dict) else [config]:
        if plan.dtype and (part is config or key in part):
            part[key] = str(plan.dtype).removeprefix("torch.")
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if plan.to_nf4:
        compute = next(one.dtype for targets in plan.files.values() for one in targets if one.dtype and one.places)
        config["quantization_config"] = nf4.config(compute)
    _write_json(folder / "config.json", config)


def _with_head(header: dict[str, TensorSpec], found: Placement) -> Iterator[tuple[str, TensorSpec]]:
    """The tensors of a file; behind an embedding that is no longer the head, a head of the same values."""
    for name, spec in header.items():
        yield name, spec
        if found.untied and found.untied[1] == name:
            yield found.untied[0], spec


def _stored_as(target: Target) -> str:
    return dtype_name(target.dtype) if target.dtype else target.source.dtype


def _in_order(header: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of a file in the order in which they lie there, so that it is read from front to back."""
    return dict(sorted(header.items(), key=lambda item: item[1].start))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
