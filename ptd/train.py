"""``ptd train``: prefix-tune a frozen backbone, on this process or on all ranks a launcher started."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ptd.backbone import TextConditioner, load_tokenizer
from ptd.checkpoint import Adapter, save_adapter, save_state
from ptd.checkpoint.run_folder import RunFolder, clear, open_run
from ptd.checkpoint.run_state import load_tensors, tensors_of
from ptd.config import DataConfig, RunConfig, TrainConfig
from ptd.data import Batches, load_rows, tokenize
from ptd.deepspeed_config import apply_deepspeed, check_batch_size
from ptd.engine.loop import Loop, peak_memory_bytes
from ptd.engine.meter import NetworkMeter, metered_deepspeed
from ptd.engine.prompt_step import PromptStep, build_optimizer
from ptd.engine.ranks import Ranks
from ptd.engine.records import Records, plot_loss, read_records
from ptd.engine.setup import Prepared, check_context, prepare
from ptd.methods import method
from ptd.types import Examples, Reporter, UserError
from ptd.versions import versions


def train(config: RunConfig, *, overwrite: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Train as ``config`` says and leave the artifacts in ``config.output_dir``; returns the result of run.json.

    An unfinished run of the same configuration in ``output_dir`` is continued. Raises `UserError`.
    """
    config, zero3 = apply_deepspeed(config)
    ranks = Ranks.start(needs_group=zero3 is not None)
    check_batch_size(config, ranks.world_size)
    reporter = reporter if reporter is not None and ranks.is_main else Reporter()
    try:
        return _train(config, zero3, ranks, overwrite, reporter)
    finally:
        ranks.stop()


def _train(
    config: RunConfig, zero3: dict[str, Any] | None, ranks: Ranks, overwrite: bool, reporter: Reporter
) -> dict[str, Any]:
    began = time.time()
    folder = ranks.on_main(lambda: open_run(config, overwrite=overwrite))
    for note in folder.notes:
        reporter.note(note)
    facts = folder.facts()
    settings = fit_batch(config, ranks.world_size, facts.get("rows_per_step"), reporter)
    tokenizer = load_tokenizer(config.backbone)
    examples = {which: _examples(config.data, which, tokenizer, ranks, reporter) for which in ("train", "eval")}
    assert examples["train"] is not None
    prepared = prepare(config.backbone, ranks, zero3)
    step = _build_step(config, prepared, tokenizer, ranks)
    batches = _batches(config.data, settings, examples["train"], tokenizer, ranks)
    total = settings.max_steps or batches.total_steps(settings.num_train_epochs)

    start = 0
    if folder.checkpoint is not None:
        load_tensors(folder.checkpoint, tensors_of(step.encoder, step.optimizer))
        start = facts["step"]
    best: dict[str, Any] = facts.get("best") or {}
    description = {
        "status": "running",
        "config": config.to_dict(),
        "command": sys.argv,
        "versions": versions(),
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "backbone_fingerprint": prepared.fingerprint,
        "trained_parameters": sum(parameter.numel() for parameter in step.encoder.parameters()),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if ranks.is_main:
        _begin(folder, description)
    records = Records(folder.path, start) if ranks.is_main else None

    def keep_adapter(name: str) -> None:
        with torch.no_grad():
            flat = step.flat()
        if ranks.is_main:
            save_adapter(folder.path / name, _adapter(config, prepared, flat))

    def on_eval(number: int, metrics: dict[str, float]) -> None:
        if math.isfinite(metrics["loss"]) and (not best or metrics["loss"] < best["loss"]):
            best.update(metrics, step=number)
            keep_adapter("best")

    def on_save(number: int) -> None:
        save_state(
            folder.checkpoints,
            number,
            tensors_of(step.encoder, step.optimizer),
            {"rows_per_step": batches.slots * settings.per_device_train_batch_size, "best": best},
            is_main=ranks.is_main,
            barrier=ranks.barrier,
            keep=settings.save_total_limit,
        )

    loop = Loop(
        settings,
        prepared.model,
        prepared.attachment,
        step,
        batches,
        _eval_batches(config, examples["eval"], tokenizer, ranks),
        ranks,
        reporter,
        on_record=records.write if records is not None else lambda record: None,
        on_eval=on_eval,
        on_save=on_save,
    )
    with ExitStack() as stack:
        if zero3 is not None:
            stack.enter_context(metered_deepspeed(step.meter))
        loop.run(start, total)
    keep_adapter("adapter")
    result: dict[str, Any] = {
        "steps": total,
        "seconds": time.time() - began,
        "best": best or None,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if records is not None:
        records.close()
        final = ("loss", "eval_loss", "eval_perplexity")
        result |= {key: record[key] for record in read_records(folder.path) for key in final if key in record}
        plot_loss(folder.path)
        folder.write({**description, "status": "finished", "result": result})
    ranks.barrier()
    return result


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


def _examples(config: DataConfig, which: str, tokenizer: Any, ranks: Ranks, reporter: Reporter) -> Examples | None:
    source = config.train if which == "train" else config.eval
    if source is None:
        if which == "train":
            raise UserError("data.train: is missing; name the training file")
        return None
    split = config.train_split if which == "train" else config.eval_split

    def read() -> Examples:
        rows = load_rows(source, split, what=f"data.{which}")
        return tokenize(rows, config, tokenizer, max_length=config.max_length, what=source)

    examples = ranks.on_main(read)
    reporter.note(f"data.{which}: {examples.report}")
    return examples


def _build_step(config: RunConfig, prepared: Prepared, tokenizer: Any, ranks: Ranks) -> PromptStep:
    settings, chosen = config.method_config(), method(config.method_name)
    check_context(prepared.shape, settings.num_virtual_tokens, config.data.max_length)
    conditioner = TextConditioner(prepared.model, tokenizer, ranks.device)
    encoder = chosen.build(settings, prepared.shape, conditioner, seed=config.train.seed)
    encoder = ranks.distribute(encoder)
    optimizer = build_optimizer(
        encoder,
        learning_rate=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        epsilon=config.train.adam_epsilon,
        weight_decay=config.train.weight_decay,
    )
    return PromptStep(encoder, optimizer, ranks, NetworkMeter(ranks.world_size), config.train.max_grad_norm)


def _batches(config: DataConfig, settings: TrainConfig, examples: Examples, tokenizer: Any, ranks: Ranks) -> Batches:
    return Batches(
        examples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        per_device_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        packing=config.packing,
        max_tokens=config.max_tokens,
        seed=settings.seed,
        pad_token_id=tokenizer.pad_token_id or 0,
    )


def _eval_batches(config: RunConfig, examples: Examples | None, tokenizer: Any, ranks: Ranks) -> Batches | None:
    if examples is None:
        return None
    return Batches(
        examples,
        rank=ranks.rank,
        world_size=ranks.world_size,
        per_device_batch_size=config.train.eval_batch_size,
        packing=config.data.packing,
        shuffle=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )


def _begin(folder: RunFolder, description: dict[str, Any]) -> None:
    if folder.checkpoint is None:
        clear(folder)
    folder.write(description)


def _adapter(config: RunConfig, prepared: Prepared, flat: torch.Tensor) -> Adapter:
    path = Path(config.backbone.path)
    resolved = config.to_dict()
    return Adapter(
        flat,
        prepared.shape.layers,
        backbone=str(path.resolve()) if path.is_dir() else config.backbone.path,
        revision=config.backbone.revision,
        facts={
            "fingerprint": prepared.fingerprint,
            "method": resolved["method"],
            "data": resolved["data"],
            "versions": versions(),
        },
    )
