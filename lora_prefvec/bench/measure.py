"""How things are measured, and what a measurement has to reach."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lora_prefvec.errors import InputError

REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: the median of `runs` runs.

    Args:
        seconds: without `fsync`.
        fsync: seconds spent waiting until the disk had what was written.
        peak_mb: the most memory that its process ever held, in 1e6 bytes; None where it was not measured.
        whole: seconds of its process from start to end, imports included; None where it had none of its own.
    """

    seconds: float
    fsync: float = 0.0
    peak_mb: float | None = None
    whole: float | None = None
    runs: int = 1


@dataclass(frozen=True)
class Row:
    """A measurement and its bar.

    Args:
        ours, peer: what was measured, in `unit`; the peer is None where the bar is a number of its own.
        figure: what is held against the bar.
        sense: on which side of the bar the figure has to be.
        of: unit of figure and bar: `x` for a ratio.
    """

    work: str
    ours: float
    peer: float | None
    unit: str
    figure: float
    sense: Literal["at least", "at most"]
    bar: float
    of: str = "x"
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure reaches its bar; a figure that is no number does not."""
        return self.figure >= self.bar if self.sense == "at least" else self.figure <= self.bar

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Growth:
    """Cost as work grows: what each line took at each place, in `unit` (s or MB).

    Args:
        across: what grows, with its unit.
        lines: what was measured -> its figures; None where a place was left out.
    """

    title: str
    across: str
    places: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    unit: Literal["s", "MB"] = "s"


def faster(work: str, ours: float, peer: float, at_least: float, note: str = "") -> Row:
    """A row that holds when we need `at_least` times less than the peer."""
    return Row(work, ours, peer, "s", peer / ours, "at least", at_least, note=note)


def ratio(work: str, ours: float, peer: float, at_most: float, note: str = "") -> Row:
    """A row that holds when we need `at_most` times what the peer needs."""
    return Row(work, ours, peer, "s", ours / peer, "at most", at_most, note=note)


def within(work: str, ours: float, at_most: float, unit: str, peer: float | None = None, note: str = "") -> Row:
    """A row that holds when our figure itself is `at_most` so much."""
    return Row(work, ours, peer, unit, ours, "at most", at_most, of=unit, note=note)


def rounds(
    works: Mapping[str, Callable[[], Cost]], *, repeats: int = REPEATS, patience: float = math.inf
) -> dict[str, Cost]:
    """Run all works in turn, `repeats` times, so that a slow minute of the machine meets all of them; the medians.

    A work whose first run took more than `patience` seconds is not run again.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            if not costs[name] or costs[name][0].seconds <= patience:
                os.sync()  # what earlier work left for the disk is none of this one's cost
                costs[name].append(work())
    return {name: _median(runs) for name, runs in costs.items()}


def timed(work: Callable[[], object]) -> Cost:
    """The cost of a call in this process, without its memory."""
    with fsync_seconds() as spent:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return Cost(seconds - sum(spent), sum(spent))


@contextlib.contextmanager
def fsync_seconds() -> Iterator[list[float]]:
    """Collects how long each fsync within the block takes."""
    spent: list[float] = []
    real = os.fsync

    def fsync(fd: Any) -> None:
        start = time.perf_counter()
        real(fd)
        spent.append(time.perf_counter() - start)

    os.fsync = fsync
    try:
        yield spent
    finally:
        os.fsync = real


def fsync_all(paths: Sequence[Path]) -> None:
    """Wait until the disk has the files."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def workplace(needed: int) -> Iterator[Path]:
    """A temporary folder with room for `needed` bytes, removed at the end.

    Raises:
        InputError: the disk has less room.
    """
    with tempfile.TemporaryDirectory(prefix="prefvec-bench-") as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"this needs {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, and {free / 1e9:.1f} GB are free",
                "Point TMPDIR to a larger disk, or use --quick.",
            )
        yield Path(folder)


def machine() -> dict[str, Any]:
    """Where it was measured: processor, cores, threads, versions."""
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in ("torch", "peft", "transformers", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _median(runs: Sequence[Cost]) -> Cost:
    def middle(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return Cost(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.fsync for run in runs),
        middle([run.peak_mb for run in runs]),
        middle([run.whole for run in runs]),
        len(runs),
    )
