"""TRL's DPO trainer, with what a preference vector needs: signs, fp32 factors, a shared reference, safe checkpoints."""

from __future__ import annotations

import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lora_prefvec.artifact import atomic_folder
from lora_prefvec.errors import RunError
from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import LoraSpec, TrainingSpec
from lora_prefvec.training import adapter
from lora_prefvec.vector import PreferenceVector

Side = Literal["positive", "negative", "two"]
FACTORS = "factors.safetensors"


class AdapterTrainer(DPOTrainer):
    """One adapter on a resident base: fp32 factors, checkpoints that survive a kill, and nothing left on the base.

    What it is trained for, a subclass says.

    Args:
        base: the resident base; it is left as it was by `release`.
        lora, spec: the sections `lora` and `training` of a recipe.
        dataset: rows that are tokenised already; `collate` names their columns.
        folder: where checkpoints go.
        start: the adapter to begin with; None for LoRA's own start, a delta of zero.
    """

    def __init__(
        self,
        base: LoadedBase,
        lora: LoraSpec,
        spec: TrainingSpec,
        dataset: Dataset,
        folder: Path,
        start: PreferenceVector | None = None,
    ) -> None:
        self.spec = spec
        config = base.model.config
        self._settings = [
            (part, dict(vars(part))) for part in (config, config.get_text_config(), base.model.generation_config)
        ]
        self._own = set(vars(base.model))
        on_cpu = base.device.type == "cpu"
        super().__init__(
            model=base.model,
            args=DPOConfig(
                output_dir=str(folder),
                beta=spec.beta,
                loss_type=["sigmoid", "sft"] if spec.sft_weight else ["sigmoid"],
                loss_weights=[1.0, spec.sft_weight] if spec.sft_weight else None,
                learning_rate=spec.learning_rate,
                lr_scheduler_type="constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
                warmup_steps=spec.warmup_ratio,
                weight_decay=spec.weight_decay,
                max_grad_norm=spec.max_grad_norm,
                num_train_epochs=spec.epochs,
                max_steps=spec.max_steps or -1,
                per_device_train_batch_size=spec.micro_batch_size,
                gradient_accumulation_steps=spec.batch_size // spec.micro_batch_size,
                gradient_checkpointing=spec.gradient_checkpointing,
                # The base computes in its own dtype and the factors in fp32, as they will at inference; only fp16 needs
                # autocast, for its loss scaling.
                bf16=False,
                fp16=base.model.dtype == torch.float16,
                max_length=None,  # lengths were cut when the pairs were rendered
                remove_unused_columns=False,
                seed=spec.seed,
                data_seed=spec.seed,
                save_strategy="steps",
                save_steps=spec.checkpoint_every,
                logging_steps=5,
                logging_nan_inf_filter=False,
                disable_tqdm=True,
                report_to="none",
                include_num_input_tokens_seen="non_padding",
                dataloader_pin_memory=not on_cpu,
                use_cpu=on_cpu,
            ),
            data_collator=self.collate(base.tokenizer.pad_token_id),
            train_dataset=dataset,
            processing_class=base.tokenizer,
            peft_config=adapter.lora_config(lora),
        )
        self.remove_callback(PrinterCallback)
        # TRL hooks into the embeddings and `train` does so once more, forgetting the first hook.
        self.model.get_base_model().disable_input_require_grads()
        # TRL has cast the factors to bf16, where updates of a DPO learning rate round away; they start anew in fp32.
        adapter.start(self.model, spec.seed, start)
        self.precompute_ref_logps = True

    def collate(self, pad_token_id: int) -> Any:
        """What makes batches of the rows."""
        raise NotImplementedError

    @property
    def wanted(self) -> int:
        """Which reply of a pair the run wants more of: 0 for chosen, 1 for rejected."""
        return 0

    def summary(self) -> dict[str, float]:
        """What there is to say of the run when it ends."""
        return {}

    def release(self) -> None:
        """Take the adapter and every patch off the base, so that the next run finds it as it was loaded."""
        bare = self.model.get_base_model()
        self.model.unload()
        if self.args.gradient_checkpointing:
            bare.gradient_checkpointing_disable()
            bare.disable_input_require_grads()
        for name in vars(bare).keys() - self._own:  # such as TRL's forward
            delattr(bare, name)
        for part, before in self._settings:  # the cache is off, for one
            vars(part).clear()
            vars(part).update(before)
        bare.requires_grad_(False)
        bare.eval()

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # rendered and tokenised already

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.check(loss)
        return loss

    def check(self, losses: Tensor) -> None:
        """Raises RunError where a loss is no longer a number."""
        if not torch.isfinite(losses).all():
            raise self._diverged(f"the loss became {losses.sum().item()} at step {self.state.global_step + 1}")

    def reply_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The summed log-probability of every reply of a batch, and its number of tokens: each [2 n]."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found = model(**ids, labels=labels, use_cache=False, fused_lm_head=True)
        return found.log_probs.sum(dim=1), (labels[:, 1:] != -100).sum(dim=1)

    def _diverged(self, what: str) -> RunError:
        return RunError(
            what,
            f"Lower training.learning_rate (now {self.spec.learning_rate:g}), or set training.compute_dtype=float32.",
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not all(bool(torch.isfinite(factor).all()) for factor in adapter.trainable(self.model).values()):
            raise self._diverged(f"the factors are no longer numbers after step {self.state.global_step}")
        run = Path(self.args.output_dir)
        older = checkpoints(run)
        with atomic_folder(run / f"checkpoint-{self.state.global_step}", force=True) as folder:
            adapter.save_factors(self.model, folder / FACTORS)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        for checkpoint in older:
            if checkpoint.name != f"checkpoint-{self.state.global_step}":
                remove_folder(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter.load_factors(self.model, Path(resume_from_checkpoint) / FACTORS)

    # -- manners ------------------------------------------------------------------------------------------------------

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The artifact has a card of its own."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""


class SignedCollator(DataCollatorForPreference):
    """TRL's collator, which also carries `swaps` [n]: whether a pair's labels follow the sign of the run."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["swaps"] = torch.tensor([example["swaps"] for example in examples])
        return batch


class PreferenceTrainer(AdapterTrainer):
    """DPO on pairs that carry their reference log-probabilities, with the labels of one side.

    A `positive` run takes the labels as given, a `negative` one swaps them; both scale the adapter by 1 or `reach`. A
    `two`-sided run draws a coefficient for every batch, scales the adapter by it and swaps the labels where it is
    negative, so that one LoRA v learns that +v prefers the chosen replies and -v the rejected ones.

    Args:
        side: which labels this run trains on.
        dataset: columns prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps, swaps.
    """

    def __init__(
        self, base: LoadedBase, lora: LoraSpec, spec: TrainingSpec, side: Side, dataset: Dataset, folder: Path
    ) -> None:
        self.side = side
        self._micro_step = (-1, 0)  # (optimiser step, micro-batches seen in it)
        super().__init__(base, lora, spec, dataset, folder)

    def collate(self, pad_token_id: int) -> SignedCollator:
        """Pairs with their `swaps`."""
        return SignedCollator(pad_token_id=pad_token_id)

    @property
    def wanted(self) -> int:
        """As the labels are taken."""
        return int(self.side == "negative")

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        swaps = inputs.pop("swaps")
        coefficient = self._draw_coefficient()
        adapter.set_coefficient(self.model, coefficient if self.side == "two" else abs(coefficient))
        if coefficient < 0:
            inputs = swap_labels(inputs, swaps)
        return super()._compute_loss(model, inputs, return_outputs)

    def _draw_coefficient(self) -> float:
        """+-1 or +-reach for this micro-batch: a function of seed and position, so that a resumed run draws the same.

        Micro-batches come in pairs of equal size; those of a two-sided run are of opposite sign.
        """
        step, seen = self._micro_step
        seen = seen + 1 if step == self.state.global_step else 0
        self._micro_step = (self.state.global_step, seen)
        position = self.state.global_step * self.args.gradient_accumulation_steps + seen
        dice = random.Random(f"{self.spec.seed}:{position // 2}")
        first = dice.choice((1.0, -1.0)) * dice.choice((1.0, self.spec.reach))
        if self.side != "two":
            return abs(first) if self.side == "positive" else -abs(first)
        return first if position % 2 == 0 else -first


def swap_labels(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """A batch [chosen; rejected] with the two exchanged where `rows` [n] is true."""
    n = len(rows)
    index = torch.arange(2 * n, device=rows.device)
    index[:n] += n * rows
    index[n:] -= n * rows
    swapped = {name: tensor[index] for name, tensor in batch.items() if len(tensor) == 2 * n}
    chosen, rejected = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    swapped["ref_chosen_logps"] = torch.where(rows, rejected, chosen)
    swapped["ref_rejected_logps"] = torch.where(rows, chosen, rejected)
    return swapped


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that reads as complete; the next call clears that up."""
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the run after the step in progress, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: Callable[..., Any] | int | None = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, *_: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
