"""``ptd report``: show the results of one or several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import make_folders, write_atomically
from ptd.files import as_path
from ptd.report import tables
from ptd.report.data import read_run, read_runs
from ptd.report.heat_map import HeatMap
from ptd.report.page import render_report
from ptd.report.panels import panels
from ptd.report.plots import plot_loss, save_pngs
from ptd.types import UserError

REPORT = "report.html"


def report(
    folders: Sequence[Path], output: Path | None = None, *, pngs: Path | None = None, heat: HeatMap | None = None
) -> dict[str, Any]:
    """Write the page of one run, or of several next to each other; with ``pngs``, also write each plot to that folder.

    ``heat``: a map of the runs over two settings, for the page. ``output``: by default report.html, in the run's folder
    for a single run, in the current folder for several. Returns the files written (``report``, ``png``), the ``runs``
    with their figures and, for several runs, the ``differences`` of their settings. Raises `UserError` if a folder
    holds no run or the files cannot be written.
    """
    folders = [as_path(folder) for folder in folders]
    target = as_path(output) if output is not None else folders[0] / REPORT if len(folders) == 1 else Path(REPORT)
    pngs = None if pngs is None else as_path(pngs)
    runs = read_runs(folders)
    found = panels(runs)
    files: list[Path] = []
    place: Path = target
    try:
        make_folders(target.parent)
        write_atomically(target, render_report(runs, found, heat))
        if pngs is not None:
            place = pngs
            files = save_pngs(found, pngs)
    except OSError as error:
        raise UserError(
            f"{'--output' if place is target else '--png'}: cannot write {place} ({error.strerror or error}); give "
            "another path"
        ) from error
    return {
        "report": str(target),
        "png": [str(file) for file in files],
        "runs": [{"name": run.name, **tables.plain(run)} for run in runs],
        "differences": dict(tables.differences(runs)) if len(runs) > 1 else {},
    }


def leave_report(folder: Path) -> str | None:
    """Write report.html and loss.png into a run's folder; return why that failed, None if it did not.

    By then the run has ended and its results are saved, so a failure here does not raise.
    """
    try:
        run = read_run(folder)
        found = panels([run])
        plot_loss(folder)
        write_atomically(folder / REPORT, render_report([run], found))
    except Exception as error:
        again = f"run ptd report {folder} to write it"
        return f"{REPORT} was not written ({type(error).__name__}: {error}); {again}"
    return None
