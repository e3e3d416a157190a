"""The merge in the span that vectors share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_prefvec.vector.delta import Cut, LowRankDelta
from lora_prefvec.vector.dense import Part, elect

CANCELLED = 1e-10  # of the entries' sizes: below it their sum is rounding in float64


def merge_in_span(parts: Sequence[Part], *, rank: int | None, energy: float | None, density: float) -> Cut:
    """The deltas of one module, merged inside bases that they share, so that the rank is exact by construction.

    The order of Compress-then-Merge (He et al. 2026, arXiv 2606.03723): compress to shared bases, then merge; the bases
    are singular vectors of the deltas side by side, as in KnOTS (Stoica et al. 2024, arXiv 2410.19735), on both sides:

        U = leading left singular vectors of [c_1 D_1, ..., c_k D_k]       V = the right ones of [c_1 D_1; ...; c_k D_k]
        M_i = U^T c_i D_i V                                                delta = U elect(top(M_1), ..., top(M_k)) V^T

    All of it happens in the span of the stacked factors: with A^T = Q_a R_a and B = Q_b R_b stacked, D_i is
    Q_b C_i Q_a^T with a core C_i no larger than the sum of ranks.

    Args:
        parts: the deltas.
        rank: number of directions in U and V; or
        energy: the part of sum |c_i D_i|^2 that must lie in U and V.
        density: the part of each M_i's entries, largest first, that is kept.

    Returns:
        The delta; of the norms, sum |c_i D_i|^2 and sum |M_i|^2, which is what lies in the shared bases.
    """
    dtype = torch.float64
    q_a, r_a = torch.linalg.qr(torch.cat([part.delta.A for part in parts]).to(dtype).T)
    q_b, r_b = torch.linalg.qr(torch.cat([part.delta.B for part in parts], dim=1).to(dtype))
    ranks = [part.delta.rank for part in parts]
    columns = zip(r_b.split(ranks, dim=1), r_a.split(ranks, dim=1), strict=True)
    cores = [part.coefficient * b @ a.T for part, (b, a) in zip(parts, columns, strict=True)]

    u = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False).U
    v = torch.linalg.svd(torch.cat(cores), full_matrices=False).Vh.T
    seen = torch.stack([u.T @ core @ v for core in cores])

    # held[k]: what the first k + 1 directions of both bases, or all of the shorter one, hold of the squared norm.
    sums = seen.square().sum(0).cumsum(0).cumsum(1)
    k = torch.arange(max(sums.shape), device=sums.device)
    held = sums[k.clamp(max=sums.shape[0] - 1), k.clamp(max=sums.shape[1] - 1)]
    norm2 = float(held[-1])
    count = rank if rank is not None else int((held < (energy or 1.0) * norm2).sum()) + 1
    count = min(count, len(held))

    inside = [_largest(core, density) for core in seen[:, :count, :count]]
    left, s, right = torch.linalg.svd(elect(inside, rounding=CANCELLED), full_matrices=False)
    solid = max(int((s > torch.finfo(dtype).eps * len(held) * s[0]).sum()), 1)
    root = s[:solid].sqrt()
    A = (right[:solid].T * root).T @ (q_a @ v[:, :count]).T
    B = q_b @ u[:, :count] @ (left[:, :solid] * root)
    out = max((part.delta.A.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return Cut(LowRankDelta(A.to(out).contiguous(), B.to(out).contiguous()), norm2, min(float(held[count - 1]), norm2))


def _largest(core: Tensor, density: float) -> Tensor:
    """The core with its `density` largest entries, rounded up, and zeros elsewhere."""
    sizes = core.abs()
    return core * (sizes >= sizes.flatten().topk(math.ceil(density * core.numel())).values[-1])
