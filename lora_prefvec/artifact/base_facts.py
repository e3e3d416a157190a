"""What an exporter or a check must know of a base: its `config.json` and the headers of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_prefvec.artifact.canonical import Shape, base_shapes
from lora_prefvec.artifact.identity import architecture
from lora_prefvec.artifact.provenance import read_json
from lora_prefvec.artifact.reference import local_base, resolve_base
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity

# Families whose configuration ties head and embedding where `config.json` does not say so.
_TIED = ("gemma", "smollm3", "gpt2")


@dataclass(frozen=True)
class Base:
    """A base as its folder describes it; no weight is read.

    Args:
        model_type: of the text part, as transformers calls it: `llama`, `gemma3_text`.
        multimodal: whether the text model is a part of a larger one.
        tied: whether head and embedding are one matrix.
        layers, vocabulary, experts: 0 where `config.json` does not say.
        heads: of the queries, and of keys and values.
        dtype: `bfloat16`, ...; empty where `config.json` does not say.
        shapes: module -> (out, in); empty where the folder holds no weights, or they are quantised or named otherwise.
    """

    folder: Path
    model_type: str
    multimodal: bool
    tied: bool
    layers: int
    vocabulary: int
    experts: int
    heads: tuple[int, int]
    dtype: str
    shapes: dict[str, Shape]


def read_base(folder: Path) -> Base:
    """The facts of the base in a folder; `config.json` alone will do.

    Raises:
        InputError: there is no valid `config.json`.
    """
    config, known = read_json(folder / "config.json"), architecture(folder)
    text = config.get("text_config")
    merged: dict[str, Any] = {**config, **text} if isinstance(text, dict) else config
    model_type = str(known.get("model_type") or "")
    shapes = {} if merged.get("quantization_config") else base_shapes(folder)
    if not any(name.startswith(("model.", "transformer.")) for name in shapes):
        shapes = {}  # named otherwise than the modules of the model, so it tells nothing of them
    tied = merged.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        tied = model_type.startswith(_TIED)
    return Base(
        folder=folder,
        model_type=model_type,
        multimodal=isinstance(text, dict),
        tied=tied,
        layers=_count(known.get("num_hidden_layers")),
        vocabulary=_count(known.get("vocab_size")),
        experts=_count(known.get("num_local_experts")),
        heads=(_count(known.get("num_attention_heads")), _count(known.get("num_key_value_heads"))),
        dtype=str(merged.get("dtype") or merged.get("torch_dtype") or ""),
        shapes=shapes,
    )


def find_base(identity: BaseIdentity | None, ref: str | None = None) -> Base | None:
    """The base that `ref` names; else that of `identity` where it is on this machine, else None.

    Raises:
        InputError: there is no base `ref`, or its `config.json` is damaged.
    """
    folder = resolve_base(ref) if ref else local_base(identity)
    return read_base(folder) if folder else None


def need_base(identity: BaseIdentity | None, ref: str | None, why: str) -> Base:
    """The same where nothing can be done without it.

    Raises:
        InputError: as `find_base`, or no base was found.
    """
    base = find_base(identity, ref)
    if base is None:
        known = f"the base {identity.id!r} is not on this machine" if identity else "the vector names no base"
        raise InputError(f"{known}, and {why}", "Name its folder or Hub id with --base.")
    return base


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
