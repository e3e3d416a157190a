"""Stopped at any moment, a run goes on and ends in the same bytes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_prefvec.errors import InputError
from lora_prefvec.inference import LoadedBase
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import Trained, train
from lora_prefvec.training.trainer import checkpoints, remove_folder
from tests.forks import Warm
from tests.training.tiny import Stop, hidden, stop_at, weights_hash, write_pairs

MakeRecipe = Callable[..., Recipe]

CASES: dict[str, dict[str, Any]] = {
    "two": {"max_steps": 12},
    "no accumulation": {"max_steps": 12, "micro_batch_size": 4},
    "uneven epochs": {
        "max_steps": None,
        "epochs": 2.0,
        "batch_size": 6,
        "sft_weight": 0.5,
    },  # 6 steps each, of 32 pairs
    "constant": {"max_steps": 12, "schedule": "constant", "warmup_ratio": 0.0, "evaluate_every": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    case: str, recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(**CASES[case])
    unbroken = train(wanted, tmp_path / "unbroken", base=nf4)
    broken = tmp_path / "broken"
    for step in (2, 11):  # before the first checkpoint, between two
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, step)
            train(wanted, broken, base=nf4, resume=step > 2)
        assert not broken.exists()
        assert [path.name for path in checkpoints(tmp_path / ".broken.training" / "two")] == (
            [f"checkpoint-{(step - 1) // 3 * 3}"] if step > 3 else []
        )
    resumed = train(wanted, broken, base=nf4, resume=True)
    assert weights_hash(broken) == weights_hash(unbroken.folder)
    assert resumed.metrics == unbroken.metrics
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_pair_goes_on_in_the_side_that_was_stopped(
    side: Any,
    trained: Callable[..., Trained],
    recipe: MakeRecipe,
    nf4: LoadedBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = recipe(sides="pair")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 5, side)
        train(wanted, tmp_path / "broken", base=nf4)
    train(wanted, tmp_path / "broken", base=nf4, resume=True)
    for part in ("", "positive", "negative"):
        assert weights_hash(tmp_path / "broken" / part) == weights_hash(trained("pair").folder / part)


@pytest.mark.parametrize("moment", ["write_finished", "measure", "write", "remove_folder"])
def test_a_kill_after_the_last_step_loses_nothing(
    moment: str,
    trained: Callable[..., Trained],
    recipe: MakeRecipe,
    nf4: LoadedBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = trained("two", schedule="constant")  # one step too many would have been seen, not so at a rate of 0

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        module = {"write_finished": "run", "measure": "methods.preference_vector"}.get(moment, "training")
        patch.setattr(f"lora_prefvec.training.{module}.{moment}", stop)
        train(recipe(schedule="constant"), tmp_path / "broken", base=nf4)
    resumed = train(recipe(schedule="constant"), tmp_path / "broken", base=nf4, resume=True)
    assert weights_hash(tmp_path / "broken") == weights_hash(unbroken.folder)
    assert resumed.metrics == unbroken.metrics
    assert hidden(tmp_path) == []


def test_an_older_artifact_is_not_taken_for_the_result(
    recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    train(recipe(max_steps=2), place, base=nf4)
    before = weights_hash(place)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 5)
        train(recipe(), place, base=nf4, force=True)
    assert weights_hash(place) == before
    with pytest.raises(InputError, match="exists"):
        train(recipe(), place, base=nf4, resume=True)
    train(recipe(), place, base=nf4, resume=True, force=True)
    assert weights_hash(place) != before
    assert hidden(tmp_path) == []


@pytest.fixture
def unfinished(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> Path:
    """Where the result of a run would lie that was stopped after a checkpoint."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 5)
        train(recipe(), tmp_path / "out", base=nf4)
    return tmp_path / "out"


def test_an_unfinished_run_is_not_thrown_away_unasked(
    unfinished: Path, recipe: MakeRecipe, nf4: LoadedBase, trained: Callable[..., Trained]
) -> None:
    with pytest.raises(InputError, match=r"an unfinished run for .* is there.*--resume.*--force"):
        train(recipe(), unfinished, base=nf4)
    train(recipe(), unfinished, base=nf4, force=True)
    assert weights_hash(unfinished) == weights_hash(trained("two").folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"beta": 0.2}}, "training.beta"),
        ({"held_out": 10}, "held_out"),
        ({"anchors": {"source": "pairs.jsonl", "share": 0.25}}, "anchors.source, anchors.split"),
        ({"lora": {"rank": 8}, "preference": "other"}, "preference, lora.rank"),
    ],
)
def test_another_recipe_is_refused(
    change: dict[str, Any], named: str, unfinished: Path, recipe: MakeRecipe, nf4: LoadedBase
) -> None:
    old = recipe().model_dump()
    changed = {
        key: {**(old[key] or {}), **value} if isinstance(value, dict) else value for key, value in change.items()
    }
    with pytest.raises(InputError, match=f"made with another recipe.*{named}"):
        train(Recipe.model_validate(old | changed), unfinished, base=nf4, resume=True)


def test_other_data_are_refused(recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "own.jsonl")
    wanted = Recipe.model_validate(recipe().model_dump() | {"data": {"source": str(data)}})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 5)
        train(wanted, tmp_path / "out", base=nf4)
    write_pairs(data, seed=7)
    with pytest.raises(InputError, match="the data have changed"):
        train(wanted, tmp_path / "out", base=nf4, resume=True)


def test_resuming_nothing_begins(
    recipe: MakeRecipe, nf4: LoadedBase, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    train(recipe(), tmp_path / "out", base=nf4, resume=True)
    assert weights_hash(tmp_path / "out") == weights_hash(trained("two").folder)


def test_removed_folders_never_read_as_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a kill as it begins
        remove_folder(folder)
    assert checkpoints(tmp_path) == []
    assert hidden(tmp_path) == [".checkpoint-3.removed"]
    remove_folder(folder)
    assert hidden(tmp_path) == []


# -- whole commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`train FILE --out`, of 30 steps with a checkpoint every third."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(recipe(max_steps=30).to_yaml())
    return ["train", str(file), "--out"]


@pytest.fixture(scope="module")
def unbroken(command: list[str], warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    ended = warm.run(*command, folder)
    assert ended.code == 0, ended.err
    return folder


def wait_for_checkpoint(work: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(work.glob("two/checkpoint-*")):
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.005)


def test_sigkill_at_random_moments_changes_no_byte(
    command: list[str], warm: Warm, unbroken: Path, tmp_path: Path
) -> None:
    place, draw = tmp_path / "out", random.Random(0)
    for round_ in range(3):
        job = warm.start(*command, place, *(["--resume"] if round_ else []))
        wait_for_checkpoint(tmp_path / ".out.training")
        time.sleep(draw.uniform(0, 0.4))
        job.send(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
        assert not place.exists()
    ended = warm.run(*command, place, "--resume")
    assert ended.code == 0, ended.err
    assert weights_hash(place) == weights_hash(unbroken)
    assert hidden(tmp_path) == []


def test_ctrl_c_saves_and_says_how_to_go_on(command: list[str], warm: Warm, unbroken: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    job = warm.start(*command, place)
    wait_for_checkpoint(tmp_path / ".out.training")
    job.send(signal.SIGINT)
    ended = job.wait()
    assert (ended.code, ended.out) == (130, "")
    last = ended.err.splitlines()[-1]
    assert last.startswith("interrupted: stopped at step ")
    assert "of 30" in last
    assert "--resume" in last
    (checkpoint,) = checkpoints(tmp_path / ".out.training" / "two")
    assert f"step {checkpoint.name.removeprefix('checkpoint-')} of 30" in last

    refused = warm.run(*command, place)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--resume" in refused.err
    refused = warm.run(*command, place, "--resume", "--set", "training.beta=0.2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "training.beta" in refused.err

    assert warm.run(*command, place, "--resume").code == 0
    assert weights_hash(place) == weights_hash(unbroken)


def test_a_finished_run_resumes_to_itself(command: list[str], warm: Warm, unbroken: Path) -> None:
    before = weights_hash(unbroken)
    ended = warm.run(*command, unbroken, "--resume", "--format", "json")
    assert ended.code == 0
    assert yaml.safe_load(ended.out)["held_out_accuracy@+1"] == 1.0
    assert weights_hash(unbroken) == before
