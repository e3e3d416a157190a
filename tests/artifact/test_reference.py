from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_prefvec
from lora_prefvec.artifact import adapter_names, commit_of, public_name, resolve_adapter, resolve_base, shipped
from lora_prefvec.errors import InputError, RunError


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder(plain_adapter: Callable[..., Path]) -> None:
    folder = plain_adapter()
    assert resolve_adapter(str(folder)) == folder


def test_a_name_is_looked_up_in_order(
    plain_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_adapter()
    shutil.copytree(folder, tmp_path / "cwd" / "adapters" / "kind")
    assert resolve_adapter("kind") == Path("adapters/kind")
    shutil.copytree(folder, tmp_path / "mine" / "kind")
    shutil.copytree(folder, tmp_path / "mine" / "honest")
    monkeypatch.setenv("PREFVEC_ADAPTERS", f"{tmp_path / 'none'}:{tmp_path / 'mine'}")
    assert resolve_adapter("kind") == tmp_path / "mine" / "kind"
    assert {"kind", "honest"} <= set(adapter_names())
    with pytest.raises(InputError, match="Did you mean 'honest'"):
        resolve_adapter("honets")


def test_a_folder_without_an_adapter_names_those_inside(plain_adapter: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(plain_adapter(), tmp_path / "run" / "positive")
    with pytest.raises(InputError, match=r"no adapter_config.json. Did you mean .*run/positive\?"):
        resolve_adapter(str(tmp_path / "run"))


def test_a_folder_that_is_no_adapter_does_not_hide_a_name(plain_adapter: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(plain_adapter(), tmp_path / "cwd" / "adapters" / "kind")
    (tmp_path / "cwd" / "kind").mkdir()
    assert resolve_adapter("kind") == Path("adapters/kind")


@pytest.mark.parametrize("ref", ["./nowhere", "/no/where", "a/b/c", "../x/y", "a b/c", "x@y", "", "~/nowhere", "a\0b"])
def test_a_mistyped_path_is_never_looked_for_on_the_hub(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    for resolve in (resolve_adapter, resolve_base):
        with pytest.raises(InputError):
            resolve(ref)


def test_a_hub_id_is_fetched_without_pickles_and_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def download(repository: str, **options: object) -> str:
        asked.update(repository=repository, **options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_adapter("owner/name@v1") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert resolve_base("owner/name", "abc") == tmp_path
    assert asked["revision"] == "abc"
    from fnmatch import fnmatch

    for name in ("adapter_model.bin", "pytorch_model.bin", "model.pt", "modeling.py", "x.pkl", "original/x.pth"):
        assert not any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]
    for name in ("model-00001-of-2.safetensors", "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"):
        assert any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]
        assert not any(fnmatch(name, pattern) for pattern in asked["ignore_patterns"])  # type: ignore[attr-defined]


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="cannot be reached"):
        resolve_adapter("owner/name")


def test_a_base(tiny_llama: Path, tmp_path: Path) -> None:
    assert resolve_base(str(tiny_llama)) == tiny_llama
    with pytest.raises(InputError, match=r"no config.json"):
        resolve_base(str(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        resolve_base(str(tiny_llama / "config.json"))


def test_the_sandbox_is_embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sandbox" / "base").mkdir(parents=True)
    monkeypatch.setattr(lora_prefvec, "__file__", str(tmp_path / "__init__.py"))
    assert resolve_base("sandbox") == tmp_path / "sandbox" / "base"
    (tmp_path / "sandbox" / "base").rmdir()
    with pytest.raises(RunError):
        resolve_base("sandbox")


def test_shipped_folders_in_a_wheel_and_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "lora_prefvec"
    package.mkdir(parents=True)
    monkeypatch.setattr(lora_prefvec, "__file__", str(package / "__init__.py"))
    assert shipped("adapters") == tmp_path / "site" / "adapters"
    (package / "adapters").mkdir()
    assert shipped("adapters") == package / "adapters"


def test_names_hold_no_path_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert public_name(tmp_path / "m") == "m"
    assert public_name(f"{tmp_path}/gone") == "gone"
    assert public_name("../some/where/else") == "else"
    assert public_name("owner/name") == "owner/name"
    assert public_name("owner/name@v1") == "owner/name@v1"
    assert public_name("sandbox:helpful") == "sandbox:helpful"
    assert commit_of(tmp_path / "models--x" / "snapshots" / "abc") == "abc"
    assert commit_of(tmp_path) is None
