"""`tune`: the mix for a wish."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_prefvec.cli.live import Live, Quantization, written_mix
from lora_prefvec.cli.measure import (
    SANDBOX,
    Question,
    asked_scorers,
    base_facts,
    command_line,
    find_questions,
    loader,
    measures,
    tell_costs,
)
from lora_prefvec.cli.options import live_mix, writes
from lora_prefvec.cli.sweep import cell, find_ranges, head
from lora_prefvec.errors import InputError, Interrupted
from lora_prefvec.output import out

if TYPE_CHECKING:
    from lora_prefvec.evaluation import Scorer
    from lora_prefvec.evaluation.design import Range
    from lora_prefvec.evaluation.store import Store
    from lora_prefvec.evaluation.tune import Evaluate
    from lora_prefvec.evaluation.tuned import Answer, Tuned
    from lora_prefvec.evaluation.wish import Wish

BARE = re.compile(r"(?P<ref>[^=]+?)(?P<options>(?:,\s*(?:layers|modules)\s*=[^=]*)*)")
DEFAULT_RANGE = "-1:2"
STORE, RECORD = "store.sqlite", "tune.json"


@click.command()
@live_mix
@click.option("--maximize", multiple=True, metavar="AXIS", help="A scorer's name; several give their front.")
@click.option("--minimize", multiple=True, metavar="AXIS", help="The same where less is wanted.")
@click.option("--subject-to", "bounds", multiple=True, metavar='"AXIS >= 0.9"', help="A bound on the mean, >= or <=.")
@measures
@click.option("--fresh", help="Prompts that the answer is judged on; where left out every second one of --prompts.")
@click.option("--evaluations", type=click.IntRange(min=2), default=30, show_default=True, help="Mixes that are tried.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Replies written side by side."
)
@writes("FILE.yaml for the mix; or a folder for mix.yaml and tune.json, where a search that was stopped goes on.")
def tune(
    refs: tuple[str, ...],
    base: str | None,
    quantization: Quantization | None,
    allow_mismatch: bool,
    maximize: tuple[str, ...],
    minimize: tuple[str, ...],
    bounds: tuple[str, ...],
    prompts: str | None,
    limit: int | None,
    scorers: tuple[str, ...],
    fresh: str | None,
    evaluations: int,
    batch_size: int,
    out_: Path,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> int:
    """The mix for a wish: the most of one axis while others stay in bounds.

    REF is tried from -1 to 2, REF=LOW:HIGH in that range, and REF=COEF stays where it is. Hopeless mixes are stopped on
    a quarter of the prompts; what is told of the answer was measured on prompts that it was not chosen on. Exit code 1
    where it breaks a bound.

    \b
    prefvec tune sandbox-helpful sandbox-harmless --maximize helpful --subject-to "harmless >= 0.9" --out gentle
    prefvec chat gentle/mix.yaml
    """
    from lora_prefvec.evaluation.scorers import unread_note
    from lora_prefvec.evaluation.tune import tune as search
    from lora_prefvec.evaluation.wish import parse_wish
    from lora_prefvec.progress import progress

    wish = parse_wish(maximize, minimize, bounds)
    live, ranges = find_tried(refs, base, quantization, allow_mismatch)
    found = asked_scorers(scorers, live.base)
    wish.check([scorer.name for scorer in found])
    asked, kept_back = find_prompts(prompts, fresh, limit, live.base, settings["seed"])
    check_out(out_, wish, force)
    if dry_run:
        plan = {"wish": str(wish), "ranges": {name: [one.low, one.high] for name, one in ranges.items()}}
        out.result({**plan, "prompts": len(asked), "fresh": len(kept_back), "out": str(out_)})
        return 0
    chosen_on, judged_on = [one.record for one in asked], [one.record for one in kept_back]
    answers = evaluations if len(wish.goals) > 1 else 1
    tell_costs(found, [*chosen_on * evaluations, *judged_on * (answers + 1)])  # the base is judged too
    store, unread = open_store(live, out_), defaultdict[str, set[str]](set)
    try:
        with progress("mixes", evaluations) as bar:
            tuned = search(
                evaluator(live, [*asked, *kept_back], found, store, unread, settings, batch_size),
                ranges,
                wish,
                chosen_on,
                judged_on,
                evaluations=evaluations,
                seed=settings["seed"],
                bar=bar,
            )
    except KeyboardInterrupt:
        if is_file(out_):
            raise
        raise Interrupted(f"the replies so far are in {out_}", "The same command goes on.") from None
    for name, keys in unread.items():
        if lacking := len(keys - store.scores(keys).keys()):
            out.warn(unread_note(name, lacking))
    files = write(tuned, live, out_, force)
    show(tuned, files)
    return 0 if all(answer.feasible for answer in tuned.answers) else 1


def find_tried(
    refs: Sequence[str], base: str | None, quantization: Quantization | None, allow_mismatch: bool
) -> tuple[Live, dict[str, Range]]:
    """The base and vectors, and what is tried of each: a range, which for a fixed coefficient has no width.

    Raises:
        InputError: as `find_ranges`, or nothing is left to find.
    """
    from lora_prefvec.evaluation.design import Range

    bare = {ref: match for ref in refs if (match := BARE.fullmatch(ref))}
    typed = [f"{bare[ref]['ref']}={DEFAULT_RANGE}{bare[ref]['options']}" if ref in bare else ref for ref in refs]
    live, ranges, fixed = find_ranges(typed, base, quantization, allow_mismatch)
    if not ranges:
        raise InputError("there is no coefficient to find", "Name a vector without one, or with a range: helpful=0:2.")
    return live, {name: ranges[name] if name in ranges else Range(fixed[name], fixed[name]) for name in live.mix}


def find_prompts(
    reference: str | None, fresh: str | None, limit: int | None, base: str, seed: int
) -> tuple[list[Question], list[Question]]:
    """The prompts to choose on, shuffled, and those to judge on.

    The sandbox' own are those of its validation and of its held-out tasks.

    Raises:
        InputError: as `find_questions`, there are fewer than two, or all fresh ones are among the others.
    """
    from lora_prefvec.evaluation.scorers import messages_of

    if reference is None and fresh is None and base == SANDBOX:
        reference, fresh = f"{SANDBOX}:validation", f"{SANDBOX}:held_out"
    asked = find_questions(reference, limit, base)
    random.Random(seed).shuffle(asked)
    if fresh is None:
        if len(asked) < 2:
            raise InputError("one prompt cannot both choose a mix and judge it", "Give more, or others with --fresh.")
        return asked[::2], asked[1::2]
    seen = [messages_of(one.record) for one in asked]
    kept_back = [one for one in find_questions(fresh, limit, base) if messages_of(one.record) not in seen]
    if not kept_back:
        raise InputError(f"all prompts of {fresh} are among those that the mix is chosen on", "Name others.")
    return asked, kept_back


def is_file(place: Path) -> bool:
    """Whether `--out` names the mix itself and not a folder."""
    return place.suffix in (".yaml", ".yml")


def check_out(place: Path, wish: Wish, force: bool) -> None:
    """Raises InputError where the results may not be written to `place`."""
    from lora_prefvec.artifact import check_target

    if is_file(place):
        if len(wish.goals) > 1:
            raise InputError("several goals have several answers", f"Name a folder: --out {place.with_suffix('')}.")
        check_target(place, force)
        return
    check_target(place, force=True)
    if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / STORE).is_file()):
        raise InputError(f"{place} is there, and holds no search for a mix", "Choose another --out.")
    if (place / RECORD).exists() and not force:
        raise InputError(
            f"{place} holds an answer", "Choose another --out; or --force replaces it, and uses the replies again."
        )


def open_store(live: Live, place: Path) -> Store:
    """Where replies and scores are kept: in the folder of `--out`, or in memory."""
    from lora_prefvec.evaluation import Store

    if is_file(place):
        return Store()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {place}: {error.strerror}", "Choose another --out.") from None
    vectors = {name: f"{one.adapter.sha256} {one.filter}" for name, one in live.ingredients.items()}
    return Store(place / STORE, base=json.dumps(base_facts(live), sort_keys=True), vectors=vectors)


def evaluator(
    live: Live,
    questions: Sequence[Question],
    scorers: Sequence[Scorer],
    store: Store,
    unread: Mapping[str, set[str]],
    settings: Mapping[str, Any],
    batch_size: int,
) -> Evaluate:
    """What scores mixes for the search: `evaluation.evaluate` without bars of its own.

    Args:
        unread: by scorer, takes the keys of scores that cannot be read.
    """
    from lora_prefvec.evaluation.rows import Plan, grade, write
    from lora_prefvec.evaluation.sweep import Point, points

    load = loader(live, questions)

    def evaluate(mixes: Sequence[Mapping[str, float]], prompts: Sequence[Any]) -> list[Point]:
        plan = Plan(mixes, prompts, **settings)
        write(plan, load, store, batch_size=batch_size)
        for scorer in scorers:
            unread[scorer.name].update(grade(plan, scorer, load, store))
        return points(plan, scorers, store)

    return evaluate


def write(tuned: Tuned, live: Live, place: Path, force: bool) -> list[Path]:
    """Write a mix.yaml for each answer, and in a folder the record of the search; returns the mixes' files."""
    from lora_prefvec.artifact import atomic_file, mix_file

    files = [place] if is_file(place) else [place / "mix.yaml"]
    if len(tuned.answers) > 1:
        files = [place / f"mix-{i:02}.yaml" for i in range(1, len(tuned.answers) + 1)]
    for file, answer in zip(files, tuned.answers, strict=True):
        parts = [replace(one, coefficient=answer.mix[name]) for name, one in live.ingredients.items()]
        fitted = live.base if any(one.fit_error is not None for one in parts) else None
        vector = parts[0].adapter.vector
        text = mix_file(parts, vector, file.parent, "float32", fitted_on=fitted, base=live.base).to_yaml()
        with atomic_file(file, force or not is_file(place)) as work:
            work.write_text(f"# {tuned.wish}\n# on fresh prompts: {told(tuned, answer)}\n{text}", encoding="utf-8")
    if not is_file(place):
        record = {"command": command_line(), "files": [file.name for file in files], **tuned.to_dict()}
        with atomic_file(place / RECORD, force=True) as work:
            work.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return files


def told(tuned: Tuned, answer: Answer) -> str:
    """How an answer keeps the wish: `helpful 0.66 ±0.04, harmless 0.95 ±0.05 (>= 0.9: 88 % sure)`."""
    parts = []
    for axis in tuned.wish.axes:
        kept = [f"{bound.relation}: {sure:.0%} sure" for bound, sure in answer.confidence.items() if bound.axis == axis]
        parts.append(f"{axis} {cell(answer.fresh.scores[axis])}" + (f" ({', '.join(kept)})" if kept else ""))
    return ", ".join(parts)


def show(tuned: Tuned, files: Sequence[Path]) -> None:
    """The answers with their scores on fresh prompts; what stands in the way, where no mix keeps the bounds."""
    if out.format == "json":
        out.result({**tuned.to_dict(), "files": [str(file) for file in files]})
        return
    names, axes = list(tuned.answers[0].mix), list(tuned.base.scores)
    least = [min(answer.confidence.values(), default=None) for answer in tuned.answers]
    sure = [None, *(None if one is None else f"{one:.0%}" for one in least)]
    stopped = sum(one.whole is None for one in tuned.tried)
    out.table(
        [*map(head, names), *(axis.replace("_", " ") for axis in axes), "kept"],
        [
            [*(point.mix.get(name, 0.0) for name in names), *(cell(point.scores[axis]) for axis in axes), kept]
            for point, kept in zip(tuned.points, sure, strict=True)
        ],
        title=str(tuned.wish),
        note=f"On fresh prompts, the base first; kept: how sure the bounds are kept. {len(tuned.tried)} mixes were "
        f"tried, {stopped} of them stopped early.",
    )
    if tuned.shortfall:
        nearest = written_mix(tuned.answers[0].mix)
        out.warn(
            f"no mix keeps all bounds by half a standard error; {nearest} is nearest, short of that by "
            f"{tuned.shortfall:.3f} in all, where 1 is the range of an axis' scores"
        )
        for bound, score in tuned.binding.items():
            out.warn(f"{bound} binds: mixes that keep the rest come to {bound.axis} {cell(score)}")
        if not tuned.binding:
            out.warn("leaving out one bound is not enough")
    if out.format == "human":
        if tuned.hypervolume is not None:
            print(f"Hypervolume of the front against the base: {tuned.hypervolume:.4g}")
        print("\n".join(f"prefvec chat {file}" for file in files[:1]))
