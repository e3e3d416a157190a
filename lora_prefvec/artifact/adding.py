"""Adding deltas to the tensors of a file: in pieces that stay in the processor's cache, by several threads.

A piece is read into a buffer of its thread, widened, added to, rounded and measured block by block, and written from
there. So memory holds a few MB per thread whatever the model's size, and nothing passes through main memory twice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_prefvec.artifact import nf4
from lora_prefvec.artifact.placing import Place, matrix
from lora_prefvec.artifact.weights import (
    FLOATS,
    TensorSpec,
    copy_bytes,
    dtype_name,
    load_tensor,
    read_bytes,
    write_bytes,
)
from lora_prefvec.errors import InputError
from lora_prefvec.vector import PreferenceVector

CHUNK = 1 << 20  # elements that are read and written at once
BLOCK = 1 << 17  # elements that are computed at once: in float32 they fit a core's cache
_COPY = 1 << 26  # bytes that are copied at once, so that several threads share a large tensor
_SAMPLE = 1 << 13  # elements of a chunk from which its distance to NF4 is estimated
_NF4 = threading.Lock()  # whole matrices in float32: one at a time


@dataclass(frozen=True)
class Target:
    """A tensor of the new model.

    Args:
        source: the tensor of the base that it comes from.
        dtype: its floating-point type; None for other types, which are copied.
        places: the deltas that it gets, in the order of its rows.
        turned: whether it holds the transpose of what NF4 rounds (GPT-2's Conv1D).
        onto_nf4: type in which the base's weight is rounded to NF4 before the delta is added; None where it is not.
        to_nf4: whether the sum is rounded to NF4.
        compare: type in which the base's weight was rounded to NF4 for training, to measure how far away that is; None
            where it was not, or nobody asks.
    """

    name: str
    source: TensorSpec
    dtype: torch.dtype | None
    places: tuple[Place, ...] = ()
    turned: bool = False
    onto_nf4: torch.dtype | None = None
    to_nf4: bool = False
    compare: torch.dtype | None = None

    @property
    def whole(self) -> bool:
        """Whether it must be rounded as a whole."""
        return self.onto_nf4 is not None or self.to_nf4

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of the source."""
        same = self.dtype is None or dtype_name(self.dtype) == self.source.dtype
        return same and not self.places and not self.whole


@dataclass(frozen=True)
class Piece:
    """Rows of a target's matrix that one thread works on; `place` is None where they get no delta."""

    target: Target
    first: int
    rows: int
    place: Place | None


@dataclass(frozen=True)
class Measured:
    """Squared norms: of what rounding took from a module's delta, and of what NF4 changes in the base's weight."""

    module: str | None = None
    error: float = 0.0
    distance: float = 0.0


class Buffers(threading.local):
    """Memory of a thread, touched once: fresh memory, and fresh views of it, would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._blocks: dict[tuple[str, int, int, torch.dtype], list[Tensor]] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix with whatever it held before."""
        size = rows * columns * dtype.itemsize
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=torch.uint8)
            self._blocks = {key: views for key, views in self._blocks.items() if key[0] != name}
        return self._held[name][:size].view(dtype).view(rows, columns)

    def blocks(self, name: str, like: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """A matrix of the shape of `like`, as views of so many rows that they stay in the cache."""
        rows, columns = like.shape
        key = (name, rows, columns, dtype)
        matrix = self.take(*key)
        if key not in self._blocks:
            step = rows_of_block(columns)
            self._blocks[key] = [matrix[first : first + step] for first in range(0, rows, step)]
        return self._blocks[key]


def rows_of_block(columns: int) -> int:
    """How many rows are computed at once."""
    return max(1, BLOCK // columns)


def pieces(target: Target) -> Iterator[Piece]:
    """All of a target, cut at the borders of its deltas and into chunks."""
    rows, columns = matrix(target.source)
    step = max(1, CHUNK // max(columns, 1))
    if target.whole:
        step = max(rows, 1)
    elif target.copied:
        step = max(1, _COPY * rows // max(target.source.size, 1))
    begin = 0
    for place in (*target.places, None):
        start = place.start if place else rows
        yield from (Piece(target, first, min(step, start - first), None) for first in range(begin, start, step))
        begin = start + (target.source.shape[-2] if place else 0)
        yield from (Piece(target, first, min(step, begin - first), place) for first in range(start, begin, step))


def work(piece: Piece, vector: PreferenceVector, file: Path, offsets: dict[str, int], buffers: Buffers) -> Measured:
    """Make a piece of the new file.

    Args:
        offsets: where in the file the tensors belong.

    Raises:
        InputError: a weight overflows its type, or the base is cut off.
    """
    target, source = piece.target, piece.target.source
    if target.whole:
        with _NF4:
            return _work_nf4(piece, vector, file, offsets)
    rows, columns = matrix(source)
    if target.copied or target.dtype is None:
        width = source.size // rows
        start = piece.first * width
        copy_bytes(source.file, source.start + start, piece.rows * width, file, offsets[target.name] + start)
        return Measured()
    dtype = FLOATS[source.dtype]
    before = buffers.take("before", piece.rows, columns, dtype)
    read_bytes(source.file, source.start + piece.first * columns * dtype.itemsize, _memory(before))
    in_place = dtype == target.dtype != torch.float32
    after = before if in_place else buffers.take("after", piece.rows, columns, target.dtype)
    found = Measured()
    if piece.place:
        left, right = piece.place.factors(vector.deltas[piece.place.module])
        left = left[piece.first - piece.place.start :]
        distance = _sampled_distance(before.T if target.turned else before, target.compare) if target.compare else 0.0
        blocks = buffers.blocks("before", before, dtype)
        if in_place:
            error = _add_in_place(blocks, left, right, buffers)
        else:
            error = _add(blocks, left, right, buffers.blocks("after", after, target.dtype), buffers)
        found = Measured(piece.place.module, error, distance)
    else:
        after.copy_(before)
        if not bool(torch.isfinite(after).all()) and bool(torch.isfinite(before).all()):
            raise _overflow(target)
    if not math.isfinite(found.error):
        raise _overflow(target)
    write_bytes(file, offsets[target.name] + piece.first * columns * target.dtype.itemsize, _memory(after))
    return found


def _add_in_place(weights: list[Tensor], left: Tensor, right: Tensor, buffers: Buffers) -> float:
    """weights += left @ right, rounded to their 16 bits; returns the squared norm of what rounding took.

    The float32 sum counts as exact: beside 16 bits its own rounding is nothing.
    """
    error = 0.0
    first = 0
    for weight in weights:
        (total,) = buffers.blocks("total", weight, torch.float32)
        total.copy_(weight).addmm_(left[first : first + len(weight)], right)
        weight.copy_(total)
        flat = total.sub_(weight).view(-1)
        error += float(torch.dot(flat, flat))
        first += len(weight)
    return error


def _add(before: list[Tensor], left: Tensor, right: Tensor, after: list[Tensor], buffers: Buffers) -> float:
    """after = before + left @ right, rounded; returns the squared norm of (after - before - left @ right).

    `before` counts as rounded to the type of `after`, so that the error is what the delta lost and not what a cast of
    the base takes anyway.
    """
    error = 0.0
    first = 0
    for weight, result in zip(before, after, strict=True):
        (total,) = buffers.blocks("total", weight, torch.float32)
        (delta,) = buffers.blocks("delta", weight, torch.float32)
        torch.mm(left[first : first + len(weight)], right, out=delta)
        result.copy_(total.copy_(weight).add_(delta))
        flat = total.copy_(result).sub_(weight.to(result.dtype)).sub_(delta).view(-1)
        error += float(torch.dot(flat, flat))
        first += len(weight)
    return error


def _work_nf4(piece: Piece, vector: PreferenceVector, file: Path, offsets: dict[str, int]) -> Measured:
    """The same for a matrix that is rounded to NF4 as a whole, before the delta is added or after."""
    target, place = piece.target, piece.place
    assert target.dtype is not None
    original = load_tensor(target.source)
    original = original.T.contiguous() if target.turned else original
    weight = original
    if target.onto_nf4 and (place or not target.to_nf4):  # rounding twice what no delta changed would move it
        weight = nf4.round_trip(original.to(target.onto_nf4))
    delta = vector.deltas[place.module].dense().float().cpu() if place else None
    total = (weight if delta is None else weight.float() + delta).to(target.dtype)
    result, rounded = total, weight.to(target.dtype)
    if target.to_nf4:
        packed, state = nf4.quantise(total)
        for name, part in nf4.parts(target.name, packed, state).items():
            write_bytes(file, offsets[name], _memory(part))
        if delta is not None:
            result, rounded = nf4.dequantise(packed, state), nf4.round_trip(rounded)
    else:
        write_bytes(file, offsets[target.name], _memory(total.T if target.turned else total))
    if place is None or delta is None:
        return Measured()
    error = float((result.float() - rounded.float() - delta).norm()) ** 2
    if not math.isfinite(error):
        raise _overflow(target)
    distance = 0.0
    if target.onto_nf4:
        distance = float((weight.float() - original.float()).norm()) ** 2
    elif target.compare:
        distance = _sampled_distance(original, target.compare)
    return Measured(place.module, error, distance)


def _sampled_distance(weight: Tensor, dtype: torch.dtype) -> float:
    """Squared norm of what NF4 changes in a weight, estimated from some of its rows: rounding to NF4 takes long."""
    some = weight[:: max(1, weight.numel() // _SAMPLE)].to(dtype)
    change = float((nf4.round_trip(some).float() - some.float()).norm())
    return change**2 * len(weight) / len(some)


def _overflow(target: Target) -> InputError:
    assert target.dtype is not None
    return InputError(f"{target.name} overflows {dtype_name(target.dtype)}", "Fold with --dtype bfloat16 or float32.")


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, those of a contiguous one in place."""
    memory: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return memory
