"""What a module's name tells of its kind, and how the weight of that kind lies in a checkpoint.

A delta is always [out, in], the change of `nn.Linear`'s weight. What the stored weight is instead is decided here:

| kind | module | stored as |
|---|---|---|
| linear, head | `model.layers.0.self_attn.q_proj`, `lm_head` | `<module>.weight` [out, in] |
| embedding | `model.embed_tokens` | `<module>.weight` [vocabulary, hidden], which is the delta's shape |
| Conv1D of GPT-2 | `transformer.h.0.attn.c_attn` | `<module>.weight` [in, out] |
| fused experts | `model.layers.0.mlp.experts.gate_up_proj.3` | slice 3 of a parameter [experts, out, in] |
"""

from __future__ import annotations

import re

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings"})
_HEADS = frozenset({"lm_head", "embed_out"})
# PEFT's own file does not always say so (transformers: pytorch_utils.Conv1D).
_CONV1D = re.compile(r"(?:.*\.)?h\.\d+\.(?:attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)")
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
# Parameters of transformers' expert modules in the order in which they are registered, so the last is PEFT's outermost.
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_EXPERT = re.compile(rf"(?P<parameter>(?:.+\.)?experts\.(?:{'|'.join(EXPERT_PARAMETERS)}))\.(?P<index>\d+)")
_ONE_OF_MANY = re.compile(r"(?:.*\.)?experts\.\d+\..+")
# Their experts are stored as [experts, in, out] (`is_transposed` of transformers' expert modules).
_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria"})


def is_embedding(module: str) -> bool:
    """Whether a module is an input embedding, whose factors PEFT keeps as `lora_embedding_A` and `_B`."""
    return leaf(module) in _EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether a module is the output head: a plain linear layer that few engines adapt."""
    return leaf(module) in _HEADS


def is_conv1d(module: str, model_type: str | None = None) -> bool:
    """Whether a module is GPT-2's Conv1D, whose weight is stored as [in, out].

    Args:
        model_type: of the base's `config.json` where it is at hand: others use the same names for linear layers.
    """
    return bool(_CONV1D.fullmatch(module)) and (model_type is None or model_type in _CONV1D_MODELS)


def is_router(module: str) -> bool:
    """Whether a module chooses among experts; transformers 5 has a bare parameter there, which is targeted as one."""
    return leaf(module) in {"gate", "router"}


def expert_of(module: str) -> tuple[str, int] | None:
    """The fused parameter and the index in it of a delta such as `model.layers.0.mlp.experts.gate_up_proj.3`."""
    match = _EXPERT.fullmatch(module)
    return (match["parameter"], int(match["index"])) if match else None


def is_single_expert(module: str) -> bool:
    """Whether a module is an expert where they are stored one by one: `model.layers.0.mlp.experts.3.up_proj`."""
    return bool(_ONE_OF_MANY.fullmatch(module))


def experts_transposed(model_type: str | None) -> bool:
    """Whether a base stores fused experts as [experts, in, out], so that the transposed delta is added to a slice."""
    return model_type in _TRANSPOSED_EXPERTS


def is_canonical(module: str) -> bool:
    """Whether a module is a linear layer that every engine places: no embedding, head, Conv1D, router or expert."""
    special = is_embedding(module) or is_head(module) or is_conv1d(module) or is_router(module)
    return not (special or expert_of(module) or is_single_expert(module))


def leaf(module: str) -> str:
    """Last part of a module's path."""
    return module.rpartition(".")[2]
