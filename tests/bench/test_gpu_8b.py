"""The GPU benchmark runs on a CPU with a tiny shape, so that it still works where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("gpu_8b.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)


def test_tiny_shape_trains_every_side_on_a_cpu() -> None:
    done = run("--tiny")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["runs"]) == ["positive", "negative", "two"]
    assert all(sides["step_seconds"] > 0 and sides["last_loss"] > 0 for sides in result["runs"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
