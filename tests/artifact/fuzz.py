"""Mutated adapter folders: each is read rightly or refused in one line, in 2 s and within 500 MB of the file's size.

    python tests/artifact/fuzz.py --cases 10000 --seed 0

A case is fixed by the seed and its number. A worker process reads it; its parent ends it when it hangs, and starts
another one behind the case. Whatever was read is computed again from the file by other code, and compared.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from tests.artifact.mutations import CONFIG, WEIGHTS, Case, make_case, templates

SECONDS = 2.0
MEGABYTES = 500
_ADDRESS_SPACE = 6 << 30  # a last resort, so that a fault ends the worker and not the machine


class Outcome(NamedTuple):
    """What became of a case.

    Args:
        result: `read`, `refused`, or what is wrong with it.
        seconds: of the processor, which a busy machine does not stretch.
        megabytes: of memory above the size of the folder's files.
        clock: seconds by the clock; four times the limit without an answer is a hang.
    """

    case: int
    kinds: tuple[str, ...]
    result: str
    seconds: float
    megabytes: float
    clock: float

    @property
    def sound(self) -> bool:
        return self.result in ("read", "refused") and self.seconds <= SECONDS and self.megabytes <= MEGABYTES


def fuzz(cases: range, seed: int) -> Iterator[Outcome]:
    """Read the cases in worker processes."""
    methods = multiprocessing.get_context("fork")
    place = Path(tempfile.mkdtemp(prefix="prefvec-fuzz-"))
    try:
        following = cases.start
        while following < cases.stop:
            here, there = methods.Pipe()
            worker = methods.Process(target=_work, args=(there, place, range(following, cases.stop), seed), daemon=True)
            worker.start()
            there.close()
            while following < cases.stop:
                wrong, outcome = "the worker died", None
                try:
                    kinds = here.recv()  # the case is made: from now on it is read
                    wrong = "hangs"
                    if here.poll(4 * SECONDS):
                        wrong = "the worker died"
                        outcome = here.recv()
                except EOFError:
                    kinds = ()
                yield outcome or Outcome(following, kinds, wrong, 0.0, 0.0, 4 * SECONDS)
                following += 1
                if outcome is None:
                    break
            worker.kill()
            worker.join()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _work(answers: Connection, place: Path, cases: range, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    torch.set_num_threads(1)
    kinds = templates(place)
    for number in cases:
        case = make_case(number, seed, kinds)
        folder = case.write(place / "case")
        answers.send(case.kinds)
        answers.send(_judge(number, case, folder))


def _judge(number: int, case: Case, folder: Path) -> Outcome:
    from lora_prefvec.artifact import read_adapter
    from lora_prefvec.errors import InputError

    before = _reset_peak()
    begin, clock = time.process_time(), time.perf_counter()
    vector = None
    try:
        vector = read_adapter(folder, check_hash=case.check_hash).vector
        result = "read"
    except InputError as error:
        result = (
            "refused" if _one_line(str(error)) else f"refused in {len(str(error))} characters: {str(error)[:200]!r}"
        )
    except BaseException as error:
        result = f"{type(error).__name__}: {str(error)[:200]}"
    seconds, clock = time.process_time() - begin, time.perf_counter() - clock
    grown = (_peak() - before) / 2**20 - _size(folder) / 2**20
    if vector is not None and (wrong := _difference(folder, vector)):
        result = wrong
    return Outcome(number, case.kinds, result, seconds, grown, clock)


def _one_line(text: str) -> bool:
    return text.isprintable() and 0 < len(text) < 1500


def _difference(folder: Path, vector: Any) -> str:
    """What is wrong with a vector, beside what the file says by PEFT's rules; empty where nothing is."""
    try:
        expected = _by_the_book(folder)
    except Exception as error:
        return f"read, and the reference cannot: {type(error).__name__}: {str(error)[:200]}"
    if vector.deltas.keys() != expected.keys():
        return f"read as other modules: {sorted(vector.deltas.keys() ^ expected.keys())[:3]}"
    for name, (A, B) in expected.items():
        delta = vector.deltas[name]
        if not (torch.isfinite(delta.A).all() and torch.isfinite(delta.B).all()):
            return f"read with values that are not finite in {name}"
        there = B @ A
        here = delta.B.double() @ delta.A.double()
        size = B.abs() @ A.abs()  # so that what cancels is not asked for more digits than the factors have
        if here.shape != there.shape or not bool(((here - there).abs() <= 1e-5 * size + 1e-300).all()):
            return f"read wrongly: {name}"
    return ""


def _by_the_book(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> its A and scaled B in float64, from the file by the rules of PEFT."""
    import regex
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))

    def of(pattern: str, key: str, default: Any) -> Any:
        found = (n for k, n in (config.get(pattern) or {}).items() if regex.match(rf"(.*\.)?({k})$", key, timeout=5))
        return next(found, default)

    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part:  # otherwise the base's own weight
            found.setdefault(path, {})["A" if part.removeprefix("embedding_")[0] == "A" else "B"] = tensor.double()
    deltas = {}
    for path, factors in found.items():
        A, B, key = factors["A"], factors["B"], path
        if path.endswith((".experts", ".experts.base_layer")):
            key = path.removesuffix(".base_layer") + (".gate_up_proj" if path.endswith("base_layer") else ".down_proj")
        rank, alpha = of("rank_pattern", key, config["r"]), of("alpha_pattern", key, config["lora_alpha"])
        B = B * (alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
        if key != path:
            experts = A.shape[0] // rank
            A, B = A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts)
            deltas.update({f"{key}.{e}": (A[e], B[:, :, e]) for e in range(experts)})
        else:
            deltas[key] = (B.T, A.T) if re.search(r"embed_tokens$|wte$", path) else (A, B)
    return deltas


def _reset_peak() -> int:
    """Forget the highest use of memory so far; returns the use now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def _size(folder: Path) -> int:
    return sum(os.lstat(path).st_size for path in folder.iterdir()) if folder.is_dir() else 0


def report(outcomes: list[Outcome], seed: int, seconds: float) -> str:
    """A table by kind of mutation, and whatever is not sound."""
    lines = [
        "# Mutated adapter folders",
        "",
        f"`python tests/artifact/fuzz.py --cases {len(outcomes)} --seed {seed}`",
        "",
        f"{len(outcomes)} cases in {seconds:.0f} s; {sum(not o.sound for o in outcomes)} faults."
        f" Slowest: {max(o.seconds for o in outcomes):.2f} s of the processor,"
        f" {max(o.clock for o in outcomes):.2f} s by the clock."
        f" Most memory above the files' size: {max(o.megabytes for o in outcomes):.0f} MB."
        " A case has one to three mutations and counts under each.",
        "",
        "| mutation | cases | read | refused | faults |",
        "|---|---|---|---|---|",
    ]
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for kind in set(outcome.kinds) or {"none"}:
            counts.setdefault(kind, Counter())[outcome.result if outcome.sound else "fault"] += 1
    for kind, count in sorted(counts.items()):
        lines.append(f"| {kind} | {count.total()} | {count['read']} | {count['refused']} | {count['fault']} |")
    lines.append("")
    for o in outcomes:
        if not o.sound:
            cost = f"{o.seconds:.2f} s, {o.clock:.2f} s by the clock, {o.megabytes:.0f} MB"
            lines.append(f"- case {o.case} ({', '.join(o.kinds)}): {o.result}, {cost}")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    begin = time.monotonic()
    outcomes = list(fuzz(range(options.first, options.first + options.cases), options.seed))
    text = report(outcomes, options.seed, time.monotonic() - begin)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0 if all(outcome.sound for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
