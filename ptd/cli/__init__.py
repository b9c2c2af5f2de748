"""The command line. `ptd.errors` explains its exit codes.

Each command is a function in one of this package's modules and an entry of ``COMMANDS``. The modules import torch only
when a command that needs it runs, so that help, completion and usage errors answer immediately.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from ptd.cli import launch, look, start, sweep, train, use
from ptd.cli.common import is_main
from ptd.errors import INTERRUPTED, Diverged, Preempted, RankError, UserError

app = typer.Typer(
    name="ptd",
    help="Tune a prefix, not a model: prompt- and prefix-tuning of frozen language models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": start.quickstart,
    "init": start.init,
    "ls": start.ls,
    "cp": start.cp,
    "doctor": look.doctor,
    "plan": look.plan,
    "bench": look.bench,
    "train": train.train,
    "sweep": sweep.sweep,
    "report": look.report,
    "eval": use.evaluate,
    "generate": use.generate,
    "predict": use.predict,
    "inspect": use.inspect_,
    "export": use.export_,
    "import": use.import_,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(launch.app, name="launch")


def _version(show: bool) -> None:
    if show:
        print(f"ptd {version('ptd')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _leave(code: int) -> None:
    """Exit without Python's shutdown, which takes a different time on every rank.

    As soon as the first rank has exited, a launcher kills the others, and their exit code would be that of a kill.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run the ``ptd`` command; its entry point."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        if is_main() or isinstance(error, RankError):
            print(f"ptd: error: {error}", file=sys.stderr)
        if isinstance(error, Diverged) and os.environ.get("WORLD_SIZE", "1") != "1":
            _leave(error.exit_code)
        sys.exit(error.exit_code)
    except Preempted as stopped:
        if is_main():
            print(f"ptd: {stopped}", file=sys.stderr)
        _leave(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
