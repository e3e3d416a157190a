"""`prefvec`: the table of contents of the command line, and how every command ends."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from lora_prefvec import __version__
from lora_prefvec.cli.bench import bench
from lora_prefvec.cli.calibrate import calibrate
from lora_prefvec.cli.chat import chat
from lora_prefvec.cli.compare import compare
from lora_prefvec.cli.compose import compose, extract
from lora_prefvec.cli.data import data_command
from lora_prefvec.cli.demo import demo
from lora_prefvec.cli.export import export, verify
from lora_prefvec.cli.fold import fold
from lora_prefvec.cli.generate import generate
from lora_prefvec.cli.inspect import inspect
from lora_prefvec.cli.score import score
from lora_prefvec.cli.serve import serve
from lora_prefvec.cli.sweep import sweep
from lora_prefvec.cli.train import train
from lora_prefvec.cli.tune import tune
from lora_prefvec.cli.ui import ui
from lora_prefvec.errors import PrefvecError, nearest
from lora_prefvec.output import out
from lora_prefvec.progress import quiet_libraries

SECTIONS = {
    "Train": [demo, data_command, train],
    "Compose": [extract, compose, fold, export],
    "Talk": [generate, chat, ui],
    "Measure": [score, sweep, tune, calibrate, compare],
    "Serve": [serve],
    "See": [inspect, verify, bench],
}


class TableOfContents(click.Group):
    """A group whose help lists the verbs by section, in the order in which they are used."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            raise click.UsageError(f"There is no verb {args[0]!r}. {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.name or "", verb.get_short_help_str(90)) for verb in verbs])


def set_format(_: click.Context, __: click.Parameter, value: Any) -> None:
    """Remember `--format`, wherever on the line it stands."""
    if value is not None:
        out.format = value


def set_debug(_: click.Context, __: click.Parameter, value: bool) -> None:
    """Remember `--debug`, wherever on the line it stands."""
    out.debug = out.debug or value


def common_options() -> list[click.Option]:
    """The options that are taken before the verb and after it."""
    return [
        click.Option(
            ["--format"],
            type=click.Choice(["human", "json", "quiet"]),
            expose_value=False,
            callback=set_format,
            help="How results are printed; human by default.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=set_debug,
            help="Show tracebacks, and what other libraries print.",
        ),
    ]


@click.group(
    cls=TableOfContents,
    params=common_options(),
    invoke_without_command=True,
    subcommand_metavar="VERB ...",
    context_settings={"max_content_width": 100},
)
@click.version_option(__version__, message="prefvec %(version)s")
@click.pass_context
def prefvec(ctx: click.Context) -> None:
    """Train preferences once as low-rank vectors; mix them at test time.

    A vector is a folder, the name of an adapter that is shipped or lies in ./adapters, or a Hub id; REF=COEF gives it a
    coefficient.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def quietly(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with other libraries silenced before it imports them."""

    @functools.wraps(run)
    def quiet_run(*args: Any, **kwargs: Any) -> Any:
        # Threads that spin while they wait make small models several times slower wherever another process runs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if not out.debug:
            quiet_libraries()
        return run(*args, **kwargs)

    return quiet_run


for verb in [verb for verbs in SECTIONS.values() for verb in verbs]:
    for command in (verb, *getattr(verb, "commands", {}).values()):
        assert command.callback is not None
        command.callback = quietly(command.callback)
        command.params += common_options()
    prefvec.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code.

    0 done, 1 failed, 2 wrong usage or input, 130 stopped by Ctrl-C. An error is one line on stderr.
    """
    out.format, out.debug = "human", False
    try:
        code = prefvec.main(arguments, prog_name="prefvec", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def report(error: BaseException) -> int:
    """Tell the user in one line why the command ended; returns the exit code."""
    if isinstance(error, click.Abort) and error.__cause__ is not None:
        error = error.__cause__  # click's name for Ctrl-C and for an unexpected end of a file
    if isinstance(error, BrokenPipeError):
        # The reader has gone (`prefvec ... | head`): nobody to tell, and nothing more to write at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if out.debug and not isinstance(error, click.ClickException):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    code, text = explain(error)
    text = " ".join(text.split("\n"))
    if code == 130:
        print(f"interrupted: {text}", file=sys.stderr)
    else:
        out.error(text)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence for an error."""
    if isinstance(error, PrefvecError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        said = " ".join(error.format_message().split())
        return 2, f"{said} See: {context.command_path if context else 'prefvec'} --help"
    if no_space(error):
        file = getattr(error, "filename", None)
        return 2, f"no space left on the disk{f' for {file}' if file else ''}. Free some, or write to another --out."
    said = ": ".join(filter(None, [type(error).__name__, str(error)]))
    return 1, f"{said} (run again with --debug for the traceback)"


def no_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind `error`, whichever library met it."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
