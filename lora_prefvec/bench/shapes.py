"""The shapes that are measured, and random vectors and models of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_prefvec.vector import LowRankDelta, PreferenceVector

SHARD = 500_000_000  # bytes


@dataclass(frozen=True)
class Llama:
    """Sizes of a model of the Llama family."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in) of every matrix that is adapted: seven a layer."""
        h, i, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        one = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
        }
        return {f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in one.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint, layer by layer."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        linear = self.linear()
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{name}.weight"] = (self.hidden,)
            found |= {f"{name}.weight": shape for name, shape in linear.items() if name.startswith(prefix)}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(shape) for shape in self.tensors().values())


LLAMA_8B = Llama(4096, 14336, 32, 32, 8, 128256)
TINY_LLAMA = Llama(2048, 5632, 22, 32, 4, 32000)  # TinyLlama-1.1B
QUICK = Llama(128, 256, 2, 4, 2, 512)


def random_delta(out: int, in_: int, rank: int, generator: torch.Generator) -> LowRankDelta:
    """A delta whose singular values fall, as those of trained adapters do."""
    A = torch.randn(rank, in_, generator=generator) / in_**0.5
    B = torch.randn(out, rank, generator=generator) / out**0.5 * torch.logspace(0, -1.5, rank)
    return LowRankDelta(A, B)


def random_vector(shape: Llama, rank: int, seed: int) -> PreferenceVector:
    """A vector over all linear layers but the head."""
    generator = torch.Generator().manual_seed(seed)
    return PreferenceVector(
        {name: random_delta(out, in_, rank, generator) for name, (out, in_) in shape.linear().items()}
    )


def write_base(folder: Path, shape: Llama, *, shard: int = SHARD) -> Path:
    """Write a random bfloat16 model as transformers would: shards of at most `shard` bytes, index and config."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    groups = list(_shards(shape, shard))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _weights(shape.tensors()[name], generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def with_layers(shape: Llama, layers: int) -> Llama:
    """The same model with another depth."""
    return replace(shape, layers=layers)


def _shards(shape: Llama, shard: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, dims in shape.tensors().items():
        bytes_ = 2 * math.prod(dims)
        if group and size + bytes_ > shard:
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_
    yield group


def _weights(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
