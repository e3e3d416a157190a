"""SIGKILL at random moments of everything that writes: what is left is never taken for whole, and the work goes on.

    python tests/bench/kills.py --kills 50 --seed 0

Commands run on a tiny random model: `train` (two-sided, as a pair, and over an older artifact with --force), `extract`,
`compose` and `fold` (into a new place, and over an older artifact). Each is killed up to three times in a row: half of
the kills come after a random time, half just before a random one of all the touches of a file or folder that an
unbroken run makes, so that short writes get their share. The commands are forks of a warm process (tests/forks.py): no
kill is wasted on imports, during which nothing is written.

After every kill `inspect` reads every folder that looks like an adapter, hidden ones too: what it accepts must be,
byte for byte, the artifact that was there before or the one of an unbroken run. So must be whatever transformers would
take for a model. At the end the same command, with --resume for `train`, must end in the bytes of an unbroken run and
leave nothing beside them. Prints a table and writes tests/bench/results/kills.json; exits with 1 where anything went
wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the line above runs from any folder

from tests.forks import Ended, Warm  # noqa: E402

RESULTS = Path(__file__).parent / "results"
TIMED = {"prefvec.json", "README.md"}  # of a training: they tell how long it took


@dataclass
class Case:
    """A command that writes `out`.

    Args:
        arguments: without --out.
        over: what lies at `out` before.
        whole: the files of an unbroken run's result, by relative path, as hashes.
        touches, seconds: what an unbroken run takes.
    """

    name: str
    arguments: list[str]
    over: Path | None = None
    whole: dict[str, str] = field(default_factory=dict)
    touches: int = 0
    seconds: float = 0.0

    @property
    def trains(self) -> bool:
        return self.arguments[0] == "train"

    def hashes(self, folder: Path) -> dict[str, str]:
        """Relative path -> SHA-256 of the files that this command makes alike every time."""
        return {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not (self.trains and file.name in TIMED)
        }

    def line(self, place: Path) -> list[object]:
        return [*self.arguments, "--out", place / "out", *(["--force"] if self.over else [])]


@dataclass
class Tally:
    """What happened to one case, over all its rounds."""

    rounds: int = 0
    kills_by_time: int = 0
    kills_by_touch: int = 0
    reads_refused: int = 0
    reads_accepted: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.kills_by_time + self.kills_by_touch


def prepare(warm: Warm, folder: Path) -> list[Case]:
    """The cases, each run once without a kill."""
    from lora_prefvec.progress import quiet_libraries

    quiet_libraries()
    from tests.helpers import write_tiny_model
    from tests.training.tiny import tiny_recipe, write_pairs

    base = folder / "base"
    base.mkdir()
    write_tiny_model("llama", base)
    pairs = write_pairs(folder / "pairs.jsonl")
    for sides in ("two", "pair"):
        recipe = tiny_recipe(base, pairs, sides=sides, max_steps=9 if sides == "two" else 6)
        (folder / f"{sides}.yaml").write_text(recipe.to_yaml())
    train = {sides: ["train", str(folder / f"{sides}.yaml")] for sides in ("two", "pair")}
    two, pair = folder / "train-two" / "out", folder / "train-pair" / "out"
    mix = ["compose", f"{two}=1", f"{pair}=-0.5"]
    folded = ["fold", str(base), f"{two}=1", f"{pair}=-0.5", "--dtype", "bfloat16"]
    halves = ["extract", str(pair / "positive"), str(pair / "negative")]
    cases = [
        Case("train-two", train["two"]),
        Case("train-pair", train["pair"]),
        Case("extract", halves),
        Case("compose", mix),
        Case("fold", folded),
        Case("train over an artifact", train["two"], over=pair),
        Case("extract over an artifact", halves, over=two),
        Case("compose over an artifact", mix, over=pair),
        Case("fold over an artifact", folded, over=two),
    ]
    for case in cases:
        place = begin(case, folder / case.name.replace(" ", "-"))
        started = time.monotonic()
        ended = warm.run(*case.line(place), watched=place)
        case.seconds = time.monotonic() - started
        if ended.code != 0 or not ended.touches:
            raise SystemExit(f"{case.name} fails without any kill: {ended.err}")
        case.touches = ended.touches
        case.whole = case.hashes(place / "out")
    return cases


def begin(case: Case, place: Path) -> Path:
    """An empty place for a case, or one with the older artifact."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if case.over:
        shutil.copytree(case.over, place / "out")
    return place


def torture(warm: Warm, case: Case, place: Path, draw: random.Random, tally: Tally, most: int) -> None:
    """One round: kills, then the end. Faults are noted in `tally`."""
    started = time.monotonic()
    begin(case, place)
    line = case.line(place)
    for _ in range(min(most, draw.randint(1, 3))):
        ended, by_touch = killed(warm, case, line, place, draw)
        if ended.code != -signal.SIGKILL:  # it was done before the kill came
            break
        if by_touch:
            tally.kills_by_touch += 1
        else:
            tally.kills_by_time += 1
        look(warm, case, place, tally)
        if case.trains and "--resume" not in line:
            line.append("--resume")
    else:
        ended = warm.run(*line)
    if ended.code == 2 and not case.trains and case.hashes(place / "out") == case.whole:
        ended = warm.run(*line, "--force")  # it was complete already, so it exists
    if ended.code != 0:
        tally.faults.append(f"the command did not go on: {ended.err.strip()}")
    elif case.hashes(place / "out") != case.whole:
        tally.faults.append("the result differs from an unbroken run's")
    left = sorted(path.name for path in place.iterdir() if path.name != "out")
    if left:
        tally.faults.append(f"left behind: {', '.join(left)}")
    tally.rounds += 1
    tally.seconds += time.monotonic() - started


def killed(warm: Warm, case: Case, line: list[object], place: Path, draw: random.Random) -> tuple[Ended, bool]:
    """Run a command and kill it at a random moment; also whether that was a touch."""
    if draw.random() < 0.5:
        return warm.run(*line, watched=place, kill_at=draw.randint(1, case.touches)), True
    job = warm.start(*line)
    time.sleep(draw.uniform(0, case.seconds))
    job.send(signal.SIGKILL)
    return job.wait(), False


def look(warm: Warm, case: Case, place: Path, tally: Tally) -> None:
    """Read every folder that could be taken for an adapter."""
    known = [case.whole, case.hashes(case.over) if case.over else {}]
    names = {"adapter_config.json", "adapter_model.safetensors", "prefvec.json"}
    for folder in sorted({file.parent for file in place.rglob("*") if file.name in names}):
        ended = warm.run("inspect", folder)
        if ended.code != 0:
            tally.reads_refused += 1
            if ended.code != 2 or ended.err.count("\n") != 1:
                tally.faults.append(f"inspect ended with {ended.code}: {ended.err.strip()}")
            continue
        tally.reads_accepted += 1
        top = place / "out"
        if top not in (folder, *folder.parents) or case.hashes(top) not in known:
            tally.faults.append(f"inspect accepts {folder.relative_to(place)}, which is not whole")
    for config in place.rglob("config.json"):
        if case.hashes(config.parent) not in known:
            tally.faults.append(f"{config.parent.relative_to(place)} is a model that is not whole")


def run(warm: Warm, folder: Path, kills: int, seed: int) -> dict[str, Tally]:
    """So many kills, spread over the cases; by name of the case."""
    cases = prepare(warm, folder)
    draw = random.Random(seed)
    tallies = {case.name: Tally() for case in cases}
    number = 0
    while (done := sum(tally.kills for tally in tallies.values())) < kills:
        case = cases[number % len(cases)]
        torture(warm, case, folder / f"round-{number}", draw, tallies[case.name], kills - done)
        shutil.rmtree(folder / f"round-{number}")
        number += 1
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PREFVEC_CACHE"] = str(folder / "cache")
        with Warm(folder / "logs", {}) as warm:
            tallies = run(warm, folder, arguments.kills, arguments.seed)
    total = Counter[str]()
    print(
        f"{'command':<26}{'rounds':>7}{'kills':>7}{'by time':>9}{'by touch':>10}{'read':>6}{'refused':>9}{'faults':>8}"
    )
    for case, tally in tallies.items():
        counts = {
            "rounds": tally.rounds,
            "kills": tally.kills,
            "kills_by_time": tally.kills_by_time,
            "kills_by_touch": tally.kills_by_touch,
            "reads_accepted": tally.reads_accepted,
            "reads_refused": tally.reads_refused,
            "faults": len(tally.faults),
        }
        total.update(counts)
        print(
            f"{case:<26}" + "".join(f"{count:>{width}}" for count, width in zip(counts.values(), WIDTHS, strict=True))
        )
        tally.faults = [fault.replace(name, "...") for fault in tally.faults]  # no paths of this machine
        for fault in tally.faults:
            print(f"  fault: {fault}")
    print(f"{'all':<26}" + "".join(f"{total[key]:>{width}}" for key, width in zip(counts, WIDTHS, strict=True)))
    results = {
        "command": f"python tests/bench/kills.py --kills {arguments.kills} --seed {arguments.seed}",
        "seconds": round(time.monotonic() - started),
        "total": dict(total),
        "cases": {
            case: {**vars(tally), "kills": tally.kills, "seconds": round(tally.seconds, 1)}
            for case, tally in tallies.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kills.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 1 if total["faults"] else 0


WIDTHS = (7, 7, 9, 10, 6, 9, 8)

if __name__ == "__main__":
    sys.exit(main())
