"""Train one run, or several runs together over one backbone, each with its own output folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptd.backbone import fusion_of
from ptd.config import RunConfig, SweepCell
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.data import Batches
from ptd.distributed.network_meter import metered_deepspeed
from ptd.distributed.preflight import bytes_to_write, check_before_run, check_space
from ptd.distributed.ranks import Ranks
from ptd.engine.guard import Guard
from ptd.engine.loop import Loop
from ptd.engine.member import Astray, Dropped, End, Enough, Failed, Member, Stopped, nothing
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.preemption import StopRequest
from ptd.engine.prompt_step import PromptStep
from ptd.engine.records import peak_memory_bytes
from ptd.engine.schedule import warmup_steps
from ptd.engine.setup import Prepared
from ptd.engine.watchdog import Watchdog, Watched
from ptd.errors import Diverged
from ptd.runs.artifacts import Artifacts
from ptd.runs.build import RunMaterial, build_member, compile_backbone, fit_batch, load_backbone, read_material
from ptd.runs.folder import RunFolder, at_a_common_step, has_result, open_run
from ptd.runs.metrics_log import Records
from ptd.runs.run_json import Journal
from ptd.runs.sampler import Sampler
from ptd.runs.tuned import Tuned
from ptd.tasks import Task
from ptd.types import Preempted, Prompts, Reporter, UserError
from ptd.versions import versions


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be trained: its configuration and its run.json. ``name``: empty if it is trained alone."""

    name: str
    config: RunConfig
    journal: Journal


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its ``result`` as in run.json and, if it has failed or diverged, the ``error``."""

    result: dict[str, Any]
    error: UserError | None = None


@dataclass
class _Run:
    """A run in training."""

    plan: PlannedRun
    material: RunMaterial
    step: PromptStep
    batches: Batches
    artifacts: Artifacts
    total: int
    start: int = 0
    records: Records | None = None
    sampler: Sampler | None = None
    member: Member = field(init=False)

    @property
    def fresh(self) -> bool:
        return self.plan.journal.folder.checkpoint is None


def train_runs(
    plans: Sequence[PlannedRun],
    zero3: dict[str, Any] | None,
    ranks: Ranks,
    home: Path,
    reporter: Reporter,
    request: StopRequest,
    *,
    on_end: Callable[[Path], str | None] = lambda folder: None,
    halving: bool = False,
) -> list[Outcome]:
    """Train all ``plans`` together, write their artifacts, and return their outcomes. All ranks call this together.

    The runs have the same backbone section. ``home``: folder for the logs of the process. ``on_end``, called on rank 0
    with the folder of each run that has ended, returns a note for the user. ``halving``: successive halving
    (`rungs_of`) drops runs on the way. Raises `UserError` if nothing can be trained, and `Preempted` if a stop was
    requested on any rank.
    """
    began = time.time()
    _from_a_common_step(plans, ranks, reporter)
    known: dict[str, RunMaterial] = {}
    materials = [_material(plan.config, ranks, reporter, known) for plan in plans]
    first = plans[0].config
    _tell_fusion(first, ranks, reporter)
    prepared = load_backbone(first, zero3, ranks, list({id(each): each for each in materials}.values()))
    if prepared.attachment.notice is not None:
        reporter.note(f"backbone.attention: {prepared.attachment.notice}")
    runs = [_build(plan, material, prepared, ranks, reporter) for plan, material in zip(plans, materials, strict=True)]
    _check_alike(runs, prepared)
    compile_backbone(first, prepared)
    for run in runs[1:]:  # one meter and one clock for all
        run.step.meter, run.step.clock = runs[0].step.meter, runs[0].step.clock
    _check_room(runs, ranks)
    stacks = home / "logs" / f"rank-{ranks.rank}.stacks"
    watchdog = Watchdog(first.train.hang_timeout_minutes * 60, stacks, ranks.rank)
    watched = Watched(reporter, watchdog)
    for run in runs:
        _begin(run, prepared, ranks, reporter, watched, watchdog)
    loop = Loop(
        prepared,
        ranks,
        watched,
        [run.member for run in runs],
        on_boundary=lambda: _move_on(runs, request),
        request=request,
        heartbeat=watchdog.beat,
        rungs=rungs_of([run.total for run in runs]) if halving else {},
    )
    with watchdog, ExitStack() as stack:
        if len(runs) == 1:
            stack.enter_context(runs[0].artifacts.telling(reporter))
        for run in runs:
            stack.callback(run.artifacts.saver.close)
            if run.records is not None:  # closes the records also when the run fails
                stack.enter_context(run.records)
        if first.backbone.sharded:
            stack.enter_context(metered_deepspeed(runs[0].step.meter))
        if ranks.any(request.wanted):  # requested while the backbone was loading
            _preempt(runs, [None] * len(runs), ranks)
        if runs[0].fresh:
            _measure_start(loop, runs)
        ends = _take_steps(loop, runs)
        if any(isinstance(end, Stopped) for end in ends):
            _preempt(runs, ends, ranks)
        watchdog.beat("writing the adapter")
        return [
            _finish(run, end, time.time() - began, ranks, reporter, on_end) for run, end in zip(runs, ends, strict=True)
        ]


def _from_a_common_step(plans: Sequence[PlannedRun], ranks: Ranks, reporter: Reporter) -> None:
    """Let all runs continue after the same step, so that each continues as it would have without the interruption."""
    if len(plans) > 1:
        folders = ranks.on_main(lambda: at_a_common_step([plan.journal.folder for plan in plans]))
        for plan, folder in zip(plans, folders, strict=True):
            plan.journal.folder = folder
        steps = {folder.step for folder in folders}
        reporter.note(f"continuing after step {max(steps)}" if max(steps) else "starting from the beginning")


def _tell_fusion(config: RunConfig, ranks: Ranks, reporter: Reporter) -> None:
    """Say what runs the layers' elementwise work, unless it is what every backbone on a CPU has."""
    fusion = fusion_of(config.backbone, ranks.device.type)
    if ranks.device.type != "cpu" or fusion.by != "transformers":
        reporter.note(str(fusion))


def _material(config: RunConfig, ranks: Ranks, reporter: Reporter, known: dict[str, RunMaterial]) -> RunMaterial:
    """Read the rows of a run; runs with the same rows and the same task share them (``known``)."""
    shown = config.to_dict()
    settings = [shown["task"], shown["data"], config.method, config.train.eval_batch_size, config.train.best_metric]
    own = {key: value for key, value in config.method.items() if key in ("name", "head_hidden_sizes", "pooling")}
    key = json.dumps([*settings[:2], own, *settings[3:]], sort_keys=True, default=str)
    if key not in known:
        known[key] = read_material(config, ranks, reporter)
    return known[key]


def _build(plan: PlannedRun, material: RunMaterial, prepared: Prepared, ranks: Ranks, reporter: Reporter) -> _Run:
    config, folder = plan.config, plan.journal.folder
    settings = fit_batch(config, ranks.world_size, folder.facts().get("rows_per_step"), reporter)
    units = folder.checkpoint is None or bool(folder.facts().get("units"))
    step, batches = build_member(config, prepared, ranks, settings, material, units=units)
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
    digest = material.examples.digest()
    artifacts = Artifacts(config, plan.journal, prepared, material.task, step, ranks, settings, digest)
    artifacts.learned_from = material.examples.report if material.trains else None
    artifacts.reporter, artifacts.total = reporter, total
    if material.trains:
        artifacts.guard = Guard(total, warmup)
    return _Run(plan, material, step, batches, artifacts, total)


def _check_alike(runs: Sequence[_Run], prepared: Prepared) -> None:
    """Raise `UserError` if the runs cannot share a forward pass."""
    if len(runs) == 1:
        return
    outputs = {run.material.task.output for run in runs}
    if len(outputs) > 1:
        raise UserError(
            f"runs that are trained together read the same output of the backbone, but these read {sorted(outputs)}: "
            "train labels by a head and labels by words separately"
        )
    still = [run.plan.name for run in runs if not run.material.trains]
    if still:
        raise UserError(f"{still[0]}: its method trains nothing; evaluate it separately, with ptd eval")
    with torch.no_grad():
        prepared.attachment.set(Prompts(tuple(run.step.state() for run in runs)))


def _check_room(runs: Sequence[_Run], ranks: Ranks) -> None:
    """Raise `UserError` if the disk of an output folder has no room for what the runs will write."""
    with torch.no_grad():
        needed = [
            bytes_to_write(
                run.step.trained.count(),
                run.step.flat().numel(),
                run.artifacts.settings.save_total_limit,
                OPTIMIZERS[run.artifacts.settings.optimizer].state_bytes,
            )
            for run in runs
        ]
    ranks.on_main(lambda: check_space([run.plan.config.output_dir for run in runs], sum(needed)))


def _begin(
    run: _Run, prepared: Prepared, ranks: Ranks, reporter: Reporter, watched: Watched, watchdog: Watchdog
) -> None:
    """Load the checkpoint, prepare the folder, and connect the run with the loop."""
    artifacts, material, config = run.artifacts, run.material, run.plan.config
    run.start = artifacts.resume()
    if run.plan.name:  # checkpoints after the common step
        ranks.on_main(lambda: artifacts.last_good(run.start))
    run.records = artifacts.begin(run.start, reporter)
    taught = material.examples.report.ends
    tuned = Tuned(prepared, material.tokenizer, None, material.task, run.step.readout, taught)
    run.sampler = Sampler.of(config, tuned, material.held_out, ranks, watched, watchdog.beat)
    run.member = Member(
        artifacts.settings,
        run.step,
        run.batches,
        material.held_out,
        name=run.plan.name,
        on_record=run.records.write if run.records is not None else nothing,
        on_trained=artifacts.keep_trained,
        on_eval=artifacts.keep_best,
        on_save=artifacts.save_state,
        on_end=artifacts.has_ended if run.plan.name else nothing,
        standing=artifacts.standing,
        enough=lambda: artifacts.enough,
        guard=artifacts.guard,
        on_divergence=artifacts.has_diverged,
        rate_factor=artifacts.rate_factor,
    )


def _move_on(runs: Sequence[_Run], request: StopRequest) -> None:
    for run in runs:
        run.artifacts.move_on(request)


def _measure_start(loop: Loop, runs: Sequence[_Run]) -> None:
    """Measure and sample what the backbone does before training."""
    if runs[0].material.trains:
        loop.measure_start([run.total for run in runs], alone=alone_reads(runs[0].material.task))
    for run in runs:
        if run.sampler is not None:
            run.sampler.keep(0, run.step.state())
            run.step.meter.take()


def _take_steps(loop: Loop, runs: Sequence[_Run]) -> list[End | None]:
    """Run the steps that are left. A single run that diverges may go back, and runs the steps after its last good one.

    Return why each run ended before its last step; None for those that did not.
    """
    only = runs[0] if len(runs) == 1 else None
    start = runs[0].start if only is not None else max(run.start for run in runs)
    if only is not None and only.artifacts.enough and 0 < start < only.total:
        return [Enough(start)]  # the run had stopped early and was interrupted before it finished
    due = any(run.artifacts.evaluation_due for run in runs)
    while True:
        ended = [run.artifacts.end_before() for run in runs]
        ends = loop.run(start, [run.total for run in runs], evaluation_due=due, ended=ended)
        if only is None or not isinstance(ends[0], Astray) or not only.artifacts.may_retry:
            return ends
        loop.heartbeat("going back")
        start, due = only.artifacts.go_back(ends[0], only.records)
        only.member.rate_factor = only.artifacts.rate_factor


def _preempt(runs: Sequence[_Run], ends: Sequence[End | None], ranks: Ranks) -> None:
    """Save the state of every run that stopped on request. Raises `Preempted`."""
    numbers = []
    for run, end in zip(runs, ends, strict=True):
        stopped = end if isinstance(end, Stopped) else None
        run.artifacts.leave_off(stopped)
        number = run.start if stopped is None else stopped.step
        run.plan.journal.end("preempted", step=number)
        numbers.append(number)
    ranks.barrier()
    raise Preempted(f"stopped after step {max(numbers)}, as requested; run the same command again to continue")


def _finish(
    run: _Run,
    end: End | None,
    seconds: float,
    ranks: Ranks,
    reporter: Reporter,
    on_end: Callable[[Path], str | None],
) -> Outcome:
    """Write the run's adapter and result."""
    artifacts, name = run.artifacts, run.member.said
    if isinstance(end, Failed):
        failed = UserError(name(end.reason))
        if not run.plan.name:
            raise failed
        result = {"steps": end.step, "error": end.reason}
        artifacts.finish(result, "failed")
        return Outcome(result, failed)
    steps = run.total if end is None else end.step
    result = artifacts.keep_result({"steps": steps, "seconds": seconds})
    if isinstance(end, Enough):
        result["stopped_early"] = end.step
        reporter.note(
            name(
                f"ended after step {end.step}: {artifacts.waited} consecutive evaluations were no better than the "
                f"evaluation after step {artifacts.best.get('step')} (train.early_stopping_patience)"
            )
        )
    if isinstance(end, Dropped):
        result["dropped_after"] = end.step
    if run.sampler is not None and run.total and not isinstance(end, Astray):
        run.sampler.keep(steps, run.step.state())
    result["peak_memory_bytes"] = peak_memory_bytes()
    artifacts.finish(result, "diverged" if isinstance(end, Astray) else "finished")
    if ranks.is_main and (note := on_end(run.plan.journal.folder.path)) is not None:
        reporter.note(name(note))
    ranks.barrier()
    return Outcome(result, Diverged(name(artifacts.last_words(end))) if isinstance(end, Astray) else None)


def rungs_of(totals: Sequence[int]) -> dict[int, int]:
    """Return the rungs of successive halving: step -> number of runs that go on, for runs of so many steps.

    At each rung the better half goes on, until one is left: with N runs of T steps, after T / 2^⌈log₂ N⌉ steps …, T / 4
    and T / 2 steps.
    """
    left, shortest = len(totals), min(totals)
    keeps = []
    while left > 1:
        left = -(-left // 2)
        keeps.append(left)
    steps = [max(1, shortest >> (len(keeps) - place)) for place in range(len(keeps))]
    return dict(zip(steps, keeps, strict=True))


def alone_reads(task: Task) -> bool:
    """Return whether the backbone can do the task without a prompt: the task trains no head, and no row has virtual
    tokens."""
    return task.output != "body" and task.virtual_tokens == 0


def train_cells(
    cells: Sequence[SweepCell],
    ranks: Ranks,
    reporter: Reporter,
    request: StopRequest,
    *,
    overwrite: bool = False,
    halving: bool = False,
    on_end: Callable[[Path], str | None] = lambda folder: None,
) -> None:
    """Train runs together that have names, each in a folder of its own. Runs that have ended before are left out.

    The other arguments are those of `train_runs`, which says what is raised.
    """
    root = cells[0].config.output_dir.parent
    resolved = {cell.name: apply_deepspeed(cell.config) for cell in cells}
    for config, _ in resolved.values():
        check_batch_size(config, ranks.world_size)
        check_before_run(config, ranks)
    if not overwrite:
        over = ranks.on_main(lambda: [name for name in resolved if has_result(root / name)])
        resolved = {name: each for name, each in resolved.items() if name not in over}
    if not resolved:
        return
    configs = {name: config for name, (config, _) in resolved.items()}
    zero3 = next(iter(resolved.values()))[1]
    folders = ranks.on_main(lambda: [open_run(config, overwrite=overwrite) for config in configs.values()])
    plans = [
        PlannedRun(name, config, journal_of(config, folder, ranks))
        for (name, config), folder in zip(configs.items(), folders, strict=True)
    ]
    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(plan.journal.attempt())
            ranks.on_main(plan.journal.begin)
        outcomes = train_runs(plans, zero3, ranks, root, reporter, request, on_end=on_end, halving=halving)
    for outcome in outcomes:
        if outcome.error is not None:
            reporter.note(str(outcome.error))


def journal_of(config: RunConfig, folder: RunFolder, ranks: Ranks) -> Journal:
    """Return the writer of the run's run.json."""
    facts = {
        "config": config.to_dict(),
        "command": sys.argv,
        "versions": versions(),
        "units": True,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layers_run_by": fusion_of(config.backbone, ranks.device.type).by,
    }
    return Journal(folder, facts, is_main=ranks.is_main)
