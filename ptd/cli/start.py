"""``ptd quickstart``, ``init``, ``ls`` and ``cp``: the first steps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptd.cli import completion
from ptd.cli.common import (
    Quiet,
    at_home,
    done,
    hush,
    left_by,
    print_json,
    reporter_unless,
)
from ptd.errors import UserError
from ptd.files import expand_home

if TYPE_CHECKING:
    pass


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for data, adapter and curve.", callback=at_home)
    ] = Path("quickstart"),
    ranks: Annotated[int, typer.Option(min=1, help="Number of training processes.")] = 2,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier quickstart in the folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Tune the shipped tiny backbone in minutes. It is sharded over two ranks and measured before and after."""
    hush()
    from ptd.quickstart.run import run_quickstart

    found = run_quickstart(output, ranks=ranks, overwrite=overwrite, reporter=reporter_unless(quiet), quiet=quiet)
    run = shlex.quote(str(output / "run"))
    prompt = shlex.quote(found["prompt"])
    then = [f"ptd generate --adapter {run} {prompt}", "ptd init   # a run file for your own model and data"]
    done(quiet, {output / "data": "the task's rows", **left_by(output / "run")}, then)


def init(
    run: Annotated[Path, typer.Argument(help="The run file to write.", metavar="RUN.yaml", callback=at_home)] = Path(
        "run.yaml"
    ),
    name: Annotated[
        str | None,
        typer.Option("--method", "-m", help="Tuning method.", autocompletion=completion.method_names),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Kind of task.", autocompletion=completion.task_kinds)
    ] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", "-b", help="Backbone folder or hub id.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Rows to train on: file, folder or hub name.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing; use the usual choice for each option that is not given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented RUN.yaml. The keys that the method and the task require are set, all others commented out.

    Asks for the method and the task if they are not given and stdin is a terminal.
    """
    if run.exists() and not force:
        raise UserError(f"{run} exists already; give another name, or --force to replace it")
    asks = sys.stdin.isatty() and not yes
    missing = [flag for flag, value in (("--task", task), ("--method", name)) if value is None]
    if missing and not (asks or yes):
        raise UserError(
            f"stdin is not a terminal, so ptd cannot ask: give {' and '.join(missing)}, or --yes for the usual choices"
        )
    from ptd.commands.init import FILL_IN, draft, kind_of, kinds, render_run_file, suitable, usual_method

    if task is None:
        task = _choose("task", kinds(), "causal_lm") if asks else "causal_lm"
    kind = kind_of(task)
    if name is None:
        name = _choose("method", suitable(kind), usual_method(kind)) if asks else usual_method(kind)
    backbone, data = (None if given is None else expand_home(given) for given in (backbone, data))
    text = render_run_file(draft(name, kind, backbone), run, backbone=backbone, data=data)
    try:
        run.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {run}: {error.strerror}; give a file in an existing folder") from error
    shown = shlex.quote(str(run))
    count = text.count(f"# {FILL_IN}:")
    then = [f"fill in the keys marked {FILL_IN} ({count})"] if count else []
    done(quiet, {run: f"method {name}, task {task}"}, [*then, f"ptd doctor {shown}", f"ptd train {shown}"])


def _choose(what: str, options: Mapping[Any, str], usual: str) -> str:
    """Ask for one of ``options``, by number or by name, until the answer is one of them."""
    names = list(options)
    for number, (option, about) in enumerate(options.items(), start=1):
        typer.echo(f"  {number}  {option:<22} {about}", err=True)
    while True:
        given = typer.prompt(what, default=usual, err=True).strip()
        if given in options:
            return str(given)
        if given.isdecimal() and 1 <= int(given) <= len(names):
            return str(names[int(given) - 1])
        typer.echo(f"{given!r} is not one of the options; give a number or a name", err=True)


def ls(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List the files that ptd ships. They are recipes, DeepSpeed files and job scripts; their names alone find them."""
    from ptd.shipped import KINDS, shipped_files

    files = shipped_files()
    if as_json:
        print_json({kind: {file.name: file.about for file in files if file.kind == kind} for kind in KINDS})
        return
    width = max(len(file.name) for file in files)
    for kind, title in KINDS.items():
        print(f"{title}")
        for file in files:
            if file.kind == kind:
                print(f"  {file.name:<{width}}  {file.about}")


def cp(
    name: Annotated[
        str, typer.Argument(help="Name of a file that ptd ls lists.", autocompletion=completion.shipped_names)
    ],
    target: Annotated[
        Path, typer.Argument(help="File or folder to copy it to.", metavar="DEST", callback=at_home)
    ] = Path("."),
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Copy a shipped file to edit it."""
    from ptd.shipped import copy_shipped

    file, where = copy_shipped(name, target, force=force)
    shown = shlex.quote(str(where))
    then = {
        "recipe": f"ptd doctor {shown} backbone.path=MODEL",
        "deepspeed": f"ptd train RUN.yaml deepspeed={shown}",
        "slurm": f"edit it, then sbatch {shown}",
        "hostfile": f"edit it, then ptd launch ssh RUN.yaml --hostfile {shown}",
    }
    done(quiet, {where: file.about}, [then[file.kind]])
