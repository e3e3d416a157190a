"""The hidden folder of work in progress, which makes a run that was killed go on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora_prefvec.artifact import Adapter, atomic_file, read_adapter
from lora_prefvec.errors import InputError
from lora_prefvec.recipe import Recipe, parse_recipe
from lora_prefvec.training.run import FINISHED
from lora_prefvec.training.trainer import remove_folder


def work_folder(target: Path) -> Path:
    """The hidden folder of work in progress on `target`."""
    return target.with_name(f".{target.name}.training")


def completed(target: Path, recipe: Recipe, runs: Sequence[str]) -> Adapter | None:
    """What lies at `target` if this recipe made it: it was killed between its last write and its clearing up.

    Args:
        runs: the names of all runs of the recipe's method.
    """
    file, work = target / "recipe.yaml", work_folder(target)
    if not file.is_file() or file.read_text(encoding="utf-8") != recipe.to_yaml():
        return None
    if work.exists() and not all((work / run / FINISHED).is_dir() for run in runs):
        return None
    adapter = read_adapter(target)
    remove_folder(work)
    return adapter


def claim_work(target: Path, recipe: Recipe, *, resume: bool, force: bool) -> Path:
    """The hidden folder of work in progress, after making sure that it belongs to this recipe.

    Raises:
        InputError: there is unfinished work and neither `resume` nor `force`, or it is another recipe's.
    """
    work = work_folder(target)
    if not work.exists():
        return work
    if not resume:
        if not force:
            raise InputError(
                f"an unfinished run for {target} is there",
                "Go on with --resume, or start again with --force.",
            )
        remove_folder(work)
        return work
    file = work / "recipe.yaml"
    if file.is_file():
        before, now = _keys(parse_recipe(file.read_text(encoding="utf-8"), str(file))), _keys(recipe)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            raise InputError(
                f"the unfinished run for {target} was made with another recipe ({', '.join(changed)} differ)",
                "Resume with the same recipe, or start again with --force.",
            )
    return work


def check_data(work: Path, hashes: Sequence[str | None]) -> None:
    """Raises InputError where an unfinished run was made with other data."""
    file = work / "data.json"
    if file.is_file() and file.read_text(encoding="utf-8") != json.dumps(hashes):
        raise InputError(
            "the data have changed since the unfinished run was made", "Put them back, or start again with --force."
        )


def begin(work: Path, recipe: Recipe, hashes: Sequence[str | None]) -> None:
    """Write down whose work this is."""
    work.mkdir(parents=True, exist_ok=True)
    for name, text in (("recipe.yaml", recipe.to_yaml()), ("data.json", json.dumps(hashes))):
        with atomic_file(work / name, force=True) as file:
            file.write_text(text, encoding="utf-8")


def _keys(recipe: Recipe) -> dict[str, object]:
    """A recipe's values by dotted key."""
    found: dict[str, object] = {}
    for name, value in recipe.model_dump().items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found
