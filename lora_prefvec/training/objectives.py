"""Several objectives, one adapter: the DPO loss of each of them, and a run on their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import LoraSpec, TrainingSpec
from lora_prefvec.training.made import Made
from lora_prefvec.training.rows import PreparedRows, adapter_margins
from lora_prefvec.training.run import Job, run
from lora_prefvec.training.trainer import AdapterTrainer

RUN = "adapter"  # the name of the only run


class SignsCollator(DataCollatorForPreference):
    """TRL's collator, which also carries signs [n, m], strength [n] and offset [n]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in ("signs", "strength", "offset"):
            batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch


class ObjectivesTrainer(AdapterTrainer):
    """Trains on the weighted sum of the objectives' DPO losses.

    Args:
        weights: [m].
        dataset: as `PreparedRows.dataset`.
    """

    def __init__(
        self,
        base: LoadedBase,
        lora: LoraSpec,
        spec: TrainingSpec,
        weights: Sequence[float],
        dataset: Dataset,
        folder: Path,
    ) -> None:
        super().__init__(base, lora, spec, dataset, folder)
        self.weights = torch.tensor(weights, device=base.device)
        part = ~torch.tensor(dataset["signs"]).isnan()
        self._share = part.float().mean(dim=0).to(base.device)  # [m]: of the rows, each objective's data

    def collate(self, pad_token_id: int) -> SignsCollator:
        """Pairs with their signs."""
        return SignsCollator(pad_token_id=pad_token_id)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        loss = (self.weights * self.objective_losses(model, inputs)).sum()
        return (loss, None) if return_outputs else loss

    def objective_losses(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of each objective, [m], as a mean over its own data; ties count log 2 and have no gradient.

        L_i = mean of softplus(-beta k s_i (D - o)), D = log-ratio(chosen) - log-ratio(rejected), s_i the sign, k the
        strength and o the offset of a pair. `sft_weight` adds the mean negative log-probability per token of the reply
        that the objective prefers.
        """
        inputs = dict(inputs)
        signs, strength, offset = (inputs.pop(name) for name in ("signs", "strength", "offset"))
        log_probs, tokens = self.reply_log_probs(model, inputs)
        chosen, rejected = log_probs.chunk(2)
        difference = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        logits = self.spec.beta * strength * (difference - offset)
        sign = signs.nan_to_num()
        losses = F.softplus(-sign * logits[:, None])
        if self.spec.sft_weight:
            unlikely = (-log_probs / tokens).chunk(2)
            preferred = torch.where(sign > 0, unlikely[0][:, None], unlikely[1][:, None])
            losses = losses + self.spec.sft_weight * preferred * (sign != 0)
        return (losses * ~signs.isnan()).sum(dim=0) / (len(signs) * self._share)


def train_rows(job: Job, prepared: PreparedRows, make: Callable[[Path], ObjectivesTrainer] | None = None) -> Made:
    """Train one adapter on the objectives, and measure on held-out pairs how far it goes with each of them."""
    weights = prepared.rows.weights

    def weighted(folder: Path) -> ObjectivesTrainer:
        return ObjectivesTrainer(job.base, job.recipe.lora, job.recipe.training, weights, prepared.dataset, folder)

    done = run(job, RUN, make or weighted, prepared)
    metrics: dict[str, float | None] = {}
    if prepared.held_out:
        margins = adapter_margins(job.base, done.vector, prepared.held_out, prepared.held_out_reference)
        for name, sign in zip(prepared.rows.names, prepared.held_out_signs.T, strict=True):
            says = sign.nan_to_num() != 0
            right = (sign * margins)[says] > 0
            metrics[f"held_out_accuracy.{name}"] = round(right.float().mean().item(), 4) if len(right) else None
        metrics["held_out_pairs"] = len(prepared.held_out)
    own = prepared.rows.own
    objectives = [
        {"name": name, "weight": weight, "data": data, "anchors": anchors}
        for name, weight in zip(prepared.rows.names, weights, strict=True)
        for data, anchors in [own.get(name, (None, None))]
    ]
    return Made(
        kind="preference_adapter",
        vector=done.vector,
        runs=[done],
        data=prepared.rows.data,
        facts={"method": job.recipe.method.name, "objectives": objectives},
        metrics=metrics | {name: round(value, 4) for name, value in done.summary.items()},
    )
