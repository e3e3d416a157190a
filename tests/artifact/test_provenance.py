from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_prefvec.artifact import DataFacts, Parent, Provenance, TrainingFacts, read_provenance
from lora_prefvec.artifact.provenance import FILE
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity

FULL = Provenance(
    kind="preference_adapter",
    preference="helpful",
    sign=-1,
    method="dpo",
    sides="pair",
    base=BaseIdentity("owner/base", "c0ffee", "1" * 64, "2" * 64, None, "nf4"),
    data=DataFacts(id="owner/pairs", revision="beef", split="train", form="trl", sha256="3" * 64, rows=9, swapped=True),
    anchors=DataFacts(id="sandbox:anchors", rows=4),
    training=TrainingFacts(beta=0.1, learning_rate=1e-4, epochs=1, seed=7, libraries={"torch": "2.13.0"}),
    parents=[Parent(name="x", sha256="4" * 64, coefficient=-1.0)],
    metrics={"accuracy": 0.71, "diverged": float("nan")},
    weights_sha256="5" * 64,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(FULL.to_json())
    assert read_provenance(tmp_path) == FULL
    assert FULL.metrics["diverged"] is None
    assert list(json.loads(FULL.to_json())) == sorted(json.loads(FULL.to_json()))


def test_a_plain_folder_has_none(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema 2.*pip install -U"),
        ({"schema_version": "1"}, "schema_version"),
        ({"kind": "poem"}, "kind"),
        ({"sign": 2}, "sign"),
        ({"mood": "good"}, "mood"),
        ({"base": {"name": "x"}}, "base"),
        ({"training": {"beta": "large"}}, "training.beta"),
        ({"parents": {"a": 1}}, "parents"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / FILE).write_text(json.dumps({**json.loads(FULL.to_json()), **change}))
    with pytest.raises(InputError, match=said) as raised:
        read_provenance(tmp_path)
    assert "\n" not in str(raised.value)


@given(
    st.binary(max_size=200) | st.sampled_from([b"[]", b"null", b'"x"', b"[" * 100_000, b'{"kind": NaN}', b"\xff\xfe"])
)
def test_garbage_is_one_line(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(content)
        with pytest.raises(InputError) as raised:
            read_provenance(Path(folder))
        assert "\n" not in str(raised.value)
