"""RACO's algorithm against a dense search of the simplex, and its gradient against the sum that it should be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_prefvec.training.methods.raco import conflict_averse, solve


def h(p: Tensor, gradients: Tensor, w: Tensor, c: float) -> Tensor:
    """The function that p* minimises, for rows of p; from the gradients, since p H p rounds where they cancel."""
    wanted = w @ gradients
    return p @ (gradients @ wanted) + c * wanted.norm() * (p @ gradients).norm(dim=-1)


def simplex(m: int, steps: int) -> Tensor:
    """All points of the simplex whose entries are multiples of 1 / steps."""
    points = [one for one in itertools.product(range(steps + 1), repeat=m - 1) if sum(one) <= steps]
    return torch.tensor([[*one, steps - sum(one)] for one in points], dtype=torch.float64) / steps


GRIDS = {2: simplex(2, 20_000), 3: simplex(3, 300), 4: simplex(4, 60)}


@st.composite
def problems(draw: st.DrawFn, m: int) -> tuple[Tensor, Tensor, float]:
    """Gradients of m objectives of very different lengths, some of them nearly parallel or opposite."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(m, draw(st.sampled_from([2, 3, 50])), generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["any", "parallel", "opposite"]))
    if kind != "any":
        gradients[1] = gradients[0] * (1 if kind == "parallel" else -1)
        gradients[1] += draw(st.sampled_from([0, 1e-9, 1e-3])) * torch.randn(gradients[1].shape, generator=generator)
    gradients *= torch.tensor([[draw(st.sampled_from([0.2, 1.0, 5.0]))] for _ in range(m)])
    w = torch.rand(m, generator=generator, dtype=torch.float64) + 0.01
    return gradients, w / w.sum(), draw(st.sampled_from([0.1, 0.4, 0.8, 0.99]))


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_p_star_is_the_best_of_the_simplex(m: int, scale: float, data: st.DataObject) -> None:
    gradients, w, c = data.draw(problems(m))
    gradients = gradients * scale
    H = gradients @ gradients.T
    step = solve(H, w, c)
    assert step.p_star.sum() == pytest.approx(1)
    assert step.p_star.min() >= 0
    unit = gradients / H.trace().sqrt()
    ours = float(h(step.p_star, unit, w, c))
    assert ours <= float(h(GRIDS[m], unit, w, c).min()) + 1e-9


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3])
def test_a_root_inside_is_found_at_every_scale(scale: float) -> None:
    gradients = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64) * scale
    step = solve(gradients @ gradients.T, torch.tensor([0.2, 0.8]), 0.5)
    assert step.p_star[0].item() == pytest.approx(0.3561, abs=1e-4)


def test_the_symmetric_double_root_is_found() -> None:
    gradients = torch.tensor([[1.0, 0.3], [-0.4, 1.0]], dtype=torch.float64)
    gradients /= gradients.norm(dim=1, keepdim=True)
    step = solve(gradients @ gradients.T, torch.tensor([0.5, 0.5]), 0.4)
    assert step.p_star.tolist() == pytest.approx([0.5, 0.5])


def test_the_correction_has_length_c_and_the_clip_turns_it_towards_the_weights() -> None:
    gradients = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64)
    H, w, c = gradients @ gradients.T, torch.tensor([0.2, 0.8], dtype=torch.float64), 0.5
    g0 = w @ gradients
    corrections = []
    for clip in (False, True):
        step = solve(H, w, c, clip=clip)
        corrections.append(step.coefficients @ gradients - g0)
        assert corrections[-1].norm() == pytest.approx(c * g0.norm())
    assert torch.all(step.p_clipped <= w + 1e-12)
    assert step.p_clipped.sum() < 1  # not renormalised
    cosines = [torch.cosine_similarity(one, g0, dim=0) for one in corrections]
    assert cosines[1] > cosines[0] + 0.01


def test_without_a_radius_or_a_gradient_it_is_the_weighted_sum() -> None:
    w = torch.tensor([0.3, 0.7], dtype=torch.float64)
    H = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    assert torch.equal(solve(H, w, 0.0).coefficients, w)
    assert torch.equal(solve(torch.zeros(2, 2), w, 0.4).coefficients, w)


def test_exactly_opposite_gradients() -> None:
    """At the start every pair with two opposite signs has them."""
    H = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    step = solve(H, torch.tensor([0.8, 0.2]), 0.4)
    assert step.p_star.tolist() == [0.0, 1.0]
    assert all(map(math.isfinite, step.coefficients))
    even = solve(H, torch.tensor([0.5, 0.5]), 0.4)  # g0 is 0
    assert even.coefficients.tolist() == [0.5, 0.5]


def test_any_number_of_objectives() -> None:
    gradients = torch.randn(7, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H, w = gradients @ gradients.T, torch.full((7,), 1 / 7, dtype=torch.float64)
    p = conflict_averse(H / H.trace(), w, 0.4)
    nearby = p + 1e-4 * torch.randn(2000, 7, dtype=torch.float64).clamp(min=-p / 1e-4)
    nearby = nearby / nearby.sum(-1, keepdim=True)
    unit = gradients / H.trace().sqrt()
    assert h(p, unit, w, 0.4) <= h(nearby, unit, w, 0.4).min() + 1e-12
