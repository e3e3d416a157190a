"""Means with their intervals, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
BLOCK = 1_000_000  # drawn indices held at once
NORMAL = 1.96  # standard errors from the mean to either end of its 95 % interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """The mean of one axis over the replies on which it has a say.

    Args:
        mean: None where it has no say at all.
        low, high: ends of the 95 % interval; None below two prompts.
        error: standard error of the mean; None below two prompts.
        n: replies that count.
    """

    mean: float | None
    low: float | None
    high: float | None
    error: float | None
    n: int


def estimate(values: Sequence[float | None], n: int = 1, seed: int = 0) -> Score:
    """The mean of `values`, with the interval that a bootstrap over the prompts gives.

    Prompts are drawn with replacement, each with all its replies: several replies to one prompt are no independent
    evidence. The interval ends at the 2.5th and 97.5th percentile of the means (Efron and Tibshirani 1993, ch. 13).

    Args:
        values: `n` in a row for each prompt; None does not count.
        seed: of the bootstrap; the same values give the same interval.
    """
    table = np.array([math.nan if value is None else value for value in values], dtype=np.float64).reshape(-1, n)
    table = table[~np.isnan(table).all(axis=1)]
    counts, sums = (~np.isnan(table)).sum(axis=1), np.nansum(table, axis=1)
    size = int(counts.sum())
    if not size:
        return Score(None, None, None, None, 0)
    mean, prompts = float(sums.sum() / size), len(table)
    if prompts < 2:
        return Score(mean, None, None, None, size)
    low, high = np.percentile(_bootstrap(sums, counts, seed), [2.5, 97.5])
    residuals = sums - mean * counts
    error = math.sqrt(float(residuals @ residuals) * prompts / (prompts - 1)) / size
    return Score(mean, float(low), float(high), error, size)


def from_error(mean: float, error: float | None, n: int) -> Score:
    """A mean whose standard error is known, with the interval that the normal distribution gives."""
    if error is None or not math.isfinite(error):
        return Score(mean, None, None, None, n)
    return Score(mean, mean - NORMAL * error, mean + NORMAL * error, error, n)


def from_share(share: float, error: float, n: int) -> Score:
    """A share of `n` cases, with Wilson's interval (1927), which has a width where the share is 0 or 1 too."""
    odds = NORMAL**2 / n
    middle = (share + odds / 2) / (1 + odds)
    half = NORMAL * math.sqrt(share * (1 - share) / n + odds / (4 * n)) / (1 + odds)
    return Score(share, middle - half, middle + half, error, n)


def _bootstrap(sums: Floats, counts: NDArray[np.int64], seed: int) -> Floats:
    """The mean in each of `RESAMPLES` samples of the prompts."""
    rng, prompts = np.random.default_rng(seed), len(sums)
    block = max(1, BLOCK // prompts)
    means = []
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(prompts, size=(min(block, RESAMPLES - start), prompts))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0.0 where one side is constant."""
    ranks = [_ranks(xs), _ranks(ys)]
    means = [fmean(part) for part in ranks]
    x, y = ([rank - mean for rank in part] for part, mean in zip(ranks, means, strict=True))
    norm = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
