"""A slice of the mutated folders; `python tests/artifact/fuzz.py` reads the 10,000."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.artifact.fuzz import Outcome, report

FUZZ = Path(__file__).parent / "fuzz.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_mutated_folders_are_read_rightly_or_refused() -> None:
    ended = subprocess.run(
        [sys.executable, str(FUZZ), "--cases", "1000", "--seed", "1"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def test_a_fault_is_told() -> None:
    sound = Outcome(0, ("links",), "refused", 0.1, 0.0, 0.1)
    faults = [
        sound._replace(result="KeyError: 'a'"),
        sound._replace(seconds=2.1),
        sound._replace(megabytes=501.0),
        sound._replace(result="hangs", clock=8.0),
    ]
    assert sound.sound
    assert not any(fault.sound for fault in faults)
    text = report([sound, *faults], seed=3, seconds=1.0)
    assert "| links | 5 | 0 | 1 | 4 |" in text
    assert "- case 0 (links): KeyError: 'a'" in text
