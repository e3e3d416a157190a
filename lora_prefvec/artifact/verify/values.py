"""Checks of the numbers in a PEFT folder: each returns what is wrong as a phrase, or None."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lora_prefvec.artifact.folder import read_adapter
from lora_prefvec.artifact.verify.subject import Folder
from lora_prefvec.artifact.verify.tensors import VLLM_LIMITS
from lora_prefvec.artifact.weights import FLOATS, load_tensor
from lora_prefvec.artifact.writing import cast_error
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta

_FLOAT16_MAX = 65504.0
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_LOST = 0.01  # a cast of balanced factors to bfloat16 changes a delta by 0.2 to 0.4 %


def finite(folder: Folder) -> str | None:
    for name, (is_finite, largest) in folder.extremes.items():
        if not is_finite:
            return f"{name} holds NaN or infinity"
        if largest > _FLOAT16_MAX:
            return f"{name} holds {largest:.3g}, which float16 cannot"
    return None


def not_zero(folder: Folder) -> str | None:
    # Where either factor of every module is zero, the delta is.
    by_module: dict[str, list[float]] = {}
    for name, (_, largest) in folder.extremes.items():
        by_module.setdefault(name.rpartition(".")[0], []).append(largest)
    zero = by_module and all(min(sizes) == 0 for sizes in by_module.values())
    return "it changes nothing" if zero else None


def exact_scale(folder: Folder) -> str | None:
    settings = folder.settings
    for module in folder.pairs if settings and settings.lora_alpha else ():
        scale = abs(settings.scale(module)) if settings else 0.0
        if scale and math.frexp(scale)[0] != 0.5:
            return f"{scale:.4g} is no power of two, so vLLM rounds B twice"
    return None


def survives_half(folder: Folder) -> str | None:
    """What the cast of float32 factors to the type of the base changes; to either half type where that is unknown."""
    if not all(is_finite for is_finite, _ in folder.extremes.values()):
        return None
    named = folder.base.dtype if folder.base else ""
    dtypes = [_HALVES[named]] if named in _HALVES else [] if named else list(_HALVES.values())
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        try:
            lost = cast_error(_deltas(folder), dtype)
        except InputError:
            return f"the cast to {name} overflows"
        if lost > _MOST_LOST:
            return f"the cast to {name} changes the delta by {lost:.1%}"
    return None


def _deltas(folder: Folder) -> Iterator[tuple[str, LowRankDelta]]:
    """The complete pairs of numbers that we read, one in memory at a time."""
    for module, parts in folder.pairs.items():
        specs = [parts[part].spec for part in "AB" if part in parts and parts[part].spec.dtype in FLOATS]
        if len(specs) == 2 and parts["A"].rank == parts["B"].rank and parts["A"].rank:
            yield module, LowRankDelta(load_tensor(specs[0]), load_tensor(specs[1]))


def truncation(folder: Folder) -> str:
    """The command that brings the rank under the limit, and the part of the squared norm that is left."""
    limit = folder.max_rank or VLLM_LIMITS[-1]
    if limit < 8:
        return "8 is the least that every engine takes: give the engine that limit"
    rank = 8 if limit < 16 else limit // 16 * 16  # what `write_adapter` makes of a rank is this one again
    command = f"prefvec compose {{ref}} --rank {rank} --out DIR"
    try:
        kept = read_adapter(folder.path).vector.energy(rank)
    except InputError:
        return command
    # rounded down, so that it never says 100 where something is lost
    return f"{command} keeps {math.floor(kept * 1e4 + 1e-6) / 100:.2f}% of the energy"
