"""Checks of adapted embeddings, heads and experts: each returns what is wrong as a phrase, or None."""

from __future__ import annotations

import re
from collections import defaultdict

from lora_prefvec.artifact.export_gguf import ARCHITECTURES
from lora_prefvec.artifact.verify.subject import Folder, some

# Families whose classes in vLLM declare embedding and head as modules that an adapter may change.
_VLLM_EMBEDS = ("llama", "phi3", "mixtral", "granite", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_text")
_VLLM_MAX_VOCABULARY = 258_048
_EXPERT = re.compile(r"(?P<path>.*experts)\.(?P<expert>\d{1,6})\.(?P<leaf>[^.]+)")
_PROJECTIONS = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "w1": 0, "w3": 1, "w2": 2}


def vllm_embeddings(folder: Folder) -> str | None:
    adapted = folder.embeddings + folder.heads
    return (
        f"{folder.model_type} declares no {some(adapted)}"
        if adapted and folder.model_type not in _VLLM_EMBEDS
        else None
    )


def sglang_embeddings(folder: Folder) -> str | None:
    adapted = folder.embeddings + folder.heads
    return f"{folder.model_type} applies none to {some(adapted)}" if adapted and _gemma(folder) else None


def vocabulary(folder: Folder) -> str | None:
    expected = folder.base.vocabulary if folder.base else 0
    for module in folder.embeddings:
        part = folder.pairs[module].get("A")
        if part and expected and part.width != expected:
            return f"{module} is {part.width} wide, and the base has {expected} tokens"
    return None


def tied_embedding(folder: Folder) -> str | None:
    return f"{folder.embeddings[0]} is tied to the head" if folder.embeddings and _tied(folder) else None


def tied_head(folder: Folder) -> str | None:
    return f"{folder.heads[0]} is tied to the embedding" if folder.heads and _tied(folder) else None


def gemma_head(folder: Folder) -> str | None:
    return f"it adapts {folder.heads[0]}" if folder.heads and folder.model_type in {"gemma", "gemma2"} else None


def large_vocabulary(folder: Folder) -> str | None:
    size = folder.base.vocabulary if folder.base else 0
    declares = folder.model_type in _VLLM_EMBEDS
    return (
        f"the base has {size:,}; start vLLM with --lora-target-modules"
        if declares and size > _VLLM_MAX_VOCABULARY
        else None
    )


def listed(folder: Folder) -> str | None:
    targets = folder.config.get("target_modules")
    leaves = {str(name).rpartition(".")[2] for name in targets} if isinstance(targets, list) else set()
    found = [name for name in folder.embeddings + folder.heads if name.rpartition(".")[2] not in leaves]
    return f"{some(found)} is not in target_modules" if found and isinstance(targets, list) else None


def complete(folder: Folder) -> str | None:
    for path, experts in _experts(folder).items():
        count = max([max(experts) + 1, folder.base.experts if folder.base else 0])
        lacking = [expert for expert in range(count) if len(experts.get(expert, ())) < 3]
        if lacking:
            return f"{path}.{lacking[0]} has {len(experts.get(lacking[0], ()))} of 3 projections"
    return None


def gate_and_up(folder: Folder) -> str | None:
    for path, experts in _experts(folder).items():
        for expert, found in experts.items():
            if len(found & {0, 1}) == 1:
                return f"{path}.{expert} has one of gate and up"
    return None


def one_by_one(folder: Folder) -> str | None:
    return f"{some(folder.fused_experts)} holds them together" if folder.fused_experts else None


def known_layout(folder: Folder) -> str | None:
    if folder.model_type in ARCHITECTURES:
        return None
    return f"{folder.model_type or 'the base'} is not among them; llama.cpp's own converter may know it"


def _experts(folder: Folder) -> dict[str, dict[int, set[int]]]:
    """Path of the experts of a layer -> expert -> which of gate (0), up (1) and down (2) it adapts."""
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for module in folder.pairs:
        if (match := _EXPERT.fullmatch(module)) and match["leaf"] in _PROJECTIONS:
            found[match["path"]][int(match["expert"])].add(_PROJECTIONS[match["leaf"]])
    return found


def _tied(folder: Folder) -> bool:
    return folder.base is not None and folder.base.tied


def _gemma(folder: Folder) -> bool:
    return folder.model_type.startswith("gemma")
