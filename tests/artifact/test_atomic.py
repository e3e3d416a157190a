from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_prefvec.artifact import atomic, atomic_file, atomic_folder, check_output, check_target, read_adapter
from lora_prefvec.errors import InputError


def fill(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with atomic_folder(target) as work:
        fill(work, "new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert names(tmp_path / "a") == ["b"]


def fail(target: Path, error: BaseException) -> None:
    """A replacing write that comes to grief."""
    with atomic_folder(target, force=True) as work:
        fill(work, "new")
        raise error


def test_a_failing_block_leaves_nothing_not_even_parents(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "a" / "b", ZeroDivisionError())
    assert names(tmp_path) == []


def test_an_existing_target_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    target = tmp_path / "t"
    for force in (False, True):
        with atomic_folder(target, force) as work:
            fill(work, str(force))
    assert (target / "file").read_text() == "True"
    with pytest.raises(InputError, match=r"exists.*--force"), atomic_folder(target):
        pytest.fail("the block must not run")
    assert (target / "file").read_text() == "True"
    assert names(tmp_path) == ["t"]


def test_replacing_works_where_the_system_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    test_an_existing_target_is_kept_without_force_and_replaced_with_it(tmp_path)


def test_a_failing_replacement_keeps_the_old(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "t") as work:
        fill(work, "old")
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "t", ZeroDivisionError())
    assert (tmp_path / "t" / "file").read_text() == "old"
    assert names(tmp_path) == ["t"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "t")
    with atomic_folder(tmp_path / "link") as work:
        fill(work, "new")
    assert (tmp_path / "real" / "t" / "file").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_files_too(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a" / "f") as work:
        work.write_text("one")
    with pytest.raises(InputError, match="exists"), atomic_file(tmp_path / "a" / "f"):
        pytest.fail("the block must not run")
    with atomic_file(tmp_path / "a" / "f", force=True) as work:
        work.write_text("two")
    assert (tmp_path / "a" / "f").read_text() == "two"
    assert names(tmp_path / "a") == ["f"]


def test_one_write_inside_another(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "t") as work, atomic_folder(work / "inner") as inner:
        fill(inner, "new")
    assert (tmp_path / "t" / "inner" / "file").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError, match="no space left on the disk of") as raised:
        fail(tmp_path / "t", OSError(number, os.strerror(number)))
    assert raised.value.exit_code == 2
    assert names(tmp_path) == []


def test_a_full_disk_met_inside_a_library(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(InputError, match="no space left"), atomic_folder(tmp_path / "t"):
        raise RuntimeError(message)


@pytest.mark.parametrize("place", ["file/t", "x" * 300, "loop/t"])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot write to") as raised, atomic_folder(tmp_path / place):
        pytest.fail("the block must not run")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), atomic_folder(tmp_path / "t"):
        pytest.fail("the block must not run")


def test_an_error_of_reading_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "t"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input")


def test_the_ground_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (tmp_path, tmp_path / "here"):
        with pytest.raises(InputError, match="folder you stand in"):
            check_target(target, force=True)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def filling(work: Path) -> None:
    die()


def before_the_swap(work: Path) -> None:
    atomic._put = die


def after_the_swap(work: Path) -> None:
    exchange = atomic._exchange
    atomic._exchange = lambda one, other: (exchange(one, other), die())[0]


def between_two_renames(work: Path) -> None:
    rename = os.rename
    atomic._exchange = lambda one, other: False
    os.rename = lambda one, other: (rename(one, other), die())[0]


def after_two_renames(work: Path) -> None:
    atomic._exchange = lambda one, other: False
    atomic._sync = lambda path: die() if path == work.parent else None


@pytest.mark.parametrize(
    ("doom", "left"),
    [
        (filling, "old"),
        (before_the_swap, "old"),
        (after_the_swap, "new"),
        (between_two_renames, "old"),
        (after_two_renames, "new"),
    ],
)
def test_a_kill_leaves_the_old_or_the_new_and_the_next_write_cleans_up(
    tmp_path: Path, doom: Callable[[Path], None], left: str
) -> None:
    target = tmp_path / "t"
    with atomic_folder(target) as work:
        fill(work, "old")
    child = os.fork()
    if child == 0:  # everything that is patched dies with the child
        try:
            with atomic_folder(target, force=True) as work:
                fill(work, "new")
                (work / "adapter_config.json").write_text("{}")
                doom(work)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    leftover = [path for path in tmp_path.iterdir() if path != target]
    assert leftover
    for path in leftover:
        with pytest.raises(InputError, match="unfinished write"):
            read_adapter(path)
    atomic.recover(target)
    assert (target / "file").read_text() == left
    with atomic_folder(target, force=True) as work:
        fill(work, "next")
    assert (target / "file").read_text() == "next"
    assert names(tmp_path) == ["t"]


def test_the_unfinished_write_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".t.prefvec-new-{atomic._HOST}-{os.getppid()}-00000000"
    other.mkdir()
    with atomic_folder(tmp_path / "t") as work:
        fill(work, "new")
    assert other.is_dir()
    with pytest.raises(InputError, match="unfinished"):
        check_target(other)


def test_force_replaces_an_output_and_nothing_that_somebody_needs(tmp_path: Path) -> None:
    empty, mine, model, file = (tmp_path / name for name in ("empty", "mine", "model", "thesis.txt"))
    empty.mkdir()
    (mine / "src").mkdir(parents=True)
    (mine / "src" / "thesis.txt").write_text("x")
    model.mkdir()
    (model / "config.json").write_text("{}")
    file.write_text("x")
    assert check_output(tmp_path / "new") == (tmp_path / "new").resolve()
    assert [check_output(place, force=True) for place in (empty, model)] == [empty.resolve(), model.resolve()]
    with pytest.raises(InputError, match="none that tells of an adapter or a model"):
        check_output(mine, force=True)
    with pytest.raises(InputError, match="is a file, and a folder is to be written"):
        check_output(file, force=True)
    with pytest.raises(InputError, match="exists"):
        check_output(model)
