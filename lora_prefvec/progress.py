"""Progress of long work: a bar with ETA on a terminal, plain lines elsewhere; and the noise of others kept away."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from lora_prefvec.output import out

PLAIN_INTERVAL = 10.0  # seconds between two plain lines


class Progress:
    """Handle for one piece of work of `total` units; `advance` as units are done."""

    def __init__(self, description: str, total: int, start: int = 0) -> None:
        self.description, self.total, self.done = description, total, start
        self._start, self._started_at = start, time.monotonic()
        self._spoke_at = self._started_at

    def advance(self, units: int = 1, info: str = "") -> None:
        """Report `units` more as done; `info` is shown behind the count."""
        self.done += units
        now = time.monotonic()
        if out.format != "quiet" and (now - self._spoke_at >= PLAIN_INTERVAL or self.done == self.total):
            self._spoke_at = now
            left = (now - self._started_at) / max(self.done - self._start, 1) * (self.total - self.done)
            out.note(f"{self.description}: {self.done}/{self.total}, {left:.0f} s left{', ' + info if info else ''}")


class BarProgress(Progress):
    """The same on a terminal, drawn by rich."""

    def __init__(self, description: str, total: int, start: int = 0) -> None:
        super().__init__(description, total, start)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=out.console(stderr=True),
        )
        self._task = self._bar.add_task(description, total=total, completed=start, info="")

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, units: int = 1, info: str = "") -> None:
        self.done += units
        self._bar.update(self._task, completed=self.done, info=info or self._bar.tasks[self._task].fields["info"])


@contextlib.contextmanager
def progress(description: str, total: int, *, start: int = 0) -> Iterator[Progress]:
    """Show how far `total` units of work have come, beginning at `start`.

    >>> with progress("scoring", 100) as bar:
    ...     bar.advance(10, info="loss 0.51")
    """
    if sys.stderr.isatty() and out.format != "quiet":
        with BarProgress(description, total, start) as bar:
            yield bar
    else:
        yield Progress(description, total, start)


def quiet_libraries() -> None:
    """Keep the loading bars, kernel notices and deprecation warnings of other libraries off the terminal.

    Called once by the command line, before those libraries are imported; `--debug` leaves them on.
    """
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "critical")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(logging.NullHandler())  # else loggers without a handler write to stderr
