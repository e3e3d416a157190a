"""`chat`: a conversation with a base under a mix that changes while it goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_prefvec.cli.conditions import (
    asks,
    check_asked,
    condition_facts,
    typed_question,
    written_axes,
    written_condition,
)
from lora_prefvec.cli.live import Live, Quantization, check_base, find_live, live_name, live_part, written_mix
from lora_prefvec.cli.options import live_mix
from lora_prefvec.errors import InputError, PrefvecError, nearest
from lora_prefvec.output import out

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_prefvec.inference import Reply
    from lora_prefvec.vector import Coefficient

HELP = """\
/mix                   show the coefficients
/mix helpful=0.5 ...   change the named ones
/condition             show what the adapter is asked for
/condition helpful=5   ask for this and nothing else; /condition none asks for nothing
/add REF[=COEF]        attach one more vector
/remove NAME           take a vector off
/compare               what the base and the mix say to your last message
/retry                 another reply to your last message
/undo                  take back your last message and its reply
/reset                 forget the conversation
/save FILE.yaml        keep the mix for chat, generate, compose; /save! replaces
/help                  this list
/quit                  leave (Ctrl-D does too)
Ctrl-C stops a reply."""


@click.command()
@live_mix
@asks
def chat(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    levels: tuple[str, ...],
    direction: str | None,
    **settings: Any,
) -> None:
    """A conversation with a base and a mix that changes while you talk.

    \b
    prefvec chat helpful=1 harmless=0.5
    > /mix harmless=-0.5
    > /compare
    """
    live, condition = typed_question(find_live(refs, base, quantization, allow_mismatch), levels, direction)
    talk = Chat(live, allow_mismatch, condition=condition, **settings)
    asked = f", {written_condition(condition)}" if condition else ""
    out.note(f"{talk.live.base} with {talk.shown}{asked}\n/help lists the commands, /quit ends.")
    for line in typed_lines():
        if line == "/quit":
            return
        talk.take(line)


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
        except KeyboardInterrupt:  # perhaps meant for a reply that ended just before
            out.note("\n(/quit or Ctrl-D ends the chat)")
            continue
        if line:
            yield line


class Chat:
    """A conversation, and the base and the vectors that carry it on.

    Attributes:
        history: messages of both sides in turn, the user's first.
        retries: how often the last reply was asked for anew; its seed depends on it.
        condition: what is asked of a conditional adapter; it stands in the last message only, and not in the history.
    """

    def __init__(
        self,
        live: Live,
        allow_mismatch: bool,
        *,
        condition: Mapping[str, float] | None = None,
        seed: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        from lora_prefvec.inference.generate import check_chat_template

        self.live, self.allow_mismatch = live, allow_mismatch
        self.loaded, self.mixer = live.load()
        check_chat_template(self.loaded)
        self.ingredients = dict(live.ingredients)
        self.history: list[dict[str, str]] = []
        self.retries = 0
        self.condition = dict(condition or {})
        self.seed = seed
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}

    @property
    def mix(self) -> dict[str, Coefficient]:
        """The coefficients of all attached vectors, zeros included."""
        mix = self.mixer.mix
        assert isinstance(mix, dict)  # between two replies there is one mix, for all rows
        return {name: mix.get(name, 0.0) for name in self.mixer.names}

    @property
    def shown(self) -> str:
        """The mix as it is typed."""
        return written_mix(self.mix)

    def take(self, line: str) -> None:
        """Do what a line asks for; what cannot be done is one line, and the conversation goes on."""
        try:
            if line.startswith("/"):
                command, _, rest = line.partition(" ")
                self.obey(command, rest.strip())
            else:
                self.retries = 0
                self.answer([*self.history, {"role": "user", "content": line}])
        except PrefvecError as error:
            out.error(str(error))
        except KeyboardInterrupt:
            out.note("(stopped)")

    def obey(self, command: str, rest: str) -> None:
        """Do what a line that begins with a slash says."""
        match command:
            case "/mix" if rest:
                self.change(rest)
            case "/mix":
                out.result(self.mix, text=self.shown)
            case "/condition" if rest:
                self.ask(rest)
            case "/condition":
                out.result(self.condition, text=written_condition(self.condition))
            case "/add":
                self.add(rest)
            case "/remove":
                self.remove(rest)
            case "/compare":
                self.compare()
            case "/retry":
                question = self.turn()[0]
                self.retries += 1
                self.answer([*self.history[:-2], question])
            case "/undo":
                question = self.turn()[0]
                del self.history[-2:]
                self.retries = 0
                out.note(f"took back: {question['content']}")
            case "/reset":
                self.history.clear()
                out.note("the conversation begins anew")
            case "/save" | "/save!":
                self.save(rest, force=command.endswith("!"))
            case "/help":
                print(HELP)
            case _:
                raise InputError(f"there is no command {command!r}", nearest(command, re.findall(r"^/\w+", HELP, re.M)))

    def turn(self) -> list[dict[str, str]]:
        """The user's last message and its reply."""
        if not self.history:
            raise InputError("nothing was said yet", "Type a message first.")
        return self.history[-2:]

    def change(self, written: str) -> None:
        """Set the coefficients that are named."""
        from lora_prefvec.artifact import plain_coefficient
        from lora_prefvec.vector import parse_term

        mix = self.mix
        terms = [parse_term(word) for word in re.findall(r"(?:\[[^\]]*\]|\S)+", written)]
        for term in terms:
            if term.filter:
                raise InputError(
                    f"which part of {term.ref!r} counts was said when it was attached", f"Write /mix {term.ref}=0.5."
                )
            known = self.ingredients.get(term.ref)
            mix[term.ref] = plain_coefficient(term, known.adapter) if known else term.coefficient
        self.mixer.set_mix(mix)
        out.note(self.shown)

    def ask(self, written: str) -> None:
        """Ask the conditional adapter for what is named, from the next reply on."""
        asked = {} if written == "none" else written_axes(written.replace(",", " ").split())
        self.condition = check_asked(asked, self.ingredients) if asked else {}
        out.note(written_condition(self.condition))

    def add(self, ref: str) -> None:
        """Attach a vector, which has to be one of this base."""
        from lora_prefvec.artifact import open_mix, typed_term

        if not ref:
            raise InputError("/add needs a vector", "Write /add REF, or /add REF=COEF.")
        (one,) = open_mix([typed_term(ref)], allow_mismatch=self.allow_mismatch)
        if not self.allow_mismatch:
            check_base([one], self.live.base, self.live.folder)
        if any((known.ref, known.filter) == (one.ref, one.filter) for known in self.ingredients.values()):
            raise InputError(f"{one.ref} is attached already", "Change it with /mix.")
        name = live_name(one, self.ingredients)
        self.mixer.attach({name: live_part(one)})
        self.ingredients[name] = one
        self.mixer.set_mix({**self.mix, name: one.coefficient})
        out.note(self.shown)

    def remove(self, name: str) -> None:
        """Take a vector off."""
        self.mixer.remove(name)
        known = self.ingredients.pop(name).adapter.provenance
        if known and known.condition:
            self.condition = {}
        out.note(self.shown)

    def save(self, path: str, *, force: bool) -> None:
        """Write the mix as a file that `chat`, `generate` and `compose` take."""
        from lora_prefvec.artifact import atomic_file, mix_file

        target = Path(path).expanduser()
        if target.suffix not in (".yaml", ".yml"):
            raise InputError("a mix is kept in a .yaml file", f"Write /save {path or 'mix'}.yaml.")
        if target.exists() and not force:
            raise InputError(f"{target} exists", f"Choose another name, or replace it with /save! {path}.")
        if not self.ingredients:
            raise InputError("there is no vector to keep", "Attach one with /add.")
        asked = [replace(one, coefficient=self.mix[name]) for name, one in self.ingredients.items()]
        # A DoRA was fitted on the base that it goes with, which is the one that we talk to.
        fitted = self.live.base if any(one.fit_error is not None for one in asked) else None
        vector, base = asked[0].adapter.vector, self.live.base
        text = mix_file(asked, vector, target.parent, "float32", fitted_on=fitted, base=base).to_yaml()
        with atomic_file(target, force) as work:
            work.write_text(text, encoding="utf-8")
        out.note(f"wrote {target}: prefvec chat {path} goes on with this mix")

    def answer(self, messages: Sequence[dict[str, str]]) -> None:
        """Print the reply to `messages` as it is written and keep both; Ctrl-C keeps what was said so far."""
        text, stopped = "", False
        try:
            with closing(self.replies(messages, [self.mix])) as steps:
                for (reply,) in steps:
                    piece = reply.take()
                    text += piece
                    if out.format != "json":
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        except PrefvecError:
            print(end="\n" if text and out.format != "json" else "", flush=True)
            raise
        if out.format == "json":
            out.result({"reply": text, "mix": self.mix})
        elif text:
            print()
        if stopped:
            out.note("(stopped)")
        elif not text:
            out.note("(an empty reply)")
        if text or not stopped:
            self.history = [*messages, {"role": "assistant", "content": text}]

    def compare(self) -> None:
        """Print what the base and the mix say to the last message, from the same random numbers; keep none of it."""
        messages = [*self.history[:-2], self.turn()[0]]
        mix, title = self.mix, self.shown
        with closing(self.replies(messages, [{}, mix])) as steps:
            if out.format == "human" and sys.stdout.isatty():
                from rich.live import Live as Screen

                with Screen(console=out.console()) as screen:
                    for replies in steps:
                        screen.update(side_by_side(title, replies))
                return
            *_, replies = steps
        base, mixed = (reply.text for reply in replies)
        out.result({"base": base, "reply": mixed, "mix": mix}, text=f"[base]\n{base}\n\n[{title}]\n{mixed}\n")

    def replies(
        self, messages: Sequence[dict[str, str]], mixes: Sequence[Mapping[str, Coefficient]]
    ) -> Generator[list[Reply]]:
        """The replies to `messages` under each of the mixes, side by side, as they grow.

        Raises:
            InputError: the conversation is longer than the context.
            RunError: the model's output is not finite.
        """
        from lora_prefvec.artifact import write_condition
        from lora_prefvec.inference import ContinuousBatch, Request, Sampling, encode

        before, asked = self.mix, list(messages)
        if self.condition:
            asked = write_condition(condition_facts(self.ingredients), self.condition, messages)
        batch = ContinuousBatch(self.loaded, self.mixer, max_rows=len(mixes))
        sampling = Sampling(**self.settings, seed=f"{self.seed + len(messages) - 1}:{self.retries}")
        replies = [
            batch.add(Request(encode(self.loaded, asked if mix else list(messages)), mix, sampling)) for mix in mixes
        ]
        try:
            while batch.waiting or batch.running:
                for reply in batch.step():
                    if reply.error:
                        raise reply.error
                yield replies
        finally:
            self.mixer.set_mix(before)


def side_by_side(mix: str, replies: Sequence[Reply]) -> RenderableType:
    """The base's reply and the mix's in two columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, expand=True)
    for title in ("base", mix):
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(Text(reply.text) for reply in replies))
    return table
