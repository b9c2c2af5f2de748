"""``ptd train``: tune a prompt or head of a frozen backbone, in this process or on all ranks of a launcher."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

import torch

from ptd.backbone import fusion_of
from ptd.backbone.fusion import Fusion
from ptd.config import RunConfig
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.distributed.network_meter import metered_deepspeed
from ptd.distributed.preflight import bytes_to_write, check_before_run, check_space
from ptd.distributed.ranks import Ranks
from ptd.engine.guard import Guard
from ptd.engine.loop import Astray, Enough, Loop, Stopped, peak_memory_bytes, warmup_steps
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.preemption import StopRequest
from ptd.engine.watchdog import Watchdog, Watched
from ptd.errors import Diverged
from ptd.report import leave_report
from ptd.runs.artifacts import Artifacts
from ptd.runs.build import build_engine, fit_batch, read_material
from ptd.runs.folder import RunFolder, as_begun, open_run
from ptd.runs.metrics_log import Records
from ptd.runs.run_json import Journal
from ptd.runs.sampler import Sampler
from ptd.runs.tuned import Tuned
from ptd.tasks import Task
from ptd.types import Reporter
from ptd.versions import versions


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
        fusion = fusion_of(config.backbone, ranks.device.type)
        if ranks.device.type != "cpu" or fusion.by != "transformers":
            reporter.note(str(fusion))
        journal = _journal(config, folder, ranks, fusion)
        with journal.attempt():
            ranks.on_main(journal.begin)
            return _train(config, zero3, ranks, journal, reporter, request or StopRequest())
    finally:
        ranks.stop()


def _train(
    config: RunConfig,
    zero3: dict[str, Any] | None,
    ranks: Ranks,
    journal: Journal,
    reporter: Reporter,
    request: StopRequest,
) -> dict[str, Any]:
    began, folder = time.time(), journal.folder
    settings = fit_batch(config, ranks.world_size, folder.facts().get("rows_per_step"), reporter)
    material = read_material(config, ranks, reporter)
    units = folder.checkpoint is None or bool(folder.facts().get("units"))
    prepared, step, batches = build_engine(config, zero3, ranks, settings, material, units=units)
    total = settings.max_steps or batches.total_steps(settings.num_train_epochs)
    warmup = warmup_steps(settings, total)
    if material.trains and warmup >= total:
        reporter.note(
            f"the warm-up takes {warmup} steps and the run has {total}, so the learning rate never reaches "
            f"{settings.learning_rate:g}; lower train.warmup_steps or train.warmup_ratio"
        )
    if not material.trains:
        reporter.note(f"method {config.method_name} trains nothing: ptd only evaluates the backbone")
        total = 0

    with torch.no_grad():
        needed = bytes_to_write(
            step.trained.count(),
            step.flat().numel(),
            settings.save_total_limit,
            OPTIMIZERS[settings.optimizer].state_bytes,
        )
    ranks.on_main(lambda: check_space(config.output_dir, needed))
    artifacts = Artifacts(config, journal, prepared, material.task, step, ranks, settings, material.examples.digest())
    artifacts.learned_from = material.examples.report if material.trains else None
    artifacts.reporter = reporter
    if material.trains:
        artifacts.guard = Guard(total, warmup)
    start = artifacts.resume()
    records = artifacts.begin(start, reporter)
    stacks = folder.path / "logs" / f"rank-{ranks.rank}.stacks"
    watchdog = Watchdog(settings.hang_timeout_minutes * 60, stacks, ranks.rank)
    watched = Watched(reporter, watchdog)
    taught = material.examples.report.ends
    tuned = Tuned(prepared, material.tokenizer, None, material.task, step.readout, taught)
    sampler = Sampler.of(config, tuned, material.held_out, ranks, watched, watchdog.beat)
    loop = Loop(
        settings,
        prepared,
        step,
        batches,
        material.held_out,
        ranks,
        watched,
        on_record=records.write if records is not None else lambda record: None,
        on_trained=artifacts.keep_trained,
        on_eval=artifacts.keep_best,
        on_save=artifacts.save_state,
        on_boundary=lambda: artifacts.move_on(request),
        request=request,
        heartbeat=watchdog.beat,
        enough=lambda: artifacts.enough,
        guard=artifacts.guard,
        on_divergence=artifacts.has_diverged,
        rate_factor=artifacts.rate_factor,
    )
    with watchdog, artifacts.telling(reporter), ExitStack() as stack:
        stack.callback(artifacts.saver.close)
        if records is not None:  # closes the records also when the run fails
            stack.enter_context(records)
        if config.backbone.sharded:
            stack.enter_context(metered_deepspeed(step.meter))
        if ranks.any(request.wanted):  # requested while the backbone was loading
            artifacts.preempt(start, None)
        fresh = folder.checkpoint is None
        if fresh and material.trains:
            loop.measure_start(total, alone=alone_reads(material.task))
        if sampler is not None and fresh:
            sampler.keep(0, step.state())
            step.meter.take()
        ended = take_steps(loop, artifacts, records, start, total)
        if isinstance(ended, Stopped):
            artifacts.preempt(ended.step, ended)
        watchdog.beat("writing the adapter")
        steps = total if ended is None else ended.step
        result = artifacts.keep_result({"steps": steps, "seconds": time.time() - began})
        if isinstance(ended, Enough):
            result["stopped_early"] = ended.step
            reporter.note(
                f"ended after step {ended.step}: {artifacts.waited} consecutive evaluations were no better than the "
                f"evaluation after step {artifacts.best.get('step')} (train.early_stopping_patience)"
            )
        if sampler is not None and total and not isinstance(ended, Astray):
            sampler.keep(steps, step.state())
        result["peak_memory_bytes"] = peak_memory_bytes()
        artifacts.finish(result, "diverged" if isinstance(ended, Astray) else "finished")
        if ranks.is_main and (note := leave_report(folder.path)) is not None:
            reporter.note(note)
        ranks.barrier()
        if isinstance(ended, Astray):
            raise Diverged(artifacts.last_words(ended))
        return result


def take_steps(
    loop: Loop, artifacts: Artifacts, records: Records | None, start: int, total: int
) -> Stopped | Enough | Astray | None:
    """Run the steps after ``start``. If the run diverges and may retry, run the steps after the last good one.

    Return why the run ended before step ``total``, or None if it did not.
    """
    if artifacts.enough and 0 < start < total:  # the run had stopped early and was interrupted before it finished
        return Enough(start)
    due = artifacts.evaluation_due
    while True:
        ended = loop.run(start, total, evaluation_due=due)
        if not isinstance(ended, Astray) or not artifacts.may_retry:
            return ended
        loop.heartbeat("going back")
        start, due = artifacts.go_back(ended, records)
        loop.rate_factor = artifacts.rate_factor


def alone_reads(task: Task) -> bool:
    """Return whether the backbone can do the task without a prompt: the task trains no head, and no row has virtual
    tokens."""
    return task.output != "body" and task.virtual_tokens == 0


def _journal(config: RunConfig, folder: RunFolder, ranks: Ranks, fusion: Fusion) -> Journal:
    facts = {
        "config": config.to_dict(),
        "command": sys.argv,
        "versions": versions(),
        "units": True,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layers_run_by": fusion.by,
    }
    return Journal(folder, facts, is_main=ranks.is_main)
