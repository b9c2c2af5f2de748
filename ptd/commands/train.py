"""``ptd train``: tune a prompt or head of a frozen backbone, in this process or on all ranks of a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptd.config import RunConfig, SweepCell
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.distributed.preflight import check_before_run
from ptd.distributed.ranks import Ranks
from ptd.engine.preemption import StopRequest
from ptd.report import leave_report
from ptd.runs.folder import as_begun, open_run, read_run_json
from ptd.runs.training import PlannedRun, journal_of, train_cells, train_runs
from ptd.types import Reporter


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    retry: bool = False,
    reporter: Reporter | None = None,
    request: StopRequest | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says, write the artifacts to ``config.output_dir`` and return the result of run.json.

    An unfinished run of the same configuration in ``output_dir`` is continued, with ``retry`` also one that keeps
    failing. Raises `UserError`; `Preempted` if a stop was requested on any rank (``request``); and `Diverged` if the
    training diverged and ``train.on_divergence`` ends such a run.
    """
    config, zero3 = apply_deepspeed(config)
    ranks = Ranks.start(needs_group=config.backbone.sharded)
    check_batch_size(config, ranks.world_size)
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    try:
        if not overwrite:
            config = as_begun(config)
        check_before_run(config, ranks)
        folder = ranks.on_main(lambda: open_run(config, overwrite=overwrite, retry=retry))
        for note in folder.notes:
            reporter.note(note)
        journal = journal_of(config, folder, ranks)
        with journal.attempt():
            ranks.on_main(journal.begin)
            plans, home = [PlannedRun("", config, journal)], config.output_dir
            (outcome,) = train_runs(plans, zero3, ranks, home, reporter, request or StopRequest(), on_end=leave_report)
            if outcome.error is not None:
                raise outcome.error
            return outcome.result
    finally:
        ranks.stop()


def train_members(
    members: Sequence[SweepCell],
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    request: StopRequest | None = None,
) -> dict[str, Any]:
    """Train all members of a run file at once over one backbone; return name -> status and result of run.json.

    Every member gets the folder that it would have alone, ``output_dir/NAME``. The same call continues an interrupted
    run. Raises `UserError`, and `Preempted` if a stop was requested on any rank.
    """
    ranks = Ranks.start(needs_group=members[0].config.backbone.sharded)
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    try:
        train_cells(members, ranks, reporter, request or StopRequest(), overwrite=overwrite, on_end=leave_report)
        found = {}
        for member in members:
            content = read_run_json(member.config.output_dir)
            found[member.name] = {"status": content.get("status"), "result": content.get("result")}
        return found
    finally:
        ranks.stop()
