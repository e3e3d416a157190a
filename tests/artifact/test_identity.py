from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_prefvec.artifact import base_identity, identity_of
from lora_prefvec.errors import InputError


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_local_base_keeps_its_name_and_no_path(base: Path) -> None:
    identity = base_identity(str(base), quantization="nf4")
    assert (identity.id, identity.revision, identity.quantization) == ("copy", None, "nf4")
    assert identity.config_sha256
    assert identity.tokenizer_sha256
    assert identity.template_sha256


def test_a_snapshot_keeps_id_and_commit(base: Path, tmp_path: Path) -> None:
    snapshot = shutil.copytree(base, tmp_path / "models--owner--name" / "snapshots" / "abc")
    identity = identity_of(Path(snapshot), "owner/name@main")
    assert (identity.id, identity.revision) == ("owner/name", "abc")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (
            "config.json",
            lambda c: c.update(transformers_version="9", _name_or_path="/x", use_cache=False, dtype="float16"),
        ),
        ("tokenizer.json", lambda c: c.update(truncation={"max_length": 5}, padding=None)),
        ("generation_config.json", lambda c: c.update(temperature=0.1)),
    ],
)
def test_what_does_not_matter_changes_nothing(
    base: Path, file: str, change: Callable[[dict[str, Any]], object]
) -> None:
    before = identity_of(base)
    edit(base / file, change)
    assert identity_of(base) == before


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda c: c.update(num_hidden_layers=3), "config"),
        ("config.json", lambda c: c.update(model_type="mistral"), "config"),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update(new=999), "tokenizer"),
    ],
)
def test_what_matters_is_named(base: Path, file: str, change: Callable[[dict[str, Any]], object], said: str) -> None:
    before = identity_of(base)
    edit(base / file, change)
    assert [line.partition(":")[0] for line in before.mismatches(identity_of(base))] == [said]


def test_saving_the_model_again_keeps_its_identity(base: Path, tmp_path: Path) -> None:
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(base).half().save_pretrained(tmp_path / "again")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "again")
    assert identity_of(base).mismatches(identity_of(tmp_path / "again")) == []


def test_the_template_is_found_wherever_it_lies(base: Path) -> None:
    file = base / "chat_template.jinja"
    text, before = file.read_text(), identity_of(base)
    file.write_text(text + " ")
    assert before.mismatches(identity_of(base))[0].startswith("chat template")
    file.unlink()
    assert identity_of(base).template_sha256 is None
    for template in (text, [{"name": "tools", "template": "x"}, {"name": "default", "template": text}]):
        edit(base / "tokenizer_config.json", lambda c, t=template: c.update(chat_template=t))
        assert identity_of(base) == before


def test_a_damaged_file_is_one_line(base: Path) -> None:
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no valid JSON"):
        identity_of(base)
    (base / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        identity_of(base)
