from __future__ import annotations

from typing import Any

import pytest
import yaml

from lora_prefvec.artifact import Parent, Provenance
from lora_prefvec.artifact.card import model_card
from lora_prefvec.vector import BaseIdentity
from tests.artifact.test_provenance import FULL


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_a_card_tells_where_the_adapter_comes_from() -> None:
    card = model_card(FULL, rank=16, modules=224)
    assert front_matter(card) == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "preference-vector", "lora-prefvec", "dpo"],
        "datasets": ["owner/pairs"],
    }
    for said in (
        "# helpful: a preference adapter, swapped labels",
        "rank 16 on 224 linear layers of `owner/base` at revision `c0ffee`",
        "| beta | 0.1 |",
        "| learning rate | 0.0001 |",
        "| seed | 7 |",
        "`owner/pairs`, revision `beef`, split train, 9 pairs, chosen and rejected exchanged, SHA-256 `33333333",
        "| anchors | `sandbox:anchors`, 4 pairs |",
        "| accuracy | 0.71 |",
        "| diverged | - |",
        "| x | -1 | - | `4444444444444444` |",
        'from_pretrained("owner/base", revision="c0ffee")',
        "prefvec extract",
        "--max-lora-rank 16",
        "4-bit (NF4)",
    ):
        assert said in card


@pytest.mark.parametrize("kind", ["preference_adapter", "preference_vector", "mix", "conditional_adapter"])
@pytest.mark.parametrize("base", [None, BaseIdentity("sandbox", quantization="nf4"), BaseIdentity("o/b")])
def test_a_card_of_little_knowledge(kind: Any, base: BaseIdentity | None) -> None:
    card = model_card(Provenance(kind=kind, base=base), rank=8, modules=1)
    assert "None" not in card
    assert front_matter(card).get("base_model") == ("o/b" if base and "/" in base.id else None)
    assert "\n\n\n" not in card


def test_names_cannot_break_the_card() -> None:
    parents = [Parent(name="a|b\n# title")]
    card = model_card(Provenance(kind="mix", parents=parents, metrics={"x|y": 1.0}), rank=8, modules=1)
    assert "\n# title" not in card
    assert r"x\|y" in card
