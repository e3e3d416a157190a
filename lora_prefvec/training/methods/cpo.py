"""CPO, Controllable Preference Optimization (arXiv 2402.19085): a prompt asks for levels of some axes, by tags.

CPSFT: maximise log pi(y | c, x) over every rated reply y, c being tags of its own ratings.
CDPO:  minimise -log sigma(beta [log pi(w | c, x) / ref(w | c, x) - log pi(l | c, x) / ref(l | c, x)])

over pairs of replies to x and conditions c with R(w | c) > R(l | c); the reference is what CPSFT made, and training
goes on from there. Without tags R is the sum of the ratings: an untagged prompt asks for the best reply.

    R(y | c) = sum_i omega_i g_i,  g_i = -lambda_i |P_i - c_i| on the axes that c names, P_i on the others

The authors' script has other names for an axis in the second stage than in the first, -|P| - c for honesty, and P in
the place of an exact match; here is the formula. Unlike theirs, fine-tuning leaves the prompt's own tokens out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lora_prefvec.artifact import ConditionFacts, DataFacts, conditioned
from lora_prefvec.data import Message, Pair, RatedReplies, split_held_out
from lora_prefvec.errors import InputError
from lora_prefvec.inference import LiveMixer, LoadedBase, RenderedPair, pair_log_probs, render_pairs
from lora_prefvec.progress import progress
from lora_prefvec.recipe import CpoSpec, DataSpec, Recipe, TrainingSpec
from lora_prefvec.training.levels import Dice, advantage, levels_of
from lora_prefvec.training.made import Made
from lora_prefvec.training.prepare import data_facts, pair_columns, report_cuts
from lora_prefvec.training.replies import PreparedReplies, ReplyTrainer, render_replies
from lora_prefvec.training.rows import check_rated, read_rated
from lora_prefvec.training.run import Job, run, total_steps
from lora_prefvec.training.trainer import AdapterTrainer
from lora_prefvec.vector import PreferenceVector

CPSFT, CDPO = "cpsft", "cdpo"


@dataclass(frozen=True)
class Tagged:
    """Replies and pairs under drawn conditions, before any model is loaded; all prompts carry their tags.

    Args:
        replies: prompts with replies that are just as they ask.
        train, held_out: pairs of which the reply that is more as the prompt asks is the chosen one.
        contrasts: axis -> held-out pairs, each twice: under the level of one reply, and turned under that of the other.
    """

    condition: ConditionFacts
    replies: list[tuple[list[Message], list[Message]]]
    train: list[Pair]
    held_out: list[Pair]
    contrasts: dict[str, list[Pair]]
    data: DataFacts

    @property
    def hashes(self) -> list[str | None]:
        """What tells whether a run goes on with the data that it began with."""
        return [self.data.sha256]


@dataclass(frozen=True)
class PreparedTags:
    """`Tagged`, rendered for a base."""

    tagged: Tagged
    replies: PreparedReplies
    pairs: list[RenderedPair]
    held_out: list[RenderedPair]
    contrasts: dict[str, list[RenderedPair]]


@dataclass(frozen=True)
class Referenced:
    """Pairs with the reference's log-probabilities, in the form in which `run` takes them."""

    dataset: Dataset
    held_out: list[RenderedPair]
    held_out_reference: Tensor


class CdpoTrainer(AdapterTrainer):
    """DPO as it is; columns prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps."""

    def collate(self, pad_token_id: int) -> DataCollatorForPreference:
        """Pairs with their reference."""
        return DataCollatorForPreference(pad_token_id=pad_token_id)


def runs(recipe: Recipe) -> tuple[str, ...]:
    """Fine-tuning, then DPO."""
    return CPSFT, CDPO


def steps(recipe: Recipe, tagged: Tagged) -> int:
    """Optimiser steps of both runs."""
    return total_steps(fine_tuning(recipe), len(tagged.replies)) + total_steps(recipe.training, len(tagged.train))


def load(recipe: Recipe) -> Tagged:
    """Read the rated replies, set the held-out prompts apart, and draw conditions.

    Raises:
        InputError: an objective is not rated, or its ratings are no levels; or the conditions order no pair.
    """
    spec, seed = _spec(recipe), recipe.training.seed
    assert recipe.data is not None
    found = read_rated(recipe.data, seed)
    check_rated(found, list(spec.objectives))
    facts = levels_of(found, spec)
    if isinstance(recipe.held_out, DataSpec):
        train, held_out = found.groups, read_rated(recipe.held_out, seed).groups
    else:
        train, held_out = split_held_out(found.groups, recipe.held_out, seed)

    def dice(purpose: str) -> Dice:
        return Dice(spec, facts.levels, random.Random(f"cpo {purpose} {seed}"))

    own = dice(CPSFT)
    replies = [
        (conditioned(facts, own.condition_of(one, group), group.prompt), one.reply)
        for group in train
        for one in group.replies
    ]
    pairs = draw_pairs(train, facts, dice(CDPO))
    if not pairs:
        raise InputError(f"no two replies in {found.source} differ in what the conditions ask for", "Give other ones.")
    data = data_facts(found, recipe.data)
    return Tagged(
        facts, replies, pairs, draw_pairs(held_out, facts, dice("held out")), contrasts(held_out, facts), data
    )


def draw_pairs(groups: Sequence[RatedReplies], facts: ConditionFacts, dice: Dice) -> list[Pair]:
    """Two replies to each prompt under a drawn condition, so often as the recipe says; ties are left out."""
    pairs = []
    for group in groups:
        for _ in range(dice.spec.pairs if len(group.replies) > 1 else 0):
            one, other = dice.random.sample(group.replies, 2)
            condition = dice.condition()
            gain = advantage(one, other, condition, dice.spec.objectives)
            if gain and one.reply != other.reply:
                chosen, rejected = (one, other) if gain > 0 else (other, one)
                pairs.append(Pair(conditioned(facts, condition, group.prompt), chosen.reply, rejected.reply))
    return pairs


def contrasts(groups: Sequence[RatedReplies], facts: ConditionFacts) -> dict[str, list[Pair]]:
    """For each axis, two replies of each prompt that are rated apart on it; see `Tagged`."""
    found: dict[str, list[Pair]] = {}
    for axis, known in facts.levels.items():
        found[axis] = []
        for group in groups:
            rated = [one for one in group.replies if one.ratings.get(axis) in known]
            other = next((one for one in rated if one.ratings[axis] != rated[0].ratings[axis]), None)
            for own, another in [(rated[0], other), (other, rated[0])] if other else []:
                prompt = conditioned(facts, {axis: own.ratings[axis]}, group.prompt)
                found[axis].append(Pair(prompt, own.reply, another.reply))
    return found


def prepare(recipe: Recipe, tagged: Tagged, base: LoadedBase) -> PreparedTags:
    """Render everything for `base`."""
    limits = {name: getattr(recipe.training, name) for name in ("max_prompt_tokens", "max_reply_tokens")}
    pairs, held_out = (render_pairs(part, base.tokenizer, **limits) for part in (tagged.train, tagged.held_out))
    report_cuts([pairs, held_out], recipe)
    return PreparedTags(
        tagged,
        render_replies(tagged.replies, base.tokenizer, **limits),
        pairs.pairs,
        held_out.pairs,
        {axis: render_pairs(part, base.tokenizer, **limits).pairs for axis, part in tagged.contrasts.items()},
    )


def make(job: Job, prepared: PreparedTags) -> Made:
    """Fine-tune on replies as they are asked for, then prefer what is more as it is asked for."""
    base, recipe, tagged = job.base, job.recipe, prepared.tagged
    sft = fine_tuning(recipe)

    def cpsft_trainer(folder: Path) -> ReplyTrainer:
        return ReplyTrainer(base, recipe.lora, sft, prepared.replies.dataset, folder)

    sft_job = replace(job, recipe=recipe.model_copy(update={"training": sft}))
    cpsft = run(sft_job, CPSFT, cpsft_trainer, prepared.replies)
    pairs = refer(base, cpsft.vector, prepared, batch_size=max(2 * recipe.training.micro_batch_size, 2))

    def cdpo_trainer(folder: Path) -> CdpoTrainer:
        return CdpoTrainer(base, recipe.lora, recipe.training, pairs.dataset, folder, start=cpsft.vector)

    cdpo = run(job, CDPO, cdpo_trainer, pairs)
    facts = {
        "method": "cpo",
        "condition": tagged.condition,
        "objectives": [{"name": name, "weight": one.weight} for name, one in _spec(recipe).objectives.items()],
    }
    first = Made(
        kind="conditional_adapter",
        vector=cpsft.vector,
        runs=[cpsft],
        data=tagged.data,
        facts=facts,
        metrics=tag_gains(base, cpsft.vector, prepared.contrasts),
        training=sft,
    )
    return Made(
        kind="conditional_adapter",
        vector=cdpo.vector,
        runs=[cpsft, cdpo],
        data=tagged.data,
        facts=facts,
        metrics={
            "held_out_accuracy": cdpo.accuracy,
            "held_out_pairs": len(prepared.held_out),
            **tag_gains(base, cdpo.vector, prepared.contrasts),
        },
        parts={CPSFT: first},
        coefficients={CPSFT: 1.0},
    )


def fine_tuning(recipe: Recipe) -> TrainingSpec:
    """The settings of CPSFT."""
    spec, training = _spec(recipe), recipe.training
    changed: dict[str, object] = {}
    if spec.sft_learning_rate is not None:
        changed["learning_rate"] = spec.sft_learning_rate
    if spec.sft_epochs is not None:
        changed |= {"epochs": spec.sft_epochs, "max_steps": None}
    if spec.sft_batch_size is not None:
        micro = math.gcd(training.micro_batch_size, spec.sft_batch_size)
        changed |= {"batch_size": spec.sft_batch_size, "micro_batch_size": micro}
    return training.model_copy(update=changed)


def refer(base: LoadedBase, vector: PreferenceVector, prepared: PreparedTags, *, batch_size: int) -> Referenced:
    """The pairs with their log-probabilities under `base` with `vector`, from which DPO starts."""
    train, held_out = prepared.pairs, prepared.held_out
    with progress("reference", len(train) + len(held_out)) as bar:
        reference = log_probs(base, vector, [*train, *held_out], batch_size, bar.advance)
    dataset = Dataset.from_dict(pair_columns(train, reference[: len(train)]))
    return Referenced(dataset, held_out, reference[len(train) :])


def tag_gains(
    base: LoadedBase, vector: PreferenceVector, contrasts: dict[str, list[RenderedPair]]
) -> dict[str, float | None]:
    """How much more likely a reply is under the tag of its own level than under that of another: mean, in nats."""
    gains: dict[str, float | None] = {}
    for axis, pairs in contrasts.items():
        found = log_probs(base, vector, pairs).view(-1, 2, 2)  # [prompts, whose level is asked for, that one or other]
        own, other = found[:, :, 0].sum(dim=1), found[:, :, 1].sum(dim=1)
        gains[f"tag_gain.{axis}"] = round(((own - other) / 2).mean().item(), 4) if pairs else None
    return gains


def log_probs(
    base: LoadedBase,
    vector: PreferenceVector,
    pairs: Sequence[RenderedPair],
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """`pair_log_probs` of the base with an adapter."""
    with LiveMixer(base.model, {"adapter": vector}) as mixer:
        mixer.set_mix({"adapter": 1.0})
        return pair_log_probs(
            base.model, pairs, pad_token_id=base.tokenizer.pad_token_id, batch_size=batch_size, on_batch=on_batch
        )


def _spec(recipe: Recipe) -> CpoSpec:
    assert isinstance(recipe.method, CpoSpec)
    return recipe.method
