"""Build what a run needs: rows, backbone, prompt encoder, readout, optimizer step and batches."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from ptd.backbone import (
    TextConditioner,
    architecture_of,
    embeddings_of,
    load_tokenizer,
    text_config_of,
    vocabulary_of,
)
from ptd.config import DataConfig, RunConfig, TrainConfig, task_config
from ptd.data import Batches, load_rows
from ptd.data.cache import RowsCache
from ptd.data.identity import rows_digest
from ptd.data.tokens import check_ids, check_words, rows_in_both
from ptd.distributed.network_meter import NetworkMeter
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut
from ptd.engine.loss_scale import LossScale
from ptd.engine.optimizers import OPTIMIZERS
from ptd.engine.prompt_step import PromptStep, Trained, build_optimizer
from ptd.engine.setup import Prepared, check_context, prepare
from ptd.inject import check_backend, compile_layers, context_of
from ptd.methods import TaskFacts, method
from ptd.runs.shared_rows import Tokenising, cache_of, share_examples
from ptd.tasks import Task, make_task, rows_key
from ptd.tasks.labels import some
from ptd.types import Architecture, Examples, Reporter, UserError


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
    architecture: Architecture
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
        digest = cache(lambda: rows_digest(rows))
        found = cache_of(self.config)

        def load() -> Task:
            nonlocal rows
            rows = load_rows(source, split, what=f"data.{which}")
            return self._fit(task, rows, source, digest, found) if learn else task

        fitted = self.ranks.on_main(load, long=True)
        job = Tokenising(
            make=lambda columns: fitted.tokenize(rows, self.tokenizer, what=source, columns=columns),
            identify=lambda: rows_key(fitted, digest(), self.tokenizer),
        )
        examples = share_examples(job, found, self.ranks, self.reporter)
        self.ranks.on_main(lambda: check_ids(examples, self.tokenizer, self.embeddings, source, writes=task.generates))
        self.reporter.note(f"data.{which}: {examples.report}")
        return fitted, examples, rows

    def _fit(self, task: Task, rows: Any, source: str, digest: Callable[[], str], found: RowsCache | None) -> Task:
        """Return the task with what it learns from the rows, or has learned from the same rows at an earlier start."""

        def learn() -> dict[str, Any]:
            return task.fit(rows, source).facts()

        learned = learn() if found is None else found.learned(rows_key(task, digest(), None), learn)
        return make_task(task_config(learned), self.config, self.architecture)


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
class RunMaterial:
    """The task and the rows of a run, for training and for evaluation.

    ``trains``: whether the run trains anything; if not, ``examples`` are the rows for evaluation.
    """

    tokenizer: Any
    task: Task
    examples: Examples
    held_out: HeldOut | None
    trains: bool


def read_material(config: RunConfig, ranks: Ranks, reporter: Reporter) -> RunMaterial:
    """Read and tokenise the run's rows. All ranks call this together. Raises `UserError`."""
    check_backend(config.backbone.attention)
    OPTIMIZERS[config.train.optimizer].check(ranks.device.type)
    text_config = text_config_of(config.backbone)
    check_context(context_of(text_config), 0, config.data.max_length)  # `build_trained` checks it with the prompt
    tokenizer = load_tokenizer(config.backbone)
    architecture = architecture_of(config.backbone)
    task = make_task(config.task, config.data, architecture)
    chosen, facts = method(config.method_name), facts_of(config, task)
    chosen.check(config.method_config(), facts)
    trains = chosen.has_prompt or facts.trained_head
    learned_from: Literal["train", "eval"] = "train" if trains else "eval"
    source = _Source(config.data, architecture, tokenizer, vocabulary_of(text_config), ranks, reporter)
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
    return RunMaterial(tokenizer, task, examples, held_out, trains)


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
    material: RunMaterial,
    *,
    units: bool = True,
) -> Engine:
    """Load the backbone and build what the run trains on it. All ranks call this together. Raises `UserError`.

    ``units``: train the prompt in units of the backbone's own values (`ptd.types.Units`), not as raw values.
    """
    prepared = load_backbone(config, zero3, ranks, [material])
    step, batches = build_member(config, prepared, ranks, settings, material, units=units)
    compile_backbone(config, prepared)
    return Engine(prepared, step, batches)


def load_backbone(
    config: RunConfig, zero3: dict[str, Any] | None, ranks: Ranks, materials: Sequence[RunMaterial]
) -> Prepared:
    """Load the backbone, and check the rows of all ``materials`` against it. All ranks call this together."""
    prepared = prepare(config.backbone, ranks, zero3, output=materials[0].task.output)
    prepared.attachment.inputs.placeholder = materials[0].tokenizer.pad_token_id or 0
    # `read_material` checked the ids only if the backbone's config gives the number of embeddings.
    size = embeddings_of(prepared.model)
    for material in materials:
        held_out = material.held_out.examples if material.held_out is not None else material.examples
        for what, examples in (("data.train", material.examples), ("data.eval", held_out)):
            check_ids(examples, material.tokenizer, size, what, writes=material.task.generates)
    return prepared


def compile_backbone(config: RunConfig, prepared: Prepared) -> None:
    """Compile the backbone if the configuration says so. Call it after `build_member`, which inspects the layers."""
    if config.backbone.compile is True and not prepared.attachment.replaces_attention:
        raise UserError(
            f"backbone.compile: a {prepared.shape.model_type} backbone keeps its own attention code and cache, which "
            "ptd does not compile; set compile: false"
        )
    if config.backbone.compile is True:
        compile_layers(prepared.model)


def build_member(
    config: RunConfig,
    prepared: Prepared,
    ranks: Ranks,
    settings: TrainConfig,
    material: RunMaterial,
    *,
    units: bool = True,
) -> tuple[PromptStep, Batches]:
    """Build what one prompt of a run trains, and its batches; arguments as for `build_engine`."""
    built = build_trained(config, prepared, material.task, material.tokenizer, material.examples, units=units)
    trained = Trained(ranks.distribute(built.encoder), built.readout.to(ranks.device), built.readout_rates)
    step = build_step(config, trained, ranks, prepared.model.dtype)
    return step, _batches(config.data, settings, material.examples, material.tokenizer, prepared, ranks)


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
        config.train.optimizer,
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
