"""What folding costs: two vectors into a sharded bfloat16 model, beside `cp -r` and beside PEFT."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from lora_prefvec.artifact import Provenance, write_adapter
from lora_prefvec.bench.measure import Cost, Growth, Row, fsync_all, ratio, rounds, timed, within, workplace
from lora_prefvec.bench.shapes import QUICK, TINY_LLAMA, Llama, random_vector, with_layers, write_base
from lora_prefvec.errors import RunError
from lora_prefvec.progress import progress

RANK = 16
MODULE = "model.layers.0.mlp.up_proj.weight"  # where our result and PEFT's are compared


def run(*, quick: bool = False) -> list[Row]:
    """Measure all rows; `quick` takes a small model, whose figures say nothing about the bars.

    Raises:
        InputError: the disk has no room for the models.
        RunError: a fold failed.
    """
    shape = QUICK if quick else TINY_LLAMA
    costs, apart = measure(shape)
    ours, copied, peft = costs["ours"], costs["copy"], costs["peft"]
    size = f"{shape.parameters / 1e9:.1f}B" if shape.parameters >= 5e7 else f"{shape.parameters / 1e6:.1f}M"
    work = f"fold of two vectors into a {size} bf16 model"
    same = f"{MODULE} differs from PEFT's by {apart:.1e} of its norm (a step of bf16: 2e-3)"
    synced = f"besides, fsync: ours {ours.fsync:.1f} s, copy {copied.fsync:.1f} s"
    begun = f"with imports: ours {ours.whole or 0:.1f} s, PEFT {peft.whole or 0:.1f} s; PEFT never waits for the disk"
    return [
        ratio(f"{work}, beside cp -r", ours.seconds, copied.seconds, 1.3, note=synced),
        ratio(f"{work}, beside PEFT", ours.seconds, peft.seconds, 0.4, note=f"{begun}; {same}"),
        within("its peak memory, torch imported", ours.peak_mb or math.inf, 700, "MB", peer=peft.peak_mb),
    ]


def growth(*, quick: bool = False) -> list[Growth]:
    """Fold, copy and PEFT against the size of the model, and their memory."""
    shape = QUICK if quick else TINY_LLAMA
    depths = [1, 2] if quick else [1, 4, 10, 22]
    shapes = [with_layers(shape, depth) for depth in depths]
    costs = [measure(one, repeats=1 if quick else 3)[0] for one in shapes]
    places = [one.parameters / 1e9 for one in shapes]
    names = {"ours": "prefvec fold", "copy": "cp -r", "peft": "PEFT merge and save"}
    across = "billions of parameters, bf16"
    return [
        Growth(
            "Fold of two vectors: time",
            across,
            places,
            {shown: [cost[name].seconds for cost in costs] for name, shown in names.items()},
        ),
        Growth(
            "Fold of two vectors: peak memory",
            across,
            places,
            {shown: [cost[name].peak_mb for cost in costs] for name, shown in names.items() if name != "copy"},
            unit="MB",
        ),
    ]


def measure(shape: Llama, *, repeats: int = 5) -> tuple[dict[str, Cost], float]:
    """The costs of our fold, of `cp -r` and of PEFT, and how far our weights are from PEFT's, relative to them."""
    with workplace(5 * shape.parameters * 2) as place, progress("bench fold", 3 * repeats) as bar:
        base = write_base(place / "base", shape)
        vectors = [place / f"vector-{seed}" for seed in (0, 1)]
        for seed, folder in enumerate(vectors):
            facts = Provenance(kind="preference_vector", preference=folder.name)
            write_adapter(folder, random_vector(shape, RANK, seed), facts, dtype=torch.bfloat16)
        first: dict[str, torch.Tensor] = {}

        def one(who: str) -> Cost:
            out = place / who
            cost = copy(base, out) if who == "copy" else process(who, base, out, vectors)
            if who not in first:
                first[who] = weights(out, MODULE)
            shutil.rmtree(out)
            bar.advance(info=who)
            return cost

        costs = rounds({who: partial(one, who) for who in ("copy", "ours", "peft")}, repeats=repeats)
    apart = float((first["ours"] - first["peft"]).norm() / first["peft"].norm())
    return costs, apart


def copy(base: Path, out: Path) -> Cost:
    """`cp -r`; its fsync is timed apart."""
    copied = timed(lambda: subprocess.run(["cp", "-r", str(base), str(out)], check=True))
    synced = timed(lambda: fsync_all([path for path in out.rglob("*") if path.is_file()]))
    return Cost(copied.seconds, synced.fsync)


def process(who: str, base: Path, out: Path, vectors: Sequence[Path]) -> Cost:
    """One fold in a process of its own.

    Raises:
        RunError: it failed.
    """
    command = [sys.executable, "-m", "lora_prefvec.bench.one_fold", who, str(base), str(out), *map(str, vectors)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}, check=False)
    whole = time.perf_counter() - start
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise RunError(f"the fold by {who} failed: {said[-1]}")
    return replace(Cost(**json.loads(done.stdout.splitlines()[-1])), whole=whole)


def weights(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a sharded or single checkpoint, in float64."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - no mapping
                found: torch.Tensor = tensors.get_tensor(name)
                return found.double()
    raise RunError(f"{folder} holds no {name}")
