"""Reading the adapter folder: any plain PEFT LoRA, wholly or not at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_prefvec.artifact.atomic import is_temporary, recover
from lora_prefvec.artifact.canonical import trim
from lora_prefvec.artifact.peft_config import FILE as CONFIG
from lora_prefvec.artifact.peft_config import LoraSettings, read_config
from lora_prefvec.artifact.provenance import Provenance, read_provenance
from lora_prefvec.artifact.weights import FLOATS, TensorSpec, file_sha256, load_tensor, read_header
from lora_prefvec.errors import InputError
from lora_prefvec.vector import LowRankDelta, PreferenceVector

WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# GPT-2 stores these transposed, and PEFT's own file does not say so.
_CONV1D = re.compile(r"(?:.*\.)?h\.\d+\.(?:attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)")


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Args:
        provenance: of `prefvec.json`; None for a plain PEFT adapter.
        config: `adapter_config.json` as it stands.
        sha256: of the weights file.
    """

    path: Path
    vector: PreferenceVector
    provenance: Provenance | None
    config: dict[str, Any]
    sha256: str


def read_adapter(path: str | Path, *, check_hash: bool = True) -> Adapter:
    """Read a LoRA folder wholly, or refuse it.

    Any plain PEFT LoRA will do: rsLoRA, rank and alpha patterns and an adapter's name in the tensor names are
    understood. The scale is folded into B, and components that are zero are dropped.

    Args:
        check_hash: compare the weights with the hash in `prefvec.json`.

    Raises:
        InputError: the folder is unfinished, damaged, no adapter, or no linear delta; the message says which.
    """
    folder = Path(path)
    recover(folder)
    if is_temporary(folder.absolute()):
        raise InputError(
            f"{folder} is an unfinished write", "Give the folder that was to be written, or write it again."
        )
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", "Give the folder of an adapter.")
    settings, config = read_config(folder)
    facts = read_provenance(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise _no_weights(folder)
    sha256 = file_sha256(weights)
    if check_hash and facts and facts.weights_sha256 and facts.weights_sha256 != sha256:
        raise InputError(
            f"{weights} has SHA-256 {sha256[:12]}..., and prefvec.json says {facts.weights_sha256[:12]}...",
            "The weights were changed: get the folder again, or read them as they are with --allow-mismatch.",
        )
    pairs = _pair_up(weights, read_header(weights)[0])
    deltas = {module: _delta(module, a, b, settings) for module, (a, b) in pairs.items()}
    identity = facts.base if facts else settings.identity()
    return Adapter(folder, PreferenceVector(deltas, identity), facts, config, sha256)


def _no_weights(folder: Path) -> InputError:
    if any((folder / name).is_file() for name in ("adapter_model.bin", "adapter_model.pt")):
        return InputError(
            f"{folder} has its weights as a pickle, which can run code",
            "Convert them to safetensors: load the adapter with PEFT where you trust it and call save_pretrained.",
        )
    return InputError(f"{folder} holds no {WEIGHTS}", "Get the folder again, with its weights.")


def _pair_up(path: Path, tensors: dict[str, TensorSpec]) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """Module -> its A and B; anything in the file that is no factor of a linear layer is refused."""
    found: dict[str, dict[str, TensorSpec]] = {}
    adapters = set()
    for name, spec in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise _not_a_factor(path, name)
        module, part = match["module"], match["part"]
        _check_module(path, module)
        adapters.add(match["adapter"])
        if part in found.setdefault(module, {}):
            raise InputError(f"{path} holds two factors {part} of {module}", "Save the adapter again, alone.")
        if spec.dtype not in FLOATS:
            raise InputError(f"{path} holds {name} as {spec.dtype}", "Save it as float32, bfloat16 or float16.")
        found[module][part] = spec
    if len(adapters) > 1:
        raise InputError(f"{path} holds several adapters: {sorted(map(str, adapters))}", "Save each in its own folder.")
    if not found:
        raise InputError(f"{path} holds no tensors", "Get the adapter again.")
    for module, parts in found.items():
        if len(parts) != 2:
            raise InputError(
                f"{path} lacks factor {'B' if 'A' in parts else 'A'} of {module}", "Get the adapter again."
            )
    return {module: (parts["A"], parts["B"]) for module, parts in found.items()}


def _not_a_factor(path: Path, name: str) -> InputError:
    shown = repr(name[:200])
    if "lora_magnitude_vector" in name:
        return InputError(f"{path} is a DoRA (it holds {shown})", "Train it again without use_dora.")
    if "lora_embedding_" in name:
        return InputError(f"{path} adapts an embedding ({shown})", "Train it on linear layers only.")
    if name.endswith(".bias"):
        return InputError(f"{path} carries a bias ({shown})", "Train it again with bias none.")
    return InputError(f"{path} holds {shown}, which is no factor of a LoRA", "Train it without modules_to_save.")


def _check_module(path: Path, module: str) -> None:
    leaf = module.rpartition(".")[2]
    if leaf in {"lm_head", "embed_tokens", "embed_out", "wte"}:
        raise InputError(f"{path} adapts {module}", "Train it on the linear layers between embedding and head.")
    if ".experts" in module:
        raise InputError(f"{path} adapts experts ({module})", "Train it on the attention layers.")
    if leaf == "base_layer":
        raise InputError(f"{path} holds {module}, a part of the base", "Save the adapter alone.")
    if _CONV1D.fullmatch(module):
        raise InputError(f"{path} adapts GPT-2's Conv1D layers ({module})", "Use a base with plain linear layers.")


def _delta(module: str, a: TensorSpec, b: TensorSpec, settings: LoraSettings) -> LowRankDelta:
    """The delta of a module in float32, scale folded into B."""
    rank = settings.rank(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"{a.file} holds {module} as A {list(a.shape)} and B {list(b.shape)}, and {CONFIG} says rank {rank}",
            "Get the adapter again.",
        )
    A, B = load_tensor(a).float(), load_tensor(b).float()
    for part, factor in (("A", A), ("B", B)):
        if not bool(torch.isfinite(factor).all()):
            raise InputError(
                f"{a.file} holds NaN or infinity in {module}.lora_{part}", "Its training diverged: use another one."
            )
    scaled = B * settings.scale(module)
    if not bool(torch.isfinite(scaled).all()):
        raise InputError(f"{a.file} overflows when {module} is scaled by its lora_alpha", "Get the adapter again.")
    return trim(A, scaled)
