"""What a base makes of a whole conversation: its last hidden state, on which a reward model puts its heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_prefvec.inference.base import LoadedBase
from lora_prefvec.progress import Progress

BATCH_TOKENS = 8192  # of one forward, padding included


def last_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state behind the final norm at the last token of every row: [n, hidden], float32.

    Args:
        model: a causal language model, bare or with adapters or a live mix on it.
        input_ids, attention_mask: [n, length], padded on the right.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = bare.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    states: Tensor = found.last_hidden_state[rows, attention_mask.sum(dim=1) - 1]
    return states.float()


def final_states(base: LoadedBase, rows: Sequence[Sequence[int]], bar: Progress | None = None) -> Tensor:
    """`last_states` of many rows of token ids, those of about one length together: [rows, hidden], on the CPU.

    Args:
        bar: advanced by one for each row.
    """
    config = base.model.config.get_text_config()
    found = torch.empty(len(rows), config.hidden_size)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    with torch.no_grad():
        while order:
            batch = order[: max(1, BATCH_TOKENS // len(rows[order[0]]))]
            del order[: len(batch)]
            ids = torch.zeros(len(batch), max(len(rows[row]) for row in batch), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for line, row in enumerate(batch):
                ids[line, : len(rows[row])] = torch.tensor(rows[row])
                mask[line, : len(rows[row])] = 1
            found[batch] = last_states(base.model, ids.to(base.device), mask.to(base.device)).cpu()
            if bar:
                bar.advance(len(batch))
    return found
