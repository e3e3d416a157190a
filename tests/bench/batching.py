"""The running batch on the sandbox base: beside transformers' own continuous batching, and what exactness costs.

    python tests/bench/batching.py

Speeds are tokens per second of CPU time on one thread. Where company is measured, requests arrive a few at a time, each
with a mix, a seed and settings of its own. Noise is how far a logit in company lies from that of the row alone, once a
shift of all of them alike is taken off, which changes nothing; the largest over all tokens with p > 1e-4. Writes
tests/bench/results/batching.md. About ten minutes.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from lora_prefvec.artifact import resolve_base
from lora_prefvec.inference import ContinuousBatch, LiveMixer, LoadedBase, Reply, Request, Sampling, encode, load_base
from lora_prefvec.inference.row_cache import RowCache
from lora_prefvec.progress import quiet_libraries
from lora_prefvec.sandbox.world import prompts
from tests.helpers import random_vector

RESULT = Path(__file__).parent / "results" / "batching.md"
NEW_TOKENS = 64
ROWS = 32
REQUESTS = 200  # for exactness


def main() -> None:
    """Measure, print, write."""
    quiet_libraries()
    lines = [
        f"{platform.processor() or platform.machine()}, one thread; torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Made by `python tests/bench/batching.py`.",
        "",
        *speeds(),
        "",
        *exactness(),
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def speeds() -> list[str]:
    """Greedy replies to 128 prompts without a mix, which is what all three can do."""
    loaded = load_base(resolve_base("sandbox"), quantization="none", device="cpu", compute_dtype="float32")
    asked = [encode(loaded, prompt) for prompt in prompts("held_out", 128, 0)]
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=loaded.model.generation_config.eos_token_id
    )
    config.pad_token_id = loaded.tokenizer.pad_token_id
    batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1024, max_requests_per_batch=ROWS)

    def own() -> int:
        batch = ContinuousBatch(loaded, max_rows=ROWS)
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
        replies = [batch.add(Request(prompt, {}, sampling)) for prompt in asked]
        finish(batch)
        return sum(len(reply.tokens) + (reply.finish_reason == "stop") for reply in replies)

    def theirs() -> int:
        results = loaded.model.generate_batch(
            asked, generation_config=config, continuous_batching_config=batching, persistent_manager=True, warmup=False
        )
        return sum(len(result.generated_tokens) for result in results.values())

    def one_by_one() -> int:
        total = 0
        for prompt in asked:
            ids = torch.tensor([prompt])
            total += loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            ).numel() - len(prompt)
        return total

    table = [f"| {len(asked)} prompts, greedy, {ROWS} rows | tokens | tokens/s |", "|---|---:|---:|"]
    for name, run in [
        ("`ContinuousBatch`", own),
        ("transformers' `generate_batch`, kept warm", theirs),
        ("transformers' `generate`, one by one", one_by_one),
    ]:
        run()
        tokens, seconds = min((timed(run) for _ in range(5)), key=lambda result: result[1])
        table.append(f"| {name} | {tokens} | {tokens / seconds:.0f} |")
    return table


def exactness() -> list[str]:
    """How many replies differ in company, with and without the rule, and what the rule costs."""
    table = [
        "| base | close choices are made | tokens/s | differing replies | noise, largest (99th percentile) |",
        "|---|---|---:|---:|---:|",
    ]
    for quantization, dtype in [("none", "float32"), ("nf4", "float32"), ("nf4", "bfloat16"), ("none", "bfloat16")]:
        loaded = load_base(resolve_base("sandbox"), quantization=quantization, device="cpu", compute_dtype=dtype)  # type: ignore[arg-type]
        vectors = {name: random_vector(loaded.model, 8, seed, scale=0.01) for seed, name in enumerate("abc")}
        with LiveMixer(loaded.model, vectors) as mixer:
            asked = random_requests(loaded)
            with noise_watched(loaded, mixer) as seen:
                in_company(ContinuousBatch(loaded, mixer, max_rows=ROWS, exact=False), asked[:60])
            noise = torch.tensor(seen)
            for exact in (False, True):
                batches = [ContinuousBatch(loaded, mixer, max_rows=rows, exact=exact) for rows in (ROWS, 1)]
                start = time.process_time()
                together = in_company(batches[0], asked)
                seconds = time.process_time() - start
                alone = [batches[1].add(request) for request in asked]
                finish(batches[1])
                differing = sum(a.tokens != b.tokens for a, b in zip(together, alone, strict=True))
                speed = sum(len(reply.tokens) for reply in together) / seconds
                table.append(
                    f"| {quantization}, {dtype} | {'alone' if exact else 'in company'} | {speed:.0f} | "
                    f"{differing} of {len(asked)} | {noise.max():.1g} ({noise.quantile(0.99):.1g}) |"
                )
                print(table[-1], flush=True)
    return table


@contextmanager
def noise_watched(loaded: LoadedBase, mixer: LiveMixer) -> Any:
    """Collects how far the logits of rows in company lie from theirs alone."""
    seen: list[float] = []
    choose = ContinuousBatch._choose

    def watch(self: ContinuousBatch, logits: torch.Tensor, rows: Sequence[Any]) -> list[Reply]:
        for row, together in zip(rows, logits, strict=True):
            if row.writing and len(rows) > 1:
                mixer.set_mix([row.reply.request.mix])
                alone = RowCache(loaded.model, [row.ids], loaded.device).logits[0]
                probabilities = alone.softmax(-1)
                apart = together - alone
                apart -= (apart * probabilities).sum()
                seen.append(apart[probabilities > 1e-4].abs().max().item())
        self._mixed = []
        return choose(self, logits, rows)

    ContinuousBatch._choose = watch  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ContinuousBatch._choose = choose  # type: ignore[method-assign]


def random_requests(loaded: LoadedBase) -> list[Request]:
    """Prompts of several lengths, two in five greedy."""
    dice = random.Random(0)
    return [
        Request(
            encode(loaded, prompt[0]["content"] * dice.choice([1, 1, 3])),
            {name: dice.uniform(-1, 1.5) for name in "abc" if dice.random() < 0.5},
            Sampling(
                max_new_tokens=dice.randint(1, NEW_TOKENS),
                temperature=dice.choice([0, 0, 0.7, 1, 1.3]),
                top_p=dice.choice([1, 1, 0.9]),
                seed=number,
            ),
        )
        for number, prompt in enumerate(prompts("held_out", REQUESTS, 1))
    ]


def in_company(batch: ContinuousBatch, requests: Sequence[Request]) -> list[Reply]:
    """Replies to requests that arrive a few at a time."""
    dice = random.Random(1)
    replies: list[Reply] = []
    while len(replies) < len(requests) or batch.waiting or batch.running:
        replies += [batch.add(request) for request in requests[len(replies) :][: dice.choice([0, 1, 4])]]
        batch.step()
    return replies


def finish(batch: ContinuousBatch) -> None:
    while batch.waiting or batch.running:
        batch.step()


def timed(work: Callable[[], int]) -> tuple[int, float]:
    start = time.process_time()
    return work(), time.process_time() - start


if __name__ == "__main__":
    main()
