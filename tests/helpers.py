"""Tiny models of several families and random vectors for them, all made from a seed."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lora_prefvec.vector import LowRankDelta, PreferenceVector

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 256 + len(SPECIAL_TOKENS)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.1,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=32),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=32),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=16, num_experts=4),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(**COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
}


def write_tiny_model(family: str, folder: Path) -> Path:
    """Writes a random float32 model of the family, with a byte-level tokenizer and a chat template."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and the special tokens of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module -> (out, in) of every linear layer but the head."""
    shapes = {}
    for name, module in model.named_modules():
        if name == "lm_head":
            continue
        if isinstance(module, nn.Linear):  # bitsandbytes' packed layers too
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


def random_vector(model: nn.Module, rank: int, seed: int, scale: float = 0.1) -> PreferenceVector:
    """A vector over all linear layers but the head, large enough to change what the model answers."""
    generator = torch.Generator().manual_seed(seed)
    return PreferenceVector(
        {
            name: LowRankDelta(
                torch.randn(rank, columns, generator=generator) / columns**0.5,
                torch.randn(rows, rank, generator=generator) * scale,
            )
            for name, (rows, columns) in linear_layers(model).items()
        }
    )
