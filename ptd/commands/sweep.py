"""``ptd sweep``: train many variants of a run at once over one backbone, and compare them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import make_folders, write_json, writing
from ptd.config import SweepCell
from ptd.distributed.ranks import Ranks
from ptd.engine.preemption import StopRequest
from ptd.report import leave_report, report
from ptd.report.heat_map import heat_map
from ptd.runs.folder import read_run_json
from ptd.runs.metrics_log import METRICS
from ptd.runs.training import train_cells
from ptd.tasks import LOWER_IS_BETTER
from ptd.types import Reporter, UserError

SWEEP = "sweep.json"


def sweep(
    cells: Sequence[SweepCell],
    *,
    at_once: int | None = None,
    halving: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    request: StopRequest | None = None,
) -> dict[str, Any]:
    """Train all ``cells`` together, compare them, and return what sweep.json holds.

    ``at_once``: the number of runs that train together; the others wait for the next turn. None: all. ``halving``: at
    some steps only the better half of the runs goes on. Every run gets
    the folder that ``ptd train`` would write; the folder of the sweep gets sweep.json, report.html and, as ``best/``, a
    copy of the best adapter. The same call continues an interrupted sweep. Raises `UserError`, and `Preempted` if a
    stop was requested on any rank.
    """
    root = cells[0].config.output_dir.parent
    if halving and cells[0].config.data.eval is None:
        raise UserError("--halving: compares held-out rows, and there are none; set data.eval, or remove it")
    ranks = Ranks.start(needs_group=cells[0].config.backbone.sharded)
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    try:
        if not overwrite:
            ranks.on_main(lambda: _check_same(root, cells))
        size = at_once or len(cells)
        turns = [cells[begin : begin + size] for begin in range(0, len(cells), size)]
        for number, turn in enumerate(turns, 1):
            if len(turns) > 1:
                reporter.note(f"turn {number} of {len(turns)}: {len(turn)} runs")
            train_cells(
                turn, ranks, reporter, request or StopRequest(), overwrite=overwrite, halving=halving,
                on_end=leave_report,
            )  # fmt: skip
        return ranks.on_main(lambda: _conclude(root, cells, reporter))
    finally:
        ranks.stop()


def _check_same(root: Path, cells: Sequence[SweepCell]) -> None:
    """Raise `UserError` if the folder holds a sweep over other values."""
    try:
        before = {cell["name"] for cell in json.loads((root / SWEEP).read_text(encoding="utf-8"))["cells"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != {cell.name for cell in cells}:
        raise UserError(
            f"output_dir: {root} holds a sweep over other values; choose another output_dir, or --overwrite to replace "
            "it"
        )


def _conclude(root: Path, cells: Sequence[SweepCell], reporter: Reporter) -> dict[str, Any]:
    """Compare the runs, and write the files of the sweep (rank 0)."""
    metric = cells[0].config.train.best_metric
    found = [_result(root, cell, metric) for cell in cells]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    values = {each["name"]: each["value"] for each in found if each["value"] is not None}
    ranking = sorted(values, key=lambda name: sign * values[name])
    by_name = {each["name"]: each for each in found}
    best = _keep_best(root, [by_name[name] for name in ranking[:2]], metric)
    content = {"metric": metric, "cells": found, "ranking": ranking, "best": best}
    with writing(root):
        make_folders(root)
        write_json(root / SWEEP, content)
    with_records = [root / cell.name for cell in cells if (root / cell.name / METRICS).exists()]
    if with_records:
        try:
            heat = heat_map(metric, found, lower_is_better=sign > 0)
            report(with_records, root / "report.html", heat=heat)
        except UserError as error:
            reporter.note(f"report.html was not written: {error}")
    return content


def _result(root: Path, cell: SweepCell, metric: str) -> dict[str, Any]:
    content = read_run_json(root / cell.name)
    result = content.get("result") or {}
    best = result.get("best") or {}
    value = best.get(metric)
    return {
        "name": cell.name,
        "changes": dict(cell.changes),
        "status": content.get("status"),
        "value": value if isinstance(value, float | int) and math.isfinite(value) else None,
        "step": best.get("step"),
        "dropped_after": result.get("dropped_after"),
        "frozen": result.get(f"frozen_{metric}"),
    }


def _keep_best(root: Path, first: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """Copy the best adapter to ``best/``; return which one it is and why. ``first``: the best two runs."""
    if not first:
        return None
    best = first[0]
    with writing(root):
        shutil.rmtree(root / "best", ignore_errors=True)
        shutil.copytree(root / best["name"] / "best", root / "best")
    lead = "".join(f"; the next best, {each['name']}, has {each['value']:.4f}" for each in first[1:])
    reason = f"{metric} {best['value']:.4f} after step {best['step']}{lead}"
    return {"name": best["name"], "reason": reason, "adapter": str(root / "best")}
