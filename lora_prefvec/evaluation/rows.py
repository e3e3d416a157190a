"""The rows of a sweep: every mix on every prompt, written in mixed batches and scored, each at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from lora_prefvec.data import Message
from lora_prefvec.errors import InputError, RunError
from lora_prefvec.evaluation.scorers import Prompt, Scorer, Unread, Writer, answers, fingerprint, messages_of
from lora_prefvec.evaluation.store import Store, Written, digest
from lora_prefvec.inference import ContinuousBatch, LiveMixer, LoadedBase, Reply, Request, Sampling, encode
from lora_prefvec.progress import Progress

Loader = Callable[[], tuple[LoadedBase, LiveMixer]]
Item = TypeVar("Item")

ROUND = 4  # batches that are kept together: nothing of a round is kept before all of it is there
SCORED = 256  # replies that a scorer gets at once


@dataclass(frozen=True)
class Row:
    """One reply that is asked for."""

    mix: Mapping[str, float]
    prompt: Prompt
    asked: list[Message]
    sampling: Sampling


@dataclass(frozen=True)
class Plan:
    """What is asked for: `n` replies to every prompt with every mix.

    A row's seed follows from `seed`, its prompt and its number among the replies to it: mixes differ by their
    coefficients and not by their luck, and a row stays the same when prompts or mixes are added beside it.

    Args:
        turned: what the model reads in place of a prompt's messages; scorers are given the prompt itself.

    Raises:
        InputError: a setting is out of range, or several replies are asked for that would be one and the same.
    """

    mixes: Sequence[Mapping[str, float]]
    prompts: Sequence[Prompt]
    n: int = 1
    max_new_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    turned: Callable[[list[Message]], list[Message]] = list

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"{self.n} replies to each prompt are asked for", "Take 1 or more.")
        if self.n > 1 and self._sampling("").greedy:
            raise InputError(
                f"{self.n} greedy replies to one prompt are all the same", "Take one, or a temperature such as 1."
            )

    @cached_property
    def rows(self) -> list[Row]:
        """Mix by mix, prompt by prompt, the replies to a prompt side by side."""
        seeds = [digest(messages_of(prompt))[:16] for prompt in self.prompts]
        samplings = [[self._sampling(f"{self.seed}:{seed}:{i}") for i in range(self.n)] for seed in seeds]
        turned = [self.turned(messages_of(prompt)) for prompt in self.prompts]
        return [
            Row(mix, prompt, asked, sampling)
            for mix in self.mixes
            for prompt, asked, own in zip(self.prompts, turned, samplings, strict=True)
            for sampling in own
        ]

    def keys(self, store: Store) -> list[str]:
        """The key of every row."""
        settings = [self.max_new_tokens, self.temperature, self.top_p]
        return [store.key(row.mix, [row.asked, *settings, row.sampling.seed]) for row in self.rows]

    def _sampling(self, seed: str) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, seed=seed)


def write(plan: Plan, load: Loader, store: Store, *, batch_size: int = 64, bar: Progress | None = None) -> None:
    """Generate the replies that the store lacks.

    They are written in rounds of `ROUND` batches, and a round is kept as a whole. So the rows that stand beside each
    other are the same however often a run was stopped, and with them the replies: in bfloat16 the rounding of a row
    depends on the rows beside it.

    Args:
        load: the base and its mixer; not called where nothing is missing.
        bar: advanced by one for each new reply.

    Raises:
        InputError: a mix names an unknown vector, or a prompt is longer than the context.
        RunError: the model's output is not finite.
    """
    for group in _groups(list(zip(plan.keys(store), plan.rows, strict=True)), ROUND * batch_size):
        wanted = dict(group)
        for key in store.replies(wanted):
            del wanted[key]
        if wanted:
            store.add_replies(_generate(wanted, *load(), batch_size, bar))


def grade(plan: Plan, scorer: Scorer, load: Loader, store: Store, *, bar: Progress | None = None) -> set[str]:
    """Score the replies, all of which the store has, where it lacks the scores.

    Args:
        load: the base and its mixer, for a scorer that asks the model.
        bar: advanced by one for each new score.

    Returns:
        The keys of scores that cannot be read from the scorer's answers: the store lacks them still.

    Raises:
        InputError, RunError: as `scorers.answers`.
    """
    keys = plan.keys(store)
    own = score_keys(plan, keys, scorer)
    known, written = store.scores(own), store.replies(keys)
    rows = zip(own, plan.rows, (written[key].text for key in keys), strict=True)
    groups = [[one for one in group if one[0] not in known] for group in _groups(list(rows), SCORED)]
    some, unread = any(score is not None for score in known.values()), set()
    for group in filter(None, groups):
        asks_model = getattr(scorer, "needs_model", False)
        writer = Writer(*load(), [row.mix for _, row, _ in group]) if asks_model else None
        prompts, replies = [row.prompt for _, row, _ in group], [reply for _, _, reply in group]
        found = dict(
            zip((key for key, _, _ in group), answers(scorer, prompts, replies, writer, known=some), strict=True)
        )
        scores = {key: score for key, score in found.items() if not isinstance(score, Unread)}
        store.add_scores(scores)
        unread |= found.keys() - scores.keys()
        some = some or any(score is not None for score in scores.values())
        if bar is not None:
            bar.advance(len(group), info=scorer.name)
    return unread


def costs(plan: Plan, scorers: Sequence[Scorer], store: Store) -> list[str]:
    """What the scores that the store lacks would cost, of the scorers that know: `judge: 12 calls of ...`."""
    keys = plan.keys(store)
    written, told = store.replies(keys), []
    for scorer in scorers:
        if not hasattr(scorer, "cost"):
            continue
        own = score_keys(plan, keys, scorer)
        known = store.scores(own)
        lacking = [
            (row.prompt, written[key].text if key in written else None)
            for key, mine, row in zip(keys, own, plan.rows, strict=True)
            if mine not in known
        ]
        if lacking:
            told.append(f"{scorer.name}: {scorer.cost(*zip(*lacking, strict=True))}")
    return told


def score_keys(plan: Plan, keys: Sequence[str], scorer: Scorer) -> list[str]:
    """The key of every row's score, from those of the replies: a scorer may read all of a prompt's record."""
    own = fingerprint(scorer)
    records = [digest([own, one if isinstance(one, str | Mapping) else list(one)]) for one in plan.prompts]
    return [digest([records[i // plan.n % len(plan.prompts)], key]) for i, key in enumerate(keys)]


def _generate(
    wanted: Mapping[str, Row], loaded: LoadedBase, mixer: LiveMixer, batch_size: int, bar: Progress | None
) -> dict[str, Written]:
    """The replies to some rows, all of them at once in one batch that they join and leave."""
    batch = ContinuousBatch(loaded, mixer, max_rows=batch_size)
    before = mixer.mix
    requests = {key: Request(encode(loaded, row.asked), row.mix, row.sampling) for key, row in wanted.items()}
    longest_first = sorted(requests, key=lambda key: -len(requests[key].prompt))  # memory peaks at once
    replies = {key: batch.add(requests[key]) for key in longest_first}
    try:
        for reply in _finished(batch):
            if reply.error is not None:
                mix = " ".join(f"{name}={value:g}" for name, value in reply.request.mix.items())
                raise RunError(f"with the mix {mix or 'of nothing'}, {reply.error.problem}", reply.error.fix)
            if bar is not None:
                bar.advance()
    finally:
        mixer.set_mix(before)
    return {
        key: Written(reply.text, len(reply.tokens), reply.finish_reason == "stop") for key, reply in replies.items()
    }


def _finished(batch: ContinuousBatch) -> Iterator[Reply]:
    while batch.waiting or batch.running:
        yield from (reply for reply in batch.step() if reply.finish_reason is not None)


def _groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
