"""What can go wrong, as exceptions that carry the exit code and the sentence a person reads."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PrefvecError(Exception):
    """A failure that is told in one line, without a traceback.

    Args:
        problem: what was given or done, and why it cannot work.
        fix: what to type or change instead; empty when nothing can be done.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        problem, fix = _on_one_line(problem), _on_one_line(fix)
        super().__init__(f"{problem.rstrip('.')}. {fix}".rstrip() if fix else problem)
        self.problem = problem
        self.fix = fix


class InputError(PrefvecError):
    """The input or the usage is wrong: exit code 2, and nothing was written."""

    exit_code = 2


class RunError(PrefvecError):
    """The input was right and the work failed: exit code 1."""


class Interrupted(PrefvecError):
    """The user stopped the work; what was done is saved: exit code 130."""

    exit_code = 130


def _on_one_line(text: str) -> str:
    """A text without what a file may have put into it to move a terminal's cursor: `\\n`, control codes, and so on."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def require_extra(module: str, extra: str) -> InputError:
    """The error for a feature whose optional dependency `module` is not installed."""
    return InputError(
        f"this needs the package {module!r}, which is not installed",
        f"Install it with: pip install 'lora-prefvec[{extra}]'",
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that names the known word closest to `name`, or lists what is known."""
    words = sorted(known)
    close = get_close_matches(name, words, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")
    return f"Known: {shown}." if words else ""
