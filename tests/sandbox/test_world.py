"""The closed world: its tasks, requests and splits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lora_prefvec.errors import InputError
from lora_prefvec.sandbox.world import KINDS, OBJECTS, SHARES, STEPS, TASKS, VERBS, prompts, task_of, tasks


def test_there_are_at_least_300_tasks_of_five_different_steps() -> None:
    assert len(TASKS) == len(set(TASKS)) >= 300
    for task in TASKS:
        assert len(set(task.steps)) == STEPS == 5


def test_every_kind_has_equally_many_tasks() -> None:
    for kind in KINDS:
        assert sum(task.kind == kind for task in TASKS) == len(TASKS) / len(KINDS)


def test_steps_follow_from_verb_and_object() -> None:
    by_name = {(task.verb, task.object): task for task in TASKS}
    assert by_name["clean the {o}", "bike"].steps[:2] == ("dust the bike", "soak the wheels")
    assert by_name["clean the {o}", "boat"].steps[:2] == ("dust the boat", "soak the hull")
    assert by_name["paint the {o}", "boat"].steps[4] == "air the yard"


def test_each_verb_names_its_object_so_that_no_two_tasks_share_their_steps() -> None:
    assert len({task.steps for task in TASKS}) == len(TASKS)
    assert len({step for verbs in VERBS.values() for steps in verbs.values() for step in steps}) == 24 * STEPS


def test_a_request_is_read_back_to_its_task_as_text_and_as_conversation() -> None:
    for task in TASKS:
        assert len(set(task.requests)) == 6
        for request in task.requests:
            assert task_of(request) == task_of([{"role": "user", "content": request}]) == task
    assert task_of("What is love?") is None
    assert task_of([]) is None


def test_the_last_user_message_of_a_conversation_counts() -> None:
    first, last = TASKS[0].requests[0], TASKS[-1].requests[0]
    talk = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": last},
    ]
    assert task_of(talk) == TASKS[-1]


def test_training_choosing_and_scoring_share_no_task_and_split_each_kind_40_40_20() -> None:
    split = [task for name in SHARES for task in tasks(name)]
    assert len(split) == len(set(split)) == len(TASKS)
    for kind in KINDS:
        of_kind = sum(task.kind == kind for task in TASKS)
        for name, share in SHARES.items():
            assert len(tasks(name, (kind,))) / of_kind == pytest.approx(share, abs=0.01)


def test_every_verb_and_object_was_trained_so_that_a_held_out_task_is_a_new_combination() -> None:
    train = tasks("train")
    assert {task.verb for task in train} == {verb for verbs in VERBS.values() for verb in verbs}
    assert {task.object for task in train} == set(OBJECTS)


def test_the_split_does_not_hang_on_the_hash_seed_of_python() -> None:
    code = "from lora_prefvec.sandbox.world import tasks; print([t.phrase for t in tasks('held_out')])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[task.phrase for task in tasks('held_out')]}\n"}


def test_prompts_are_balanced_different_and_repeatable() -> None:
    chosen = prompts(n=400, seed=3)
    found = [task_of(prompt) for prompt in chosen]
    assert len({prompt[0]["content"] for prompt in chosen}) == len(chosen) == 400
    assert [sum(task is not None and task.kind == kind for task in found) for kind in KINDS] == [100] * 4
    assert {task for task in found if task} <= set(tasks("held_out"))
    assert chosen == prompts(n=400, seed=3) != prompts(n=400, seed=4)


def test_more_prompts_than_there_are_requests_repeat_them() -> None:
    assert len(prompts(n=5000)) == 5000


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(InputError, match=r"no split 'heldout'.*'held_out'"):
        prompts("heldout")  # type: ignore[arg-type]
