"""One fold in a process of its own, so that its memory is its own: ours, or PEFT's.

    python -m lora_prefvec.bench.one_fold ours|peft BASE OUT VECTOR VECTOR

Prints one JSON object: seconds (without imports and fsync), fsync, peak_mb.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lora_prefvec.bench.measure import timed
from lora_prefvec.bench.shapes import SHARD

COEFFICIENTS = (1.0, 0.5)
IMPORTS = {"ours": ["lora_prefvec.artifact"], "peft": ["peft", "transformers.models.llama.modeling_llama"]}


def ours(base: Path, out: Path, vectors: Sequence[Path]) -> None:
    """Read the vectors, add them, and fold the sum."""
    from lora_prefvec.artifact import Provenance, compose, fold, open_mix, plan_fold

    references = [(str(path), coefficient) for path, coefficient in zip(vectors, COEFFICIENTS, strict=True)]
    vector = compose(open_mix(references))
    fold(plan_fold(base, vector), vector, out, Provenance(kind="fold", method="exact"))


def peft(base: Path, out: Path, vectors: Sequence[Path]) -> None:
    """Load, `add_weighted_adapter(combination_type="cat")`, `merge_and_unload`, save in the same shards."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    names = [str(number) for number in range(len(vectors))]
    adapted = peft.PeftModel.from_pretrained(model, vectors[0], adapter_name=names[0])
    for name, path in zip(names[1:], vectors[1:], strict=True):
        adapted.load_adapter(path, adapter_name=name)
    adapted.add_weighted_adapter(names, list(COEFFICIENTS), "mix", combination_type="cat")
    adapted.set_adapter("mix")
    adapted.merge_and_unload().save_pretrained(out, max_shard_size=f"{SHARD // 1_000_000}MB")


def peak_mb() -> float:
    """The most memory that this process held, in 1e6 bytes.

    Linux hands `ru_maxrss` down from the process that started this one, so its own high-water mark is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def main(arguments: Sequence[str]) -> None:
    """Fold, and print what it cost."""
    who, base, out, *vectors = arguments
    for module in IMPORTS[who]:  # nobody's work
        importlib.import_module(module)
    work = {"ours": ours, "peft": peft}[who]
    cost = timed(lambda: work(Path(base), Path(out), [Path(vector) for vector in vectors]))
    print(json.dumps({**asdict(cost), "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(sys.argv[1:])
