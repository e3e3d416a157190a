"""How a command line begins and ends: help in time, options anywhere, one line per error, nobody else's noise."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from lora_prefvec import __version__
from lora_prefvec.cli.main import SECTIONS, main, prefvec
from lora_prefvec.errors import InputError, Interrupted, RunError
from lora_prefvec.output import out

COMMAND = [sys.executable, "-c", "import sys; from lora_prefvec.cli.main import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warnings of other tests stay as they are."""
    monkeypatch.setattr("lora_prefvec.cli.main.quiet_libraries", lambda: None)


@pytest.fixture
def inspect_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Puts a function in the place of the verb `inspect`."""

    def put(function: Callable[[], Any]) -> None:
        monkeypatch.setattr(prefvec.commands["inspect"], "callback", lambda **_: function())

    return put


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def test_help_lists_every_verb_in_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}:\n") for title in SECTIONS]
    assert places == sorted(places)
    for verb in prefvec.commands:
        assert f"\n  {verb} " in text
    assert "..." not in text[places[0] :]  # every summary fits
    assert main([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("verb", sorted(prefvec.commands))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--format" in text
    assert "--debug" in text
    for parameter in prefvec.commands[verb].params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{verb} {parameter.name} has no help"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prefvec {__version__}\n"


def test_help_needs_nothing_heavy() -> None:
    heavy = (
        "[m for m in ('torch', 'transformers', 'rich', 'pydantic', 'datasets', 'numpy', 'yaml') if m in sys.modules]"
    )
    told = f"print({heavy}, len(sys.modules) < 250, file=sys.stderr)"
    code = f"import sys; from lora_prefvec.cli.main import main; main(['--help']); {told}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[] True\n"


@pytest.mark.parametrize("line", ["--format json inspect x", "inspect --format json x", "inspect x --format json"])
def test_format_is_taken_anywhere(
    line: str, inspect_does: Callable[[Callable[[], Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_does(lambda: out.result({"answer": 42}))
    assert main(line.split()) == 0
    assert json.loads(capsys.readouterr().out) == {"answer": 42}
    assert main(["inspect", "x"]) == 0  # and forgotten afterwards
    assert capsys.readouterr().out == "answer: 42\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            InputError("the folder x exists", "Take another --out."),
            2,
            "error: the folder x exists. Take another --out.",
        ),
        (RunError("the loss is NaN"), 1, "error: the loss is NaN"),
        (
            Interrupted("12 steps are saved", "Go on with --resume."),
            130,
            "interrupted: 12 steps are saved. Go on with --resume.",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ZeroDivisionError("by zero"),
            1,
            "error: ZeroDivisionError: by zero (run again with --debug for the traceback)",
        ),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (run again with --debug for the traceback)"),
        (EOFError("cut file"), 1, "error: EOFError: cut file (run again with --debug for the traceback)"),
        (MemoryError(), 1, "error: MemoryError (run again with --debug for the traceback)"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            "error: no space left on the disk for a/b. Free some, or write to another --out.",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            2,
            "error: no space left on the disk. Free some, or write to another --out.",
        ),
    ],
)
def test_an_error_is_one_line_and_a_code(
    error: BaseException,
    code: int,
    line: str,
    inspect_does: Callable[[Callable[[], Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    inspect_does(raising(error))
    assert main(["inspect", "x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip("\n") == line


@pytest.mark.parametrize("line", ["--debug inspect x", "inspect x --debug"])
def test_debug_shows_the_traceback(
    line: str, inspect_does: Callable[[Callable[[], Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_does(raising(InputError("wrong")))
    assert main(line.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last)")
    assert told.endswith("error: wrong\n")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("generat", ["no verb 'generat'", "Did you mean 'generate'?", "prefvec --help"]),
        ("generate --promt hi", ["'--promt'", "'--prompt'", "prefvec generate --help"]),
        ("--format xml inspect x", ["'xml'", "'json'", "prefvec --help"]),
        ("extract one --out y", ["NEGATIVE", "prefvec extract --help"]),
        ("generate --temperature warm", ["'--temperature'", "'warm'"]),
        ("generate --temperature", ["'--temperature' requires an argument"]),
    ],
)
def test_wrong_usage(line: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    for part in parts:
        assert part in told


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_ctrl_c_ends_with_130() -> None:
    reads_stdin = [*COMMAND, "generate", "--prompts", "-"]
    with subprocess.Popen(reads_stdin, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(b'{"prompt": "hi"}\n' * 20_000)  # more than a pipe holds: it was read, so the command runs
        child.stdin.flush()
        child.send_signal(signal.SIGINT)
        _, told = child.communicate()
    assert child.returncode == 130
    assert told.strip() == b"interrupted"


NOISE = """
import logging, sys, warnings
from lora_prefvec.progress import quiet_libraries
if sys.argv[1] == "quiet":
    quiet_libraries()
import datasets
from lora_prefvec.inference import load_base
load_base(sys.argv[2], device="cpu")
datasets.Dataset.from_list([{"a": 1}] * 4).map(lambda row: row)
warnings.warn("old")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("kernels")
logging.getLogger("transformers.models").warning("weights")
logging.getLogger("a.third.party").warning("hm")
"""


def test_other_libraries_are_silent(tiny_llama: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", NOISE, mode, str(tiny_llama)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for mode in ("loud", "quiet")
    ]
    loud, quiet = (child.communicate()[0] for child in started)
    assert [child.returncode for child in started] == [0, 0]
    for noise in ("Loading weights", "Map:", "old", "kernels", "hm"):
        assert noise in loud
    assert quiet == ""
