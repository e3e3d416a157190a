"""From data sections to rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_prefvec.data import Pair
from lora_prefvec.errors import InputError
from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import Recipe
from lora_prefvec.training.prepare import load_pairs, prepare, repeated
from tests.training.tiny import write_pairs

MakeRecipe = Callable[..., Recipe]


def with_anchors(recipe: Recipe, file: Path, **more: object) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | {"anchors": {"source": str(file), **more}})


def test_anchors_make_their_share_and_keep_their_labels(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    anchors = write_pairs(tmp_path / "anchors.jsonl", rows=10, seed=1)
    for share, swapped, count in ((0.5, False, 32), (0.2, True, 8)):
        wanted = with_anchors(recipe(), anchors, share=share, swapped=swapped)
        found = load_pairs(wanted)
        assert (len(found.own), len(found.held_out), len(found.anchors)) == (32, 8, count)
        assert found.train == [*found.own, *found.anchors]
        rows = prepare(wanted, found, nf4).dataset
        assert rows["swaps"] == [True] * 32 + [swapped] * count


def test_anchors_are_used_equally_often_and_in_a_seeded_order() -> None:
    pairs = [Pair(str(number), "a", "b") for number in range(5)]
    drawn = repeated(pairs, 13, seed=0)
    assert sorted(Counter(pair.prompt for pair in drawn).values()) == [2, 2, 3, 3, 3]
    assert drawn == repeated(pairs, 13, seed=0) != repeated(pairs, 13, seed=1)
    assert repeated([], 0, seed=0) == []
    with pytest.raises(InputError, match="anchors hold no pair"):
        repeated([], 1, seed=0)


def test_a_held_out_set_of_its_own_leaves_the_data_whole(recipe: MakeRecipe, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "held.jsonl", rows=6, seed=2)
    wanted = Recipe.model_validate(recipe().model_dump() | {"held_out": {"source": str(other), "rows": 4}})
    found = load_pairs(wanted)
    assert (len(found.train), len(found.held_out)) == (40, 4)


def test_cuts_are_told(recipe: MakeRecipe, nf4: LoadedBase, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe(max_prompt_tokens=8, max_reply_tokens=4)
    rows = prepare(wanted, load_pairs(wanted), nf4).dataset
    assert max(map(len, rows["prompt_ids"])) == 8
    assert max(map(len, rows["chosen_ids"])) == 4
    told = capsys.readouterr().err
    assert "40 of 40 prompts cut to 8 tokens" in told
    assert "40 of 40 replies cut to 4 tokens" in told


def test_pairs_that_a_cut_makes_equal_are_refused(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "a", "chosen": "bcd yes", "rejected": "bcd no"}\n' * 20)
    wanted = Recipe.model_validate(
        recipe(max_reply_tokens=3).model_dump() | {"data": {"source": str(same)}, "held_out": 0}
    )
    with pytest.raises(InputError, match="none of the 20 pairs differ within the first 3 tokens") as refusal:
        prepare(wanted, load_pairs(wanted), nf4)
    assert "max_reply_tokens" in refusal.value.fix
