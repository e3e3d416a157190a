"""References with coefficients, as people type them."""

from __future__ import annotations

import pytest

from lora_prefvec.errors import InputError
from lora_prefvec.vector import parse_reference


@pytest.mark.parametrize(
    ("text", "reference", "coefficient"),
    [
        ("helpful", "helpful", 1.0),
        ("helpful=0.5", "helpful", 0.5),
        ("helpful=-1", "helpful", -1.0),
        ("helpful=0", "helpful", 0.0),
        ("org/helpful@main=1e-1", "org/helpful@main", 0.1),
        (r"C:\vectors\helpful=2", r"C:\vectors\helpful", 2.0),
        ("org/helpful@3f2a:adapter", "org/helpful@3f2a:adapter", 1.0),
        ("runs/lr=2e-4/helpful=+1.5", "runs/lr=2e-4/helpful", 1.5),
        ("runs/lr=2e-4=1", "runs/lr=2e-4", 1.0),
    ],
)
def test_parsed_at_the_last_equals_sign(text: str, reference: str, coefficient: float) -> None:
    assert parse_reference(text) == (reference, coefficient)


@pytest.mark.parametrize("written", ["abc", "nan", "inf", "-inf", "1e999", "", " ", "0x1", "1,5"])
def test_a_coefficient_that_is_no_finite_number(written: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_reference(f"helpful={written}")
    message = str(caught.value)
    assert repr(written.strip()) in message
    assert "Write helpful=1.0" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", " ", "=1.0", " =2"])
def test_a_reference_that_names_nothing(text: str) -> None:
    with pytest.raises(InputError, match=r"names no vector\. Write REF=COEF"):
        parse_reference(text)
