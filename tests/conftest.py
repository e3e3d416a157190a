"""Fixtures that every room shares: tiny models on disk, made once and only when asked for, and the shared data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.forks import Warm

REPOSITORY = Path(__file__).parent.parent

# No deadline per example: a loaded machine is slow, not wrong.
hypothesis.settings.register_profile("prefvec", deadline=None)
hypothesis.settings.load_profile("prefvec")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reference log-probabilities are cached apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFVEC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder with a tiny random model and its tokenizer; see `helpers.CONFIGS` for the families."""
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            from tests.helpers import write_tiny_model  # heavy, and most tests need no model

            written[family] = write_tiny_model(family, tmp_path_factory.mktemp(f"tiny-{family}"))
        return written[family]

    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3")


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("gemma3")


@pytest.fixture(scope="session")
def tiny_mistral(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("mistral")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("gpt2")


@pytest.fixture(scope="session")
def tiny_phi3(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("phi3")


@pytest.fixture(scope="session")
def warm(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that has imported everything, and forks a `prefvec` in no time."""
    with Warm(tmp_path_factory.mktemp("warm"), {}) as process:
        yield process


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the shared data and models: $PREFVEC_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("PREFVEC_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set PREFVEC_SHARED")
    return folder
