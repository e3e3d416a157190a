"""Filters and gradients, against masks and interpolation on the dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_prefvec.errors import InputError
from lora_prefvec.vector import (
    Filter,
    LowRankDelta,
    Mix,
    MixEntry,
    PreferenceVector,
    coefficient_at,
    graded,
    parse_layers,
    written_layers,
)

LAYERS = 5
LEAVES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]
NAMES = ["model.embed_tokens", *(f"model.layers.{i}.{leaf}" for i in range(LAYERS) for leaf in LEAVES), "lm_head"]


def vector(names: list[str] | None = None, seed: int = 0) -> PreferenceVector:
    generator = torch.Generator().manual_seed(seed)
    return PreferenceVector(
        {
            name: LowRankDelta(torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator))
            for name in names or NAMES
        }
    )


def layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


@given(st.integers(0, LAYERS - 1), st.integers(0, LAYERS - 1), st.sampled_from(["", "mlp", "attention", "q_proj"]))
def test_a_filter_is_a_mask_on_the_dense_delta(one: int, other: int, word: str) -> None:
    first, last = sorted((one, other))
    fits = {"mlp": "up_proj", "attention": "self_attn", "q_proj": "q_proj", "": ""}[word]
    kept = vector().filtered(Filter(layers=(first, last), modules=(word,) if word else ()))
    for name, delta in vector().deltas.items():
        at = layer(name)
        mask = at is not None and first <= at <= last and fits in name
        got = kept.deltas[name].dense() if name in kept.deltas else torch.zeros(3, 4)
        assert torch.equal(got, delta.dense() * mask)


def test_words_fit_types_parts_of_names_and_groups() -> None:
    assert Filter(modules=("lm_head", "embed_tokens")).select(NAMES) == ["model.embed_tokens", "lm_head"]
    assert Filter(modules=("mlp", "q_proj")).select(NAMES[:4]) == [NAMES[1], NAMES[3]]
    assert Filter().select(NAMES) == NAMES
    for attention in (
        "transformer.h.0.attn.c_attn",
        "model.layers.0.self_attn.q_proj",
        "layer.0.attention.query",
    ):
        assert Filter(modules=("attention",)).keeps(attention)
        assert not Filter(modules=("mlp",)).keeps(attention)
    for mlp in ("transformer.h.0.mlp.c_fc", "model.layers.0.mlp.experts.gate_up_proj.3", "decoder.layers.0.fc1"):
        assert Filter(modules=("mlp",)).keeps(mlp)
        assert not Filter(modules=("attention",)).keeps(mlp)
    assert not Filter(modules=("proj",)).keeps("model.layers.0.mlp.up_proj")  # whole words only


def test_what_a_filter_would_drop_in_silence_is_refused() -> None:
    with pytest.raises(InputError, match=r"modules=q_prj fits no module of the vector\. Did you mean 'q_proj'\?"):
        vector().filtered(Filter(modules=("mlp", "q_prj")))
    with pytest.raises(InputError, match=r"layers=7-9 leaves nothing of the vector\. Its layers are 0 to 4\."):
        vector().filtered(Filter(layers=(7, 9)))
    with pytest.raises(InputError, match=r"leaves nothing of the vector\. It has no layers\."):
        vector(["lm_head"]).filtered(Filter(layers=(0, 9)))
    with pytest.raises(InputError, match="leaves nothing"):
        vector().filtered(Filter(layers=(0, 1), modules=("lm_head",)))
    assert vector().filtered(Filter(layers=(4, 99))).deltas.keys() == {name for name in NAMES if layer(name) == 4}
    assert PreferenceVector({}).filtered(Filter(modules=("mlp",))).deltas == {}


@pytest.mark.parametrize(("written", "layers"), [("8-20", (8, 20)), ("8", (8, 8)), (3, (3, 3)), (" 0 - 2 ", (0, 2))])
def test_layers_are_inclusive(written: str | int, layers: tuple[int, int]) -> None:
    assert parse_layers(written) == layers
    assert parse_layers(written_layers(layers)) == layers


@pytest.mark.parametrize("written", ["", "a", "1-", "-1", "1-2-3", "1.5", "20-8", "1,2", "1e3", "²", "9" * 5000])
def test_layers_that_are_no_range(written: str) -> None:
    with pytest.raises(InputError, match="is no range") as caught:
        parse_layers(written)
    assert "layers=8" in str(caught.value)


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=7))
def test_a_gradient_is_linear_over_the_layers(gradient: list[float]) -> None:
    got = graded(vector(), gradient)
    for name, delta in vector().deltas.items():
        place = {"model.embed_tokens": 0.0, "lm_head": 1.0}.get(name, (layer(name) or 0) / (LAYERS - 1))
        position = place * (len(gradient) - 1)
        # Hat functions around the equally spaced values.
        expected = sum(value * max(0.0, 1 - abs(position - i)) for i, value in enumerate(gradient))
        dense = got.deltas[name].dense() if name in got.deltas else torch.zeros(3, 4)
        torch.testing.assert_close(dense, delta.dense() * expected, rtol=1e-5, atol=1e-5)


def test_gradients_at_the_edges() -> None:
    rising = [0, 0.5, 1]
    assert [coefficient_at(rising, f"layers.{i}.q_proj", 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert coefficient_at(rising, "transformer.wte", 5) == 0
    assert coefficient_at(rising, "embed_out", 5) == 1
    assert coefficient_at(rising, "layers.0.q_proj", 1) == 0
    assert coefficient_at(rising, "layers.9.q_proj", 5) == 1  # deeper than the gradient spans
    assert "model.embed_tokens" not in graded(vector(), rising).deltas
    halfway = graded(vector(), [0, 1], layers=9).deltas[NAMES[-2]]
    torch.testing.assert_close(halfway.dense(), vector().deltas[NAMES[-2]].dense() / 2)
    with pytest.raises(InputError, match="an empty gradient"):
        graded(vector(), [])
    with pytest.raises(InputError, match="a coefficient of nan"):
        graded(vector(), [0.0, float("nan")])


def test_a_mix_applies_filters_and_gradients_of_the_whole_depth() -> None:
    deep, part = vector(seed=1), Filter(layers=(0, 1), modules=("mlp",))
    mix = Mix([MixEntry("a", vector(), 2.0, part), MixEntry("b", deep, (0.0, 1.0), part), MixEntry("c", deep, -0.5)])
    total = mix.compose()
    for name in NAMES:
        at, inside = layer(name), layer(name) in (0, 1) and "mlp" in name
        expected = -0.5 * deep.deltas[name].dense()
        if inside and at is not None:
            # The gradient ends at the last layer of the whole vectors, not of the part.
            expected = expected + 2 * vector().deltas[name].dense() + at / (LAYERS - 1) * deep.deltas[name].dense()
        torch.testing.assert_close(total.deltas[name].dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [{"layers": (3, 2)}, {"layers": (-1, 2)}, {"modules": ("",)}, {"modules": (" a",)}])
def test_filters_that_are_none(bad: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(InputError):
        Filter(**bad)


def test_a_filter_is_written_as_it_is_read() -> None:
    assert str(Filter(layers=(8, 20), modules=("mlp", "q_proj"))) == "layers=8-20,modules=mlp+q_proj"
    assert (str(Filter(layers=(0, 0))), str(Filter())) == ("layers=0", "")
    assert Filter(layers=(0, 0))
    assert not Filter()
