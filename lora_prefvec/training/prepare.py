"""From a recipe's data sections to rows that a trainer takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor

from lora_prefvec.artifact import DataFacts, public_name
from lora_prefvec.data import Pair, PairSet, RatedSet, load, split_held_out
from lora_prefvec.errors import InputError
from lora_prefvec.inference import LoadedBase, RenderedPair, RenderedPairs, render_pairs
from lora_prefvec.output import out
from lora_prefvec.recipe import AnchorSpec, DataSpec, Recipe
from lora_prefvec.training.reference import reference_log_probs


@dataclass(frozen=True)
class Prepared:
    """The data of a run, rendered, with reference log-probabilities.

    Args:
        dataset: training rows, anchors among them; columns as `PreferenceTrainer` takes them.
        held_out: pairs on which preference accuracy is measured.
        held_out_reference: [n, 2], the base's log-probabilities of `held_out`.
        data, anchors: what provenance records.
    """

    dataset: Dataset
    held_out: list[RenderedPair]
    held_out_reference: Tensor
    data: DataFacts
    anchors: DataFacts | None


@dataclass(frozen=True)
class Pairs:
    """The pairs that a recipe names, before any model is loaded."""

    own: list[Pair]
    held_out: list[Pair]
    anchors: list[Pair]
    data: DataFacts
    anchor_facts: DataFacts | None

    @property
    def hashes(self) -> list[str | None]:
        """What tells whether a run goes on with the data that it began with."""
        return [one.sha256 for one in (self.data, self.anchor_facts) if one]

    @property
    def train(self) -> list[Pair]:
        """Training pairs, the anchors last."""
        return [*self.own, *self.anchors]


def load_pairs(recipe: Recipe) -> Pairs:
    """Read all pairs of a recipe, set the held-out ones apart, and say what was found.

    Raises:
        InputError: a source is missing, unreadable or empty, or holds no usable pair.
    """
    assert recipe.data is not None  # only objectives bring data of their own
    found = read(recipe.data, recipe.training.seed)
    if isinstance(recipe.held_out, DataSpec):
        train, held_out = found.pairs, read(recipe.held_out, recipe.training.seed).pairs
    else:
        train, held_out = split_held_out(found.pairs, recipe.held_out, recipe.training.seed)
    anchors, anchor_facts = anchors_for(train, recipe.anchors, recipe.training.seed)
    return Pairs(train, held_out, anchors, data_facts(found, recipe.data), anchor_facts)


def prepare(recipe: Recipe, pairs: Pairs, base: LoadedBase) -> Prepared:
    """Render the pairs for `base` and give every one its reference log-probabilities."""
    spec = recipe.training
    rendered = [
        render_pairs(
            part, base.tokenizer, max_prompt_tokens=spec.max_prompt_tokens, max_reply_tokens=spec.max_reply_tokens
        )
        for part in (pairs.own, pairs.anchors, pairs.held_out)
    ]
    report_cuts(rendered, recipe)
    train, anchors, held_out = (part.pairs for part in rendered)
    together = [*train, *anchors, *held_out]
    reference = reference_log_probs(base, together, batch_size=max(2 * spec.micro_batch_size, 2))
    rows = [*train, *anchors]
    swaps_anchors = recipe.anchors is not None and recipe.anchors.swapped
    dataset = Dataset.from_dict(
        {
            **pair_columns(rows, reference[: len(rows)]),
            "swaps": [True] * len(train) + [swaps_anchors] * len(anchors),
        }
    )
    return Prepared(dataset, held_out, reference[len(rows) :], pairs.data, pairs.anchor_facts)


def read(spec: DataSpec, seed: int) -> PairSet:
    """The pairs of one section, with a line about what was found."""
    found = load(
        spec.source,
        split=spec.split,
        form=spec.form,
        columns=spec.columns,
        attribute=spec.attribute,
        margin=spec.margin,
        rows=spec.rows,
        seed=seed,
    )
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in sorted(found.skipped.items()))
    out.note(f"{public_name(spec.source)}: {len(found)} pairs of the form {found.form}{skipped}")
    return found


def data_facts(found: PairSet | RatedSet, spec: DataSpec) -> DataFacts:
    """What provenance says about a set of pairs or rated replies."""
    return DataFacts(
        id=public_name(spec.source),
        revision=found.revision,
        split=spec.split,
        form=found.form,
        sha256=found.sha256,
        rows=len(found),
    )


def anchors_for(pairs: list[Pair], spec: AnchorSpec | None, seed: int) -> tuple[list[Pair], DataFacts | None]:
    """As many anchors as go with these pairs, and what provenance says about them; none where there is no section."""
    if spec is None:
        return [], None
    found = read(spec, seed)
    return repeated(found.pairs, round(len(pairs) * spec.share / (1 - spec.share)), seed), data_facts(found, spec)


def repeated(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs in a seeded order, each used again only after all were used."""
    if count and not pairs:
        raise InputError("the anchors hold no pair", "Give another anchors.source, or leave anchors out.")
    drawn: list[Pair] = []
    generator = random.Random(f"anchors:{seed}")
    while len(drawn) < count:
        drawn += generator.sample(pairs, min(len(pairs), count - len(drawn)))
    return drawn


def pair_columns(pairs: Sequence[RenderedPair], reference: Tensor) -> dict[str, list[Any]]:
    """The columns that every DPO trainer reads; `reference` holds their log-probabilities, [pairs, 2]."""
    return {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
        "ref_chosen_logps": reference[:, 0].tolist(),
        "ref_rejected_logps": reference[:, 1].tolist(),
    }


def report_cuts(rendered: list[RenderedPairs], recipe: Recipe) -> None:
    """Say what the length limits cost, where they cost anything."""
    spec = recipe.training
    total = sum(len(part.pairs) + part.indistinct for part in rendered)
    cuts = [
        (sum(part.cut_prompts for part in rendered), f"prompts cut to {spec.max_prompt_tokens} tokens"),
        (sum(part.cut_replies for part in rendered), f"replies cut to {spec.max_reply_tokens} tokens"),
        (sum(part.indistinct for part in rendered), "pairs left out: replies equal after the cut"),
    ]
    for count, what in cuts:
        if count:
            out.note(f"{count} of {total} {what}")
