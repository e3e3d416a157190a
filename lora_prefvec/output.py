"""The one object that speaks to the user: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["human", "json", "quiet"]


class Output:
    """Prints results in the format chosen once, at the start of a command.

    `human` draws tables, `json` prints one JSON document, `quiet` prints only the values of a result, one a line.
    Notes and warnings go to stderr in every format, notes not in `quiet`.
    """

    def __init__(self) -> None:
        self.format: Format = "human"
        self.debug = False

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console on stdout or stderr; made anew, so that redirected streams are seen."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else 120
        return Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=not stream.isatty())

    def result(self, data: Mapping[str, Any], *, text: str | None = None) -> None:
        """Print the outcome of a command.

        Args:
            data: what happened, JSON-serialisable; printed whole as `json`, its values alone as `quiet`.
            text: the same for a reader; the key-value pairs of `data` where left out.
        """
        if self.format == "json":
            print(json.dumps(data, indent=2, default=str))
        elif self.format == "quiet":
            for value in data.values():
                if not isinstance(value, Mapping | Sequence) or isinstance(value, str):
                    print(value)
        elif text is not None:
            print(text)
        else:
            for key, value in data.items():
                print(f"{key}: {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", note: str = "") -> None:
        """Print rows under named columns: drawn for people, a list of objects as JSON, tab-separated as quiet."""
        if self.format == "json":
            print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2, default=str))
            return
        if self.format == "quiet":
            for row in rows:
                print("\t".join(show(cell) for cell in row))
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=title or None, caption=note or None, box=SIMPLE_HEAD, title_justify="left", caption_justify="left"
        )
        for position, column in enumerate(columns):
            numeric = any(isinstance(row[position], int | float) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(show(cell) for cell in row))
        console = self.console()
        unbound = console.options.update(max_width=10_000)
        if console.measure(table, options=unbound).maximum > console.width:
            table.collapse_padding, table.pad_edge = True, False
        console.print(table)

    def note(self, text: str) -> None:
        """Say what is going on (stderr)."""
        if self.format != "quiet":
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say what the user should know before trusting the result (stderr)."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Say in one line why the command stopped (stderr)."""
        print(f"error: {text}", file=sys.stderr, flush=True)


def show(cell: Any) -> str:
    """A table cell as text: floats to four significant digits, None as a dash."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


out = Output()
