"""What a method hands over: adapters with their facts, and how they become an artifact."""

from __future__ import annotations

import shutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from lora_prefvec.artifact import (
    DataFacts,
    Parent,
    Provenance,
    TrainingFacts,
    atomic_folder,
    fill_adapter,
    read_provenance,
)
from lora_prefvec.recipe import TrainingSpec
from lora_prefvec.training.run import Finished, Job
from lora_prefvec.vector import PreferenceVector

LIBRARIES = ("lora-prefvec", "torch", "transformers", "peft", "trl", "bitsandbytes")


class Loaded(Protocol):
    """The data of a recipe, before any model is loaded."""

    @property
    def hashes(self) -> list[str | None]:
        """What tells whether a run goes on with the data that it began with."""

    @property
    def train(self) -> Sized:
        """Training rows."""

    @property
    def held_out(self) -> Sized:
        """Rows that are set apart."""


@dataclass(frozen=True)
class Made:
    """One adapter of an artifact.

    Args:
        kind: as provenance has it.
        vector: the adapter.
        runs: what it took.
        data, anchors: what it learned from.
        facts: further fields of provenance.
        metrics: what was measured.
        parts: subfolder -> adapters that lie in the artifact's folder beside it, and are its parents.
        training: its settings, where they are not the recipe's.
        coefficients: of the parts; 1 where there is none.
        folders: subfolder -> an adapter's folder, of which the artifact holds a copy, as it is its parent too.
        files: name -> text of a further file, such as a log of the training.
    """

    kind: str
    vector: PreferenceVector
    runs: Sequence[Finished]
    data: DataFacts | None
    anchors: DataFacts | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    parts: dict[str, Made] = field(default_factory=dict)
    coefficients: dict[str, float] = field(default_factory=dict)
    training: TrainingSpec | None = None
    folders: dict[str, Path] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def write(target: Path, job: Job, made: Made, *, force: bool) -> None:
    """Write the adapter, and its parts inside its folder, all at once."""
    text = job.recipe.to_yaml()
    with atomic_folder(target, force) as folder:
        parents = []
        for name, part in made.parts.items():
            (folder / name).mkdir()
            sha256 = fill_adapter(folder / name, part.vector, provenance(job, part), recipe=text)
            coefficient = made.coefficients.get(name, 1.0)
            parents.append(Parent(name=f"{job.recipe.preference} {name}", sha256=sha256, coefficient=coefficient))
        for name, source in made.folders.items():
            shutil.copytree(source, folder / name)
            known = read_provenance(source)
            copied = known.weights_sha256 if known else None
            parents.append(Parent(name=f"{job.recipe.preference} {name}", sha256=copied))
        fill_adapter(folder, made.vector, provenance(job, made, parents), recipe=text)
        for name, content in made.files.items():
            (folder / name).write_text(content, encoding="utf-8")


def provenance(job: Job, made: Made, parents: Sequence[Parent] = ()) -> Provenance:
    """What `prefvec.json` says of an adapter."""
    recipe, spec = job.recipe, made.training or job.recipe.training
    return Provenance.model_validate(
        {
            "kind": made.kind,
            "preference": recipe.preference,
            "base": job.identity,
            "data": made.data,
            "anchors": made.anchors,
            "training": TrainingFacts(
                beta=spec.beta,
                learning_rate=spec.learning_rate,
                epochs=spec.epochs,
                steps=sum(run.steps for run in made.runs),
                batch_size=spec.batch_size,
                rank=recipe.lora.rank,
                seed=spec.seed,
                sft_weight=spec.sft_weight,
                anchor_share=recipe.anchors.share if recipe.anchors else None,
                compute_dtype=str(job.base.model.dtype).removeprefix("torch."),
                device=job.base.device.type,
                libraries={name: version(name) for name in LIBRARIES},
                wall_seconds=round(sum(run.wall_seconds for run in made.runs), 1),
                tokens=sum(run.tokens for run in made.runs),
                peak_memory_bytes=max(run.peak_memory_bytes for run in made.runs),
            ),
            "parents": list(parents),
            "metrics": made.metrics,
            **made.facts,
        }
    )
