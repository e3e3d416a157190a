"""NF4 with double quantisation, exactly as the base is loaded for training: rounding, and bitsandbytes' own files.

QLoRA (arXiv 2305.14314): blocks of 64 weights, each value rounded to one of 16 levels times the block's largest
magnitude; those magnitudes are themselves rounded to 8 bits in blocks of 256, after their mean is taken off.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_prefvec.artifact.kinds import is_embedding, is_head, is_router, is_single_expert
from lora_prefvec.artifact.weights import FLOATS, Layout, TensorSpec

BLOCK, NESTED_BLOCK = 64, 256
_STATE = "quant_state.bitsandbytes__nf4"
_STATE_BYTES = 256  # room for its JSON, whose length depends on a number; padded with blanks


def quantises(tensor: str, spec: TensorSpec) -> bool:
    """Whether a base that is loaded in NF4 has this tensor in 4 bits.

    transformers quantises `nn.Linear` and `Conv1D`, but not the head; its fused experts and their routers are bare
    parameters, however the checkpoint stores them.
    """
    module = tensor.removesuffix(".weight")
    if module == tensor or len(spec.shape) != 2 or spec.dtype not in FLOATS:
        return False
    embedding = is_embedding(module) or "embed" in module.rpartition(".")[2]
    return not (embedding or is_head(module) or is_router(module) or is_single_expert(module))


def prepare() -> None:
    """Import bitsandbytes, in one thread: where several come first, some may find its kernels not yet registered."""
    import bitsandbytes  # noqa: F401


def quantise(weight: Tensor) -> tuple[Tensor, Any]:
    """Packed values (two in a byte) and bitsandbytes' state of a weight [out, in]."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return packed, state


def dequantise(packed: Tensor, state: Any) -> Tensor:
    """The weight [out, in] that quantised weights stand for, in the type that they had."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(packed, state)
    return weight


def round_trip(weight: Tensor) -> Tensor:
    """The weight [out, in] as a model in NF4 has it, in its own type."""
    return dequantise(*quantise(weight))


def layout(tensor: str, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
    """Names, types and shapes of the tensors that stand for one of shape [out, in] in a file."""
    size = math.prod(shape)
    blocks = -(-size // BLOCK)
    return {
        tensor: ("U8", ((size + 1) // 2, 1)),
        f"{tensor}.absmax": ("U8", (blocks,)),
        f"{tensor}.nested_absmax": ("F32", (-(-blocks // NESTED_BLOCK),)),
        f"{tensor}.nested_quant_map": ("F32", (256,)),
        f"{tensor}.quant_map": ("F32", (16,)),
        f"{tensor}.{_STATE}": ("U8", (_STATE_BYTES,)),
    }


def parts(tensor: str, packed: Tensor, state: Any) -> dict[str, Tensor]:
    """The tensors of `layout`, as bitsandbytes writes them."""
    found = state.as_dict(packed=True)
    text = bytes(found[_STATE].tolist()).ljust(_STATE_BYTES)
    if len(text) != _STATE_BYTES:
        raise ValueError(f"the state of {tensor} takes {len(text)} bytes")
    found[_STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {tensor: packed, **{f"{tensor}.{name}": part for name, part in found.items()}}


def config(dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` of a model whose weights are stored in NF4."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
