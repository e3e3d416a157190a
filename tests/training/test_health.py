"""What is said while a run goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_prefvec.inference import RenderedPair
from lora_prefvec.progress import Progress
from lora_prefvec.recipe import TrainingSpec
from lora_prefvec.training import health
from lora_prefvec.training.health import Watch

PAIRS = [RenderedPair([1], [2, 3], [4, 5])] * 100  # replies of two tokens
BASE = torch.zeros(100, 2)


def policy(chosen: float, rejected: float, wins: int = 100) -> torch.Tensor:
    """Log-probabilities [100, 2] of which `wins` rows are as given and the others the wrong way round."""
    rows = torch.tensor([[chosen, rejected]]).repeat(100, 1)
    rows[wins:] = rows[wins:].flip(1)
    return rows


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watch]:
    """Makes a watch that is shown these log-probabilities, one after the other."""

    def make(side: Any, *seen: torch.Tensor, **spec: Any) -> Watch:
        remaining = iter(seen)
        monkeypatch.setattr(health, "pair_log_probs", lambda *_, **__: next(remaining))
        monkeypatch.setattr(health.adapter, "set_coefficient", lambda *_: None)
        trainer = SimpleNamespace(
            model=None,
            processing_class=SimpleNamespace(pad_token_id=0),
            args=SimpleNamespace(per_device_train_batch_size=2),
            wanted=int(side == "negative"),
            spec=TrainingSpec(**spec),
        )
        watching = Watch(trainer, PAIRS, BASE, 10, Progress("tiny", 40))
        for step in range(10, 10 * len(seen) + 1, 10):
            watching.on_step_end(None, SimpleNamespace(global_step=step, max_steps=400), None)
        return watching

    return make


def test_a_healthy_run_is_quiet(watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]) -> None:
    found = watch("two", policy(0.1, -0.1, 60), policy(0.5, -0.5, 80), policy(0.5, -1.5, 78))
    assert [entry["accuracy"] for entry in found.history] == [0.6, 0.8, 0.78]
    assert [entry["step"] for entry in found.history] == [10, 20, 30]
    assert capsys.readouterr().err == ""


def test_falling_accuracy_is_told_once_with_what_to_change(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    watch("two", policy(0.5, -0.5, 90), policy(0.5, -0.5, 60), policy(0.5, -0.5, 50), learning_rate=3e-3)
    told = capsys.readouterr().err
    assert told.count("warning:") == 1
    assert "held-out accuracy fell from 0.900 to 0.600 at step 20" in told
    assert "a lower training.learning_rate (now 0.003), or training.sft_weight=0.5, or fewer epochs" in told


def test_sinking_replies_are_told_in_nats_per_token(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    watch("positive", policy(-1.9, -9.0), policy(-5.0, -20.0), sft_weight=0.5)
    told = capsys.readouterr().err
    assert "the wanted replies lost 2.5 nats per token against the base at step 20" in told
    assert "sft_weight" not in told  # it is set already


def test_of_a_negative_run_the_rejected_replies_are_wanted(
    watch: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    found = watch("negative", policy(-9.0, 0.5), policy(-20.0, 0.5))
    assert [(entry["accuracy"], entry["learned"]) for entry in found.history] == [(0.0, 1.0), (0.0, 1.0)]
    assert capsys.readouterr().err == ""
    watch("negative", policy(0.0, -4.0))
    assert "lost 2.0 nats per token" in capsys.readouterr().err
