"""The LoRA that is being trained: seeded start, fp32 factors, sign, and what it amounts to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.recipe import LoraSpec
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector

ADAPTER = "default"  # PEFT's name for the only adapter of a run


def lora_config(spec: LoraSpec) -> LoraConfig:
    """PEFT's configuration of the adapter; no dropout, so that a resumed run repeats itself."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
    )


def check_targets(model: Any, spec: LoraSpec) -> None:
    """Whether `lora.targets` names linear layers of the base, the head not among them.

    Raises:
        InputError: a target that names none, or something else as well.
    """
    linear = {
        name: isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
        for name, module in model.named_modules()
    }
    for target in spec.targets if isinstance(spec.targets, list) else []:
        if {fits for name, fits in linear.items() if f".{name}".endswith(f".{target}")} != {True}:
            known = {name.rpartition(".")[2] for name, fits in linear.items() if fits}
            raise InputError(
                f"lora.targets: {target!r} is no linear layer of the base below its head", nearest(target, known)
            )


def layers(model: Any) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of a PEFT model, by module name without PEFT's prefix, in sorted order."""
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    yield from sorted(found.items())


def start(model: Any, seed: int, vector: PreferenceVector | None = None) -> None:
    """Set every factor to its start in fp32: A uniform in +-1/sqrt(in) as LoRA does, drawn from `seed`, and B zero.

    Runs that share a seed and a shape share A, so that d+ and d- differ by their labels alone. With a vector, of the
    same rank and modules, training goes on from there.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers(model):
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        bound = 1 / math.sqrt(A.shape[1])
        drawn = torch.empty(A.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        A.data = drawn.to(A.device)
        B.data = torch.zeros(B.shape, dtype=torch.float32, device=B.device)
        if vector is not None:
            delta, scale = vector.deltas[name], layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]
            A.data.copy_(delta.A)
            B.data.copy_(delta.B / scale)


def set_coefficient(model: Any, coefficient: float) -> None:
    """Apply the adapter that many times: 1 as it is, -1 negated."""
    for _, layer in layers(model):
        layer.scaling[ADAPTER] = coefficient * layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]


def vector(model: Any, identity: BaseIdentity | None) -> PreferenceVector:
    """The adapter as it stands, scale folded into B; factors are copied to the CPU."""
    deltas = {}
    for name, layer in layers(model):
        scale = layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        deltas[name] = LowRankDelta(A.detach().cpu().clone(), B.detach().cpu() * scale)
    return PreferenceVector(deltas, identity)


def save_factors(model: Any, file: Path) -> None:
    """Write the trained parameters, bit for bit."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable(model).items()}
    save_file(tensors, file)


def load_factors(model: Any, file: Path) -> None:
    """Put back what `save_factors` wrote."""
    tensors = load_file(file)
    for name, parameter in trainable(model).items():
        parameter.data.copy_(tensors[name])


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
