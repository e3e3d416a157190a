"""Command lines in forks of one warm process, which can be killed at a chosen moment of their work.

Most of the time of a command goes into imports. Here they are done once; each command is a process of its own, forked
from that state, so that a signal falls into the work, and real ones: SIGKILL leaves no time to clean up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is the exit code, or the negative number of the signal that killed it.

    Args:
        touches: how often it touched files in the watched folder; None if it was killed.
    """

    code: int
    out: str
    err: str
    touches: int | None


class Job:
    """A command that runs."""

    def __init__(self, warm: Warm, pid: int, log: Path) -> None:
        self.warm, self.pid, self.log = warm, pid, log
        self.ended: Ended | None = None

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a command that has ended already takes none."""
        os.kill(self.pid, number)  # not yet waited for, so the number is still its own

    def wait(self) -> Ended:
        """Wait for the end."""
        if self.ended is None:
            code = self.warm.ask({"wait": self.pid})["code"]
            out, err, touches = (self.log / name for name in ("out", "err", "touches"))
            count = int(touches.read_text() or 0) if touches.is_file() else None
            self.ended = Ended(code, out.read_text(), err.read_text(), count)
        return self.ended


class Warm:
    """The warm process. `environment` is added to that of this process."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question to the warm process, one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, *arguments: object, watched: Path | None = None, kill_at: int | None = None) -> Job:
        """Start `prefvec` with these arguments.

        Args:
            watched: a folder; every time the command touches a file in it is counted.
            kill_at: SIGKILL just before the touch of this number, from 1.
        """
        log = self.folder / str(self.count)
        log.mkdir(parents=True)
        for name in ("out", "err"):
            (log / name).touch()
        self.count += 1
        question = {
            "arguments": [str(argument) for argument in arguments],
            "log": str(log),
            "watched": str(watched) if watched else None,
            "kill_at": kill_at,
        }
        return Job(self, self.ask(question)["pid"], log)

    def run(self, *arguments: object, watched: Path | None = None, kill_at: int | None = None) -> Ended:
        """The same, and wait for the end."""
        return self.start(*arguments, watched=watched, kill_at=kill_at).wait()


def serve() -> None:
    """The warm process: imports, then forks as asked until its standard input ends."""
    from lora_prefvec.progress import quiet_libraries

    quiet_libraries()

    import lora_prefvec.artifact
    import lora_prefvec.cli.main
    import lora_prefvec.inference
    import lora_prefvec.training  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                work(**question)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def work(arguments: list[str], log: str, watched: str | None, kill_at: int | None) -> None:
    """A fork: runs one command and ends."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(log, name), os.O_WRONLY), number)
    touches = 0

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal touches
        if event not in TOUCHES or not given or not isinstance(given[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(given[0])
        # `rmtree` names what it removes relative to an open folder
        if path.startswith(str(watched)) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            touches += 1
            if touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if watched:
        sys.addaudithook(count)
    from lora_prefvec.cli.main import main

    code = main(arguments)
    watched = None
    Path(log, "touches").write_text(str(touches))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
