"""Fine-tuning on replies: prompts and what is to be said to them, without a preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lora_prefvec.data import Message
from lora_prefvec.inference import RenderedPair
from lora_prefvec.inference.render import chat_ids, common_prefix
from lora_prefvec.training.trainer import AdapterTrainer


@dataclass(frozen=True)
class PreparedReplies:
    """Rendered replies, in the form in which `run` takes them; nothing is held out.

    Args:
        dataset: columns prompt_ids and reply_ids.
    """

    dataset: Dataset
    held_out: list[RenderedPair] = field(default_factory=list)
    held_out_reference: Tensor = field(default_factory=lambda: torch.empty(0, 2))


class ReplyTrainer(AdapterTrainer):
    """Maximises the mean log-probability of a reply's tokens."""

    def collate(self, pad_token_id: int) -> ReplyCollator:
        """Prompts with their replies."""
        return ReplyCollator(pad_token_id)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        log_probs, tokens = self.reply_log_probs(model, inputs)
        loss = -log_probs.sum() / tokens.sum()
        return (loss, None) if return_outputs else loss


@dataclass(frozen=True)
class ReplyCollator:
    """Rows as one right-padded batch; each value is [n, length]."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(row["prompt_ids"]) + len(row["reply_ids"]) for row in rows)
        batch = {
            name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("attention_mask", "completion_mask")
        }
        batch["input_ids"] = torch.full((len(rows), length), self.pad_token_id)
        for number, row in enumerate(rows):
            start, end = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["reply_ids"])
            batch["input_ids"][number, :end] = torch.tensor([*row["prompt_ids"], *row["reply_ids"]])
            batch["attention_mask"][number, :end] = 1
            batch["completion_mask"][number, start:end] = 1
        return batch


def render_replies(
    rows: Sequence[tuple[list[Message], list[Message]]],
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    max_reply_tokens: int,
) -> PreparedReplies:
    """Prompts and replies, both of messages, as token ids; a prompt that is too long loses its beginning.

    Raises:
        InputError: there is no chat template, or it cannot render the turns.
    """
    found: dict[str, list[list[int]]] = {"prompt_ids": [], "reply_ids": []}
    for prompt, reply in rows:
        asked = chat_ids(tokenizer, prompt, add_generation_prompt=True)
        whole = chat_ids(tokenizer, [*prompt, *reply])
        start = common_prefix(asked, whole)
        found["prompt_ids"].append(whole[:start][-max_prompt_tokens:])
        found["reply_ids"].append(whole[start:][:max_reply_tokens])
    return PreparedReplies(Dataset.from_dict(found))
