"""Peak memory and step time of training on an 8B-shaped 4-bit base, on one GPU.

    python tests/bench/gpu_8b.py
    python tests/bench/gpu_8b.py --cap-gb 12

The base has Llama-3.1-8B's shape and random weights; memory and time do not depend on what the weights are. Each side
of a preference, and a two-sided run, trains 20 steps of one pair, 2 x 1024 tokens, with LoRA of rank 16 on all linear
layers and gradient checkpointing. Writes tests/bench/results/gpu-8b.json, or gpu-8b-cap-12.json. `--tiny` runs the same
code with a tiny shape on the CPU, prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from lora_prefvec.progress import quiet_libraries

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
quiet_libraries()

import torch  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    TrainerCallback,
)
from transformers.quantizers import AutoHfQuantizer  # noqa: E402

from lora_prefvec.artifact import resolve_base  # noqa: E402
from lora_prefvec.inference import LoadedBase, RenderedPair, pair_log_probs  # noqa: E402
from lora_prefvec.inference.base import best_dtype, keep_weights_as_loaded  # noqa: E402
from lora_prefvec.recipe import LoraSpec, TrainingSpec  # noqa: E402
from lora_prefvec.training.run import peak_memory  # noqa: E402
from lora_prefvec.training.trainer import PreferenceTrainer, Side  # noqa: E402

RESULTS = Path(__file__).parent / "results"
RANK = 16
WARM_UP = 3  # steps that compile and allocate; left out of the step time
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_base(shape: dict[str, int], device: str) -> LoadedBase:
    """A Llama of this shape with random weights, made on `device` and quantised to NF4 one layer at a time."""
    dtype = best_dtype(device)
    config = LlamaConfig(**shape, rms_norm_eps=1e-5, tie_word_embeddings=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    quantizer.preprocess_model(model=model, device_map={"": device})
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            setattr(module, name, filled(module, empty, dtype, device))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    keep_weights_as_loaded(model)
    model.requires_grad_(False)
    model.eval()
    folder = resolve_base("sandbox")  # random token ids need no tokenizer of their own
    return LoadedBase(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), path=folder, quantization="nf4")


def filled(module: nn.Module, empty: nn.Parameter, dtype: torch.dtype, device: str) -> nn.Parameter:
    """Weights for a parameter that has none: ones for a norm, else N(0, 0.02^2), in NF4 where the layer is."""
    value = torch.empty(empty.shape, dtype=dtype, device=device)
    value = value.fill_(1.0) if value.dim() == 1 else value.normal_(0.0, 0.02)
    if not isinstance(module, Linear4bit):
        return nn.Parameter(value, requires_grad=False)
    packed: nn.Parameter = Params4bit(
        value,
        requires_grad=False,
        compress_statistics=empty.compress_statistics,
        quant_type=empty.quant_type,
        quant_storage=empty.quant_storage,
        module=module,
    ).to(device)
    return packed


def random_pairs(count: int, tokens: int, vocabulary: int) -> list[RenderedPair]:
    """Pairs of two rows of `tokens` tokens each: a shared prompt and a reply, half and half."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[int]:
        ids: list[int] = torch.randint(vocabulary, (tokens // 2,), generator=generator).tolist()
        return ids

    return [RenderedPair(drawn(), drawn(), drawn()) for _ in range(count)]


class StepTimes(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self._began)


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train_side(base: LoadedBase, dataset: Dataset, side: Side, steps: int) -> dict[str, Any]:
    """Train one side on the resident base, one pair a step, and say what it took."""
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spec = TrainingSpec(max_steps=steps, batch_size=1, micro_batch_size=1, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(base, LoraSpec(rank=RANK), spec, side, dataset, Path(folder))
        times = StepTimes()
        trainer.add_callback(times)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.release()
    if not losses or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"{side}: the losses are {losses}")
    found = {
        "step_seconds": round(statistics.median(times.seconds[WARM_UP:]), 4),
        "peak_memory_gb": gb(peak_memory(base)),
        "last_loss": round(losses[-1], 4),
    }
    if base.device.type == "cuda":
        found["peak_reserved_gb"] = gb(torch.cuda.max_memory_reserved())
    return found


def gb(size: int) -> float:
    """Bytes in GB (1e9 bytes)."""
    return round(size / 1e9, 2)


def measure(*, tiny: bool, cap_gb: float | None) -> dict[str, Any]:
    """Build the base, take the reference pass, train every side."""
    device, shape, tokens, steps = ("cpu", TINY, 64, 5) if tiny else ("cuda", LLAMA_8B, 1024, 20)
    on_gpu = device == "cuda"
    if on_gpu and cap_gb:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / torch.cuda.mem_get_info()[1]))
    base = random_base(shape, device)
    pairs = random_pairs(steps, tokens, shape["vocab_size"])
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cap_gb": cap_gb,
        "shape": shape,
        "rank": RANK,
        "tokens_per_step": [2, tokens],
        "steps": steps,
        "compute_dtype": str(base.model.dtype).removeprefix("torch."),
        "libraries": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
    }
    if on_gpu:
        result["base_gb"] = gb(torch.cuda.memory_allocated())
    began = now()
    reference = pair_log_probs(base.model, pairs, pad_token_id=base.tokenizer.pad_token_id, batch_size=1)
    result["reference_seconds_per_pair"] = round((now() - began) / len(pairs), 4)
    dataset = Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt_ids for pair in pairs],
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
            "ref_chosen_logps": reference[:, 0].tolist(),
            "ref_rejected_logps": reference[:, 1].tolist(),
            "swaps": [True] * len(pairs),
        }
    )
    result["runs"] = {side: train_side(base, dataset, side, steps) for side in get_args(Side)}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap-gb", type=float, help="let PyTorch take no more than so many GB (1e9 bytes)")
    parser.add_argument("--tiny", action="store_true", help="check the code on the CPU; nothing is written")
    asked = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        print("no CUDA device: torch sees none; --tiny checks this program on a CPU", file=sys.stderr)
        return 2
    try:
        result = measure(tiny=asked.tiny, cap_gb=asked.cap_gb)
    except torch.OutOfMemoryError as error:
        limit = f"{asked.cap_gb:g} GB" if asked.cap_gb else "this GPU's memory"
        print(f"{limit} is not enough: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2))
    if not asked.tiny:
        RESULTS.mkdir(exist_ok=True)
        name = f"gpu-8b-cap-{asked.cap_gb:g}.json" if asked.cap_gb else "gpu-8b.json"
        (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
