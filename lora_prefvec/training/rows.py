"""Pairs with a sign for each of several objectives: from a recipe's data to rows that a trainer takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lora_prefvec.artifact import DataFacts, public_name
from lora_prefvec.data import Content, Pair, RatedPair, RatedSet, load_rated, rated_pairs, split_held_out
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.inference import LiveMixer, LoadedBase, RenderedPair, pair_log_probs, render_pairs
from lora_prefvec.output import out
from lora_prefvec.recipe import DataSpec, ObjectiveSpec, Recipe
from lora_prefvec.training.prepare import anchors_for, data_facts, pair_columns, read, report_cuts
from lora_prefvec.training.reference import reference_log_probs

NO_PART = math.nan


@dataclass(frozen=True)
class Row:
    """A pair as m objectives see it.

    Args:
        signs: for each, +1 where it prefers the chosen reply, -1 the rejected one, 0 for a tie, and NaN where the pair
            is none of its data.
        strength: multiplies beta for this pair.
    """

    pair: Pair
    signs: tuple[float, ...]
    strength: float = 1.0

    @property
    def prompt(self) -> Content:
        """Of the pair."""
        return self.pair.prompt


@dataclass(frozen=True)
class Rows:
    """The data of a recipe whose objectives are `names`, before any model is loaded.

    Args:
        weights: of the objectives; a row is turned so that what they prefer together is its chosen reply.
        data: what provenance records of the recipe's `data`; None where there is none.
        own: the same of objectives with data of their own, and of their anchors.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    train: list[Row]
    held_out: list[Row]
    data: DataFacts | None
    own: dict[str, tuple[DataFacts, DataFacts | None]]

    @property
    def hashes(self) -> list[str | None]:
        """What tells whether a run goes on with the data that it began with."""
        return [one.sha256 for one in (self.data, *chain(*self.own.values())) if one]


@dataclass(frozen=True)
class PreparedRows:
    """Rows as a base meets them.

    Args:
        dataset: columns prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps, signs, strength,
            offset.
        held_out, held_out_reference, held_out_signs: n pairs, [n, 2] and [n, m].
    """

    rows: Rows
    dataset: Dataset
    held_out: list[RenderedPair]
    held_out_reference: Tensor
    held_out_signs: Tensor


See = Callable[[RatedPair], Row | None]
Offsets = Callable[[LoadedBase, Sequence[RenderedPair], Tensor], Tensor]


def load_rows(
    recipe: Recipe,
    weights: dict[str, float],
    see: See,
    objectives: Mapping[str, ObjectiveSpec] | None = None,
    also: Sequence[str] = (),
) -> Rows:
    """Read the pairs of a recipe, and set the held-out ones apart.

    Args:
        weights: objective -> weight.
        also: further ratings that are needed.
        see: what a rated pair is to the objectives; None where none of them has a say.
        objectives: what the recipe says of them; those with pairs of their own learn from these alone.

    Raises:
        InputError: a source is missing, unreadable or empty, or an objective has no pairs.
    """
    own = {name: one for name, one in (objectives or {}).items() if one.data}
    names = tuple(weights)
    rows: list[Row] = []
    rated: RatedSet | None = None
    if own.keys() != weights.keys():
        assert recipe.data is not None
        rated = read_rated(recipe.data, recipe.training.seed)
        check_rated(rated, [*(name for name in names if name not in own), *also])
        rows += filter(None, map(see, rated_pairs(rated.groups)))
    own_facts = {}
    for place, name in enumerate(names):
        if name in own:
            spec = own[name].data
            assert spec is not None
            found = read(spec, recipe.training.seed)
            anchors, anchor_facts = anchors_for(found.pairs, own[name].anchors, recipe.training.seed)
            own_facts[name] = data_facts(found, spec), anchor_facts
            signs = tuple(1.0 if place == other else NO_PART for other in range(len(names)))
            rows += [Row(pair, signs) for pair in (*found.pairs, *anchors)]
    for place, name in enumerate(names):
        if not any(row.signs[place] in (1, -1) for row in rows):
            raise InputError(
                f"no pair tells which reply is better for the objective {name!r}", "Look at its ratings or signs."
            )
    if isinstance(recipe.held_out, DataSpec):
        train = rows
        rated_held_out = read_rated(recipe.held_out, recipe.training.seed)
        check_rated(rated_held_out, [*names, *also])
        held_out = list(filter(None, map(see, rated_pairs(rated_held_out.groups))))
    else:
        train, held_out = split_held_out(rows, recipe.held_out, recipe.training.seed)
    data = None
    if rated is not None and recipe.data is not None:
        data = data_facts(rated, recipe.data)
    w = tuple(weights.values())
    train, held_out = ([_turned(row, w) for row in part] for part in (train, held_out))
    return Rows(names, w, train, held_out, data, own_facts)


def read_rated(spec: DataSpec, seed: int) -> RatedSet:
    """The rated replies of one section, with a line about what was found."""
    found = load_rated(spec.source, split=spec.split, form=spec.form, rows=spec.rows, seed=seed)
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in sorted(found.skipped.items()))
    out.note(f"{public_name(spec.source)}: replies to {len(found)} prompts of the form {found.form}{skipped}")
    return found


def check_rated(found: RatedSet, names: Sequence[str]) -> None:
    """Raises InputError where nobody rated the replies for one of the objectives."""
    for name in names:
        if name not in found.objectives:
            raise InputError(
                f"{found.source} has no rating or sign for the objective {name!r}", nearest(name, found.objectives)
            )


def by_signs(names: Sequence[str]) -> See:
    """A rated pair by the sign of each objective; pairs on which all of them are even teach nothing."""

    def see(pair: RatedPair) -> Row | None:
        signs = [pair.sign(name) for name in names]
        return Row(pair.pair, tuple(float(sign or 0) for sign in signs)) if any(signs) else None

    return see


def _turned(row: Row, weights: Sequence[float]) -> Row:
    """The row with what the weights prefer as its chosen reply."""
    together = sum(w * sign for w, sign in zip(weights, row.signs, strict=True) if not math.isnan(sign))
    if together >= 0:
        return row
    pair = Pair(row.pair.prompt, row.pair.rejected, row.pair.chosen)
    return replace(row, pair=pair, signs=tuple(-sign for sign in row.signs))


def prepare_rows(recipe: Recipe, rows: Rows, base: LoadedBase, offsets: Offsets | None = None) -> PreparedRows:
    """Render the rows for `base` and give every one its reference log-probabilities.

    Args:
        offsets: what is taken off the log-ratio difference of each pair, [n] from the pairs and their reference; 0
            where it is left out.
    """
    spec = recipe.training
    rendered = [
        render_pairs(
            [row.pair for row in part],
            base.tokenizer,
            max_prompt_tokens=spec.max_prompt_tokens,
            max_reply_tokens=spec.max_reply_tokens,
        )
        for part in (rows.train, rows.held_out)
    ]
    report_cuts(rendered, recipe)
    kept = [rows.train[place] for place in rendered[0].places]
    train, held_out = (part.pairs for part in rendered)
    reference = reference_log_probs(base, [*train, *held_out], batch_size=max(2 * spec.micro_batch_size, 2))
    offset = offsets(base, train, reference[: len(train)]) if offsets else torch.zeros(len(train))
    dataset = Dataset.from_dict(
        {
            **pair_columns(train, reference[: len(train)]),
            "signs": [list(row.signs) for row in kept],
            "strength": [row.strength for row in kept],
            "offset": offset.tolist(),
        }
    )
    signs = torch.tensor([rows.held_out[place].signs for place in rendered[1].places]).view(-1, len(rows.names))
    return PreparedRows(rows, dataset, held_out, reference[len(train) :], signs)


def adapter_margins(base: LoadedBase, vector: Any, pairs: Sequence[RenderedPair], reference: Tensor) -> Tensor:
    """The log-ratio difference of an adapter for every pair, [n]: its implicit reward margin for beta = 1."""
    with LiveMixer(base.model, {"adapter": vector}) as mixer:
        mixer.set_mix({"adapter": 1.0})
        policy = pair_log_probs(base.model, pairs, pad_token_id=base.tokenizer.pad_token_id)
    ratio = policy - reference
    return ratio[:, 0] - ratio[:, 1]
