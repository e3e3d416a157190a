"""What a mix still knows: tasks of the LM Evaluation Harness (`lm_eval`), run through the live mixer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from lora_prefvec.errors import InputError, nearest, require_extra
from lora_prefvec.evaluation.statistics import Score, from_error
from lora_prefvec.inference.base import first_line

if TYPE_CHECKING:
    from lora_prefvec.inference import LiveMixer, LoadedBase
    from lora_prefvec.vector import Coefficient

BOOTSTRAPS = 1000  # for metrics whose standard error has no formula


@dataclass(frozen=True)
class TaskScore:
    """What one mix reaches in one metric of one task.

    Args:
        metric: as the harness calls it, with its filter: `acc`, `exact_match,strict-match`.
        direction: +1 where more is better, -1 where less is.
        error: standard error of the value; None where the harness gives none.
        n: questions.
    """

    task: str
    metric: str
    direction: int
    value: float
    error: float | None
    n: int

    @property
    def score(self) -> Score:
        """The value with its interval."""
        return from_error(self.value, self.error, self.n)


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises InputError where `lm_eval` is not installed, or knows no such task; nothing is fetched."""
    manager = _manager()
    for task in tasks:
        if not Path(task).is_file() and task not in manager.all_tasks:
            raise InputError(f"lm_eval knows no task {task!r}", nearest(task, manager.all_tasks))


def knowledge(
    loaded: LoadedBase,
    mixer: LiveMixer,
    mixes: Sequence[Mapping[str, Coefficient]],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
) -> list[list[TaskScore]]:
    """The scores of every mix in all metrics of all tasks; the base is loaded once, and is the one that is there.

    The harness sets the global seeds of Python, NumPy and torch.

    Args:
        mixer: on the base's model; its own mix is set again afterwards.
        tasks: names of tasks that the harness knows, or paths of task files (YAML).
        limit: questions of each task; None asks all.
        chat: render questions by the chat template.
        batch_size: questions per forward.

    Raises:
        InputError: `lm_eval` is not installed, it knows no such task, or a mix names an unknown vector.
    """
    manager = _manager()
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import get_task_dict

    checked = [mixer.check(mix) for mix in mixes]
    try:
        get_task_dict(list(tasks), manager)
    except Exception as error:  # a name, a file, a data set that is not on this machine: it has no kind of its own
        raise InputError(
            f"lm_eval cannot prepare {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}",
            "`lm_eval ls tasks` lists its names.",
        ) from error
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    before, found = mixer.mix, []
    # The harness asks git and pip about this machine, which takes longer than a small task, and git complains aloud.
    try:
        for mix in checked:
            mixer.set_mix(mix)
            with patch.multiple(evaluator, get_git_commit_hash=str, add_env_info=lambda results: None):
                results = evaluator.simple_evaluate(
                    model,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    apply_chat_template=chat,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                )
            found.append(_scores(results))
    finally:
        mixer.set_mix(before)
    return found


def _manager() -> Any:
    """What knows the names of the harness' tasks.

    Raises:
        InputError: the harness, or what its models need, is not installed.
    """
    try:
        import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise require_extra(error.name or "lm_eval", "lm-eval") from None
    return _index()


@cache  # it reads some thousand files
def _index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """The harness' `metric,filter` and `metric_stderr,filter` as scores; groups, which repeat their tasks, left out."""
    scores = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or task not in results["n-samples"]:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filtered == "none" else key,
                    direction=+1 if results["higher_is_better"][task].get(metric, True) else -1,
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                    n=results["n-samples"][task]["effective"],
                )
            )
    return scores
