"""`score`: what replies are worth, those of a mix or those in a file; or what a mix prefers and knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_prefvec.cli.live import Live, Quantization, find_live
from lora_prefvec.cli.measure import (
    Question,
    asked_scorers,
    find_questions,
    loader,
    measures,
    read_questions,
    tell_costs,
)
from lora_prefvec.cli.options import live_mix, writes
from lora_prefvec.errors import InputError, Interrupted, PrefvecError
from lora_prefvec.output import out
from lora_prefvec.progress import progress

if TYPE_CHECKING:
    from lora_prefvec.evaluation import Score, Scorer
    from lora_prefvec.evaluation.scorers import Unread
    from lora_prefvec.inference import LiveMixer, LoadedBase

Scores = Mapping[str, Sequence["float | Unread | None"]]
BATCH = 128  # replies that are written side by side
WITHOUT_REPLIES = (  # what makes sense where none are written
    *("refs", "base", "quantization", "allow_mismatch", "limit", "batch_size", "dry_run"),
    *("pairs", "split", "form", "tasks"),
)


@dataclass(frozen=True)
class Answer:
    """A reply that is scored, and the mix that wrote it, as far as the live one knows it."""

    record: Mapping[str, Any]
    reply: str
    mix: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A score that is shown; `better` says which way it is meant."""

    name: str
    score: Score
    better: str


@click.command()
@live_mix
@measures
@click.option(
    "--replies", type=click.Path(path_type=Path), help="JSONL with a `reply` beside each prompt; writes none."
)
@click.option("--n", type=click.IntRange(min=1), default=1, show_default=True, help="Replies to each prompt.")
@click.option(
    "--pairs", help="Preference pairs, as `prefvec data` reads them: how the mix ranks them. Writes no replies."
)
@click.option("--split", help="Of --pairs; where left out test on the Hub, held_out of the sandbox.")
@click.option("--form", help="Of --pairs, such as pku-saferlhf:harmless; detected where left out.")
@click.option("--lm-eval", "tasks", multiple=True, metavar="TASK", help="What the mix knows, by a task of lm_eval.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Of one forward: 128 replies, or 8 pairs or questions.")
@click.option("--list", "list_", is_flag=True, help="Show what --scorer takes.")
@writes("JSONL file for the prompts with replies and scores.", required=False)
def score(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    prompts: str | None,
    limit: int | None,
    scorers: tuple[str, ...],
    replies: Path | None,
    pairs: str | None,
    split: str | None,
    form: str | None,
    tasks: tuple[str, ...],
    batch_size: int | None,
    list_: bool,
    out_: Path | None,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """What the replies of a mix or of a file are worth, with 95 % intervals.

    Or, with no reply written: --pairs, how often the mix prefers the chosen reply more than its base does, and by how
    many nats; --lm-eval, what it reaches in tasks of the LM Evaluation Harness.

    \b
    prefvec score sandbox-helpful=1 sandbox-harmless=0.5
    prefvec score --replies replies.jsonl --scorer refusal --scorer distinct-2
    prefvec score helpful=1 --pairs PKU-Alignment/PKU-SafeRLHF --form pku-saferlhf:helpful --limit 500
    prefvec score helpful=1 --lm-eval arc_easy --limit 200
    prefvec score --list
    """
    from lora_prefvec.artifact import check_target

    if list_:
        show_scorers()
        return
    if pairs is None and (split or form):
        raise InputError(f"--{'split' if split else 'form'} is of pairs, and there are none", "Name them with --pairs.")
    if pairs is not None or tasks:
        check_alone()
        measure_model(
            find_live(refs, base, quantization, allow_mismatch), pairs, split, form, tasks, limit, batch_size, dry_run
        )
        return
    if replies is not None and prompts is not None:
        raise InputError("give one of --prompts and --replies", "A file of replies holds its prompts too.")
    if out_ is not None:
        check_target(out_, force)
    live = find_live(refs, base, quantization, allow_mismatch) if refs or base or replies is None else None
    found = asked_scorers(scorers, live.base if live else None)
    if replies is not None:
        questions = read_questions(str(replies))[:limit]
    else:
        questions = find_questions(prompts, limit, live.base if live else None)
    if dry_run:
        out.result({"prompts": len(questions), "scorers": ", ".join(one.name for one in found), "out": str(out_)})
        return
    load = loader(live, questions) if live else None
    if replies is not None or load is None or live is None:
        answers = read_answers(questions, live)
        tell_costs(found, [one.record for one in answers], [one.reply for one in answers])
    else:
        tell_costs(found, [one.record for one in questions for _ in range(settings["n"])])
        answers = write_answers(questions, live, load, batch_size or BATCH, settings)
    scores: dict[str, Sequence[float | Unread | None]] = {}
    try:
        for scorer in found:
            scores[scorer.name] = graded(scorer, answers, load)
    except (PrefvecError, KeyboardInterrupt) as error:
        if out_ is None or replies is not None:
            raise
        save(out_, force, answers, scores)
        kept = f"The replies are in {out_}; score them with --replies."
        if isinstance(error, PrefvecError):
            raise type(error)(error.problem, f"{error.fix} {kept}") from None
        raise Interrupted(kept) from None
    if out_ is not None:
        save(out_, force, answers, scores)
    show(found, answers, scores)


def check_alone() -> None:
    """Raises InputError where an option was typed that makes no sense when no reply is written."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in WITHOUT_REPLIES or not parameter.expose_value:
            continue
        if context.get_parameter_source(name) is typed:
            raise InputError(
                f"{parameter.opts[0]} is of replies, and with --pairs or --lm-eval none is written",
                "Leave it out, or measure in two runs.",
            )


def measure_model(
    live: Live,
    source: str | None,
    split: str | None,
    form: str | None,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int | None,
    dry_run: bool,
) -> None:
    """What a mix prefers and knows.

    Raises:
        InputError: the pairs, or a task, cannot be had; or a package is missing.
    """
    from lora_prefvec.evaluation.scorers.implicit import held_out_pairs, implicit_preference, preference_scores
    from lora_prefvec.evaluation.scorers.knowledge import check_tasks, knowledge

    pairs = held_out_pairs(source, split=split, form=form).pairs[:limit] if source else []
    if tasks:
        check_tasks(tasks)
    if dry_run:
        out.result({"pairs": len(pairs), "tasks": ", ".join(tasks)})
        return
    loaded, mixer = live.load()
    rows: list[Row] = []
    if pairs:
        size = batch_size or 8
        with progress("pairs", 2 * len(pairs)) as bar:
            (found,) = implicit_preference(loaded, mixer, [live.mix], pairs, batch_size=size, bar=bar)
        rows += [Row(name, one, "more") for name, one in preference_scores(found).items()]
    if tasks:
        out.note(f"lm_eval: {', '.join(tasks)}")
        (found_too,) = knowledge(loaded, mixer, [live.mix], tasks, limit=limit, batch_size=batch_size or 8)
        rows += [Row(f"{one.task} {one.metric}", one.score, better(one.direction)) for one in found_too]
    show_rows(rows, " or ".join(["pairs"] * bool(pairs) + ["questions"] * bool(tasks)))


def read_answers(questions: Sequence[Question], live: Live | None) -> list[Answer]:
    """The replies that stand beside their prompts.

    Raises:
        InputError: a line has none.
    """
    answers = []
    for one in questions:
        reply, mix = one.record.get("reply"), one.record.get("mix")
        if not isinstance(reply, str):
            raise InputError(f"{one.where}: no reply", 'Write {"prompt": "text", "reply": "text"}.')
        own = dict(mix) if isinstance(mix, dict) else live.numbers if live else {}
        answers.append(Answer(one.record, reply, own))
    return answers


def write_answers(
    questions: Sequence[Question],
    live: Live,
    load: Callable[[], tuple[LoadedBase, LiveMixer]],
    batch_size: int,
    settings: Mapping[str, Any],
) -> list[Answer]:
    """The replies of the live mix."""
    from lora_prefvec.evaluation.rows import Plan, write
    from lora_prefvec.evaluation.store import Store

    plan, store = Plan([live.numbers], [one.record for one in questions], **settings), Store()
    with progress("replies", len(plan.rows)) as bar:
        write(plan, load, store, batch_size=batch_size, bar=bar)
    keys = plan.keys(store)
    written = store.replies(keys)
    return [Answer(questions[i // plan.n].record, written[key].text, live.numbers) for i, key in enumerate(keys)]


def graded(
    scorer: Scorer, answers: Sequence[Answer], load: Callable[[], tuple[LoadedBase, LiveMixer]] | None
) -> list[float | Unread | None]:
    """The scores of all replies; how many cannot be read is told.

    Raises:
        InputError, RunError: as `evaluation.scorers.answers`.
    """
    from lora_prefvec.evaluation.scorers import Unread, Writer, unread_note
    from lora_prefvec.evaluation.scorers import answers as scores_of

    prompts, replies = [one.record for one in answers], [one.reply for one in answers]
    asks_model = load and getattr(scorer, "needs_model", False)
    writer = Writer(*load(), [one.mix for one in answers]) if load and asks_model else None
    found = scores_of(scorer, prompts, replies, writer)
    if unread := sum(isinstance(one, Unread) for one in found):
        out.warn(unread_note(scorer.name, unread))
    return found


def save(file: Path, force: bool, answers: Sequence[Answer], scores: Scores) -> None:
    """Write prompts, replies, mixes and scores, one line each; `score --replies` reads them."""
    from lora_prefvec.artifact import atomic_file

    with atomic_file(file, force) as work, work.open("w", encoding="utf-8") as opened:
        for i, one in enumerate(answers):
            own = {name: number(values[i]) for name, values in scores.items()}
            line = {**one.record, "reply": one.reply, "mix": one.mix, "scores": own}
            print(json.dumps(line, ensure_ascii=False), file=opened)


def number(score: float | Unread | None) -> float | None:
    """A score, or None where there is none."""
    return None if isinstance(score, str) else score


def show(scorers: Sequence[Scorer], answers: Sequence[Answer], scores: Scores) -> None:
    """The means with their intervals."""
    rows = []
    for one in scorers:
        said = better(one.direction) + (", a cost" if one.is_cost else "")
        rows.append(Row(one.name, mean(answers, [number(score) for score in scores[one.name]]), said))
    show_rows(rows, "replies")


def show_scorers() -> None:
    """What --scorer takes; the recipes each on a line of its own for people, who copy them, shell quotes and all."""
    from lora_prefvec.evaluation.scorers import scorer_list
    from lora_prefvec.evaluation.scorers.reward import RECIPES

    human = out.format == "human"
    out.table(["scorer", "what it says"], scorer_list() + ([] if human else list(RECIPES.items())))
    if human:
        print("Reward models of the papers:")
        print("\n".join(f"\n{what}\n  --scorer '{scorer}'" for scorer, what in RECIPES.items()))


def better(direction: int) -> str:
    """Which way a score is meant."""
    return "more" if direction > 0 else "less"


def show_rows(rows: Sequence[Row], unit: str) -> None:
    """Scores as a table, or by name as JSON."""
    if out.format == "json":
        out.result({row.name: asdict(row.score) for row in rows})
        return
    cells = [
        [row.name.replace("_", " "), row.score.mean, row.score.low, row.score.high, row.score.n, row.better]
        for row in rows
    ]
    out.table(["score", "mean", "low", "high", unit, "better"], cells, note="low to high: the 95 % interval")


def mean(answers: Sequence[Answer], values: Sequence[float | None]) -> Score:
    """The mean; replies to one prompt count as one piece of evidence."""
    from lora_prefvec.evaluation import estimate
    from lora_prefvec.evaluation.scorers import messages_of
    from lora_prefvec.evaluation.store import digest

    groups: dict[str, list[float | None]] = {}
    for answer, value in zip(answers, values, strict=True):
        groups.setdefault(digest(messages_of(answer.record)), []).append(value)
    n = max(map(len, groups.values()))
    return estimate([value for group in groups.values() for value in (group + [None] * n)[:n]], n)
