"""``ptd sweep``: train many variants of a run at once over one backbone, and compare them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ptd.checkpoint.files import make_folders, write_json, writing
from ptd.config import RunConfig, SweepCell
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.distributed.preflight import check_before_run
from ptd.distributed.ranks import Ranks
from ptd.engine.preemption import StopRequest
from ptd.report import leave_report, report
from ptd.runs.folder import open_run
from ptd.runs.metrics_log import METRICS
from ptd.runs.training import PlannedRun, journal_of, train_runs
from ptd.tasks import LOWER_IS_BETTER
from ptd.types import Reporter, UserError

SWEEP = "sweep.json"
RUN = "run.json"


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
    resolved = [apply_deepspeed(cell.config) for cell in cells]
    configs = {cell.name: config for cell, (config, _) in zip(cells, resolved, strict=True)}
    zero3 = resolved[0][1]
    ranks = Ranks.start(needs_group=resolved[0][0].backbone.sharded)
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    try:
        for config in configs.values():
            check_batch_size(config, ranks.world_size)
            check_before_run(config, ranks)
        if not overwrite:
            ranks.on_main(lambda: _check_same(root, cells))
        waiting = list(configs)
        if not overwrite:
            settled = ranks.on_main(lambda: [name for name in configs if "result" in _read(root / name / RUN)])
            waiting = [name for name in configs if name not in settled]
        size = at_once or len(cells)
        turns = [waiting[begin : begin + size] for begin in range(0, len(waiting), size)]
        for number, names in enumerate(turns, 1):
            if len(turns) > 1:
                reporter.note(f"turn {number} of {len(turns)}: {len(names)} runs")
            _train(
                {name: configs[name] for name in names}, zero3, ranks, root, reporter, request or StopRequest(),
                overwrite=overwrite, halving=halving,
            )  # fmt: skip
        return ranks.on_main(lambda: _conclude(root, cells, reporter))
    finally:
        ranks.stop()


def _train(
    configs: Mapping[str, RunConfig],
    zero3: dict[str, Any] | None,
    ranks: Ranks,
    root: Path,
    reporter: Reporter,
    request: StopRequest,
    *,
    overwrite: bool,
    halving: bool,
) -> None:
    folders = ranks.on_main(lambda: [open_run(config, overwrite=overwrite) for config in configs.values()])
    plans = [
        PlannedRun(name, config, journal_of(config, folder, ranks))
        for (name, config), folder in zip(configs.items(), folders, strict=True)
    ]
    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(plan.journal.attempt())
            ranks.on_main(plan.journal.begin)
        outcomes = train_runs(plans, zero3, ranks, root, reporter, request, on_end=leave_report, halving=halving)
    for outcome in outcomes:
        if outcome.error is not None:
            reporter.note(str(outcome.error))


def _check_same(root: Path, cells: Sequence[SweepCell]) -> None:
    """Raise `UserError` if the folder holds a sweep over other values."""
    before = _read(root / SWEEP)
    if before and before.get("cells") and {cell["name"] for cell in before["cells"]} != {cell.name for cell in cells}:
        raise UserError(
            f"output_dir: {root} holds a sweep over other values; choose another output_dir, or --overwrite to replace "
            "it"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


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
            report(with_records, root / "report.html")
        except UserError as error:
            reporter.note(f"report.html was not written: {error}")
    return content


def _result(root: Path, cell: SweepCell, metric: str) -> dict[str, Any]:
    content = _read(root / cell.name / RUN)
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
