"""``ptd train``: tune a prompt or head of a frozen backbone, in this process or on all ranks of a launcher."""

from __future__ import annotations

import difflib
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ptd.backbone import (
    TextConditioner,
    architecture_of,
    embeddings_of,
    load_tokenizer,
    text_config_of,
    vocabulary_of,
)
from ptd.checkpoint import Adapter, Saver, backbone_reference, save_adapter
from ptd.checkpoint.files import writing
from ptd.checkpoint.journal import Journal
from ptd.checkpoint.run_folder import RunFolder, as_begun, clear, open_run
from ptd.checkpoint.run_state import (
    DELETED,
    checkpoints,
    clean,
    latest_complete,
    load_tensors,
    read_facts,
    step_of,
)
from ptd.config import DataConfig, RunConfig, TrainConfig
from ptd.data import Batches, load_rows
from ptd.data.tokens import check_ids, check_words, rows_in_both
from ptd.deepspeed_config import apply_deepspeed, check_batch_size
from ptd.engine.evaluation import HeldOut
from ptd.engine.guard import Divergence, Guard
from ptd.engine.loop import Astray, Enough, Loop, Stopped, peak_memory_bytes, warmup_steps
from ptd.engine.loss_scale import LossScale
from ptd.engine.meter import NetworkMeter, metered_deepspeed
from ptd.engine.preemption import StopRequest
from ptd.engine.preflight import bytes_to_write, check_run, check_space
from ptd.engine.prompt_step import PromptStep, Trained, build_optimizer
from ptd.engine.ranks import Ranks
from ptd.engine.records import METRICS, Records, read_records
from ptd.engine.setup import Prepared, check_context, prepare
from ptd.engine.watchdog import Watchdog, Watched
from ptd.errors import Diverged
from ptd.generate import Tuned
from ptd.inject import check_backend, compile_layers, context_of
from ptd.methods import TaskFacts, method
from ptd.report import leave_report
from ptd.sampling import Sampler
from ptd.tasks import LOWER_IS_BETTER, Task, make_task
from ptd.tasks.labels import some
from ptd.trackers import Tracked, start_trackers
from ptd.types import DataReport, Examples, Preempted, Reporter, UserError
from ptd.versions import versions

PEFT_TASKS: dict[str, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "masked_lm": "FEATURE_EXTRACTION",
    "body": "FEATURE_EXTRACTION",
}
"""The backbone's output -> PEFT's name of the task type."""
MOST_RETRIES, RETRY_FACTOR = 3, 1 / 3
"""Maximum number of retries with ``train.on_divergence: retry``, and the factor of the learning rate of each retry."""


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
    ranks = Ranks.start(needs_group=zero3 is not None)
    check_batch_size(config, ranks.world_size)
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    try:
        if not overwrite:
            config = as_begun(config)
        check_run(config, ranks)
        folder = ranks.on_main(lambda: open_run(config, overwrite=overwrite, retry=retry))
        for note in folder.notes:
            reporter.note(note)
        journal = _journal(config, folder, ranks)
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
        needed = bytes_to_write(step.trained.count(), step.flat().numel(), settings.save_total_limit)
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
        if zero3 is not None:
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
        artifacts.finish(result, reporter, "diverged" if isinstance(ended, Astray) else "finished")
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


def _journal(config: RunConfig, folder: RunFolder, ranks: Ranks) -> Journal:
    facts = {
        "config": config.to_dict(),
        "command": sys.argv,
        "versions": versions(),
        "units": True,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    return Journal(folder, facts, is_main=ranks.is_main)


@dataclass
class Artifacts:
    """What this run writes to its output folder and reads from it."""

    config: RunConfig
    journal: Journal
    prepared: Prepared
    task: Task
    step: PromptStep
    ranks: Ranks
    settings: TrainConfig
    data_digest: str
    learned_from: DataReport | None = None
    best: dict[str, Any] = field(default_factory=dict)
    kept: int | None = None
    """The step after which the adapter was last written."""
    reporter: Reporter = field(default_factory=Reporter)
    guard: Guard | None = None
    waited: int = 0
    """Number of consecutive evaluations that were no better than the best one."""
    diverged: dict[str, Any] = field(default_factory=dict)
    retries: list[dict[str, Any]] = field(default_factory=list)
    """``diverged`` and ``retries`` have the form of run.json; empty: no divergence, no retry."""
    saver: Saver = field(init=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False)
    """The initial values, on the CPU, for a retry that has to begin at the start."""

    def __post_init__(self) -> None:
        self.folder = self.journal.folder
        records = self.folder.path / METRICS
        self.saver = Saver(self.folder.checkpoints, self.ranks, keep=self.settings.save_total_limit, records=records)

    def resume(self) -> int:
        """Load the checkpoint, if one exists; return the step to continue after.

        Raises `UserError` if the backbone or the training data differ from those of the checkpoint.
        """
        if self.settings.on_divergence == "retry":
            tensors = self.step.tensors()
            self._start = {name: _local(tensors[name]).to("cpu", copy=True) for name in tensors if not _moment(name)}
        if self.folder.checkpoint is None:
            return 0
        facts = self.folder.facts()
        for key, value in self._origin().items():
            if facts.get(key) != value:
                raise UserError(
                    f"output_dir: the run in {self.folder.path} was trained with another {key} ({facts.get(key)} "
                    f"there, {value} here) under the same name; restore the old one, or give --overwrite to start again"
                )
        load_tensors(self.folder.checkpoint, self.step.tensors())
        self.best = facts["best"]
        self.diverged, self.retries = facts.get("diverged", {}), facts.get("retries", [])
        self._take_up(facts)
        return int(facts["step"])

    def _take_up(self, facts: dict[str, Any]) -> None:
        """Restore what is counted over the steps from the facts of a checkpoint."""
        self.waited = facts.get("waited", 0)
        if self.guard is not None and "guard" in facts:
            self.guard.load(facts["guard"])
            if self.guard.said and self.settings.on_divergence != "warn":  # an earlier start only warned
                self.guard.rearm()

    def begin(self, start: int, reporter: Reporter) -> Records | None:
        """Prepare the folder for a run that continues after ``start``; return the records' writer (rank 0) or None."""
        records: list[Records] = []

        def begin() -> None:
            with writing(self.folder.path):
                if self.folder.checkpoint is None:
                    clear(self.folder)
                self.journal.training(
                    trained_parameters=self.step.trained.count(), **self._origin(), **self._happened()
                )
                clean(self.folder.checkpoints)
                due, trackers = self.evaluation_due, self._trackers(start)
                records.append(Records(self.folder.path, start, evaluation_due=due, trackers=trackers))

        self.ranks.on_main(begin)
        return records[0] if records else None

    def _trackers(self, start: int) -> list[Any]:
        """Start the trackers of ``train.report_to`` for the steps after ``start`` (rank 0)."""
        began, name, again = self.journal.content["started"], self.settings.run_name, len(self.retries)
        run = Tracked.of(self.folder.path, began, name, self.config.to_dict(), start, again)
        return list(start_trackers(self.settings.report_to, run, self.reporter.note))

    def _happened(self) -> dict[str, Any]:
        """Return what run.json and the checkpoints record about divergence."""
        said = {"diverged": self.diverged, "retries": self.retries}
        return {name: value for name, value in said.items() if value}

    @property
    def evaluation_due(self) -> bool:
        """Whether the checkpoint was written before the evaluation that belongs to its step."""
        return bool(self.folder.facts().get("evaluation_due"))

    def preempt(self, number: int, stopped: Stopped | None) -> NoReturn:
        """Save the state where the run ``stopped`` (None: it took no step, so there is no state to save).

        Raises `Preempted`.
        """
        if stopped is not None:
            self.save_state(number, evaluation_due=stopped.evaluation_due)
            self.saver.wait()
        self.journal.end("preempted", step=number)
        self.ranks.barrier()
        raise Preempted(f"stopped after step {number}, as requested; run the same command again to continue")

    def save_state(self, number: int, *, evaluation_due: bool = False) -> None:
        """Start to write a checkpoint from which to continue after step ``number``. All ranks call this together.

        The checkpoint is on disk when ``saver.wait()`` has returned.
        """
        rows = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps
        also = {"evaluation_due": True} if evaluation_due else {}
        facts = {
            "rows_per_step": rows * self.ranks.world_size,
            "best": self.best,
            "units": self.step.trained.units,
            "waited": self.waited,
            **also,
            **self._happened(),
            **self._origin(),
        }
        if self.guard is not None:
            facts["guard"] = self.guard.state()
        retries = self.guard is not None and self.settings.on_divergence == "retry"
        self.saver.save(number, self.step.tensors(), facts, hold=self.guard.good if self.guard and retries else None)

    def move_on(self, request: StopRequest) -> None:
        """Poll the checkpoint that is being written. If it failed, request a stop, after which all ranks raise why."""
        self.saver.poll()
        if self.saver.failed:
            request.make()

    def keep_best(self, number: int, metrics: dict[str, Any]) -> None:
        """Write the adapter to ``best`` if this evaluation is the best so far by ``train.metric_for_best_model``."""
        name = self.settings.best_metric
        sign = -1 if name in LOWER_IS_BETTER else 1
        self.waited += 1
        if math.isfinite(metrics[name]) and (not self.best or sign * metrics[name] > sign * self.best[name]):
            self.waited = 0
            self.best = {**metrics, "step": number}
            self.keep_adapter("best", self.best)

    @property
    def enough(self) -> bool:
        """Whether ``train.early_stopping_patience`` is exhausted."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.waited >= patience

    # ---- divergence

    @property
    def rate_factor(self) -> float:
        """The factor of the learning rate after all retries so far."""
        return RETRY_FACTOR ** len(self.retries)

    @property
    def may_retry(self) -> bool:
        return self.settings.on_divergence == "retry" and len(self.retries) < MOST_RETRIES

    def has_diverged(self, verdict: Divergence) -> bool:
        """Report and record the divergence; return whether the loop has to stop. All ranks call this together."""
        if self.may_retry:  # `go_back` reports it
            return True
        rate = self.settings.learning_rate * self.rate_factor
        self.diverged = {
            "step": verdict.step,
            "loss": verdict.loss,
            ("frozen_loss" if verdict.alone else "first_loss"): verdict.baseline,
            "reason": verdict.reason,
            "learning_rate": rate,
        }
        self.journal.tell(diverged=self.diverged)
        if self.settings.on_divergence == "warn":
            self.reporter.note(
                f"step {verdict.step}: the run diverges: {verdict.reason}; {self._lower()}. {self._left(verdict)}"
                "The run continues; train.on_divergence: stop ends such a run, and retry makes it go back by itself"
            )
            return False
        return True

    def _lower(self) -> str:
        rate = self.settings.learning_rate * self.rate_factor
        return f"lower train.learning_rate (now {rate:.1e}), for example to a third: {rate * RETRY_FACTOR:.1e}"

    def _left(self, verdict: Divergence) -> str:
        """Return a note on the adapter and checkpoint from before the divergence (only rank 0 prints it)."""
        better = bool(self.best) and self.best["loss"] < verdict.baseline
        said = f"best/ holds the adapter of step {self.best['step']}. " if better else ""
        found = [step for path in checkpoints(self.folder.checkpoints) if 0 < (step := step_of(path)) <= verdict.good]
        return said + (f"The checkpoint of step {found[0]} is the last good one. " if found else "")

    def last_words(self, ended: Astray) -> str:
        """Return the message with which a diverged run ends."""
        tried = f", after {len(self.retries)} retries with lower learning rates" if self.retries else ""
        return (
            f"the run diverged in step {ended.verdict.step}{tried}, and ended after step {ended.step}: "
            f"{ended.verdict.reason}; {self._lower()}, and start again with --overwrite or another output_dir. "
            f"{self._left(ended.verdict)}adapter/ holds the adapter at the end of the run"
        )

    def go_back(self, ended: Astray, records: Records | None) -> tuple[int, bool]:
        """Restore the last good state, with a lower learning rate. All ranks call this together.

        Return the step to continue after, and whether the evaluation of that step is due.
        """
        self.saver.wait()
        found = self.ranks.on_main(lambda: self._last_good(ended.verdict.good))
        facts: dict[str, Any] = {}
        if found is not None:
            load_tensors(found, self.step.tensors())
            facts = read_facts(found)
        else:
            self._begin_again()
        start, due = int(facts.get("step", 0)), bool(facts.get("evaluation_due"))
        if self.guard is not None:
            self.guard.restart()
        self._take_up(facts)
        rate = self.settings.learning_rate * self.rate_factor * RETRY_FACTOR
        self.retries = [*self.retries, {"at_step": ended.verdict.step, "from_step": start, "learning_rate": rate}]
        place = f"the checkpoint of step {start}" if start else "the start"
        self.reporter.note(
            f"step {ended.verdict.step}: the run diverges: {ended.verdict.reason}; going back to {place} with "
            f"train.learning_rate {rate:.1e} (retry {len(self.retries)} of {MOST_RETRIES})"
        )
        self.journal.tell(**self._happened())
        if records is not None:
            records.go_back(start, self._trackers(start), evaluation_due=due)
        self.save_state(start, evaluation_due=due)  # records the lower learning rate in case of an interruption
        self.keep_trained(start)
        return start, due

    def _last_good(self, step: int) -> Path | None:
        """Return the newest complete checkpoint up to ``step``, and remove the later ones (rank 0)."""
        root = self.folder.checkpoints
        with writing(root):
            for path in checkpoints(root):
                if step_of(path) > step:
                    path.rename(root / f"{DELETED}{path.name}")
            if root.is_dir():
                clean(root)
        return latest_complete(root)[0]

    def _begin_again(self) -> None:
        with torch.no_grad():
            for name, tensor in self.step.tensors().items():
                own = _local(tensor)
                if _moment(name):
                    own.zero_()
                else:
                    own.copy_(self._start[name])

    def keep_trained(self, number: int) -> None:
        """Write the adapter after step ``number``, before anything that may fail."""
        self.keep_adapter("adapter", {})
        self.kept = number

    @contextmanager
    def telling(self, reporter: Reporter) -> Iterator[None]:
        """Add to an error of the ``with`` block where the last written adapter is."""
        try:
            yield
        except (Preempted, Diverged):
            raise
        except Exception as error:
            if self.kept is not None:
                where = f"the adapter after step {self.kept} is in {self.folder.path / 'adapter'}"
                if isinstance(error, UserError):
                    error.args = (f"{error}. The trained parameters are saved: {where}",)
                else:
                    reporter.note(f"the run failed; the trained parameters are saved: {where}")
            raise

    def keep_adapter(self, name: str, metrics: dict[str, Any]) -> None:
        """Write the current adapter and the ``metrics`` of its evaluation to ``name``. All ranks call this together."""
        with torch.no_grad():
            flat = self.step.flat()

        def write() -> None:
            with writing(self.folder.path / name):
                save_adapter(self.folder.path / name, self._adapter(flat, metrics))

        self.ranks.on_main(write)

    def _adapter(self, flat: torch.Tensor, metrics: dict[str, Any]) -> Adapter:
        resolved, encoder = self.config.to_dict(), self.step.encoder
        learned = {} if self.learned_from is None else dict(vars(self.learned_from))
        learned.pop("notes", None)  # the notes quote rows, and an adapter may be passed on to others
        return Adapter(
            flat,
            encoder.layout,
            peft_type=encoder.peft_type,
            backbone=backbone_reference(self.config.backbone.path),
            revision=self.config.backbone.revision,
            task_type=PEFT_TASKS[self.task.output],
            head={name: parameter.detach() for name, parameter in self.step.readout.named_parameters()},
            facts={
                "fingerprint": self.prepared.fingerprint,
                "backbone_config": resolved["backbone"],
                "method": resolved["method"],
                "task": self.task.facts(),
                "data": resolved["data"],
                "training": {**learned, "evaluation": metrics},
                "versions": versions(),
            },
        )

    def keep_result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the adapter with its last evaluation; return ``result`` with the values of the records added."""
        result["best"] = self.best or None
        evaluation: dict[str, Any] = {}
        if self.ranks.is_main:
            for record in read_records(self.folder.path):
                shown = [key for key in record if key == "loss" or key.startswith(("eval_", "frozen_"))]
                result |= {key: record[key] for key in shown}
                measured = {key[5:]: value for key, value in record.items() if key.startswith("eval_")}
                evaluation = {**measured, "step": record["step"]} if measured else evaluation
        if self.diverged:
            result["diverged_at"] = self.diverged["step"]
        if self.retries:
            result["learning_rate"] = self.retries[-1]["learning_rate"]
        if is_worse(result):
            result["worse_than_frozen"] = True
        self.keep_adapter("adapter", evaluation)
        self.kept = result["steps"]
        return result

    def finish(self, result: dict[str, Any], reporter: Reporter, status: str) -> None:
        """Wait for the last checkpoint, then write the result and the report."""
        self.saver.wait()
        if self.ranks.is_main:
            self.journal.content["result"] = result
            self.journal.end(status, step=result["steps"])
            note = leave_report(self.folder.path)
            if note is not None:
                reporter.note(note)
        self.ranks.barrier()

    def _origin(self) -> dict[str, str]:
        return {"backbone_fingerprint": self.prepared.fingerprint, "train_data_digest": self.data_digest}


def is_worse(result: dict[str, Any]) -> bool:
    """Return whether the held-out loss of a result is null, or above that of the backbone without a prompt."""
    alone, tuned = result.get("frozen_loss"), result.get("eval_loss", 0.0)
    return alone is not None and (tuned is None or tuned > alone)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of the tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _moment(name: str) -> bool:
    """Return whether a tensor of `PromptStep.tensors` is optimizer state, which starts at zero."""
    return name.startswith("optimizer.")


def fit_batch(run: RunConfig, world_size: int, rows_per_step: int | None, reporter: Reporter) -> TrainConfig:
    """Return settings that keep the rows per optimizer step when a run continues on another number of ranks.

    Raises `UserError` if the rows cannot be divided over the ranks.
    """
    config = run.train
    given = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    if rows_per_step is None or given == rows_per_step:
        return config
    rows, uneven = divmod(rows_per_step, world_size)
    if run.data.max_tokens is not None:  # the number of micro-batches per step is then fixed, not the number of rows
        uneven = uneven or rows % config.per_device_train_batch_size
    if uneven or rows == 0:
        raise UserError(
            f"this run was started with {rows_per_step} rows per step, which {world_size} ranks cannot share evenly; "
            f"continue it on a number of ranks that divides {rows_per_step}"
        )
    largest = config.per_device_train_batch_size
    micro = next(size for size in range(largest, 0, -1) if rows % size == 0)
    reporter.note(
        f"keeping {rows_per_step} rows per step on {world_size} ranks: per_device_train_batch_size={micro}, "
        f"gradient_accumulation_steps={rows // micro}"
    )
    return config.model_copy(
        update={"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    )


@dataclass(frozen=True)
class _Source:
    """Reads the rows of a run. ``embeddings``: number of embeddings of the backbone, if its config gives it."""

    config: DataConfig
    tokenizer: Any
    embeddings: int | None
    ranks: Ranks
    reporter: Reporter

    def read(self, which: Literal["train", "eval"], task: Task, *, learn: bool = False) -> tuple[Task, Examples, Any]:
        """Return the task, the tokenised rows and, on rank 0, the rows. ``learn``: the task learns labels from them."""
        source = self.config.train if which == "train" else self.config.eval
        if source is None:
            raise UserError(f"data.{which}: is missing; name the file to read")
        split = self.config.train_split if which == "train" else self.config.eval_split
        rows: Any = None

        def read() -> tuple[Task, Examples]:
            nonlocal rows
            rows = load_rows(source, split, what=f"data.{which}")
            fitted = task.fit(rows, source) if learn else task
            examples = fitted.tokenize(rows, self.tokenizer, what=source)
            check_ids(examples, self.tokenizer, self.embeddings, source, writes=task.generates)
            return fitted, examples

        task, examples = self.ranks.on_main(read)
        self.reporter.note(f"data.{which}: {examples.report}")
        return task, examples, rows


def check_metric(config: RunConfig, task: Task) -> None:
    """Raise `UserError` if an evaluation of the task does not measure ``train.metric_for_best_model``."""
    given, known = config.train.best_metric, task.metric_names
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? Known metrics:" if near else "known metrics:"
        raise UserError(
            f"train.metric_for_best_model: an evaluation of this task has no {given!r}; {meant} {', '.join(known)}"
        )


@dataclass(frozen=True)
class Material:
    """The task and the rows of a run, for training and for evaluation.

    ``trains``: whether the run trains anything; if not, ``examples`` are the rows for evaluation.
    """

    tokenizer: Any
    task: Task
    examples: Examples
    held_out: HeldOut | None
    trains: bool


def read_material(config: RunConfig, ranks: Ranks, reporter: Reporter) -> Material:
    """Read and tokenise the run's rows. All ranks call this together. Raises `UserError`."""
    check_backend(config.backbone.attention)
    text_config = text_config_of(config.backbone)
    check_context(context_of(text_config), 0, config.data.max_length)  # `build_trained` checks it with the prompt
    tokenizer = load_tokenizer(config.backbone)
    task = make_task(config.task, config.data, architecture_of(config.backbone))
    chosen, facts = method(config.method_name), facts_of(config, task)
    chosen.check(config.method_config(), facts)
    trains = chosen.has_prompt or facts.trained_head
    learned_from: Literal["train", "eval"] = "train" if trains else "eval"
    source = _Source(config.data, tokenizer, vocabulary_of(text_config), ranks, reporter)
    told = task.labels
    task, examples, rows = source.read(learned_from, task, learn=True)
    if task.labels != told:
        reporter.note(f"task.labels: {len(task.labels)} labels found in data.{learned_from}: {some(task.labels)}")
        chosen.check(config.method_config(), facts_of(config, task))
    check_metric(config, task)
    held_out = None
    if config.data.eval is not None:
        eval_examples = examples
        if trains:
            _, eval_examples, rows = source.read("eval", task)
            if ranks.is_main and (both := rows_in_both(examples, eval_examples)):
                reporter.note(
                    f"data.eval: {both:,} of its {len(eval_examples):,} rows are in data.train too, so its loss and "
                    "metrics do not show how well the model does on new rows"
                )
        size = config.train.eval_batch_size
        held_out = HeldOut(task, eval_examples, rows, size, config.data.packing, tokenizer.pad_token_id)
    return Material(tokenizer, task, examples, held_out, trains)


class Engine(NamedTuple):
    """The backbone, the prompt step and the batches that carry out the steps of a run."""

    prepared: Prepared
    step: PromptStep
    batches: Batches


def build_engine(
    config: RunConfig,
    zero3: dict[str, Any] | None,
    ranks: Ranks,
    settings: TrainConfig,
    material: Material,
    *,
    units: bool = True,
) -> Engine:
    """Load the backbone and build what the run trains on it. All ranks call this together. Raises `UserError`.

    ``units``: train the prompt in units of the backbone's own values (`ptd.types.Units`), not as raw values.
    """
    prepared = prepare(config.backbone, ranks, zero3, output=material.task.output)
    prepared.attachment.inputs.placeholder = material.tokenizer.pad_token_id or 0
    held_out = material.held_out.examples if material.held_out is not None else material.examples
    # `read_material` checked the ids only if the backbone's config gives the number of embeddings.
    for what, examples in (("data.train", material.examples), ("data.eval", held_out)):
        size = embeddings_of(prepared.model)
        check_ids(examples, material.tokenizer, size, what, writes=material.task.generates)
    built = build_trained(config, prepared, material.task, material.tokenizer, material.examples, units=units)
    if config.backbone.compile:  # after the code that inspects the layers
        compile_layers(prepared.model)
    trained = Trained(ranks.distribute(built.encoder), built.readout.to(ranks.device), built.readout_rates)
    step = build_step(config, trained, ranks, prepared.model.dtype)
    batches = _batches(config.data, settings, material.examples, material.tokenizer, prepared, ranks)
    return Engine(prepared, step, batches)


def facts_of(config: RunConfig, task: Task) -> TaskFacts:
    """Return what the method may know of the task."""
    return TaskFacts(config.task.kind, task.labels, task.cloze, task.output == "body", task.virtual_tokens)


def build_trained(
    config: RunConfig,
    prepared: Prepared,
    task: Task,
    tokenizer: Any,
    examples: Examples | None = None,
    *,
    units: bool = True,
) -> Trained:
    """Build the prompt encoder and the readout on the CPU, with the same initial values on all ranks.

    ``examples``: the rows that initialise the prompt; ``units`` as for `build_engine`.
    """
    settings, chosen = config.method_config(), method(config.method_name)
    conditioner = TextConditioner(prepared.attachment, tokenizer, examples, config.train.seed)
    encoder = chosen.build(settings, prepared.shape, conditioner, facts_of(config, task), seed=config.train.seed)
    if not units:
        encoder.units = None
    input_size = conditioner.hidden_size() if units and task.output == "body" else None
    with torch.no_grad():
        prepared.attachment.set(encoder.state(encoder()))
    check_context(prepared.shape.context, prepared.attachment.extra_positions, config.data.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        readout = task.readout(tokenizer, prepared.shape.hidden_size, chosen.head(settings))
    check_words(readout.token_ids(), tokenizer, embeddings_of(prepared.model))
    return Trained(encoder, readout, {} if input_size is None else readout.rates(input_size))


def build_step(config: RunConfig, trained: Trained, ranks: Ranks, dtype: torch.dtype) -> PromptStep:
    """Build the step of optimizer and reduction for the trained parameters, on a backbone of this ``dtype``."""
    optimizer = build_optimizer(
        trained,
        learning_rate=config.train.learning_rate,
        head_learning_rate=config.train.head_learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        epsilon=config.train.adam_epsilon,
        weight_decay=config.train.weight_decay,
    )
    scale = None
    if dtype is torch.float16:
        scale = LossScale(config.train.initial_scale_power, config.train.loss_scale_window)
    return PromptStep(trained, optimizer, ranks, NetworkMeter(ranks), config.train.max_grad_norm, scale)


def _batches(
    config: DataConfig, settings: TrainConfig, examples: Examples, tokenizer: Any, prepared: Prepared, ranks: Ranks
) -> Batches:
    if config.max_tokens is not None and not prepared.attachment.packable:
        raise UserError(
            f"data.max_tokens: a {prepared.shape.model_type} backbone uses padded batches, which have no token budget; "
            "remove it"
        )
    return Batches(
        examples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        per_device_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        packing=config.packing and prepared.attachment.packable,
        max_tokens=config.max_tokens,
        seed=settings.seed,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
