"""The rules of `sum_rules.py` and the comparison of `sums.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_prefvec.evaluation import Point
from lora_prefvec.vector import LowRankDelta, PreferenceVector
from tests.bench.sum_rules import freed, gated, shared, weighted, with_own
from tests.bench.sums import kept, volume

NAMES = ("layers.0.q_proj", "layers.1.q_proj")


def vector(seed: int, rank: int = 2) -> PreferenceVector:
    dice = torch.Generator().manual_seed(seed)
    return PreferenceVector(
        {
            name: LowRankDelta(torch.randn(rank, 12, generator=dice), torch.randn(10, rank, generator=dice))
            for name in NAMES
        }
    )


def same(one: PreferenceVector, other: PreferenceVector) -> None:
    for name in NAMES:
        torch.testing.assert_close(one.deltas[name].dense(), other.deltas[name].dense(), atol=1e-5, rtol=1e-4)


def test_two_are_freed_by_projecting_out() -> None:
    one, other = vector(0), vector(1)
    wanted = one.project_out(other, per_module=True) + other.project_out(one, per_module=True)
    same(weighted([one, other], freed([one, other])), wanted)


def test_of_three_each_is_freed_of_the_span_of_two() -> None:
    three = [vector(seed) for seed in range(3)]
    found = weighted(three, freed(three))
    for name in NAMES:
        flat = torch.stack([one.deltas[name].dense().flatten() for one in three])
        total = torch.zeros_like(flat[0])
        for i in range(3):
            rest = flat[[j for j in range(3) if j != i]]
            total += flat[i] - rest.T @ torch.linalg.lstsq(rest.T, flat[i][:, None]).solution[:, 0]
        torch.testing.assert_close(found.deltas[name].dense().flatten(), total, atol=1e-4, rtol=1e-3)


def test_what_two_share_counts_once_or_not_at_all() -> None:
    one = vector(0)
    same(shared([one, one], keep=True), one)
    assert shared([one, one], keep=False).norm() == pytest.approx(0.0, abs=1e-4)


def test_vectors_at_right_angles_share_nothing() -> None:
    eye = torch.eye(12)
    one, other = (
        PreferenceVector({name: LowRankDelta(eye[rows], eye[:10, rows]) for name in NAMES})
        for rows in (slice(0, 2), slice(2, 4))
    )
    same(shared([one, other], keep=True), one + other)
    same(shared([one, other], keep=False), one + other)


def test_gates_add_the_weighted_sum_and_pass_gradients() -> None:
    layers = [torch.nn.Linear(12, 10) for _ in NAMES]
    holders = [torch.nn.ModuleDict({"q_proj": layer}) for layer in layers]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(holders)})
    vectors, x = [vector(0), vector(1)], torch.randn(3, 12)
    gates = torch.tensor([[1.0, -0.5], [0.0, 2.0]], requires_grad=True)
    bare = layers[0](x)
    with gated(model, vectors, gates):
        added = layers[0](x) - bare
    total = weighted(vectors, dict(zip(NAMES, gates.tolist(), strict=True)))
    torch.testing.assert_close(added, x @ total.deltas[NAMES[0]].dense().T, atol=1e-5, rtol=1e-4)
    added.sum().backward()
    assert gates.grad is not None
    assert gates.grad[0].abs().min() > 0
    assert gates.grad[1].abs().max() == 0
    assert torch.equal(layers[0](x), bare)


def test_own_is_the_mean_of_the_axes() -> None:
    values: dict[str, list[float | None]] = {"a": [1.0, 0.0, None, None], "b": [None, None, None, 1.0]}
    point = with_own(Point({}, [], {}, values), ["a", "b"])
    assert point.scores["own"].mean == pytest.approx(0.75)


def test_kept_share_and_volume() -> None:
    assert kept(np.array([0.1, 0.1]), np.array([0.2, 0.0]))[0] == pytest.approx(0.5)
    assert np.isnan(kept(np.array([0.1, 0.1]), np.array([0.2, 0.0]))[1])
    own = np.array([[0.5, 0.7], [0.5, 0.8]])[:, :, None]  # two axes, the base and one more place
    assert volume(own)[0] == pytest.approx(0.06)
