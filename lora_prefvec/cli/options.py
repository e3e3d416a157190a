"""Options that several verbs share, each said once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def writes(help_out: str, *, required: bool = True) -> Callable[[Command], Command]:
    """`--out`, `--force` and `--dry-run`: what every verb that writes takes.

    Args:
        help_out: what is written, as the help of `--out` says it.
        required: whether the verb makes no sense without `--out`.
    """

    def add(command: Command) -> Command:
        command = click.option("--dry-run", is_flag=True, help="Check everything and say what would be written.")(
            command
        )
        command = click.option("--force", is_flag=True, help="Replace what --out holds already.")(command)
        return click.option("--out", "out_", type=click.Path(path_type=Path), required=required, help=help_out)(command)

    return add


def live_mix(command: Command) -> Command:
    """`[REF=COEF]...` and the options that choose a base, its precision and how replies are sampled."""
    for decorate in reversed(
        [
            click.argument("refs", nargs=-1, metavar="[REF=COEF]..."),
            click.option("--base", help="Folder, Hub id or 'sandbox'; the base of the first vector where left out."),
            click.option(
                "--quantization",
                type=click.Choice(["nf4", "none"]),
                help="How the base is loaded; as the first vector was trained, else nf4.",
            ),
            click.option("--allow-mismatch", is_flag=True, help="Mix vectors of another base or chat template."),
            click.option(
                "--max-new-tokens",
                type=click.IntRange(min=1),
                default=256,
                show_default=True,
                help="Length of a reply at most.",
            ),
            click.option(
                "--temperature",
                type=click.FloatRange(min=0),
                default=1.0,
                show_default=True,
                help="0 always takes the best token.",
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                default=1.0,
                show_default=True,
                help="Sample from this much probability.",
            ),
            click.option(
                "--seed", type=int, default=0, show_default=True, help="The same seed gives the same replies."
            ),
        ]
    ):
        command = decorate(command)
    return command
