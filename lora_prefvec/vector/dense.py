"""The merges that look at single entries of the dense deltas: one module at a time, and a few rows of it at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_prefvec.vector.delta import Cut, LowRankDelta
from lora_prefvec.vector.lowrank import fit

DenseMethod = Literal["ties", "dare_linear", "dare_ties", "magnitude"]
BLOCK = 2**18  # entries of a dense delta in work at a time: a few of them stay in a core's cache


class Part(NamedTuple):
    """A delta of one module: its place among the terms of a mix, and its coefficient."""

    place: int
    coefficient: float
    delta: LowRankDelta


def merge_dense(
    parts: Sequence[Part],
    method: DenseMethod,
    module: str,
    *,
    rank: int | None,
    energy: float | None,
    density: float,
    seed: int,
) -> Cut:
    """The merged delta of one module, cut to a rank or an energy. Beside it only its rows in work are dense.

    - `ties`: sparsify each delta to its largest entries, then `elect`.
    - `magnitude`: the same entries, then their sum.
    - `dare_ties`, `dare_linear`: drop entries at random, then `elect` or sum.
    """
    whole = merged(parts, method, module, density=density, seed=seed)
    return fit(whole, rank=rank, energy=energy, seed=_seed(seed, module, -1))


def merged(parts: Sequence[Part], method: DenseMethod, module: str, *, density: float, seed: int) -> Tensor:
    """The merged delta of one module before any cut, [out, in]."""
    sparsify = [_sparsifier(part, method, module, density, seed) for part in parts]
    first = parts[0].delta
    dtype = max((part.delta.A.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    whole = torch.empty(first.shape, dtype=dtype, device=first.A.device)
    for rows in _blocks(first.shape):
        pieces = [
            keep(part.delta.B[rows] @ part.delta.A).mul_(part.coefficient).to(dtype)
            for part, keep in zip(parts, sparsify, strict=True)
        ]
        if method in ("ties", "dare_ties"):
            whole[rows] = elect(pieces)
        else:
            whole[rows] = pieces[0]
            for piece in pieces[1:]:
                whole[rows] += piece
    return whole


def elect(pieces: Sequence[Tensor], rounding: float = 0.0) -> Tensor:
    """TIES' election and disjoint mean (Yadav et al. 2023, arXiv 2306.01708, section 3), entry by entry.

    gamma = sign(sum x_i); the result is the mean of those x_i that have the sign gamma, 0 where there is none.

    Args:
        rounding: part of sum |x_i| below which sum x_i counts as 0, for pieces that went through arithmetic and cancel
            only up to its rounding.
    """
    total = pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    if rounding:
        total *= total.abs() > rounding * sum((piece.abs() for piece in pieces[1:]), pieces[0].abs())
    sign = total.sign_()
    merged, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for piece in pieces:
        agrees = piece * sign > 0
        merged += piece * agrees
        count += agrees
    return merged.div_(count.clamp_(min=1))


def threshold(delta: LowRankDelta, density: float) -> float:
    """The size of the smallest entry among the `density` largest of a dense delta, without holding more than a block.

    Of n entries, ceil(density n) are at least as large; more where several are equal. A radix selection: non-negative
    floats are ordered as their bits are, so counting the upper 16 bits finds the range of the wanted entry, and the
    next 16 the place in it.
    """
    wide = delta.A.dtype == torch.float64
    integer, shifts = (torch.int64, (48, 32, 16, 0)) if wide else (torch.int32, (16, 0))
    left, prefix = math.ceil(density * delta.shape[0] * delta.shape[1]), 0
    for shift in shifts:
        counts = torch.zeros(2**16, dtype=torch.int64, device=delta.A.device)
        for rows in _blocks(delta.shape):
            bits = (delta.B[rows] @ delta.A).abs_().view(integer)
            if shift != shifts[0]:
                bits = bits[(bits >> (shift + 16)) == prefix]
            counts += torch.bincount(((bits >> shift) & 0xFFFF).flatten(), minlength=2**16)
        larger = counts.flip(0).cumsum(0)  # larger[k]: how many lie in the k + 1 topmost bins
        k = int((larger < left).sum())
        left -= int(larger[k - 1]) if k else 0
        prefix = (prefix << 16) | (2**16 - 1 - k)
    bits = torch.tensor([prefix], dtype=torch.int64).to(integer)
    return float(bits.view(delta.A.dtype))


def _sparsifier(part: Part, method: DenseMethod, module: str, density: float, seed: int) -> Callable[[Tensor], Tensor]:
    """What to do with the rows of a dense delta, block by block from the top, before they are merged."""
    if density == 1:
        return lambda rows: rows
    if method in ("ties", "magnitude"):
        smallest = threshold(part.delta, density)
        return lambda rows: rows.mul_(rows.abs() >= smallest)
    # Drawn on the CPU, so that a seed means the same mask on every device.
    generator = torch.Generator().manual_seed(_seed(seed, module, part.place))

    def drop(rows: Tensor) -> Tensor:
        mask = torch.rand(rows.shape, generator=generator) < density
        return rows.mul_(mask.to(rows.device)).div_(density)

    return drop


def _blocks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _seed(seed: int, module: str, place: int) -> int:
    digest = hashlib.sha256(f"{seed}/{place}/{module}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
