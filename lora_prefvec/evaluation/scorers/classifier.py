"""Sequence classifiers as reward models come: which they are, in memory, and fed with rows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_prefvec.errors import InputError
from lora_prefvec.inference.base import Quantization, best_dtype, first_line, keep_weights_as_loaded

BATCH_TOKENS = 8192  # of one forward, padding included

SAFE_RLHF = (
    "{{ bos_token }}BEGINNING OF CONVERSATION: "
    "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }} ASSISTANT:"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Safe-RLHF has no such turn') }}{% endif %}{% endfor %}"
)
ARMORM = (
    *("helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity"),
    *("helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following"),
    *("ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe"),
    *("prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style"),
    *("code-explanation", "code-instruction-following", "code-readability"),
)


class Family(NamedTuple):
    """Reward models whose head has another name than transformers gives it.

    Args:
        head: its module in their files; `score` in transformers.
        labels: names of its outputs.
        template: their chat template, where their tokenizer has none.
    """

    head: str
    labels: tuple[str, ...]
    template: str | None = None


class Classifier(NamedTuple):
    """A sequence classifier in memory; `pad` is the padding token that its configuration names."""

    model: Any
    tokenizer: Any
    pad: int | None


FAMILIES = {
    "LlamaModelForScore": Family("score_head", ("score",), SAFE_RLHF),
    "LlamaForScore": Family("score_head", ("score",), SAFE_RLHF),
    "LlamaForRewardModelWithGating": Family("regression_layer", ARMORM),
}


def outputs_of(folder: Path) -> tuple[Family | None, tuple[str, ...]]:
    """The family that a folder's model is of, and the labels of its outputs."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"the reward model in {folder} cannot be read: {first_line(error)}") from error
    kind = (config.architectures or ["unknown"])[0]
    if kind not in FAMILIES and not kind.endswith("ForSequenceClassification"):
        raise InputError(
            f"the model in {folder} is a {kind}, which is no reward model", "Name a ...ForSequenceClassification."
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"the reward model in {folder} has no safetensors weights",
            "Pickled weights are not read; convert them with transformers' save_pretrained.",
        )
    if family := FAMILIES.get(kind):
        return family, family.labels
    return None, tuple(config.id2label[i] for i in range(config.num_labels))


@functools.cache
def load_classifier(
    folder: Path, quantization: Quantization, template: str | None, family: Family | None
) -> Classifier:
    """The classifier in a folder, loaded once for all of its outputs, on CUDA where there is one.

    Args:
        template: chat template in the place of the tokenizer's own.

    Raises:
        InputError: it cannot be loaded, its head is not in its files, or it has no chat template.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = best_dtype(device)
    options: dict[str, Any] = {}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["score", "classifier"],  # the head stays as it is
        )
    if family:
        options["key_mapping"] = {rf"^{family.head}\.": "score."}
        options["config"] = AutoConfig.from_pretrained(folder, num_labels=len(family.labels))
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the reward model in {folder} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # it would be filled with random numbers
        raise InputError(
            f"the reward model in {folder} does not fit its class: {missing[0]} is missing",
            "Take one that was saved as a ...ForSequenceClassification.",
        )
    if "score.bias" in report["unexpected_keys"]:  # the class has none, Safe-RLHF's later models have
        bias = _tensor(folder, f"{family.head if family else 'score'}.bias")
        model.score.bias = torch.nn.Parameter(bias.to(model.score.weight), requires_grad=False)
    tokenizer.chat_template = template or tokenizer.chat_template or (family and family.template)
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of the reward model in {folder} has no chat template",
            "Name one: ?template=FILE.jinja; {{ messages[-1].content }} in it is the reply.",
        )
    keep_weights_as_loaded(model)
    return Classifier(model.eval(), tokenizer, model.config.get_text_config().pad_token_id)


def _tensor(folder: Path, name: str) -> Any:
    """One tensor of a folder's safetensors files, one of which holds it."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 - it is no dict
                return opened.get_tensor(name)
    raise InputError(f"the reward model in {folder} has no {name} in its safetensors files", "Download it again.")


def batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows, those of about one length together, the longest first: memory peaks at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        size = max(1, BATCH_TOKENS // max(1, len(rows[order[0]])))
        yield order[:size]
        del order[:size]


def collate(rows: Sequence[Sequence[int]], loaded: Classifier) -> dict[str, Any]:
    """Rows padded on the right.

    Classifiers look at the last token that is not the padding token. Where a model has none, one is named that no row
    has.
    """
    import torch

    config = loaded.model.config.get_text_config()
    used = {token for row in rows for token in row}
    pad = next(token for token in range(config.vocab_size) if token not in used) if loaded.pad is None else loaded.pad
    config.pad_token_id = pad
    ids = torch.full((len(rows), max(len(row) for row in rows)), pad)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row)
        mask[line, : len(row)] = 1
    return {"input_ids": ids.to(loaded.model.device), "attention_mask": mask.to(loaded.model.device)}
