"""DPA (arXiv 2402.18571): directions in reward space, asked for in the prompt, by iterated rejection sampling.

    max E v . r(x, y)   over prompts x, directions v ~ P(v) and replies y ~ pi(. | x, v)

r is a reward model with one head for each axis, trained on the ratings of the data. At t = 0 the policy learns, of the
rated replies to each prompt, the one that is best by v . r for a v of its own, which stands in the prompt. Then, T
times, it replies itself n times to each (x, v), and learns the best of these.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from lora_prefvec.artifact import (
    ConditionFacts,
    DataFacts,
    RewardModel,
    atomic_file,
    conditioned,
    read_reward_model,
    resolve_adapter,
)
from lora_prefvec.data import Message, RatedReplies, split_held_out
from lora_prefvec.errors import InputError, Interrupted
from lora_prefvec.inference import LoadedBase, generate
from lora_prefvec.inference.render import chat_ids, has_system_turn
from lora_prefvec.output import out
from lora_prefvec.progress import progress
from lora_prefvec.recipe import DataSpec, DpaSpec, Recipe
from lora_prefvec.training.made import Made
from lora_prefvec.training.prepare import data_facts
from lora_prefvec.training.replies import ReplyTrainer
from lora_prefvec.training.reward_model import (
    Conversation,
    adapted,
    render,
    rewards,
    standardised,
    trained_reward_model,
)
from lora_prefvec.training.rows import check_rated, read_rated
from lora_prefvec.training.run import FINISHED, Finished, Job, read_finished, run
from lora_prefvec.vector import PreferenceVector

__all__ = ["best_of", "cone", "draw", "load", "make", "prepare", "runs"]

AT_ONCE = 128  # replies that are sampled side by side, and kept together
Said = list[Message]


@dataclass(frozen=True)
class Groups:
    """The rated replies of a recipe.

    Args:
        reward: SHA-256 of the reward model that the recipe names; None where one is to be trained.
    """

    train: list[RatedReplies]
    held_out: list[RatedReplies]
    data: DataFacts
    reward: str | None = None

    @property
    def hashes(self) -> list[str | None]:
        """What tells whether a run goes on with the data that it began with."""
        return [one for one in (self.data.sha256, self.reward) if one]


@dataclass(frozen=True)
class Prepared:
    """The groups whose prompts are short enough, and how the base is asked for a direction."""

    groups: Groups
    condition: ConditionFacts


@dataclass(frozen=True)
class Asked:
    """A prompt with its rated replies, and the direction in which a reply is wanted: axis -> its part, of length 1."""

    group: RatedReplies
    direction: dict[str, float]


def runs(recipe: Recipe) -> tuple[str, ...]:
    """Fine-tuning on the rated replies, and after each round of sampling; the reward model may be there already."""
    return tuple(f"sft-{t}" for t in range(_spec(recipe).iterations + 1))


def load(recipe: Recipe) -> Groups:
    """The rated replies; a reward model that the recipe names is looked at, too.

    Raises:
        InputError: a source or the reward model is missing or unreadable, or does not rate all axes.
    """
    spec, seed = _spec(recipe), recipe.training.seed
    assert recipe.data is not None
    found = read_rated(recipe.data, seed)
    check_rated(found, list(spec.axes))
    if isinstance(recipe.held_out, DataSpec):
        train, held_out = found.groups, read_rated(recipe.held_out, seed).groups
    else:
        train, held_out = split_held_out(found.groups, recipe.held_out, seed)
    data = data_facts(found, recipe.data)
    reward = None
    if spec.reward.folder:
        _, facts = read_reward_model(resolve_adapter(spec.reward.folder), axes=list(spec.axes))
        reward = f"{facts.weights_sha256} {facts.reward.heads_sha256 if facts.reward else None}"
    return Groups(train, held_out, data, reward)


def prepare(recipe: Recipe, groups: Groups, base: LoadedBase) -> Prepared:
    """Leave out the prompts that are too long: cut, they would lose their direction.

    Raises:
        InputError: there is no chat template, or no prompt is short enough.
    """
    spec = _spec(recipe)
    condition = ConditionFacts(
        kind="direction", axes=cone(spec), system=has_system_turn(base.tokenizer), grades=spec.grades
    )
    edge = Asked(groups.train[0], _turned(spec, math.radians(spec.cone), [-1.0] * (len(spec.axes) - 1)))

    def fits(group: RatedReplies) -> bool:
        ids = chat_ids(base.tokenizer, _written(condition, replace(edge, group=group)), add_generation_prompt=True)
        return len(ids) <= recipe.training.max_prompt_tokens

    train, held_out = ([group for group in part if fits(group)] for part in (groups.train, groups.held_out))
    if not train:
        raise InputError("with a direction, all prompts are too long", "Raise training.max_prompt_tokens.")
    if left_out := len(groups.train) - len(train):
        out.note(f"{left_out} of {len(groups.train)} prompts left out: too long with a direction")
    return Prepared(replace(groups, train=train, held_out=held_out), condition)


def make(job: Job, prepared: Prepared) -> Made:
    """Train the reward model, a policy on rated replies, and T times the policy on the best of its own replies."""
    spec, groups, condition = _spec(job.recipe), prepared.groups, prepared.condition
    folder = (
        resolve_adapter(spec.reward.folder)
        if spec.reward.folder
        else trained_reward_model(job, list(spec.axes), groups.train, groups.held_out, groups.data)
    )
    model, facts = read_reward_model(folder, axes=list(spec.axes), base=job.identity)
    made: list[Made] = []
    for name in runs(job.recipe):
        before = made[-1].vector if made else None
        policy = _finished(job, name)
        if policy is None:
            count = len(groups.train) if before is None else spec.prompts
            asked = draw_asked(spec, groups.train, count, f"{job.recipe.training.seed} {name}")
            if before is None:
                replies = best_rated(job, model, asked)
            else:
                sampled = sample(job, condition, before, f"{name} sampled", asked, spec.samples)
                replies = best_of(asked, sampled, rate(job, model, _rows(asked, sampled)))
            policy = fine_tune(job, condition, name, asked, replies, before)
        made.append(
            Made(
                kind="conditional_adapter",
                vector=policy.vector,
                runs=[policy],
                data=groups.data,
                facts={"method": spec.name, "condition": condition},
                metrics=measure(job, condition, model, name, policy.vector, groups.held_out),
            )
        )
    steps = dict(zip(runs(job.recipe), made, strict=True))
    metrics = {f"reward.{name}": value for name, value in facts.metrics.items()}
    metrics |= {f"{key}.{name}": value for name, one in steps.items() for key, value in one.metrics.items()}
    *earlier, last = steps
    return replace(
        steps[last],
        runs=[done for one in made for done in one.runs],
        metrics=metrics,
        parts={name: steps[name] for name in earlier},
        folders={"reward": folder},
    )


# -- directions -------------------------------------------------------------------------------------------------------


def draw(spec: DpaSpec, dice: random.Random) -> dict[str, float]:
    """A direction of P(v): its angle from the main axis is uniform up to the cone's, and all turns are alike.

    With two axes that is the paper's: an angle that is uniform between -cone and cone.
    """
    angle = math.radians(dice.uniform(0, spec.cone))
    return _turned(spec, angle, [dice.gauss(0, 1) for _ in range(len(spec.axes) - 1)])


def _turned(spec: DpaSpec, angle: float, towards: Sequence[float]) -> dict[str, float]:
    """The main axis turned by an angle towards a direction in the others."""
    length = math.hypot(*towards)
    parts = (math.cos(angle), *(math.sin(angle) * part / length for part in towards))
    return dict(zip(spec.axes, parts, strict=True))


def cone(spec: DpaSpec) -> dict[str, tuple[float, float]]:
    """Axis -> the least and the greatest part that a direction of P(v) has of it, rounded outwards to hundredths."""
    main, *others = spec.axes
    side = math.ceil(100 * math.sin(math.radians(spec.cone)) - 1e-9) / 100
    return {main: (math.floor(100 * math.cos(math.radians(spec.cone)) + 1e-9) / 100, 1.0)} | dict.fromkeys(
        others, (-side, side)
    )


def draw_asked(spec: DpaSpec, groups: Sequence[RatedReplies], count: int, seed: str) -> list[Asked]:
    """`count` prompts in a seeded order, each used again only after all were used, and a direction for each."""
    dice, places = random.Random(f"directions {seed}"), list[int]()
    while len(places) < count:
        places += dice.sample(range(len(groups)), min(len(groups), count - len(places)))
    return [Asked(groups[place], draw(spec, dice)) for place in places]


# -- replies ----------------------------------------------------------------------------------------------------------


def best_of(asked: Sequence[Asked], replies: Sequence[Sequence[Said]], r: Tensor) -> list[Said]:
    """Of the replies to each prompt the one with the largest v . r.

    Args:
        r: [all replies, m], in order.
    """
    found, start = [], 0
    for one, candidates in zip(asked, replies, strict=True):
        values = r[start : start + len(candidates)] @ torch.tensor(list(one.direction.values()))
        found.append(candidates[int(values.argmax())])
        start += len(candidates)
    return found


def best_rated(job: Job, model: RewardModel, asked: Sequence[Asked]) -> list[Said]:
    """The best of the rated replies, by their ratings; what nobody rated, the reward model does."""
    spec = _spec(job.recipe)
    replies = [[reply.reply for reply in one.group.replies] for one in asked]
    scales = dict(model.axes)
    given = torch.tensor([standardised(reply.ratings, scales) for one in asked for reply in one.group.replies])
    r = given * torch.tensor(list(spec.axes.values()))
    unrated = r.isnan().any(dim=1)
    if unrated.any():
        rows = list(compress(_rows(asked, replies), unrated))
        r[unrated] = torch.where(r[unrated].isnan(), rate(job, model, rows), r[unrated])
    return best_of(asked, replies, r)


def rate(job: Job, model: RewardModel, rows: Sequence[Conversation]) -> Tensor:
    """r of prompts with a reply each, [n, m]: what the reward model says, in standard deviations, more being better."""
    signs = torch.tensor(list(_spec(job.recipe).axes.values()))
    return rewards(job.base, model, rows, job.recipe.training) * signs


def sample(
    job: Job, condition: ConditionFacts, policy: PreferenceVector, name: str, asked: Sequence[Asked], n: int
) -> list[list[Said]]:
    """n replies of the policy to each prompt with its direction; those that were written once are kept on disk.

    Raises:
        Interrupted: Ctrl-C.
    """
    spec, training = _spec(job.recipe), job.recipe.training
    folder, together = job.work / name.replace(" ", "/"), max(1, AT_ONCE // n)
    found: list[list[Said]] = []
    with adapted(job.base, policy), progress(f"{job.recipe.preference} {name}", len(asked) * n) as bar:
        for start in range(0, len(asked), together):
            part, file = asked[start : start + together], folder / f"{start}.json"
            if file.is_file():
                texts = json.loads(file.read_text(encoding="utf-8"))
                bar.advance(len(texts))
            else:
                try:
                    texts = generate(
                        job.base,
                        [_written(condition, one) for one in part for _ in range(n)],
                        max_new_tokens=training.max_reply_tokens,
                        temperature=spec.temperature,
                        seed=random.Random(f"{training.seed} {name} {start}").getrandbits(31),
                        batch_size=AT_ONCE,
                        bar=bar,
                    )
                except KeyboardInterrupt:
                    raise Interrupted(
                        f"stopped at prompt {start} of {len(asked)}; all of it is saved",
                        "Go on with the same command and --resume.",
                    ) from None
                with atomic_file(file, force=True) as work:
                    work.write_text(json.dumps(texts), encoding="utf-8")
            said = [[{"role": "assistant", "content": text}] for text in texts]
            found += [said[place : place + n] for place in range(0, len(said), n)]
    return found


def fine_tune(
    job: Job,
    condition: ConditionFacts,
    name: str,
    asked: Sequence[Asked],
    replies: Sequence[Said],
    start: PreferenceVector | None = None,
) -> Finished:
    """SFT on (x, v, y), from the policy before on."""
    rows = [(_written(condition, one), reply) for one, reply in zip(asked, replies, strict=True)]
    data = render(job.base, rows, job.recipe.training)
    return run(
        job,
        name,
        lambda folder: ReplyTrainer(job.base, job.recipe.lora, job.recipe.training, data.dataset, folder, start),
        data,
    )


def measure(
    job: Job,
    condition: ConditionFacts,
    model: RewardModel,
    name: str,
    policy: PreferenceVector,
    held_out: Sequence[RatedReplies],
) -> dict[str, float | None]:
    """The policy's mean v . r, with one reply and one direction for each held-out prompt, the same for all policies."""
    if not held_out:
        return {}
    seed = f"{job.recipe.training.seed} held out"
    asked = draw_asked(_spec(job.recipe), held_out, len(held_out), seed)
    r = rate(job, model, _rows(asked, sample(job, condition, policy, f"{name} held-out", asked, 1)))
    values = (r * torch.tensor([list(one.direction.values()) for one in asked])).sum(dim=1)
    return {"value": round(values.mean().item(), 4)}


def _written(condition: ConditionFacts, asked: Asked) -> list[Message]:
    """The prompt with its direction in it."""
    return conditioned(condition, asked.direction, asked.group.prompt)


def _rows(asked: Sequence[Asked], replies: Sequence[Sequence[Said]]) -> list[Conversation]:
    """All replies in order, each with its prompt, which says nothing of the direction."""
    return [(one.group.prompt, reply) for one, own in zip(asked, replies, strict=True) for reply in own]


def _finished(job: Job, name: str) -> Finished | None:
    done = job.work / name / FINISHED
    return read_finished(done, job.identity) if done.is_dir() else None


def _spec(recipe: Recipe) -> DpaSpec:
    assert isinstance(recipe.method, DpaSpec)
    return recipe.method
