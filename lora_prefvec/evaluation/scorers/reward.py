"""Reward models: sequence classifiers that were trained on human judgements of replies.

`reward:FOLDER_OR_ID[@REVISION][#OUTPUT][?OPTIONS]`. OUTPUT names one of several outputs, by its label or its number.
Options: `sign=-1` for a model of costs, `name=AXIS`, `quantization=nf4`, `template=FILE.jinja`. `RECIPES` are the
scorers of papers; `prefvec score --list` shows them.

Safe-RLHF and ArmoRM publish classes of their own, which are not executed: their heads are read into the class that
transformers has for the architecture. Safe-RLHF's dialogue (`BEGINNING OF CONVERSATION: USER: ... ASSISTANT:...`)
stands in for the chat template that its tokenizers lack; its normaliser, off in what is published, is left out, and so
is ArmoRM's gate, which weighs the attributes into one score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.evaluation.scorers.classifier import (
    Classifier,
    Family,
    batches,
    collate,
    load_classifier,
    outputs_of,
)
from lora_prefvec.evaluation.scorers.protocol import Prompt, messages_of
from lora_prefvec.inference.base import Quantization
from lora_prefvec.inference.render import chat_ids

RECIPES = {
    "reward:PKU-Alignment/beaver-7b-unified-reward?name=helpful": "Safe-RLHF's reward",
    "reward:PKU-Alignment/beaver-7b-unified-cost?sign=-1&name=harmless": "Safe-RLHF's cost, turned round",
    "reward:Skywork/Skywork-Reward-V2-Qwen3-0.6B?name=preferred": "helpful and harmless in one, small",
    "reward:RLHFlow/ArmoRM-Llama3-8B-v0.1#beavertails-is_safe?name=harmless": "one of ArmoRM's 19 attributes",
}
OPTIONS = ("sign", "name", "quantization", "template")


@dataclass(frozen=True)
class RewardModel:
    """One output of a reward model, times `sign`; the weights are loaded when the first reply is scored.

    Args:
        folder: of a sequence classifier with safetensors and its tokenizer; no code of it is executed.
        output: column of its logits.
        template: chat template in the place of the tokenizer's own.
        family: where its head has another name.
    """

    name: str
    folder: Path
    output: int
    sign: int
    quantization: Quantization
    template: str | None = field(repr=False)
    family: Family | None
    direction: int = +1
    is_cost: bool = False

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float | None]:
        """The model's raw output for every reply behind its prompt, the chat template applied to both.

        Raises:
            InputError: the model cannot be loaded, or a reply is too long for it: none is cut.
        """
        import torch

        classifier = load_classifier(self.folder, self.quantization, self.template, self.family)
        rows = self._rows(prompts, replies, classifier)
        scores: list[float | None] = [None] * len(rows)
        with torch.inference_mode():
            for batch in batches(rows):
                inputs = collate([rows[i] for i in batch], classifier)
                logits = classifier.model(**inputs).logits[:, self.output]
                for i, value in zip(batch, logits.float().tolist(), strict=True):
                    scores[i] = self.sign * value
        return scores

    @cached_property
    def fingerprint(self) -> str:
        """All that the scores depend on: files of the Hub's cache by their hash, others by size and time of change."""
        facts: list[Any] = [self.output, self.sign, self.quantization, self.template]
        kinds = (".safetensors", ".json", ".jinja")
        for file in sorted(path for path in self.folder.iterdir() if path.suffix in kinds):
            blob, stat = file.resolve(), file.stat()
            facts.append(blob.name if blob.parent.name == "blobs" else [str(blob), stat.st_size, stat.st_mtime_ns])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _rows(self, prompts: Sequence[Prompt], replies: Sequence[str], classifier: Classifier) -> list[list[int]]:
        tokenizer, config = classifier.tokenizer, classifier.model.config.get_text_config()
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
        rows = []
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            row = chat_ids(tokenizer, [*messages_of(prompt), {"role": "assistant", "content": reply}])
            if len(row) > limit:
                raise InputError(
                    f"reply {i + 1} has {len(row)} tokens with its prompt, and {self.name!r} reads {limit}",
                    "Score shorter replies, or take a reward model that reads more.",
                )
            rows.append(row)
        return rows


def reward_model(reference: str, output: str, options: Mapping[str, str]) -> RewardModel:
    """The reward model in a folder or on the Hub; its files are looked at, and not loaded yet.

    Args:
        reference: a folder, or a Hub id with optional `@revision`.
        output: label or number of the output that counts; may be empty where there is one.
        options: as in this module's text.

    Raises:
        InputError: no such folder or id, no reward model, no safetensors, no such output, or a wrong option.
    """
    from lora_prefvec.artifact import resolve_base

    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise InputError(f"a reward model has no option {unknown[0]!r}", nearest(unknown[0], OPTIONS))
    sign, quantization = options.get("sign", "1").lstrip("+"), options.get("quantization", "none")
    if sign not in ("1", "-1"):
        raise InputError(f"the sign of a reward model is {sign!r}", "Write sign=-1 for a model of costs.")
    if quantization not in ("nf4", "none"):
        raise InputError(f"the quantization of a reward model is {quantization!r}", "Write nf4 or none.")
    folder = resolve_base(reference)
    family, labels = outputs_of(folder)
    column = _column(labels, output, reference)
    return RewardModel(
        name=options.get("name") or (labels[column] if len(labels) > 1 else _slug(reference)),
        folder=folder,
        output=column,
        sign=int(sign),
        quantization="nf4" if quantization == "nf4" else "none",
        template=_read_template(options.get("template")),
        family=family,
    )


def _column(labels: Sequence[str], output: str, reference: str) -> int:
    if not output and len(labels) == 1:
        return 0
    if output in labels:
        return labels.index(output)
    if output.isdecimal() and int(output) < len(labels):
        return int(output)
    problem = f"has no output {output!r}" if output else f"has {len(labels)} outputs"
    hint = nearest(output, labels) if output else f"Name one: reward:{reference}#{labels[0]}; all: {', '.join(labels)}."
    raise InputError(f"the reward model {reference} {problem}", hint)


def _slug(reference: str) -> str:
    """A name of an axis from a folder or a Hub id: `beaver-7b-v1.0-reward`."""
    return Path(reference.partition("@")[0]).name or "reward"


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the template {file} cannot be read: {error}", "Name a Jinja file.") from None
