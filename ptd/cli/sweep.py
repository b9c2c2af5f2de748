"""``ptd sweep``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from ptd.cli.common import Overrides, Overwrite, Quiet, RunFile, done, hush, is_main, print_json, reporter_unless
from ptd.errors import Preempted, UserError

Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="KEY=VALUE,…",
        help="Values to try of a key of the run file, e.g. train.learning_rate=1e-2,3e-2,1e-1. Repeated: every "
        "combination.",
    ),
]


def sweep(
    run: RunFile,
    overrides: Overrides = None,
    vary: Vary = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Train so many runs at a time; without it, all at once.")
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Drop the worse half of the runs several times on the way.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train every combination of some values at once over one backbone in memory, and compare them.

    Each run learns what it would learn alone. The same command given again continues an interrupted sweep.
    """
    from ptd.engine.preemption import StopRequest

    request = StopRequest.listen()

    from ptd.config import parse_varied, read_run_file, sweep_cells

    if not vary:
        raise UserError("--vary: is missing; give at least one key with its values, or use ptd train for a single run")
    cells = sweep_cells(read_run_file(run, overrides), parse_varied(vary), str(run))
    hush()
    from ptd.commands.sweep import sweep as run_sweep
    from ptd.console import print_sweep

    try:
        found = run_sweep(
            cells,
            at_once=at_once,
            halving=halving,
            overwrite=overwrite,
            reporter=reporter_unless(quiet),
            request=request,
        )
    except Preempted:
        request.ignore_more()
        raise
    if is_main():
        root = cells[0].config.output_dir.parent
        print_json({"output_dir": str(root), **found})
        if not quiet:
            print_sweep(found)
        written = {
            root / "sweep.json": "the runs and their results",
            root / "report.html": "all runs on one page",
            root / "best": "the adapter of the best run",
        }
        then = [f"ptd generate --adapter {shlex.quote(str(root / 'best'))} 'your prompt'"]
        done(quiet, {path: what for path, what in written.items() if path.exists()}, then, found=_best(found))


def _best(found: dict[str, Any]) -> list[str]:
    best = found["best"]
    return [] if best is None else [f"best: {best['name']} ({best['reason']})"]
