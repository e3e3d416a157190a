"""A mix as a GGUF LoRA, which llama.cpp loads beside a base in GGUF.

Layout, names and types are those of llama.cpp's `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_prefvec.artifact.atomic import atomic_file
from lora_prefvec.artifact.base_facts import Base
from lora_prefvec.artifact.canonical import Grid, check_fits, factors
from lora_prefvec.artifact.provenance import Provenance
from lora_prefvec.artifact.writing import cast_error
from lora_prefvec.errors import InputError, require_extra
from lora_prefvec.vector import LowRankDelta, PreferenceVector

PROVENANCE_KEY = "prefvec.provenance"  # llama.cpp reads only the keys that it knows
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_DENSE = {f"self_attn.{leaf}": name for leaf, name in _ATTENTION.items()} | {
    f"mlp.{leaf}": name for leaf, name in _MLP.items()
}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_UNGATED = {path: name for path, name in _DENSE.items() if path != "mlp.gate_proj"}
_MIXTURE = {path: name for path, name in _DENSE.items() if path.startswith("self_attn.")} | {
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.(?P<layer>\d{1,6})\.(?P<path>.+)")
_EMBEDDING = re.compile(r"(?:model\.|language_model\.)*embed_tokens")
_HEAD = re.compile(r"(?:language_model\.)?lm_head")
_FOLD = "Fold the mix into the base (prefvec fold) and convert the result, or leave that module out."


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp keeps a family of models.

    Args:
        name: its `general.architecture`.
        permuted: whether its files hold the rows of q and k in another order than transformers.
        places: path within a layer -> name within a block.
        head: whether it has a place for the change of a head.
    """

    name: str
    permuted: bool = False
    places: tuple[tuple[str, str], ...] = tuple(_DENSE.items())
    head: bool = True


# model_type of transformers -> what llama.cpp makes of it
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "mixtral": Architecture("llama", permuted=True, places=tuple(_MIXTURE.items())),
    "smollm3": Architecture("smollm3", permuted=True),
    "arcee": Architecture("arcee", permuted=True, places=tuple(_UNGATED.items())),
    "granite": Architecture("granite", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", places=tuple(_MIXTURE.items())),
    "gemma": Architecture("gemma", head=False),
    "gemma2": Architecture("gemma2", head=False),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3", places=tuple(_FUSED.items())),
}


@dataclass(frozen=True)
class GgufPlan:
    """What `write_gguf` will write.

    Args:
        architecture: `general.architecture`.
        names: module -> name of its tensor in the base's file; modules whose delta is zero are left out.
        size: of the factors in bytes.
        cast_error: norm of what the cast to `dtype` changes, relative to the vector's norm; 0.0 for float32.
    """

    base: Base
    architecture: Architecture
    names: dict[str, str]
    dtype: torch.dtype
    size: int
    cast_error: float


def architecture_of(base: Base) -> Architecture:
    """How llama.cpp keeps a base.

    Raises:
        InputError: we do not know it.
    """
    if base.model_type not in ARCHITECTURES:
        raise InputError(
            f"the layout of {base.model_type or 'this base'!r} in GGUF is not known here "
            f"(known: {', '.join(ARCHITECTURES)})",
            "Fold the mix into the base (prefvec fold) and convert the result with llama.cpp.",
        )
    return ARCHITECTURES[base.model_type]


def plan_gguf(vector: PreferenceVector, base: Base, dtype: torch.dtype = torch.float32) -> GgufPlan:
    """Find a place for every module, or refuse the whole.

    Raises:
        InputError: the base's layout is not known, a module has no place, does not fit or overflows `dtype`.
    """
    architecture = architecture_of(base)
    used = {module: delta for module, delta in vector.deltas.items() if delta.norm() > 0}
    if not used:
        raise InputError("the mix changes no module, so there is nothing to write", "Give a coefficient that is not 0.")
    names = {module: tensor_name(module, base, architecture) for module in used}
    if base.shapes.keys() & used.keys():
        check_fits(PreferenceVector(used), base.shapes)
    for module, delta in used.items():
        _heads(module, delta.shape[0], base, architecture)
    exact = [(module, balanced(module, delta)) for module, delta in used.items()]
    size = sum(delta.A.numel() + delta.B.numel() for _, delta in exact) * dtype.itemsize
    return GgufPlan(base, architecture, names, dtype, size, cast_error(exact, dtype))


def write_gguf(
    target: str | Path, vector: PreferenceVector, plan: GgufPlan, provenance: Provenance, *, force: bool = False
) -> None:
    """Write a vector as a GGUF LoRA, which appears only when it is complete; every module keeps its own rank.

    Args:
        provenance: is kept in the file as JSON.

    Raises:
        InputError: the target exists or cannot be written, the disk is full, or the package `gguf` is missing.
    """
    gguf = import_gguf()
    ranks = {vector.deltas[module].rank for module in plan.names}
    with atomic_file(target, force) as work:
        writer = gguf.GGUFWriter(work, plan.architecture.name)
        try:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            if len(ranks) == 1:  # the scale is in B; without this key llama.cpp does not divide by the rank at all
                writer.add_float32("adapter.lora.alpha", float(ranks.pop()))
            if provenance.preference:
                writer.add_name(provenance.preference)
            if vector.identity:
                writer.add_base_model_count(1)
                writer.add_base_model_name(0, vector.identity.id)
            writer.add_string(PROVENANCE_KEY, provenance.to_json())
            _write_tensors(writer, vector, plan)
        finally:
            writer.close()


def import_gguf() -> Any:
    """The package `gguf`, which is an optional dependency."""
    try:
        import gguf
    except ImportError:
        raise require_extra("gguf", "gguf") from None
    return gguf


def balanced(module: str, delta: LowRankDelta) -> LowRankDelta:
    """The factors with their norms made alike, which costs nothing and keeps half precision accurate."""
    return factors(PreferenceVector({module: delta}), module, Grid({module: delta.shape}, delta.rank, [module], []))


def permute(B: Tensor, heads: int) -> Tensor:
    """The rows of a factor B [out, r] in the order of llama.cpp's rotary embedding.

    Within each head of d rows, row 2j+i takes row i*d/2+j (llama.cpp `conversion/llama.py`, `LlamaModel.permute`).
    """
    rows, rank = B.shape
    return B.reshape(heads, 2, rows // heads // 2, rank).transpose(1, 2).reshape(rows, rank)


def _write_tensors(writer: Any, vector: PreferenceVector, plan: GgufPlan) -> None:
    """Announce all tensors, then write them one at a time, so that one is in memory."""
    pairs = sorted(plan.names.items(), key=lambda pair: pair[1])
    for module, name in pairs:
        (rows, columns), rank = vector.deltas[module].shape, vector.deltas[module].rank
        shapes = ((rows, rank), (columns, rank)) if name == "token_embd.weight" else ((rank, columns), (rows, rank))
        for suffix, shape in zip(("lora_a", "lora_b"), shapes, strict=True):
            size = shape[0] * shape[1] * plan.dtype.itemsize
            empty = torch.empty(0, dtype=plan.dtype).numpy()
            writer.add_tensor_info(f"{name}.{suffix}", shape, empty.dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for module, name in pairs:
        for factor in _layout(balanced(module, vector.deltas[module]), name, module, plan):
            writer.write_tensor_data(factor.to(plan.dtype).contiguous().numpy())


def _layout(delta: LowRankDelta, name: str, module: str, plan: GgufPlan) -> tuple[Tensor, Tensor]:
    """A and B as the file holds them; the embedding's are the other way round, as it is looked up by rows."""
    if name == "token_embd.weight":
        return delta.B, delta.A.T
    heads = _heads(module, delta.shape[0], plan.base, plan.architecture)
    return delta.A, permute(delta.B, heads) if heads else delta.B


def _heads(module: str, rows: int, base: Base, architecture: Architecture) -> int:
    """The heads whose rows are permuted; 0 where none are.

    Raises:
        InputError: the module's rows are no whole number of the base's heads.
    """
    leaf = module.rpartition(".")[2]
    if not architecture.permuted or leaf not in {"q_proj", "k_proj"}:
        return 0
    heads = base.heads[0 if leaf == "q_proj" else 1]
    if not heads or rows % (2 * heads):
        raise InputError(
            f"{module} has {rows} rows, and the base's config.json speaks of {heads} heads",
            "Give the base of the vector with --base.",
        )
    return heads


def tensor_name(module: str, base: Base, architecture: Architecture) -> str:
    """Where llama.cpp keeps the weights of a module.

    Raises:
        InputError: nowhere; the message says why and what to do instead.
    """
    if match := _LAYER.fullmatch(module):
        found = dict(architecture.places).get(match["path"])
        if found and (not base.layers or int(match["layer"]) < base.layers):
            return f"blk.{int(match['layer'])}.{found}.weight"
        why = f"a GGUF LoRA of {architecture.name} has no place for it"
        if ".experts" in module:
            why = "llama.cpp stacks the experts of a layer, and takes all of them or none"
    elif _EMBEDDING.fullmatch(module):
        if not base.tied:
            return "token_embd.weight"
        why = "it is tied to the head, and llama.cpp aborts on an adapter of a tied embedding"
    elif _HEAD.fullmatch(module):
        if architecture.head and not base.tied:
            return "output.weight"
        why = "it is tied to the embedding, and a GGUF file then has no head to change"
    else:
        why = f"a GGUF LoRA of {architecture.name} has no place for it"
    raise InputError(f"{module} cannot be exported: {why}", _FOLD)
