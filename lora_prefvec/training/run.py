"""One run on a resident base, which can be killed at any moment and goes on where it was."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lora_prefvec.artifact import atomic_folder
from lora_prefvec.errors import Interrupted, RunError
from lora_prefvec.inference import LoadedBase, RenderedPair
from lora_prefvec.progress import progress
from lora_prefvec.recipe import Recipe, TrainingSpec
from lora_prefvec.training import adapter
from lora_prefvec.training.health import Watch
from lora_prefvec.training.trainer import FACTORS, AdapterTrainer, StopOnInterrupt, checkpoints
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector

FACTS = ("accuracy", "steps", "wall_seconds", "peak_memory_bytes", "tokens", "summary")
FINISHED = "finished"  # the folder that keeps the result of a run until its artifact is written


@dataclass(frozen=True)
class Finished:
    """What a run came to.

    Args:
        vector: the trained adapter.
        accuracy: held-out preference accuracy against the labels as given; None without held-out pairs.
        steps: optimiser steps.
        wall_seconds: time of training, over all its parts if it was interrupted.
        peak_memory_bytes: of the GPU's allocator, or of this process on a CPU.
        tokens: prompt and reply tokens that it read, padding left out.
        summary: what the trainer has to say of its run.
    """

    vector: PreferenceVector
    accuracy: float | None
    steps: int
    wall_seconds: float
    peak_memory_bytes: int
    tokens: int = 0
    summary: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A recipe on its way: the resident base, and the folder in which its runs keep their work."""

    recipe: Recipe
    base: LoadedBase
    identity: BaseIdentity
    work: Path


class Watched(Protocol):
    """Data with held-out pairs, on which a run is watched; see `Prepared`."""

    @property
    def dataset(self) -> Dataset:
        """Training rows."""

    @property
    def held_out(self) -> list[RenderedPair]:
        """Held-out pairs; none of them where nothing is to be watched."""

    @property
    def held_out_reference(self) -> Tensor:
        """[n, 2], the log-probabilities of the held-out pairs where the adapter starts."""


def run(job: Job, name: str, make: Callable[[Path], AdapterTrainer], data: Watched) -> Finished:
    """Train one adapter, or take it up where a killed run left it.

    Args:
        name: of the run; its work lies in the job's folder of that name.
        make: builds the trainer, whose checkpoints go to the folder that it is given.

    Raises:
        Interrupted: Ctrl-C; a checkpoint is written.
        RunError: the loss is no longer a number, or the device has too little memory.
    """
    folder, spec = job.work / name, job.recipe.training
    done = folder / FINISHED
    if done.is_dir():
        return read_finished(done, job.identity)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make(folder)
    steps = total_steps(spec, len(data.dataset))
    latest = next(reversed(checkpoints(folder)), None)
    past = steps_of(latest)
    clock = Clock(folder / "seconds")
    try:
        with StopOnInterrupt() as stop, progress(f"{job.recipe.preference} {name}", steps, start=past) as bar:
            every = spec.evaluate_every or max(steps // 4, 1)  # a collapse shows only against an earlier measurement
            watch = Watch(trainer, data.held_out, data.held_out_reference, every, bar)
            trainer.add_callback(watch)
            trainer.add_callback(stop)
            if latest and past >= steps:  # killed before its result was written; Trainer would take one step too many
                adapter.load_factors(trainer.model, latest / FACTORS)
                trainer.state = TrainerState.load_from_json(str(latest / TRAINER_STATE_NAME))
                if data.held_out:
                    watch.measure(past)
            else:
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
                past = trainer.state.global_step
            clock.save()
        if past == steps:
            accuracy = watch.history[-1]["accuracy"] if watch.history else None
            found = adapter.vector(trainer.model, job.identity)
            tokens = int(trainer.state.num_input_tokens_seen)
            finished = Finished(found, accuracy, steps, clock.seconds, peak_memory(job.base), tokens, trainer.summary())
            write_finished(done, finished)
        if stop.stopped:
            raise Interrupted(
                f"stopped at step {past} of {steps}; all of it is saved", "Go on with the same command and --resume."
            )
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the GPU has too little memory for this recipe",
            "Try --set training.micro_batch_size=1 --set training.gradient_checkpointing=true, or fewer "
            f"training.max_reply_tokens (now {spec.max_reply_tokens}).",
        ) from error
    finally:
        trainer.release()
    return finished


def total_steps(spec: TrainingSpec, rows: int) -> int:
    """Optimiser steps of a run over `rows` pairs; an epoch's last batch may be smaller."""
    per_epoch = math.ceil(rows / spec.batch_size)
    return spec.max_steps or math.ceil(per_epoch * spec.epochs)


def steps_of(checkpoint: Path | None) -> int:
    """The step at which a checkpoint was written; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def write_finished(folder: Path, finished: Finished) -> None:
    """Keep a finished run until its artifact is written."""
    facts = {key: getattr(finished, key) for key in FACTS}
    with atomic_folder(folder, force=True) as temporary:
        factors = {}
        for name, delta in finished.vector.deltas.items():
            factors[f"{name}.A"], factors[f"{name}.B"] = delta.A.contiguous(), delta.B.contiguous()
        save_file(factors, temporary / "vector.safetensors")
        (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def read_finished(folder: Path, identity: BaseIdentity) -> Finished:
    """What `write_finished` kept."""
    factors = load_file(folder / "vector.safetensors")
    names = sorted(name.removesuffix(".A") for name in factors if name.endswith(".A"))
    deltas = {name: LowRankDelta(factors[f"{name}.A"], factors[f"{name}.B"]) for name in names}
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Finished(vector=PreferenceVector(deltas, identity), **facts)


class Clock:
    """Seconds of work, added up over the parts of an interrupted run; a killed part is not counted."""

    def __init__(self, file: Path) -> None:
        self.file, self.started = file, time.monotonic()
        self.before = float(file.read_text()) if file.is_file() and file.read_text() else 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.monotonic() - self.started

    def save(self) -> None:
        """Keep the count for a next part."""
        self.file.write_text(f"{self.seconds:.3f}")


def peak_memory(base: LoadedBase) -> int:
    """Bytes at the peak: the GPU allocator's, or the resident set of this process."""
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated(base.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
