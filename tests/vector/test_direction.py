"""Directions: how they are written, and what they make of a mix."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_prefvec.errors import InputError
from lora_prefvec.vector import parse_direction, unit

PARTS = st.dictionaries(
    st.sampled_from(["helpful", "concise", "honest"]),
    st.floats(-1e300, 1e300).filter(lambda part: part == 0 or abs(part) > 1e-300),
    min_size=1,
)


@given(PARTS.filter(lambda parts: any(parts.values())))
def test_a_direction_has_length_one(parts: dict[str, float]) -> None:
    found = unit(parts)
    assert math.hypot(*found.values()) == pytest.approx(1)
    assert all(found[axis] * part >= 0 for axis, part in parts.items())


def test_an_angle_is_the_same_as_its_parts() -> None:
    angle, parts = parse_direction("helpful,concise@-15"), parse_direction("helpful=0.9659258,concise=-0.2588190")
    assert angle == pytest.approx(parts)
    assert parse_direction("helpful=3, concise=4") == pytest.approx({"helpful": 0.6, "concise": 0.8})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no direction"),
        ("helpful", "is no direction"),
        ("helpful=much", "'much' in the direction"),
        ("helpful,concise@left", "'left' in the direction"),
        ("helpful=1,helpful=2", "every axis once"),
        ("=1", "every axis once"),
        ("helpful=0,concise=0", "points nowhere"),
        ("helpful=nan", "cannot be applied"),
    ],
)
def test_what_is_no_direction(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_direction(text)
