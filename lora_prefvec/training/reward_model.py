"""Reward models with several heads: ratings of replies by least squares on the base's last hidden state.

    min E sum_i (w_i' h(x, y) + b_i - z_i)^2

over the replies y that were rated on axis i, with h the last hidden state at the reply's last token and z_i the rating
in standard deviations from its mean. It is the reward model of DPA (arXiv 2402.18571), on an adapter of the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_prefvec.artifact import DataFacts, RewardModel, atomic_folder, fill_reward_model, read_reward_model
from lora_prefvec.data import Message, RatedReplies
from lora_prefvec.errors import InputError, PrefvecError
from lora_prefvec.inference import LiveMixer, LoadedBase, final_states, last_states
from lora_prefvec.progress import progress
from lora_prefvec.recipe import LoraSpec, RewardSpec, TrainingSpec
from lora_prefvec.training import adapter
from lora_prefvec.training.made import Made, provenance
from lora_prefvec.training.reference import arithmetic, cache_folder
from lora_prefvec.training.replies import PreparedReplies, ReplyCollator, render_replies
from lora_prefvec.training.run import Finished, Job, peak_memory, run
from lora_prefvec.training.trainer import FACTORS, AdapterTrainer, checkpoints
from lora_prefvec.vector import PreferenceVector

RUN = "reward"
RIDGE = 1e-3  # of the states' mean variance: what the least squares of the start give up for being well posed
Conversation = tuple[list[Message], list[Message]]


@dataclass(frozen=True)
class Ratings:
    """Rated replies as a base meets them.

    Args:
        rows: n of them.
        values: [n, m], standardised; NaN where nobody rated a reply on an axis.
    """

    rows: PreparedReplies
    values: Tensor

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of each conversation."""
        return whole(self.rows)


class HeadsTrainer(AdapterTrainer):
    """Trains an adapter and linear heads together.

    Args:
        dataset: columns prompt_ids, reply_ids and ratings [m], NaN where there is none.
        weight, bias: where the heads begin, [m, hidden] and [m].
    """

    def __init__(
        self,
        base: LoadedBase,
        lora: LoraSpec,
        spec: TrainingSpec,
        dataset: Dataset,
        folder: Path,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        super().__init__(base, lora, spec, dataset, folder)
        heads = nn.Linear(weight.shape[1], len(bias))
        heads.weight.data, heads.bias.data = weight.clone(), bias.clone()
        self.model.heads = heads.to(base.device)  # a part of the model, so that it is optimised and saved with it

    def collate(self, pad_token_id: int) -> RatingsCollator:
        """Conversations with their ratings."""
        return RatingsCollator(pad_token_id)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        states = last_states(model, inputs["input_ids"], inputs["attention_mask"])
        loss = squared_error(self.model.heads(states), inputs["ratings"])
        return (loss, None) if return_outputs else loss


@dataclass(frozen=True)
class RatingsCollator(ReplyCollator):
    """Rows as one right-padded batch, which carries `ratings` [n, m]."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        batch["ratings"] = torch.tensor([row["ratings"] for row in rows])
        return batch


def squared_error(predicted: Tensor, ratings: Tensor) -> Tensor:
    """The squared error of [n, m] summed over the axes that are rated (not NaN), as a mean over the replies."""
    return (predicted - ratings).nan_to_num(nan=0.0).square().sum(dim=1).mean()


def least_squares(states: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
    """The heads (weight [m, hidden], bias [m]) that fit ratings [n, m] best, with a ridge; NaN is not fitted."""
    weight, bias = torch.zeros(ratings.shape[1], states.shape[1]), torch.zeros(ratings.shape[1])
    for axis, values in enumerate(ratings.T):
        rated = ~values.isnan()
        x, y = states[rated].double(), values[rated].double()
        middle = x.mean(dim=0)
        x = x - middle
        spread = x.T @ x / len(x)
        ridge = RIDGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
        found = torch.linalg.solve(spread + ridge, x.T @ (y - y.mean()) / len(x))
        weight[axis], bias[axis] = found.float(), y.mean() - middle @ found
    return weight, bias


def trained_reward_model(
    job: Job, axes: Sequence[str], train: Sequence[RatedReplies], held_out: Sequence[RatedReplies], data: DataFacts
) -> Path:
    """The folder of the reward model for these replies: one that was trained before on the same, or a new one.

    Args:
        job: its recipe's sections `lora`, `training` and `method.reward` say how.
        axes: what it rates.

    Raises:
        InputError: an axis on which all replies are rated alike.
        Interrupted, RunError: as `run`.
    """
    folder = job.work / RUN / "model"
    if folder.is_dir():
        return folder
    spec: RewardSpec = job.recipe.method.reward  # type: ignore[union-attr]
    changed = {"learning_rate": spec.learning_rate, "epochs": spec.epochs, "max_steps": None, "sft_weight": 0.0}
    training = job.recipe.training.model_copy(update=changed)
    scales = {axis: scale(train, axis) for axis in axes}
    rows, judged = (prepare(part, scales, job.base, training) for part in (train, held_out))
    cached = cache_folder(RUN) / _key(job, training, spec, scales, (rows, judged))
    with contextlib.suppress(PrefvecError):
        read_reward_model(cached, axes=axes, base=job.identity)
        with atomic_folder(folder) as work:
            shutil.copytree(cached, work, dirs_exist_ok=True)
        return folder
    inner = replace(job, recipe=job.recipe.model_copy(update={"training": training}))
    model, done = _fit(inner, rows, scales) if spec.adapter else _probe(inner, rows, scales)
    made = Made(
        kind="reward_model",
        vector=model.vector,
        runs=[done],
        data=data,
        facts={"preference": "-".join(axes), "method": job.recipe.method.name},
        metrics=measure(job.base, model, judged),
    )
    with atomic_folder(folder) as work:
        fill_reward_model(work, model, provenance(inner, made), recipe=job.recipe.to_yaml())
    # A cache that cannot be written costs time, not the run.
    with contextlib.suppress(OSError, PrefvecError), atomic_folder(cached, force=True) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
    return folder


def scale(groups: Sequence[RatedReplies], axis: str) -> tuple[float, float]:
    """Mean and standard deviation of the ratings on an axis.

    Raises:
        InputError: there are none, or they are all the same.
    """
    found = torch.tensor([one.ratings[axis] for group in groups for one in group.replies if axis in one.ratings])
    if not len(found) or found.min() == found.max():
        raise InputError(f"the replies are not rated apart on the axis {axis!r}", "Leave it out of method.axes.")
    return found.double().mean().item(), found.double().std(correction=0).item()


def prepare(
    groups: Sequence[RatedReplies], scales: dict[str, tuple[float, float]], base: LoadedBase, spec: TrainingSpec
) -> Ratings:
    """All replies of the groups that are rated on some axis, rendered, with standardised ratings."""
    replies = [(group.prompt, one) for group in groups for one in group.replies if scales.keys() & one.ratings.keys()]
    found = render(base, [(prompt, one.reply) for prompt, one in replies], spec)
    values = torch.tensor([standardised(one.ratings, scales) for _, one in replies]).view(-1, len(scales))
    return Ratings(replace(found, dataset=found.dataset.add_column("ratings", values.tolist())), values)


def standardised(ratings: dict[str, float], scales: dict[str, tuple[float, float]]) -> list[float]:
    """Ratings in standard deviations from their mean, [m]; NaN where there is none."""
    return [(ratings.get(axis, math.nan) - mean) / sd for axis, (mean, sd) in scales.items()]


def render(base: LoadedBase, rows: Sequence[Conversation], spec: TrainingSpec) -> PreparedReplies:
    """Prompts with replies as token ids, cut to the lengths of the recipe."""
    return render_replies(
        rows, base.tokenizer, max_prompt_tokens=spec.max_prompt_tokens, max_reply_tokens=spec.max_reply_tokens
    )


def whole(rows: PreparedReplies) -> list[list[int]]:
    """Token ids of each conversation, prompt and reply in one."""
    return [[*one, *other] for one, other in zip(rows.dataset["prompt_ids"], rows.dataset["reply_ids"], strict=True)]


def rewards(base: LoadedBase, model: RewardModel, rows: Sequence[Conversation], spec: TrainingSpec) -> Tensor:
    """What a reward model gives replies, [n, m], in standard deviations from the mean."""
    with progress("rewards", len(rows)) as bar, adapted(base, model.vector):
        return model.standardised(final_states(base, whole(render(base, rows, spec)), bar))


def measure(base: LoadedBase, model: RewardModel, held_out: Ratings) -> dict[str, float | None]:
    """How much of the held-out ratings each head explains: R^2 = 1 - MSE / variance, and Pearson's correlation."""
    metrics: dict[str, float | None] = {}
    if not len(held_out.values):
        return metrics
    with adapted(base, model.vector):
        predicted = model.standardised(final_states(base, held_out.ids))
    for place, axis in enumerate(model.axes):
        rated = ~held_out.values[:, place].isnan()
        said, given = predicted[rated, place].double(), held_out.values[rated, place].double()
        if len(given) > 1:
            r2 = 1 - (said - given).square().mean() / given.var(correction=0)
            metrics[f"r2.{axis}"] = round(r2.item(), 4)
            metrics[f"pearson.{axis}"] = round(torch.corrcoef(torch.stack([said, given]))[0, 1].item(), 4)
    return metrics | {"held_out_replies": len(held_out.values)}


@contextlib.contextmanager
def adapted(base: LoadedBase, vector: PreferenceVector) -> Iterator[LiveMixer]:
    """The base with one adapter on it."""
    with LiveMixer(base.model, {"adapter": vector}) as mixer:
        mixer.set_mix({"adapter": 1.0})
        yield mixer


def _fit(job: Job, rows: Ratings, scales: dict[str, tuple[float, float]]) -> tuple[RewardModel, Finished]:
    """Heads and adapter, trained together from the heads' least squares on."""

    def trainer(folder: Path) -> HeadsTrainer:
        heads = least_squares(final_states(job.base, rows.ids), rows.values)
        return HeadsTrainer(job.base, job.recipe.lora, job.recipe.training, rows.rows.dataset, folder, *heads)

    done = run(job, RUN, trainer, rows.rows)
    heads = load_file(checkpoints(job.work / RUN)[-1] / FACTORS)  # written with the last step
    return RewardModel(done.vector, scales, heads["heads.weight"], heads["heads.bias"]), done


def _probe(job: Job, rows: Ratings, scales: dict[str, tuple[float, float]]) -> tuple[RewardModel, Finished]:
    """Heads alone, on an adapter of zeros."""
    heads = least_squares(final_states(job.base, rows.ids), rows.values)
    model = get_peft_model(job.base.model, adapter.lora_config(job.recipe.lora))
    adapter.start(model, job.recipe.training.seed)
    vector = adapter.vector(model, job.identity)
    model.unload()
    return RewardModel(vector, scales, *heads), Finished(vector, None, 0, 0.0, peak_memory(job.base))


def _key(
    job: Job,
    training: TrainingSpec,
    spec: RewardSpec,
    scales: dict[str, tuple[float, float]],
    parts: Sequence[Ratings],
) -> str:
    """A hash of all that determines a reward model."""
    sections = [one.model_dump(mode="json") for one in (job.recipe.lora, training, spec)]
    digest = hashlib.sha256(json.dumps([arithmetic(job.base), sections, scales]).encode())
    for part in parts:
        digest.update(json.dumps([part.ids, part.values.tolist()]).encode())
    return digest.hexdigest()
