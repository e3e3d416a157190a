"""The base's log-probabilities of all replies, computed once for both signs, every beta and every rank."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_prefvec.artifact import atomic_file
from lora_prefvec.errors import PrefvecError
from lora_prefvec.inference import LoadedBase, RenderedPair, pair_log_probs
from lora_prefvec.progress import progress


def reference_log_probs(base: LoadedBase, pairs: Sequence[RenderedPair], *, batch_size: int) -> Tensor:
    """Log-probabilities under the bare base, from the cache on disk where they were computed before.

    Swapping chosen and rejected exchanges two columns and nothing else, so that one pass serves both signs.

    Returns:
        [n, 2] float32: log pi_ref(chosen | prompt), log pi_ref(rejected | prompt), summed over the reply.
    """
    file = cache_folder() / f"{cache_key(base, pairs, batch_size)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        cached = load_file(file)["log_probs"]
        if cached.shape == (len(pairs), 2):
            return cached
    with progress("reference", len(pairs)) as bar:
        log_probs = pair_log_probs(
            base.model,
            pairs,
            pad_token_id=base.tokenizer.pad_token_id,
            batch_size=batch_size,
            on_batch=bar.advance,
        )
    # A cache that cannot be written costs time, not the run.
    with contextlib.suppress(OSError, PrefvecError), atomic_file(file, force=True) as temporary:
        save_file({"log_probs": log_probs}, temporary)
    return log_probs


def cache_key(base: LoadedBase, pairs: Sequence[RenderedPair], batch_size: int) -> str:
    """A hash of all that determines the result bit for bit: the base's weights and arithmetic, and the token ids."""
    digest = hashlib.sha256()
    digest.update(json.dumps([*arithmetic(base), batch_size]).encode())
    for pair in pairs:
        digest.update(json.dumps(asdict(pair)).encode())
    return digest.hexdigest()


def arithmetic(base: LoadedBase) -> list[object]:
    """What determines a base's outputs bit for bit: its weights, and how it computes.

    Files of the Hub's cache are known by their content's hash, others by size and time of change.
    """
    weights = []
    for file in sorted(base.path.glob("*.safetensors")):
        blob, facts = file.resolve(), file.stat()
        known = blob.name if blob.parent.name == "blobs" else f"{blob}:{facts.st_size}:{facts.st_mtime_ns}"
        weights.append((file.name, known))
    return [weights, base.quantization, str(base.model.dtype), base.device.type, torch.__version__]


def cache_folder(part: str = "reference") -> Path:
    """`$PREFVEC_CACHE`, or lora-prefvec in the user's cache folder; the part of it that is named."""
    chosen = os.environ.get("PREFVEC_CACHE")
    home = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lora-prefvec"
    return home / part
