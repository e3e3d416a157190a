"""Tasks of the LM Evaluation Harness through the live mixer."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lora_prefvec.errors import InputError
from lora_prefvec.evaluation.scorers.knowledge import knowledge
from lora_prefvec.inference import LiveMixer, LoadedBase, load_base
from tests.helpers import random_vector

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def write_task(folder: Path) -> Path:
    """A task of twelve questions, and its data."""
    data, task = folder / "data.jsonl", folder / "tiny.yaml"
    rows = [{"question": f"{i} and {i} is", "choices": [f"{2 * i}", "no"], "answer": i % 2} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task.write_text(TASK.format(data=data), encoding="utf-8")
    return task


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> LoadedBase:
    return load_base(tiny_llama, quantization="none", device="cpu", compute_dtype="float32")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_task_of_ones_own_through_the_mixer(base: LoadedBase, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = write_task(tmp_path)
    vector = random_vector(base.model, 2, seed=0, scale=0.5)
    with LiveMixer(base.model, {"one": vector}) as mixer:
        mixer.set_mix({"one": 0.5})
        ((first,), (second,)) = knowledge(base, mixer, [{}, {"one": 4.0}], [str(task)])
        assert mixer.mix == {"one": 0.5}
        mixer.set_mix({"one": 4.0})
        model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=1)
        direct = simple_evaluate(model, tasks=[str(task)], task_manager=TaskManager(), log_samples=False)
    assert (first.task, first.metric, first.direction, first.n) == ("tiny_choice", "acc", 1, 12)
    assert second.value == pytest.approx(direct["results"]["tiny_choice"]["acc,none"])
    assert second.error == pytest.approx(direct["results"]["tiny_choice"]["acc_stderr,none"])
    assert first.value != second.value


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_task_that_is_not_there(base: LoadedBase) -> None:
    with LiveMixer(base.model, {}) as mixer, pytest.raises(InputError, match="lm_eval cannot prepare no_such_task"):
        knowledge(base, mixer, [{}], ["no_such_task"])


def test_without_the_harness_it_says_what_to_install(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, module, None)
    with LiveMixer(base.model, {}) as mixer, pytest.raises(InputError, match=r"lora-prefvec\[lm-eval\]"):
        knowledge(base, mixer, [{}], ["arc_easy"])
