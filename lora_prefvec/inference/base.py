"""Loading a base model, in 4-bit or in its own precision, on CPU and CUDA alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_prefvec.errors import InputError

if TYPE_CHECKING:
    import torch

Quantization = Literal["nf4", "none"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class LoadedBase:
    """A causal language model in memory, with its tokenizer.

    Args:
        model: the transformers model, in evaluation mode, no gradients required.
        tokenizer: its tokenizer; a pad token is always set, padding side is left.
        path: the folder it was loaded from.
        quantization: `nf4` (4-bit, double quantisation) or `none`.
    """

    model: Any
    tokenizer: Any
    path: Path
    quantization: Quantization

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def load_base(
    folder: str | Path,
    *,
    quantization: Quantization = "nf4",
    device: str = "auto",
    compute_dtype: ComputeDtype = "auto",
) -> LoadedBase:
    """Load the causal language model in `folder`.

    NF4 with double quantisation is the QLoRA recipe (arXiv 2305.14314); bitsandbytes runs it on CPU as on CUDA. Weights
    come from safetensors only, and no code of the folder is executed.

    Args:
        folder: a local folder with `config.json`, safetensors and a tokenizer.
        quantization: `nf4` quantises the linear layers; `none` keeps the compute dtype.
        device: `auto` (CUDA where there is one), or a torch device.
        compute_dtype: `auto` is bfloat16 where the device multiplies it natively, else float32.

    Raises:
        InputError: the folder holds no causal language model, or has no safetensors.
    """
    folder = Path(folder)
    config = check_causal_lm(folder)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = best_dtype(device) if compute_dtype == "auto" else getattr(torch, compute_dtype)
    arguments: dict[str, Any] = {}
    if quantization == "nf4" and "quantization_config" not in config:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the base in {folder} cannot be loaded: {first_line(error)}") from error
    if report["missing_keys"]:  # transformers fills them with random numbers
        raise InputError(
            f"the base in {folder} lacks weights, {sorted(report['missing_keys'])[0]} for one", "Get the base again."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="left")
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_weights_as_loaded(model)
    model.requires_grad_(False)
    model.eval()
    return LoadedBase(model=model, tokenizer=tokenizer, path=folder, quantization=quantization)


def keep_weights_as_loaded(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first forward without gradients (CPUs with avx512_bf16).

    Repacked weights are rounded once more, have no backward pass, and change again when they are saved: a reference
    pass before training would silently cut the gradients of the training after it.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_causal_lm(folder: Path) -> dict[str, Any]:
    """The `config.json` of `folder`, once it is sure that a causal language model lies there.

    Raises:
        InputError: no or broken config, another kind of model, or weights that are not safetensors.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json", "Name a folder, 'sandbox' or a Hub id.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a JSON object")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = config.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    kind = architectures[0] if architectures else config.get("model_type", "unknown")
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not known.intersection(architectures)
    ):
        raise InputError(
            f"the base in {folder} is a {kind}, which is no causal language model",
            "Name a model that generates text, such as a ...ForCausalLM.",
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"the base in {folder} has no safetensors weights",
            "Pickled weights are not read; convert them with transformers' save_pretrained.",
        )
    return config


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where `device` multiplies it in hardware, else float32 (CPU) or float16 (older GPUs)."""
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def first_line(error: Exception) -> str:
    """The first line of an exception's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
