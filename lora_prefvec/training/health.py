"""Watching a run: progress, held-out preference accuracy, and signs that it collapses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from lora_prefvec.inference import PreferenceAccuracy, RenderedPair, pair_log_probs, preference_accuracy
from lora_prefvec.output import out
from lora_prefvec.progress import Progress
from lora_prefvec.training import adapter

SINKING = -1.0  # nats per token that the wanted replies lose against the base before it is said


class Watch(TrainerCallback):
    """Moves the progress bar, measures held-out accuracy every so often, and warns once of a collapse.

    Args:
        trainer: the trainer it watches.
        held_out, reference: n pairs and the base's log-probabilities [n, 2]; no measuring where empty.
        every: optimiser steps between two measurements; at the end there is always one.
        bar: advanced with every step.
    """

    def __init__(
        self,
        trainer: Any,
        held_out: list[RenderedPair],
        reference: Tensor,
        every: int,
        bar: Progress,
    ) -> None:
        self.trainer, self.held_out, self.reference = trainer, held_out, reference
        self.every, self.bar = every, bar
        self.history: list[dict[str, float]] = []
        self._loss, self._measured, self._warned = "", "", False
        wanted = trainer.wanted
        replies = [(pair.chosen_ids, pair.rejected_ids)[wanted] for pair in held_out]
        self._reply_tokens = sum(map(len, replies)) / max(len(replies), 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if self.held_out and (last or state.global_step % self.every == 0):
            self.measure(state.global_step)
        self.bar.advance(info=", ".join(filter(None, (self._loss, self._measured))))

    def measure(self, step: int) -> PreferenceAccuracy:
        """Held-out accuracy of the adapter as it stands, against the labels as given."""
        adapter.set_coefficient(self.trainer.model, 1.0)
        policy = pair_log_probs(
            self.trainer.model,
            self.held_out,
            pad_token_id=self.trainer.processing_class.pad_token_id,
            batch_size=max(2 * self.trainer.args.per_device_train_batch_size, 2),
        )
        found = preference_accuracy(policy, self.reference)
        self._measured = f"held-out accuracy {found.accuracy:.3f}"
        wanted = self.trainer.wanted
        shift = float((policy - self.reference)[:, wanted].mean()) / max(self._reply_tokens, 1)
        learned = 1 - found.accuracy if wanted else found.accuracy
        self.history.append({"step": step, "learned": learned, "shift_per_token": shift, **asdict(found)})
        self._warn(found.accuracy_error)
        return found

    def _warn(self, error: float) -> None:
        now = self.history[-1]
        best = max(entry["learned"] for entry in self.history)
        trouble = ""
        if best - now["learned"] > 3 * error + 0.02:
            trouble = f"held-out accuracy fell from {best:.3f} to {now['learned']:.3f}"
        elif now["shift_per_token"] < SINKING:
            trouble = f"the wanted replies lost {-now['shift_per_token']:.1f} nats per token against the base"
        if trouble and not self._warned:
            self._warned = True
            spec = self.trainer.spec
            remedies = [f"a lower training.learning_rate (now {spec.learning_rate:g})", "fewer epochs"]
            if spec.sft_weight == 0:
                remedies.insert(1, "training.sft_weight=0.5")
            out.warn(f"the run may be collapsing: {trouble} at step {int(now['step'])}. Try {', or '.join(remedies)}.")
