"""`generate`: replies of a base with a live mix, to one prompt or to a file of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import click

from lora_prefvec.cli.conditions import asks, typed_question, written_condition
from lora_prefvec.cli.live import Live, Quantization, find_live, written_mix
from lora_prefvec.cli.options import live_mix, writes
from lora_prefvec.cli.prompts import Line, named, read_line, read_records
from lora_prefvec.errors import InputError, Interrupted, RunError
from lora_prefvec.output import out
from lora_prefvec.progress import progress


@click.command()
@live_mix
@asks
@click.option("--prompt", help="One user message.")
@click.option("--prompts", type=click.File(encoding="utf-8"), help="JSONL with `prompt` or `messages`; - reads stdin.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts answered side by side."
)
@writes("JSONL file for the prompts with their replies; printed where left out.", required=False)
@click.option("--resume", is_flag=True, help="Go on with an --out that was stopped half-way.")
def generate(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    levels: tuple[str, ...],
    direction: str | None,
    prompt: str | None,
    prompts: IO[str] | None,
    batch_size: int,
    out_: Path | None,
    force: bool,
    dry_run: bool,
    resume: bool,
    **settings: Any,
) -> None:
    """Replies of a base with a mix of vectors, to one prompt or to a file of them.

    A line of the file may have a `mix` of its own, such as {"helpful": 1, "harmless": -0.5}, in the place of the
    command's; what it does not name is at 0. So may it have `seed`, `max_new_tokens`, `temperature` and `top_p`, and,
    for an adapter that takes conditions, a `condition` such as {"helpful": 5}.

    \b
    prefvec generate helpful=1 harmless=0.5 --prompt "How do I clean the bike?"
    prefvec generate gentle.yaml --prompts questions.jsonl --out replies.jsonl
    prefvec generate cpo=1 --condition helpful=5 --condition concise=1 --prompt "How do I clean the bike?"
    prefvec generate helpful=1.5 concise=1.5 --direction helpful,concise@-15 --prompt "How do I clean the bike?"
    """
    if (prompt is None) == (prompts is None):
        raise InputError("give one of --prompt and --prompts", 'For example: --prompt "How do I clean the bike?"')
    if resume and out_ is None:
        raise InputError("--resume goes on with a file", "Name it with --out.")
    records = [("--prompt", {"prompt": prompt})] if prompts is None else read_records(prompts)
    live, condition = typed_question(find_live(refs, base, quantization, allow_mismatch), levels, direction)
    lines = [read_line(where, record, live, settings, i, condition) for i, (where, record) in enumerate(records)]
    from lora_prefvec.artifact import check_target

    done: dict[int, str] = {}
    if out_ is not None:
        check_target(out_, force)
        done = replies_so_far(partial(out_), lines, resume, force)
    if dry_run:
        plan = {"base": live.base, "quantization": live.quantization, "mix": live.mix, "prompts": len(lines)}
        out.result({**plan, **({"condition": condition} if condition else {}), "out": str(out_) if out_ else None})
        return
    replies = answer(lines, done, live, batch_size, bar=prompts is not None)
    if out_ is not None:
        write(out_, force, lines, done, replies)
        out.result({"out": str(out_), "replies": len(lines)})
    elif prompts is None:
        ((_, reply),) = replies
        asked = {"condition": condition} if condition else {}
        out.result({"reply": reply, "mix": live.mix, **asked}, text=reply)
    else:
        show(lines, dict(replies))


def answer(
    lines: Sequence[Line], done: dict[int, str], live: Live, batch_size: int, *, bar: bool
) -> Iterator[tuple[int, str]]:
    """The place of a line and its reply, as soon as that is written, of all that are not done.

    Raises:
        InputError: a prompt is too long, or cannot be rendered.
        RunError: the model's output is not finite.
    """
    if len(done) == len(lines):
        return
    from lora_prefvec.inference import ContinuousBatch, Reply, Request, encode

    loaded, mixer = live.load()
    batch = ContinuousBatch(loaded, mixer, max_rows=batch_size)
    places: dict[Reply, int] = {}
    for place, line in enumerate(lines):
        if place not in done:
            with named(line.where):
                places[batch.add(Request(encode(loaded, line.reads), line.mix, line.sampling))] = place
    with progress("replies", len(lines), start=len(done)) if bar else nullcontext() as shown:
        while batch.waiting or batch.running:
            for reply in batch.step():
                if reply.error:
                    raise RunError(f"{lines[places[reply]].where}: {reply.error.problem}", reply.error.fix)
                if reply.finish_reason:
                    yield places[reply], reply.text
                    if shown:
                        shown.advance()


def write(
    target: Path, force: bool, lines: Sequence[Line], done: dict[int, str], replies: Iterator[tuple[int, str]]
) -> None:
    """Write the lines with their replies, in order, once the last is there; until then replies gather in another file.

    Raises:
        InputError: the target cannot be written.
        Interrupted: Ctrl-C; the replies so far are kept, as they are whatever else goes wrong.
    """
    from lora_prefvec.artifact import atomic_file

    gathered = partial(target)
    done = dict(done)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = gathered.open("a" if done else "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror}", "Choose another --out.") from None
    try:
        with file:
            file.write("\n" if done else "")  # ends a line that a kill cut short
            for place, reply in replies:
                done[place] = reply
                print(json.dumps({"line": place, "reply": reply, **lines[place].asked()}), file=file, flush=True)
    except KeyboardInterrupt:
        if not done:
            raise
        raise Interrupted(f"{len(done)} of {len(lines)} replies are in {gathered}", "Go on with --resume.") from None
    finally:
        if not done:
            gathered.unlink()
    with atomic_file(target, force) as work, work.open("w", encoding="utf-8") as file:
        for place, line in enumerate(lines):
            asked = line.asked()
            answered = {**line.record, "reply": done[place], "mix": asked["mix"]}
            if "condition" in asked:
                answered["condition"] = asked["condition"]
            print(json.dumps(answered, ensure_ascii=False), file=file)
    gathered.unlink()


def replies_so_far(gathered: Path, lines: Sequence[Line], resume: bool, force: bool) -> dict[int, str]:
    """Place of a line -> its reply, of those that a stopped run has left behind.

    Raises:
        InputError: there are some and nobody said what to do with them, or they answer other prompts.
    """
    if not gathered.is_file() or (force and not resume):
        return {}
    found = []
    for text in gathered.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):  # a line that a kill cut short, or the one between two runs
            found.append(json.loads(text))
    if found and not resume:
        raise InputError(
            f"{gathered} holds {len(found)} replies of a run that was stopped",
            "Go on with --resume, or begin anew with --force.",
        )
    done = {}
    for one in found:
        place, reply = one.pop("line"), one.pop("reply")
        if place >= len(lines) or one != lines[place].asked():
            raise InputError(
                f"{gathered} answers other prompts, mixes or settings", "Give the same, or begin anew with --force."
            )
        done[place] = reply
    return done


def partial(target: Path) -> Path:
    """Where replies gather until the last one is there."""
    return target.with_name(f"{target.name}.partial")


def show(lines: Sequence[Line], replies: dict[int, str]) -> None:
    """Prompts and replies as a table, with the mixes and the conditions where lines have their own."""
    own, asked = (any(key in line.record for line in lines) for key in ("mix", "condition"))
    rows = []
    for place, line in enumerate(lines):
        prompt = line.prompt if isinstance(line.prompt, str) else line.prompt[-1]["content"]
        mix = line.asked()["mix"] if out.format == "json" else written_mix(line.mix)
        condition = dict(line.condition) if out.format == "json" else written_condition(line.condition)
        rows.append([prompt, *([mix] if own else []), *([condition] if asked else []), replies[place]])
    out.table(["prompt", *(["mix"] if own else []), *(["condition"] if asked else []), "reply"], rows)
