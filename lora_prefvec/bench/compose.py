"""What composing costs: truncation beside PEFT's `svd`, exact mixes beside copying their files, and the algebra."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_prefvec.artifact import Provenance, compose, mix_provenance, open_mix, write_adapter
from lora_prefvec.bench.measure import (
    Cost,
    Growth,
    Row,
    faster,
    fsync_all,
    ratio,
    rounds,
    timed,
    within,
    workplace,
)
from lora_prefvec.bench.shapes import LLAMA_8B, QUICK, Llama, random_delta, random_vector, with_layers
from lora_prefvec.progress import progress
from lora_prefvec.vector import LowRankDelta, PreferenceVector, merge

RANK = 16
PATIENCE = 20.0  # seconds; PEFT's svd of a large module takes longer, and then runs once
COEFFICIENTS = (1.0, 0.7, -0.5, 0.3)


def run(*, quick: bool = False) -> list[Row]:
    """Measure all rows; `quick` takes small shapes, whose figures say nothing about the bars.

    Raises:
        InputError: the disk has no room for the files.
    """
    with progress("bench compose", 3) as bar:
        rows = truncation(256 if quick else 4096)
        bar.advance(info="truncation")
        rows.append(exact(QUICK if quick else LLAMA_8B))
        bar.advance(info="exact mix")
        rows.append(algebra(QUICK if quick else LLAMA_8B))
        bar.advance(info="algebra")
    return rows


def truncation(size: int) -> list[Row]:
    """Four rank-16 adapters cut to rank 16 on one square module: time, and distance from the best cut there is."""
    deltas = random_deltas(size, len(COEFFICIENTS))
    terms = [(c, PreferenceVector({"linear": delta})) for c, delta in zip(COEFFICIENTS, deltas, strict=True)]
    adapted = peft_model(deltas)
    theirs: list[LowRankDelta] = []

    def ours() -> LowRankDelta:
        return merge(terms, "truncated", rank=RANK).vector.deltas["linear"]

    def peft() -> Cost:
        cost, delta = peft_svd(adapted)
        theirs[:] = [delta]
        return cost

    found = ours()  # the first call of a linear-algebra library sets it up
    costs = rounds({"ours": lambda: timed(ours), "peft": peft}, patience=PATIENCE)
    dense = sum((c * delta.dense().double() for c, delta in zip(COEFFICIENTS, deltas, strict=True)), torch.zeros(()))
    best = optimum(dense, RANK)
    excess, peer = (error(dense, delta) / best - 1 for delta in (found, theirs[0]))
    work = f"four rank-{RANK} adapters to rank {RANK}, one {size} x {size} module"
    runs = f"PEFT's svd took over {PATIENCE:.0f} s and ran once" if costs["peft"].runs == 1 else ""
    return [
        faster(work, costs["ours"].seconds, costs["peft"].seconds, 1000, note=runs),
        within("its error over that of the dense optimum, less 1", excess, 1e-5, "", peer=peer),
    ]


def exact(shape: Llama) -> Row:
    """Four vectors read, added and written as bfloat16, beside copying the four files."""
    modules = len(shape.linear())
    size = sum(2 * RANK * (out + in_) for out, in_ in shape.linear().values())
    with workplace(14 * size) as place:
        references = []
        for seed, coefficient in enumerate(COEFFICIENTS):
            folder = place / f"vector-{seed}"
            facts = Provenance(kind="preference_vector", preference=f"vector-{seed}")
            write_adapter(folder, random_vector(shape, RANK, seed), facts, dtype=torch.bfloat16)
            references.append((str(folder), coefficient))
        weights = [Path(folder) / "adapter_model.safetensors" for folder, _ in references]

        def ours() -> None:
            ingredients = open_mix(references)
            vector = compose(ingredients)
            facts = mix_provenance(ingredients, vector, "mix")
            write_adapter(place / "mix", vector, facts, dtype=torch.bfloat16)

        def one() -> Cost:
            cost = timed(ours)
            shutil.rmtree(place / "mix")
            return cost

        costs = rounds({"ours": one, "copy": lambda: copy(weights, place / "copies")})
    mine, copied = costs["ours"], costs["copy"]
    work = f"exact mix of four rank-{RANK} adapters, {modules} modules, {4 * size / 1e6:.0f} MB of bf16, beside a copy"
    note = f"besides, fsync: ours {mine.fsync:.2f} s, copy {copied.fsync:.2f} s"
    return ratio(work, mine.seconds, copied.seconds, 2.5, note=note)


def copy(files: Sequence[Path], target: Path) -> Cost:
    """Copy files as the library of Python does; their fsync is timed apart."""
    target.mkdir()
    copies = [target / f"{number}{file.suffix}" for number, file in enumerate(files)]
    copied = timed(lambda: [shutil.copyfile(file, to) for file, to in zip(files, copies, strict=True)])
    synced = timed(lambda: fsync_all(copies))
    shutil.rmtree(target)
    return Cost(copied.seconds, synced.fsync)


def algebra(shape: Llama) -> Row:
    """Cosine of a pair, and norm and spectrum of both, in memory."""
    both = [random_vector(shape, RANK, seed) for seed in (0, 1)]
    parts: dict[str, Callable[[PreferenceVector, PreferenceVector], object]] = {
        "cosine": lambda left, right: left.cosine(right),
        "norms": lambda left, right: (left.norm(), right.norm()),
        "spectra": lambda left, right: (left.spectrum(), right.spectrum()),
    }

    def all_parts(left: PreferenceVector, right: PreferenceVector) -> None:
        for part in parts.values():
            part(left, right)

    def cost(work: Callable[[PreferenceVector, PreferenceVector], object]) -> Cost:
        return timed(partial(work, *(one.to("cpu") for one in both)))  # anew: nothing that a run before worked out

    costs = rounds({name: partial(cost, work) for name, work in {"all": all_parts, **parts}.items()})
    note = ", ".join(f"{name} {costs[name].seconds:.3g} s" for name in parts)
    work = f"cosine, norms and spectra of a rank-{RANK} pair, {len(shape.linear())} modules"
    return within(work, costs["all"].seconds, 1.0, "s", note=note)


def growth(*, quick: bool = False) -> list[Growth]:
    """Exact and truncated mixes of one layer (seven matrices) against the number of vectors, and against their rank."""
    shape = with_layers(QUICK if quick else LLAMA_8B, 1)
    counts = [1, 2, 4] if quick else [1, 2, 4, 8, 16, 32, 64]
    ranks = [4, 8] if quick else [4, 8, 16, 32, 64, 128, 256]
    matrices = "one layer of Llama-3.1-8B" if shape.hidden == LLAMA_8B.hidden else "one small layer"
    with progress("bench compose, growth", len(counts) + len(ranks)) as bar:

        def line(cases: Sequence[tuple[int, int]]) -> dict[str, list[float | None]]:
            lines: dict[str, list[float | None]] = {"exact": [], f"cut to rank {RANK}": []}
            for count, rank in cases:
                terms = [(0.5, random_vector(shape, rank, seed)) for seed in range(count)]
                for name, seconds in zip(lines, (_seconds(terms, None), _seconds(terms, RANK)), strict=True):
                    lines[name].append(seconds)
                bar.advance(info=f"{count} vectors of rank {rank}")
            return lines

        return [
            Growth(
                f"Mix of rank-{RANK} vectors, {matrices}", "vectors", counts, line([(count, RANK) for count in counts])
            ),
            Growth(
                f"Mix of four vectors, {matrices}", "rank of each vector", ranks, line([(4, rank) for rank in ranks])
            ),
        ]


def _seconds(terms: Sequence[tuple[float, PreferenceVector]], rank: int | None) -> float:
    def work() -> None:
        if rank is None:
            for delta in merge(terms, "exact").vector.deltas.values():
                _ = delta.A  # a sum joins its factors when they are asked for
        else:
            merge(terms, "truncated", rank=rank)

    return rounds({"": lambda: timed(work)}, repeats=3)[""].seconds


def random_deltas(size: int, count: int) -> list[LowRankDelta]:
    """Deltas of one square matrix."""
    generator = torch.Generator().manual_seed(0)
    return [random_delta(size, size, RANK, generator) for _ in range(count)]


class One(nn.Module):
    """A model of one matrix without bias, for PEFT to adapt."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, size]."""
        result: Tensor = self.linear(x)
        return result


def peft_model(deltas: Sequence[LowRankDelta]) -> Any:
    """A PEFT model of one matrix with an adapter per delta, named by number."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"])
    model = get_peft_model(One(deltas[0].shape[0]), config, adapter_name="0")
    for number in range(1, len(deltas)):
        model.add_adapter(str(number), config)
    layer = model.base_model.model.linear
    with torch.no_grad():
        for number, delta in enumerate(deltas):
            layer.lora_A[str(number)].weight.copy_(delta.A)
            layer.lora_B[str(number)].weight.copy_(delta.B)
    return model


def peft_svd(model: Any) -> tuple[Cost, LowRankDelta]:
    """PEFT's own mix by `svd`: what it costs, and what it is."""
    names = [str(number) for number in range(len(COEFFICIENTS))]
    cost = timed(
        lambda: model.add_weighted_adapter(names, list(COEFFICIENTS), "mix", combination_type="svd", svd_rank=RANK)
    )
    layer = model.base_model.model.linear
    scale = layer.scaling["mix"]
    found = LowRankDelta(layer.lora_A["mix"].weight.clone(), scale * layer.lora_B["mix"].weight.clone())
    model.delete_adapter("mix")
    return cost, found


def optimum(dense: Tensor, rank: int) -> float:
    """Frobenius error of the best rank-k approximation, from the dense matrix alone, in float64 (Eckart and Young)."""
    squares = torch.linalg.eigvalsh(dense @ dense.T)
    return float((dense.square().sum() - squares[-rank:].sum()).clamp(min=0).sqrt())


def error(dense: Tensor, delta: LowRankDelta) -> float:
    """Frobenius distance of a delta from a dense matrix, in float64."""
    return float((dense - delta.B.double() @ delta.A.double()).norm())
