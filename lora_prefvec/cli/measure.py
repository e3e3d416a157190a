"""What the verbs that measure share: the prompts, the scorers, and a model that is loaded only if it is asked."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_prefvec.cli.prompts import has_prompt, named, read_records
from lora_prefvec.errors import InputError
from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.cli.live import Live
    from lora_prefvec.evaluation import Scorer
    from lora_prefvec.inference import LiveMixer, LoadedBase

Command = TypeVar("Command", bound=Callable[..., Any])
SANDBOX = "sandbox"
SANDBOX_PROMPTS = 200  # where nobody says how many


@dataclass(frozen=True)
class Question:
    """A prompt that is measured on.

    Args:
        record: what a scorer is given: `prompt` or `messages`, and whatever stands beside it.
        where: what an error calls it.
    """

    record: Mapping[str, Any]
    where: str


def measures(command: Command) -> Command:
    """`--prompts`, `--limit` and `--scorer`."""
    for decorate in reversed(
        [
            click.option(
                "--prompts",
                help="JSONL with `prompt` or `messages`, - for stdin, or sandbox:SPLIT; the sandbox has its own.",
            ),
            click.option("--limit", type=click.IntRange(min=1), help="Take only so many prompts, from the beginning."),
            click.option(
                "--scorer",
                "scorers",
                multiple=True,
                help="An axis or a cost, see prefvec score --list; may be given again. On the sandbox all of its own.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def find_questions(reference: str | None, limit: int | None, base: str | None) -> list[Question]:
    """The prompts, each once.

    Args:
        reference: as `--prompts` takes it; None is the default of the base.

    Raises:
        InputError: there are none, or a line is none.
    """
    if reference is None:
        if base != SANDBOX:
            raise InputError("there are no prompts to measure on", "Name a JSONL file of them with --prompts.")
        reference = SANDBOX
    source, _, split = reference.partition(":")
    if source == SANDBOX and not Path(reference).is_file():
        from lora_prefvec.sandbox import prompts

        asked = prompts(split or "held_out", limit or SANDBOX_PROMPTS)  # type: ignore[arg-type]
        return once([Question({"messages": messages}, f"prompt {i}") for i, messages in enumerate(asked, start=1)])
    return once(read_questions(reference))[:limit]


def read_questions(file: str) -> list[Question]:
    """The prompts of a JSONL file, or of stdin as `-`.

    Raises:
        InputError: there are none, or a line is none.
    """
    try:
        with click.open_file(file, encoding="utf-8") as opened:
            found = [question(record, where) for where, record in read_records(opened)]
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", "Name a JSONL file.") from None
    if not found:
        raise InputError(f"{file} holds no prompt", 'Write one JSON object a line: {"prompt": "text"}')
    return found


def question(record: Any, where: str) -> Question:
    """A prompt from its line.

    Raises:
        InputError: there is none.
    """
    with named(where):
        if not has_prompt(record):
            raise InputError(
                "no object with a prompt",
                'Write {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}.',
            )
        if not (record.get("messages") or record["prompt"].strip()):
            raise InputError("the prompt is empty", "Write at least one word.")
    return Question(record, where)


def once(questions: Sequence[Question]) -> list[Question]:
    """Each prompt once: a second copy would say the same and make the intervals too narrow."""
    from lora_prefvec.evaluation.scorers import messages_of
    from lora_prefvec.evaluation.store import digest

    kept: dict[str, Question] = {}
    for one in questions:
        kept.setdefault(digest(messages_of(one.record)), one)
    if again := len(questions) - len(kept):
        out.warn(f"{again} of {len(questions)} prompts stand there twice or more; each counts once")
    return list(kept.values())


def asked_scorers(references: Sequence[str], base: str | None) -> list[Scorer]:
    """The scorers, the default ones of the base where none is named.

    Raises:
        InputError: there are none, or two of one name.
    """
    from lora_prefvec.evaluation.scorers import find_scorers

    if not references:
        if base != SANDBOX:
            raise InputError("there is nothing to score by", "Name a --scorer; prefvec score --list shows them.")
        from lora_prefvec.sandbox import SCORERS

        references = [f"{SANDBOX}:{name}" for name in SCORERS]
    return find_scorers(references)


def tell_costs(
    scorers: Sequence[Scorer], prompts: Sequence[Mapping[str, Any]], replies: Sequence[str] | None = None
) -> None:
    """Say what scoring would cost, of the scorers that know, before it or anything else is done.

    Args:
        replies: None for such as are not written yet.
    """
    for scorer in scorers:
        if cost := getattr(scorer, "cost", None):
            out.note(f"{scorer.name}: {cost(prompts, [None] * len(prompts) if replies is None else replies)}")


def loader(live: Live, questions: Sequence[Question]) -> Callable[[], tuple[LoadedBase, LiveMixer]]:
    """Loads the base when it is first called, and sees to it that it can read all prompts."""

    @functools.cache
    def load() -> tuple[LoadedBase, LiveMixer]:
        from lora_prefvec.evaluation.scorers import messages_of
        from lora_prefvec.inference import ContinuousBatch, Request, encode

        loaded, mixer = live.load()
        batch = ContinuousBatch(loaded)
        for one in questions:
            with named(one.where):
                batch.check(Request(encode(loaded, messages_of(one.record))))
        return loaded, mixer

    return load


def base_facts(live: Live) -> dict[str, Any]:
    """What tells a base from any other."""
    from dataclasses import asdict

    from lora_prefvec.artifact import identity_of
    from lora_prefvec.artifact.weights import file_sha256

    facts = asdict(identity_of(live.folder, live.base, live.quantization))
    if facts["revision"] is None:  # no commit that stands for the weights
        facts["weights_sha256"] = {file.name: file_sha256(file) for file in sorted(live.folder.glob("*.safetensors"))}
    return facts


def command_line() -> str:
    """The command that runs, as it is typed."""
    return shlex.join(["prefvec", *sys.argv[1:]])
