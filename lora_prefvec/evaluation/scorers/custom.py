"""Scorers of the user's own, from a Python file: `path/to/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_prefvec.errors import InputError, nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class CustomScorer:
    """A function or object of the user's file, with what it leaves out filled in; `fingerprint` hashes the file."""

    name: str
    direction: int
    is_cost: bool
    needs_model: bool
    fingerprint: str
    call: Callable[..., Any] = field(repr=False)

    def __call__(self, *arguments: Any) -> Any:
        """What the user's scorer returns for prompts and replies, unchecked: `apply` checks."""
        return self.call(*arguments)


def custom_scorer(file: Path, name: str) -> CustomScorer:
    """The scorer `name` of a Python file, which is executed.

    It is called with prompts and replies. Its attributes `name`, `direction`, `is_cost` and `needs_model` count, as
    `Scorer` has them; a plain function is an axis of its own name, where more is better.

    Raises:
        InputError: there is no such file or name, the file fails, or what it names is no scorer.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}", "Name a Python file and its scorer: path/to/file.py:name")
    found = _named(_execute(file), file, name)
    where = f"{name!r} of {file}"
    if isinstance(found, type) or not callable(found):
        raise InputError(
            f"{where} is {'a class' if isinstance(found, type) else f'of type {type(found).__name__}'}, no scorer",
            "Name a function (prompts, replies) -> scores, or an object that is called like one.",
        )
    axis, direction = getattr(found, "name", name), getattr(found, "direction", +1)
    if not isinstance(axis, str) or not NAME.fullmatch(axis):
        raise InputError(f"{where} has the name {axis!r:.60}", "Use letters, digits, '-', '_' and '.'.")
    if direction not in (+1, -1):
        raise InputError(f"{where} has the direction {direction!r:.60}", "Write +1 (more is better) or -1.")
    return CustomScorer(
        name=axis,
        direction=direction,
        is_cost=bool(getattr(found, "is_cost", False)),
        needs_model=bool(getattr(found, "needs_model", False)),
        fingerprint=f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}",
        call=found,
    )


def _execute(file: Path) -> Any:
    module_name = f"prefvec_scorers_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file", "Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{file} fails: {type(error).__name__}: {error}", "Mend it; --debug shows where.") from error
    return module


def _named(module: Any, file: Path, name: str) -> Any:
    if not name:
        raise InputError(f"no scorer of {file} is named", f"Write {file}:name.")
    if not hasattr(module, name):
        known = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise InputError(f"{file} has no {name!r}", nearest(name, known))
    return getattr(module, name)
