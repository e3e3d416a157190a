"""Writes that happen wholly or not at all: a sibling temporary, fsync, rename.

A killed process leaves the old state or the new one. What it leaves beside the target has the process id in its name
(`.NAME.prefvec-new-HOST-PID-XXXX`), is refused by every reader and removed by the next write of the same target.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from lora_prefvec.errors import InputError

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.prefvec-(?P<state>new|old)-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")
# What the system says of a place that cannot be written to, whoever tries.
_UNFIT = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
}
# What tells an adapter, a model, GGUF files or a demo from a folder that somebody needs.
_MARKS = ("adapter_config.json", "prefvec.json", "config.json", "results.json", "*.gguf")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_folder(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is complete.

    Args:
        target: the folder to write; its parents are made.
        force: replace an existing `target`; a kill while replacing leaves the old folder or the new one.

    Yields:
        An empty folder beside `target`, renamed to it when the block ends and removed when the block raises.

    Raises:
        InputError: `target` exists and `force` is not set, its place is not writable, or the disk is full.
    """
    place = check_target(target, force)
    with _writing(place, target):
        work = _temporary(place, "new")
        try:
            work.mkdir()
            yield work
            for folder, _, names in os.walk(work):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _put(work, place)
        finally:
            _remove(work)


@contextlib.contextmanager
def atomic_file(target: str | Path, force: bool = False) -> Iterator[Path]:
    """The same for one file: yields a path to write to, which becomes `target` when the block ends.

    Raises:
        InputError: as for `atomic_folder`.
    """
    place = check_target(target, force)
    with _writing(place, target):
        work = _temporary(place, "new")
        try:
            yield work
            _sync(work)
            os.replace(work, place)
            _sync(place.parent)
        finally:
            _remove(work)


def check_target(target: str | Path, force: bool = False) -> Path:
    """Where `target` will lie, links followed; asked before long work so that it does not end in a refusal.

    Raises:
        InputError: `target` exists and `force` is not set, or it is a folder that nobody means to replace.
    """
    try:
        place = Path(target).expanduser().resolve()
        recover(place)
        exists = place.exists()
    except (OSError, RuntimeError) as error:  # a cycle of links, a name that is too long, a closed folder
        raise InputError(
            f"cannot write to {target}: {getattr(error, 'strerror', None) or error}", "Choose another --out."
        ) from None
    if _TEMPORARY.fullmatch(place.name):
        raise InputError(f"{target} has the name of an unfinished write", "Choose another --out.")
    if not exists:
        return place
    if not force:
        raise InputError(f"{target} exists", "Choose another --out, or replace it with --force.")
    if place == Path.home() or place == Path.cwd() or place in Path.cwd().parents:
        raise InputError(f"{target} is your home, or holds the folder you stand in", "Choose another --out.")
    return place


def check_output(target: str | Path, force: bool = False) -> Path:
    """As `check_target`, for a folder that a person names: what `force` replaces must look like an earlier output.

    Raises:
        InputError: as `check_target`, or `target` is a file, or a folder that holds nothing that is written here.
    """
    place = check_target(target, force)
    if place.exists() and not place.is_dir():
        raise InputError(f"{target} is a file, and a folder is to be written", "Choose another --out.")
    if place.is_dir() and any(place.iterdir()) and not any(any(place.glob(mark)) for mark in _MARKS):
        raise InputError(
            f"{target} holds files, and none that tells of an adapter or a model, so --force does not replace it",
            "Choose another --out, or remove it yourself.",
        )
    return place


def is_temporary(path: Path) -> bool:
    """Whether `path` is, or lies in, the unfinished write of another process."""
    matches = (_TEMPORARY.fullmatch(part) for part in path.parts)
    return any(match and (match["host"], match["pid"]) != (_HOST, str(os.getpid())) for match in matches)


def recover(target: Path) -> None:
    """Undo a replacement that was killed between its two renames (systems that cannot swap in one step)."""
    if os.path.lexists(target):
        return
    for leftover, state in _leftovers(target):
        if state == "old":
            with contextlib.suppress(OSError):
                os.rename(leftover, target)
            return


def is_full(error: BaseException) -> bool:
    """Whether an exception of any library says that the disk, or the user's share of it, is full."""
    full = {errno.ENOSPC, errno.EDQUOT}
    text = str(error).lower()
    return getattr(error, "errno", None) in full or "no space left" in text or "disk quota exceeded" in text


@contextlib.contextmanager
def _writing(place: Path, shown: str | Path) -> Iterator[None]:
    """Make the parents, clear what dead processes left; on failure turn an error of the disk into one line."""
    made = [parent for parent in place.parents if not parent.exists()]  # deepest first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for leftover, _ in _leftovers(place):
            _remove(leftover)
        yield
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if is_full(error):
            raise InputError(
                f"no space left on the disk of {shown}; nothing was written",
                "Free some space, or choose another --out.",
            ) from error
        if isinstance(error, OSError) and error.errno in _UNFIT and _concerns(error, place):
            raise InputError(f"cannot write to {shown}: {error.strerror}", "Choose another --out.") from error
        raise


def _concerns(error: OSError, place: Path) -> bool:
    """Whether the failed call was about the target or its surroundings, and not about some input being read."""
    if not isinstance(error.filename, str | os.PathLike):
        return False
    path = Path(error.filename)
    return path == place or path in place.parents or place.parent in path.parents


def _temporary(place: Path, state: str) -> Path:
    return place.with_name(f".{place.name}.prefvec-{state}-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")


def _leftovers(place: Path) -> list[tuple[Path, str]]:
    """What dead processes of this machine left beside `place`, as (path, `new` or `old`)."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(place.parent):
            match = _TEMPORARY.fullmatch(entry.name)
            if match and match["name"] == place.name and match["host"] == _HOST and not _alive(int(match["pid"])):
                found.append((Path(entry.path), match["state"]))
    return found


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would end the process there; leftovers stay until they are removed by hand
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _put(work: Path, place: Path) -> None:
    """Rename `work` to `place`; what was there is swapped out in one step where the system can do that."""
    old = None
    if os.path.lexists(place) and not _exchange(work, place):
        old = _temporary(place, "old")
        os.rename(place, old)
    if old is not None or not os.path.lexists(place):
        os.rename(work, place)
    _sync(place.parent)
    if old is not None:
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux `renameat2`); False where kernel or file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    if os.name != "posix" and path.is_dir():
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
