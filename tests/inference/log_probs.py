"""The plain way to a reply's log-probability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_prefvec.inference import RenderedPair


def naive_log_probs(model: Any, pairs: list[RenderedPair]) -> Tensor:
    """[n, 2], row by row from full logits, nothing padded, nothing fused."""
    found = []
    for pair in pairs:
        for reply in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + reply])
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].float().log_softmax(-1)
            start = len(pair.prompt_ids)
            found.append(sum(log_probs[position - 1, ids[0, position]] for position in range(start, ids.shape[1])))
    return torch.stack([torch.as_tensor(value) for value in found]).view(-1, 2)
