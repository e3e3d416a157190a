"""Grids of weights: which weights they are, and what is refused."""

from __future__ import annotations

import pytest

from lora_prefvec.cli.train import parse_weights
from lora_prefvec.errors import InputError
from lora_prefvec.recipe import Recipe
from lora_prefvec.training.grid import lattice, place_of, with_weights

CONTENT = {
    "preference": "both",
    "base": {"id": "sandbox"},
    "data": {"source": "sandbox:rated"},
    "method": {"name": "raco", "objectives": {"helpful": 0.5, "harmless": 0.5}},
}
RECIPE = Recipe.model_validate(CONTENT)


def test_a_lattice_is_all_weights_of_its_steps() -> None:
    assert lattice(["a", "b"], 5) == [{"a": k / 4, "b": 1 - k / 4} for k in range(5)]
    three = lattice(["a", "b", "c"], 3)
    assert len(three) == 6
    assert all(sum(one.values()) == pytest.approx(1) for one in three)
    assert len({place_of(one) for one in three}) == 6
    with pytest.raises(InputError, match="more than 200 weights"):
        lattice(list("abcdef"), 11)


def test_weights_are_read_from_the_command_line() -> None:
    assert parse_weights(RECIPE, ["3"]) == lattice(["helpful", "harmless"], 3)
    named = parse_weights(RECIPE, ["helpful=0.3,harmless=0.7", "harmless=1,helpful=0"])
    assert named == [{"helpful": 0.3, "harmless": 0.7}, {"harmless": 1.0, "helpful": 0.0}]
    assert with_weights(RECIPE, named[0]).method.weights == named[0]  # type: ignore[union-attr]


def test_modpo_leaves_out_where_it_would_divide_by_zero() -> None:
    method = {**CONTENT["method"], "name": "modpo", "main": "helpful", "margins": {"harmless": "x"}}  # type: ignore[dict-item]
    modpo = Recipe.model_validate({**CONTENT, "method": method})
    assert [one["helpful"] for one in parse_weights(modpo, ["3"])] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("helpful=0.3,harmless=0.3", r"weights helpful=0.3,harmless=0.3: .* sum to 0.6, not to 1"),
        ("helpful=1.5,harmless=-0.5", r"Input should be less than or equal to 1"),
        ("helpful=1", r"the objective 'harmless' has no weight"),
        ("helpful=0.5,harmles=0.5", r"no objective 'harmles'.*'harmless'"),
        ("half", r"says no weights.*helpful=0.3,harmless=0.7"),
        ("1", r"a grid of 1 points has no two ends"),
    ],
)
def test_wrong_weights_are_one_line(given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_weights(RECIPE, [given])


def test_a_preference_vector_has_no_weights() -> None:
    plain = Recipe.model_validate({**CONTENT, "method": {"name": "preference_vector"}})
    with pytest.raises(InputError, match="preference_vector has no weights"):
        parse_weights(plain, ["helpful=0.5,harmless=0.5"])
    with pytest.raises(InputError, match="says no weights"):
        parse_weights(plain, ["5"])
