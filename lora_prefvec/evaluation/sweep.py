"""Many mixes over the same prompts: points with their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_prefvec.data import Message
from lora_prefvec.evaluation.rows import Loader, Plan, costs, grade, score_keys, write
from lora_prefvec.evaluation.scorers import Prompt, Scorer, Writer, apply, unread_note
from lora_prefvec.evaluation.statistics import Score, estimate
from lora_prefvec.evaluation.store import Store
from lora_prefvec.inference import LiveMixer, LoadedBase
from lora_prefvec.output import out
from lora_prefvec.progress import progress
from lora_prefvec.vector import PreferenceVector


@dataclass(frozen=True)
class Point:
    """One mix of a sweep, with what it says and how that scores.

    Args:
        mix: vector -> coefficient.
        replies: in the order of the prompts, those to one prompt side by side.
        scores: by scorer.
        values: scorer -> the score of every reply; None where it has no say.
        tokens: of every reply.
        cut: how many replies the limit of tokens ended.
    """

    mix: dict[str, float]
    replies: list[str]
    scores: dict[str, Score]
    values: dict[str, list[float | None]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    cut: int = 0


def sweep(
    base: LoadedBase,
    vectors: Mapping[str, PreferenceVector],
    mixes: Sequence[Mapping[str, float]],
    prompts: Sequence[Prompt],
    scorers: Sequence[Scorer],
    **settings: Any,
) -> list[Point]:
    """`evaluate` with the vectors attached for as long as it takes."""
    with LiveMixer(base.model, vectors) as mixer:
        return evaluate(base, mixer, mixes, prompts, scorers, **settings)


def evaluate(
    base: LoadedBase,
    mixer: LiveMixer,
    mixes: Sequence[Mapping[str, float]],
    prompts: Sequence[Prompt],
    scorers: Sequence[Scorer],
    *,
    n: int = 1,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    turned: Callable[[list[Message]], list[Message]] = list,
    batch_size: int = 256,
    store: Store | None = None,
) -> list[Point]:
    """Score every mix on every prompt; nothing is loaded or composed between mixes.

    Each row of a batch carries its own mix. Every mix draws with the same random numbers, which follow from `seed` and
    the prompt: mixes differ by their coefficients and not by their luck, on a part of the prompts as on all of them.

    Args:
        mixer: on the base, with the vectors that the mixes name.
        n: replies to each prompt.
        turned: what the model reads in place of a prompt's messages.
        store: what is known already, and where to keep what is new; in memory where left out.

    Returns:
        A point for each mix, in their order.

    Raises:
        InputError: a mix names an unknown vector, a prompt is longer than the context, or a scorer fails.
        RunError: the model's output is not finite.
    """
    plan = Plan(mixes, prompts, n, max_new_tokens, temperature, top_p, seed, turned)
    store = store or Store()
    complete(plan, scorers, lambda: (base, mixer), store, batch_size=batch_size)
    return points(plan, scorers, store)


def complete(plan: Plan, scorers: Sequence[Scorer], load: Loader, store: Store, *, batch_size: int) -> dict[str, int]:
    """Write and grade what the store lacks; say before what it may cost, and show how far it has come.

    Returns:
        Scorer -> how many of its answers cannot be read, of those of which there are some.

    Raises:
        InputError, RunError: as `evaluate`.
    """
    for told in costs(plan, scorers, store):
        out.note(told)
    keys = plan.keys(store)
    with progress("generating", len(set(keys)), start=len(store.replies(keys))) as bar:
        write(plan, load, store, batch_size=batch_size, bar=bar)
    own = {key for scorer in scorers for key in score_keys(plan, keys, scorer)}
    with progress("scoring", len(own), start=len(store.scores(own))) as bar:
        counts = {scorer.name: len(grade(plan, scorer, load, store, bar=bar)) for scorer in scorers}
    unread = {name: number for name, number in counts.items() if number}
    for name, number in unread.items():
        out.warn(unread_note(name, number))
    return unread


def points(plan: Plan, scorers: Sequence[Scorer], store: Store) -> list[Point]:
    """The points of a plan that is written and graded."""
    keys = plan.keys(store)
    replies = store.replies(keys)
    values = {}
    for scorer in scorers:
        own = score_keys(plan, keys, scorer)
        known = store.scores(own)
        values[scorer.name] = [known.get(key) for key in own]  # what cannot be read is not there
    size = len(plan.prompts) * plan.n
    found = []
    for i, mix in enumerate(plan.mixes):
        part = slice(i * size, (i + 1) * size)
        written = [replies[key] for key in keys[part]]
        mine = {name: scores[part] for name, scores in values.items()}
        found.append(
            Point(
                dict(mix),
                [one.text for one in written],
                {name: estimate(scores, plan.n) for name, scores in mine.items()},
                mine,
                [one.tokens for one in written],
                sum(not one.ended for one in written),
            )
        )
    return found


def score(
    prompts: Sequence[Prompt], replies: Sequence[str], scorers: Sequence[Scorer], writer: Writer | None = None
) -> dict[str, Score]:
    """The scores of replies, one per prompt, by scorer name.

    Raises:
        InputError: as `scorers.apply`.
    """
    return {scorer.name: estimate(apply(scorer, prompts, replies, writer)) for scorer in scorers}
