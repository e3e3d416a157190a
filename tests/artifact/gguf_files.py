"""GGUF without llama.cpp: what it makes of an adapter, in numpy, and a base for it to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

Array = np.ndarray[Any, np.dtype[np.float64]]
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def applied(path: Path) -> dict[str, Array]:
    """Base tensor -> the change that llama.cpp applies to it: user scale 1, alpha / rank where alpha is given."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents() if "adapter.lora.alpha" in reader.fields else 0.0
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    found = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / B.shape[1] if alpha else 1.0
        # An embedding looks up rows of A; every other weight multiplies from the left.
        found[name] = scale * (A @ B.T if name == "token_embd.weight" else B @ A)
    return found


def reorder(weight: Array, heads: int) -> Array:
    """Rows of q or k as the converter writes them: in a head of d rows, row 2j+i is row i*d/2+j of transformers."""
    size = len(weight) // heads
    order = [head * size + i * size // 2 + j for head in range(heads) for j in range(size // 2) for i in range(2)]
    return weight[order]


def write_base(folder: Path, target: Path) -> None:
    """A Llama of transformers as a GGUF base in float32, without a tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        for path, name in (LEAVES | NORMS).items():
            weight = weights.get(f"model.layers.{layer}.{path}.weight")
            if weight is not None:
                kind = {"attn_q": heads, "attn_k": shared}.get(name)
                writer.add_tensor(f"blk.{layer}.{name}.weight", reorder(weight, kind) if kind else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dense(delta: Any) -> Array:
    """A delta as a float64 matrix."""
    product: torch.Tensor = delta.B.double() @ delta.A.double()
    return product.numpy()
