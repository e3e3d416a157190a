"""`generate` and `chat`: talk to a base with a live mix of vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from lora_prefvec.cli.live import Quantization, find_live
from lora_prefvec.cli.options import live_mix, writes
from lora_prefvec.errors import InputError, PrefvecError, nearest
from lora_prefvec.output import out
from lora_prefvec.progress import progress

if TYPE_CHECKING:
    from lora_prefvec.inference import LiveMixer, LoadedBase

HELP = """\
/mix                   show the coefficients
/mix helpful=0.5       change the named ones, here to 0.5
/reset                 forget the conversation
/quit                  leave (Ctrl-D does too)
Ctrl-C stops a reply."""


@click.command()
@live_mix
@click.option("--prompt", help="One user message.")
@click.option("--prompts", type=click.File(encoding="utf-8"), help="JSONL with `prompt` or `messages`; - reads stdin.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts answered side by side."
)
@writes("JSONL file for the prompts with their replies; printed where left out.", required=False)
def generate(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    prompt: str | None,
    prompts: IO[str] | None,
    batch_size: int,
    out_: Path | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Replies of a base with a mix of vectors, to one prompt or to a file of them.

    \b
    prefvec generate helpful=1 harmless=0.5 --prompt "How do I clean the bike?"
    prefvec generate helpful=-1 --prompts questions.jsonl --out replies.jsonl
    """
    if (prompt is None) == (prompts is None):
        raise InputError("give one of --prompt and --prompts", 'For example: --prompt "How do I clean the bike?"')
    records: list[dict[str, Any]] = [{"prompt": prompt}] if prompts is None else read_prompts(prompts)
    live = find_live(refs, base, quantization, allow_mismatch)
    from lora_prefvec.artifact import atomic_file, check_target

    if out_ is not None:
        check_target(out_, force)
    if dry_run:
        plan = {"base": live.base, "quantization": live.quantization, "mix": live.mix, "prompts": len(records)}
        out.result({**plan, "out": str(out_) if out_ else None})
        return
    from lora_prefvec.inference import generate as reply_to

    loaded, _ = live.load()
    with progress("replies", len(records)) if prompts else nullcontext() as bar:
        replies = reply_to(
            loaded,
            [record.get("messages") or record["prompt"] for record in records],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            bar=bar,
        )
    if out_ is not None:
        with atomic_file(out_, force) as file:
            lines = (
                json.dumps({**record, "reply": reply, "mix": live.mix}, ensure_ascii=False)
                for record, reply in zip(records, replies, strict=True)
            )
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        out.result({"out": str(out_), "replies": len(replies)})
    elif prompts is None:
        out.result({"reply": replies[0], "mix": live.mix}, text=replies[0])
    else:
        shown = [record.get("prompt") or record["messages"] for record in records]
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in shown]
        out.table(["prompt", "reply"], list(zip(texts, replies, strict=True)))


@click.command()
@live_mix
def chat(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """A conversation with a base and a mix that changes while you talk.

    \b
    prefvec chat helpful=1 harmless=0.5
    > /mix harmless=-0.5
    """
    live = find_live(refs, base, quantization, allow_mismatch)
    from lora_prefvec.inference.generate import check_chat_template

    loaded, mixer = live.load()
    check_chat_template(loaded)
    out.note(f"{live.base} with {shown(mixer)}. /help lists the commands, /quit ends.")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    history: list[dict[str, str]] = []
    for line in typed_lines():
        if line == "/quit":
            return
        take_turn(line, loaded, mixer, history, seed=seed + len(history), **settings)


def typed_lines() -> Iterator[str]:
    """What the user types, line by line without the empty ones, until Ctrl-D or the end of piped input."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401  (gives input() its line editing and history)

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def take_turn(line: str, loaded: LoadedBase, mixer: LiveMixer, history: list[dict[str, str]], **settings: Any) -> None:
    """Do what a line asks for; what cannot be done is one line, and the conversation goes on."""
    try:
        if line.startswith("/"):
            obey(line, mixer, history)
        else:
            answer(line, loaded, mixer, history, **settings)
    except PrefvecError as error:
        out.error(str(error))


def obey(line: str, mixer: LiveMixer, history: list[dict[str, str]]) -> None:
    """Do what a line that begins with a slash says."""
    from lora_prefvec.vector import parse_reference

    command, *arguments = line.split()
    if command == "/mix" and arguments:
        mixer.set_mix({**current(mixer), **dict(parse_reference(argument) for argument in arguments)})
        out.note(shown(mixer))
    elif command == "/mix":
        out.result(current(mixer), text=shown(mixer))
    elif command == "/reset":
        history.clear()
        out.note("the conversation begins anew")
    elif command == "/help":
        print(HELP)
    else:
        known = ["/help", "/mix", "/quit", "/reset"]
        raise InputError(f"there is no command {command!r}", nearest(command, known))


def answer(line: str, loaded: LoadedBase, mixer: LiveMixer, history: list[dict[str, str]], **settings: Any) -> None:
    """Print the reply to `line` as it is written, and keep both in the history; Ctrl-C keeps what was said so far."""
    from lora_prefvec.inference import stream

    question = {"role": "user", "content": line}
    reply = ""
    try:
        for piece in stream(loaded, [*history, question], **settings):
            reply += piece
            if out.format != "json":
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        out.note(" (stopped)")
    if out.format == "json":
        out.result({"reply": reply, "mix": current(mixer)})
    elif reply:
        print()
    else:
        out.note("(an empty reply)")
    history += [question, {"role": "assistant", "content": reply}]


def read_prompts(file: IO[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file of prompts; each has a `prompt` (text) or `messages` (a conversation).

    Raises:
        InputError: a line is no such object, or there is none.
    """
    records: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict) or not is_prompt(record):
                    raise InputError(
                        f"{file.name}, line {number}: no object with a prompt",
                        'Write {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}.',
                    )
                records.append(record)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file.name}, line {number}: no JSON ({error.msg})", "Write one JSON object a line."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{file.name} is no UTF-8 text", "Save it as UTF-8.") from None
    if not records:
        raise InputError(f"{file.name} holds no prompt", 'Write one JSON object a line: {"prompt": "text"}')
    return records


def is_prompt(record: dict[str, Any]) -> bool:
    """Whether a line of a prompt file can be answered."""
    messages = record.get("messages")
    if messages is None:
        return isinstance(record.get("prompt"), str)
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )


def current(mixer: LiveMixer) -> dict[str, float]:
    """The coefficients of all attached vectors, zeros included."""
    mix = mixer.mix
    assert isinstance(mix, dict)  # the command line never sets one mix per row
    return {name: mix.get(name, 0.0) for name in mixer.names}


def shown(mixer: LiveMixer) -> str:
    """The mix as it is typed: `helpful=1 harmless=0.5`."""
    return " ".join(f"{name}={coefficient:g}" for name, coefficient in current(mixer).items()) or "no vectors"
