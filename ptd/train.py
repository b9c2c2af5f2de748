"""``ptd train``: tune a prompt or head of a frozen backbone, on this process or on all ranks a launcher started."""

from __future__ import annotations

import difflib
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

import torch

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
from ptd.checkpoint.run_state import clean, load_tensors
from ptd.config import DataConfig, RunConfig, TrainConfig
from ptd.data import Batches, load_rows
from ptd.data.tokens import check_ids, check_words, rows_in_both
from ptd.deepspeed_config import apply_deepspeed, check_batch_size
from ptd.engine.evaluation import HeldOut
from ptd.engine.loop import Loop, Stopped, peak_memory_bytes
from ptd.engine.loss_scale import LossScale
from ptd.engine.meter import NetworkMeter, metered_deepspeed
from ptd.engine.preemption import StopRequest
from ptd.engine.preflight import bytes_to_write, check_run, check_space
from ptd.engine.prompt_step import PromptStep, Trained, build_optimizer
from ptd.engine.ranks import Ranks
from ptd.engine.records import METRICS, Records, read_records
from ptd.engine.setup import Prepared, check_context, prepare
from ptd.engine.watchdog import Watchdog, Watched
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
"""PEFT's name for a task over a backbone with this output."""


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    retry: bool = False,
    reporter: Reporter | None = None,
    request: StopRequest | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says and leave the artifacts in ``config.output_dir``; returns the result of run.json.

    An unfinished run of the same configuration in ``output_dir`` is continued, with ``retry`` also one that keeps
    failing. Raises `UserError`, and `Preempted` if any rank's ``request`` asked to stop.
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
    if not material.trains:
        reporter.note(f"method {config.method_name} trains nothing: the backbone is evaluated as it is")
        total = 0

    with torch.no_grad():
        needed = bytes_to_write(step.trained.count(), step.flat().numel(), settings.save_total_limit)
    ranks.on_main(lambda: check_space(config.output_dir, needed))
    artifacts = Artifacts(config, journal, prepared, material.task, step, ranks, settings, material.examples.digest())
    artifacts.learned_from = material.examples.report if material.trains else None
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
    )
    with watchdog, artifacts.telling(reporter), ExitStack() as stack:
        stack.callback(artifacts.saver.close)
        if records is not None:  # also when the run breaks off
            stack.enter_context(records)
        if zero3 is not None:
            stack.enter_context(metered_deepspeed(step.meter))
        if ranks.any(request.wanted):  # asked while the backbone was loading
            artifacts.preempt(start, None)
        if sampler is not None and start == 0:
            sampler.keep(0, step.state())
            step.meter.take()
        stopped = loop.run(start, total, evaluation_due=artifacts.evaluation_due)
        if stopped is not None:
            artifacts.preempt(stopped.step, stopped)
        watchdog.beat("writing the adapter")
        result = artifacts.keep_result({"steps": total, "seconds": time.time() - began})
        if sampler is not None and total:
            sampler.keep(total, step.state())
        result["peak_memory_bytes"] = peak_memory_bytes()
        return artifacts.finish(result, reporter)


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
    """What this run leaves in its output folder, and what it finds there."""

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
    """The step after which the adapter was written last."""
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.journal.folder
        records = self.folder.path / METRICS
        self.saver = Saver(self.folder.checkpoints, self.ranks, keep=self.settings.save_total_limit, records=records)

    def resume(self) -> int:
        """Load the checkpoint, if there is one; returns the step to start from.

        Raises `UserError` if backbone or training data are not those it was written with.
        """
        if self.folder.checkpoint is None:
            return 0
        facts = self.folder.facts()
        for key, value in self._origin().items():
            if facts.get(key) != value:
                raise UserError(
                    f"output_dir: the run in {self.folder.path} was trained with another {key} ({facts.get(key)} "
                    f"there, {value} here) under the same name; restore it, or --overwrite to start again"
                )
        load_tensors(self.folder.checkpoint, self.step.tensors())
        self.best = facts["best"]
        return int(facts["step"])

    def begin(self, start: int, reporter: Reporter) -> Records | None:
        """Open the folder for a run that begins at ``start``; returns the records' writer on rank 0."""
        records: list[Records] = []

        def begin() -> None:
            with writing(self.folder.path):
                if self.folder.checkpoint is None:
                    clear(self.folder)
                self.journal.training(trained_parameters=self.step.trained.count(), **self._origin())
                clean(self.folder.checkpoints)
                content, settings = self.journal.content, self.settings
                run = Tracked.of(self.folder.path, content["started"], settings.run_name, self.config.to_dict(), start)
                trackers = start_trackers(settings.report_to, run, reporter.note)
                due = self.evaluation_due
                records.append(Records(self.folder.path, start, evaluation_due=due, trackers=trackers))

        self.ranks.on_main(begin)
        return records[0] if records else None

    @property
    def evaluation_due(self) -> bool:
        """Whether the checkpoint was written before the evaluation that belongs to its step."""
        return bool(self.folder.facts().get("evaluation_due"))

    def preempt(self, number: int, stopped: Stopped | None) -> NoReturn:
        """Keep where the run ``stopped`` (None: where it had begun), and raise `Preempted`."""
        if stopped is not None:
            self.save_state(number, evaluation_due=stopped.evaluation_due)
            self.saver.wait()
        self.journal.end("preempted", step=number)
        self.ranks.barrier()
        raise Preempted(f"asked to stop, stopped after step {number}; the same command goes on from there")

    def save_state(self, number: int, *, evaluation_due: bool = False) -> None:
        """Begin to keep everything to continue from after step ``number``. Every rank calls this together.

        It is on disk when ``saver.wait()`` has returned.
        """
        rows = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps
        also = {"evaluation_due": True} if evaluation_due else {}
        facts = {
            "rows_per_step": rows * self.ranks.world_size,
            "best": self.best,
            "units": self.step.trained.units,
            **also,
            **self._origin(),
        }
        self.saver.save(number, self.step.tensors(), facts)

    def move_on(self, request: StopRequest) -> None:
        """Let the checkpoint in flight move on; where it failed, ask all ranks to stop, which then raise why."""
        self.saver.poll()
        if self.saver.failed:
            request.make()

    def keep_best(self, number: int, metrics: dict[str, Any]) -> None:
        """Keep the adapter as ``best`` if no evaluation so far was better by ``train.metric_for_best_model``."""
        name = self.settings.best_metric
        sign = -1 if name in LOWER_IS_BETTER else 1
        if math.isfinite(metrics[name]) and (not self.best or sign * metrics[name] > sign * self.best[name]):
            self.best = {**metrics, "step": number}
            self.keep_adapter("best", self.best)

    def keep_trained(self, number: int) -> None:
        """Write the adapter as it stands after step ``number``, before anything else is done that may fail."""
        self.keep_adapter("adapter", {})
        self.kept = number

    @contextmanager
    def telling(self, reporter: Reporter) -> Iterator[None]:
        """Around the run: an error that ends it says where the adapter is that was written before."""
        try:
            yield
        except Preempted:
            raise
        except Exception as error:
            if self.kept is not None:
                where = f"the adapter as it was after step {self.kept} is in {self.folder.path / 'adapter'}"
                if isinstance(error, UserError):
                    error.args = (f"{error}. What was trained is kept: {where}",)
                else:
                    reporter.note(f"the run failed; what was trained is kept: {where}")
            raise

    def keep_adapter(self, name: str, metrics: dict[str, Any]) -> None:
        """Write what is trained as it stands, and how its evaluation went. Every rank calls this together."""
        with torch.no_grad():
            flat = self.step.flat()

        def write() -> None:
            with writing(self.folder.path / name):
                save_adapter(self.folder.path / name, self._adapter(flat, metrics))

        self.ranks.on_main(write)

    def _adapter(self, flat: torch.Tensor, metrics: dict[str, Any]) -> Adapter:
        resolved, encoder = self.config.to_dict(), self.step.encoder
        learned = {} if self.learned_from is None else dict(vars(self.learned_from))
        learned.pop("notes", None)  # they quote rows, and an adapter goes to other people
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
        """Write the adapter with what its evaluation said; returns the ``result`` with what the records say."""
        result["best"] = self.best or None
        evaluation: dict[str, Any] = {}
        if self.ranks.is_main:
            for record in read_records(self.folder.path):
                result |= {key: value for key, value in record.items() if key == "loss" or key.startswith("eval_")}
                measured = {key[5:]: value for key, value in record.items() if key.startswith("eval_")}
                evaluation = {**measured, "step": record["step"]} if measured else evaluation
        self.keep_adapter("adapter", evaluation)
        self.kept = result["steps"]
        return result

    def finish(self, result: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
        """Write the result and the report, after the last checkpoint."""
        self.saver.wait()
        if self.ranks.is_main:
            self.journal.content["result"] = result
            self.journal.end("finished", step=result["steps"])
            note = leave_report(self.folder.path)
            if note is not None:
                reporter.note(note)
        self.ranks.barrier()
        return result

    def _origin(self) -> dict[str, str]:
        return {"backbone_fingerprint": self.prepared.fingerprint, "train_data_digest": self.data_digest}


def fit_batch(run: RunConfig, world_size: int, rows_per_step: int | None, reporter: Reporter) -> TrainConfig:
    """Keep the rows of an optimizer step when a run continues on another number of ranks.

    Raises `UserError` if they cannot be divided over the ranks.
    """
    config = run.train
    given = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    if rows_per_step is None or given == rows_per_step:
        return config
    rows, uneven = divmod(rows_per_step, world_size)
    if run.data.max_tokens is not None:  # a step is then a number of micro-batches, whatever rows they hold
        uneven = uneven or rows % config.per_device_train_batch_size
    if uneven or rows == 0:
        raise UserError(
            f"this run was started with {rows_per_step} rows a step, which {world_size} ranks cannot share evenly; "
            f"continue it on a number of ranks that divides {rows_per_step}"
        )
    largest = config.per_device_train_batch_size
    micro = next(size for size in range(largest, 0, -1) if rows % size == 0)
    reporter.note(
        f"keeping {rows_per_step} rows a step on {world_size} ranks: per_device_train_batch_size={micro}, "
        f"gradient_accumulation_steps={rows // micro}"
    )
    return config.model_copy(
        update={"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    )


@dataclass(frozen=True)
class _Source:
    """How the rows of a run are read; ``embeddings``: of the backbone, if its config says how many it has."""

    config: DataConfig
    tokenizer: Any
    embeddings: int | None
    ranks: Ranks
    reporter: Reporter

    def read(self, which: Literal["train", "eval"], task: Task, *, learn: bool = False) -> tuple[Task, Examples, Any]:
        """The task (which may ``learn`` its labels from these rows), the rows' tokens, and on rank 0 the rows."""
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
        meant = f"did you mean {near[0]}? It has" if near else "it has"
        raise UserError(
            f"train.metric_for_best_model: an evaluation of this task has no {given!r}; {meant} {', '.join(known)}"
        )


@dataclass(frozen=True)
class Material:
    """What a run learns from, and is judged by.

    ``trains``: whether anything is trained; otherwise ``examples`` are those it is evaluated on.
    """

    tokenizer: Any
    task: Task
    examples: Examples
    held_out: HeldOut | None
    trains: bool


def read_material(config: RunConfig, ranks: Ranks, reporter: Reporter) -> Material:
    """Read and tokenise the run's rows. Every rank calls this together; raises `UserError`."""
    check_backend(config.backbone.attention)
    text_config = text_config_of(config.backbone)
    check_context(context_of(text_config), 0, config.data.max_length)  # with the prompt's own, once it is loaded
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
        reporter.note(f"task.labels: {len(task.labels)} learned from data.{learned_from}: {some(task.labels)}")
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
                    "metrics do not say how new rows fare"
                )
        size = config.train.eval_batch_size
        held_out = HeldOut(task, eval_examples, rows, size, config.data.packing, tokenizer.pad_token_id)
    return Material(tokenizer, task, examples, held_out, trains)


class Engine(NamedTuple):
    """What takes the steps of a run."""

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
    """Load the backbone and put around it what the run trains. Every rank calls this together; raises `UserError`.

    ``units``: train the prompt in the backbone's own sizes (`ptd.types.Units`), not as the numbers that it reads.
    """
    prepared = prepare(config.backbone, ranks, zero3, output=material.task.output)
    prepared.attachment.inputs.placeholder = material.tokenizer.pad_token_id or 0
    held_out = material.held_out.examples if material.held_out is not None else material.examples
    for what, examples in (("data.train", material.examples), ("data.eval", held_out)):  # its config may have said less
        size = embeddings_of(prepared.model)
        check_ids(examples, material.tokenizer, size, what, writes=material.task.generates)
    built = build_trained(config, prepared, material.task, material.tokenizer, material.examples, units=units)
    if config.backbone.compile:  # after what looks into the layers
        compile_layers(prepared.model)
    trained = Trained(ranks.distribute(built.encoder), built.readout.to(ranks.device), built.readout_rates)
    step = build_step(config, trained, ranks, prepared.model.dtype)
    batches = _batches(config.data, settings, material.examples, material.tokenizer, prepared, ranks)
    return Engine(prepared, step, batches)


def facts_of(config: RunConfig, task: Task) -> TaskFacts:
    """What the method may know of the task."""
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
    """Prompt encoder and readout, initialised alike on all ranks and still on the CPU.

    ``examples``: the rows to start from; ``units`` as for `build_engine`.
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
    """The optimizer and the reduction around what is trained over a backbone of this ``dtype``."""
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
            f"data.max_tokens: a {prepared.shape.model_type} backbone runs padded batches, which have no token budget; "
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
