"""Where the deltas of a vector lie in the tensors of a base's checkpoint, from names and shapes alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_prefvec.artifact.kinds import expert_of, experts_transposed, is_conv1d, is_embedding, is_head, leaf
from lora_prefvec.artifact.weights import FLOATS, TensorSpec
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector

_OTHERS = "Use vectors that were trained on this base."
# transformers 5 fuses, while loading, what these checkpoints store expert by expert.
_EXPERT_FOLDERS = ("mlp.experts", "block_sparse_moe.experts")
_FUSED_FROM = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Place:
    """A delta, or some of its rows, in a tensor that is seen as a matrix [size / columns, columns].

    Args:
        start: row of the tensor that gets the first row.
        rows: which rows of the delta.
        transposed: the tensor holds the delta's transpose.
    """

    module: str
    start: int
    rows: slice
    transposed: bool = False

    def factors(self, delta: LowRankDelta) -> tuple[Tensor, Tensor]:
        """What is added, as a product of [rows, r] and [r, columns], float32 on the CPU."""
        A, B = delta.A.float().cpu(), delta.B[self.rows].float().cpu()
        return (A.T.contiguous(), B.T.contiguous()) if self.transposed else (B, A)


@dataclass
class Placement:
    """Where a vector goes.

    Args:
        places: tensor -> what is added to it, in the order of its rows.
        untied: name of the head's tensor that must be made, and of the embedding it was one with; None where the base
            stores its head, or the vector changes neither.
    """

    places: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    untied: tuple[str, str] | None = None


def place(vector: PreferenceVector, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Placement:
    """Find the tensors that a vector changes.

    A delta on one side of a tied pair of embedding and head changes that side alone, as PEFT does it.

    Args:
        tensors: of the checkpoint.
        config: the base's `config.json`.

    Raises:
        InputError: the base lacks a module, or has it in another shape.
    """
    text = config.get("text_config")
    model_type = str((text if isinstance(text, dict) else config).get("model_type") or config.get("model_type"))
    found = Placement()
    tokens = next((name for name in tensors if is_embedding(_module(name)) and leaf(_module(name)) != "wpe"), None)
    stored = any(is_head(_module(name)) for name in tensors)
    for module, delta in vector.deltas.items():
        if tokens and not stored and (is_head(module) or _is(module, _module(tokens))):
            name = f"{module}.weight" if is_head(module) else tokens
            head = name if is_head(module) else "lm_head.weight"
            found.untied = (head, tokens)
            _check(module, delta, tensors[tokens].shape)
            found.places[name].append(Place(module, 0, slice(None)))
            continue
        for name, one in _find(module, delta, tensors, model_type):
            found.places[name].append(one)
    for places in found.places.values():
        places.sort(key=lambda one: one.start)
    return found


def _find(
    module: str, delta: LowRankDelta, tensors: Mapping[str, TensorSpec], model_type: str
) -> list[tuple[str, Place]]:
    """The tensors, each with its place, that hold a module."""
    expert = expert_of(module)
    if expert:
        return _find_expert(module, *expert, delta, tensors, experts_transposed(model_type))
    # Some checkpoints leave out the first part of the names that the model has, as GPT-2's does.
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in tensors and len(tensors[name].shape) == 2 and tensors[name].dtype in FLOATS:
            transposed = is_conv1d(module, model_type)
            _check(module, delta, tensors[name].shape[::-1] if transposed else tensors[name].shape)
            return [(name, Place(module, 0, slice(None), transposed))]
    raise InputError(f"the base has no linear layer {module}", _OTHERS)


def _find_expert(
    module: str, parameter: str, index: int, delta: LowRankDelta, tensors: Mapping[str, TensorSpec], transposed: bool
) -> list[tuple[str, Place]]:
    if parameter in tensors and len(tensors[parameter].shape) == 3 and tensors[parameter].dtype in FLOATS:
        experts, *shape = tensors[parameter].shape
        if index >= experts:
            raise InputError(
                f"the base has {experts} experts in {parameter}, and the vector an expert {index}", _OTHERS
            )
        _check(module, delta, tuple(shape[::-1] if transposed else shape))
        return [(parameter, Place(module, index * shape[0], slice(None), transposed))]
    stem, _, kind = parameter.rpartition(".")
    layer = next((stem.removesuffix(folder) for folder in _EXPERT_FOLDERS if stem.endswith(folder)), None)
    for folder in _EXPERT_FOLDERS if layer is not None else ():
        for parts in _FUSED_FROM[kind]:
            names = [f"{layer}{folder}.{index}.{part}.weight" for part in parts]
            if not all(name in tensors for name in names):
                continue
            shapes = [tensors[name].shape for name in names]
            _check(module, delta, (sum(shape[0] for shape in shapes), shapes[0][1]))
            ends = [sum(shape[0] for shape in shapes[: number + 1]) for number in range(len(shapes))]
            return [
                (name, Place(module, 0, slice(end - shape[0], end)))
                for name, shape, end in zip(names, shapes, ends, strict=True)
            ]
    raise InputError(f"the base has no experts {parameter} with a number {index}", _OTHERS)


def _check(module: str, delta: LowRankDelta, shape: tuple[int, ...]) -> None:
    if tuple(shape) != delta.shape:
        raise InputError(f"{module} is {list(shape)} in the base and {list(delta.shape)} in the vector", _OTHERS)


def _is(module: str, stored: str) -> bool:
    """Whether a module is the one that a checkpoint calls `stored`, maybe without the first part of its name."""
    return stored in (module, module.partition(".")[2])


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def matrix(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix, its last dimension kept; a vector is one row."""
    columns = spec.shape[-1] if spec.shape else 1
    return (math.prod(spec.shape) // columns if columns else 0), columns
