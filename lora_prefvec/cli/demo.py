"""`prefvec demo`: the whole way on the embedded default."""

from __future__ import annotations

from pathlib import Path

import click

from lora_prefvec.cli.options import writes
from lora_prefvec.output import out


@click.command()
@writes("Folder for vectors, mix, table and pictures.")
@click.option("--quick", is_flag=True, help="Use the shipped vectors and train nothing.")
def demo(out_: Path, force: bool, dry_run: bool, quick: bool) -> None:
    """Train two preferences on a tiny model, mix them, add a third; offline and on a CPU.

    The model is an assistant of a closed world in which every score is exact. Vectors, the composed mix, results.json,
    control.png and front.png are written to --out.
    """
    from lora_prefvec.artifact import check_output
    from lora_prefvec.sandbox.demo import run_demo

    check_output(out_, force)
    if dry_run:
        out.result({"out": str(out_), "trains": [] if quick else ["helpful", "harmless", "concise"]})
        return
    run_demo(out_, quick=quick, force=force)
