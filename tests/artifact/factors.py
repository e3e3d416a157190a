"""Small vectors and what a sound PEFT folder says."""

from __future__ import annotations

import torch

from lora_prefvec.vector import LowRankDelta, PreferenceVector

MODULES = {
    f"model.layers.{layer}.{leaf}": shape
    for layer in range(2)
    for leaf, shape in {"self_attn.q_proj": (6, 5), "self_attn.v_proj": (4, 5), "mlp.down_proj": (5, 7)}.items()
}
PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "owner/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "bias": "none",
}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def small_vector(rank: int, seed: int, scale: float = 1.0) -> PreferenceVector:
    """A random vector over `MODULES`."""
    generator = torch.Generator().manual_seed(seed)
    return PreferenceVector(
        {
            name: LowRankDelta(
                torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator) * scale
            )
            for name, (rows, columns) in MODULES.items()
        }
    )


def dense(vector: PreferenceVector) -> dict[str, torch.Tensor]:
    """Module -> dense delta, without the modules that are zero."""
    return {name: delta.dense() for name, delta in vector.deltas.items() if delta.norm() > 0}


def assert_same(left: PreferenceVector, right: PreferenceVector, tolerance: float = 0.0) -> None:
    """Compare dense deltas; 0 asks for equal bits of the factors' product up to the order of a sum."""
    here, there = dense(left), dense(right)
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))
