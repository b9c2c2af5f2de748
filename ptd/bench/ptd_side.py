"""ptd's side of a benchmark: run the engine of ``ptd train``, one step at a time, on given rows."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ptd.backbone import fusion_of
from ptd.bench.flops import AttentionLayer, Formula, Load, attention_layers, distinct, load_of, observed
from ptd.bench.machine import matmul_rate
from ptd.bench.memory import PeakMemory
from ptd.bench.sides import Facts, StepTiming, Workload
from ptd.checkpoint import peft_format
from ptd.config import RunConfig
from ptd.config.deepspeed import apply_deepspeed, check_batch_size
from ptd.distributed.network_meter import metered_deepspeed, summary
from ptd.distributed.preflight import check_same_config
from ptd.distributed.ranks import Ranks
from ptd.engine.loop import Loop
from ptd.engine.member import Member
from ptd.methods import method
from ptd.runs.artifacts import PEFT_TASKS
from ptd.runs.build import build_engine, read_material
from ptd.types import Batch, PromptState, Reporter, UserError


class PtdSide:
    """One process of the run that ``config`` describes. All ranks call the methods that take rows together.

    ``compared``: the benchmark has another side.
    """

    def __init__(self, config: RunConfig, compared: bool = False) -> None:
        config, zero3 = apply_deepspeed(config)
        if compared and config.backbone.sharded:
            raise UserError(
                "--against peft: this run shards its backbone with DeepSpeed, but the comparison runs each side in one "
                "process that holds the whole backbone; leave out --against, or remove backbone.sharding and deepspeed"
            )
        self.ranks = Ranks.start(needs_group=config.backbone.sharded)
        if compared:  # PEFT has no other start; the step time does not depend on it
            config = started_at_random(config)
        self._open = ExitStack()
        self._open.callback(self.ranks.stop)
        try:
            self._prepare(config, zero3)
        except BaseException:
            self.close()
            raise

    def _prepare(self, config: RunConfig, zero3: dict[str, Any] | None) -> None:
        ranks = self.ranks
        check_batch_size(config, ranks.world_size)
        check_same_config(config, ranks)
        self.config = config
        self.material = read_material(config, ranks, Reporter())
        if not self.material.trains:
            raise UserError(f"method.name: {config.method_name} trains nothing, so there is no step to time")
        self.memory = PeakMemory(ranks.device)
        self.engine = build_engine(config, zero3, ranks, config.train, self.material)
        self.prepared, self.step, self.batches = self.engine
        if config.backbone.sharded:
            self._open.enter_context(metered_deepspeed(self.step.meter))
        self.loop = Loop(self.prepared, ranks, Reporter(), [Member(config.train, self.step, self.batches)])
        self.formula: Formula | None = None
        self.uncounted = self._count()
        self._taken = 0
        self._sent: dict[tuple[str, str, str], float] = {}

    def close(self) -> None:
        """Leave the process group."""
        self._open.close()

    def facts(self) -> Facts:
        backbone, model = self.config.backbone, self.prepared.model
        settings = {
            "batches": "packed" if self.batches.packing else "padded",
            "rows": self.config.train.per_device_train_batch_size,
            "gradient_accumulation_steps": self.config.train.gradient_accumulation_steps,
            "attention": backbone.attention,
            "sharding": backbone.sharding,
            "quantization": backbone.quantization,
            "layers": fusion_of(backbone, self.ranks.device.type).by,
            "world_size": self.ranks.world_size,
        }
        return Facts(
            device=self.ranks.device.type,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            settings=settings,
            uncounted=self.uncounted,
            rows=len(self.material.examples),
            obstacle=self._obstacle(),
        )

    def hand_over(self) -> Workload:
        """Return what PEFT's side starts from."""
        encoder, layout = self.step.encoder, self.step.encoder.layout
        with torch.no_grad():
            flat, state = self.step.flat(), self.step.state()
        return Workload(
            self.material.examples,
            self.material.tokenizer.pad_token_id or 0,
            {name: tensor.cpu().numpy() for name, tensor in encoder.without_units().items()},
            str(encoder.peft_type),
            peft_format.write_config(layout, len(flat), encoder.peft_type),
            self._attention(state),
        )

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row."""
        return self.material.examples.lengths()

    def rows(self, step: int) -> np.ndarray:
        """Return the rows that ``ptd train`` uses in this step."""
        return np.array(self.batches.rows(step))

    def matmul_rate(self) -> dict[str, Any]:
        """Measure the matmul rate of this machine in this run's dtype."""
        dtype = self.prepared.model.dtype
        return matmul_rate(dtype, self.ranks.device)

    def check(self, rows: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean loss of these rows and its gradient for the current prompt. Takes no optimizer step."""
        loss = weight = 0.0
        self.prepared.attachment.set(self.step.encode())
        for batch in self.batches.of(rows):
            reading = self.step.readout(self.prepared.run, batch)
            reading.loss.backward()
            loss, weight = loss + float(reading.loss.detach()), weight + float(reading.weight)
        gradient = (self.step.leaf_gradient() / weight).cpu().numpy()
        self.step.optimizer.zero_grad(set_to_none=True)
        return loss / weight, gradient

    def take(self, rows: np.ndarray) -> StepTiming:
        """Take and measure one optimizer step on these rows."""
        self.memory.reset()
        self.step.meter.take()
        self.step.clock.start("data")
        batches = self.batches.of(rows)
        (pending,) = self.loop.take_step(self._taken, [batches])
        seconds, phases = self.step.clock.stop()
        result = pending.read()
        self._taken += 1
        for key, size in self.step.meter.take().items():
            self._sent[key] = self._sent.get(key, 0.0) + size
        if result.skipped:
            raise UserError(
                f"step {self._taken} was skipped (loss {result.loss}, gradient norm {result.grad_norm}), so there is "
                "nothing to time; lower train.learning_rate"
            )
        positions = sum(batch.input_ids.numel() for batch in batches)
        flops = None if self.formula is None else sum(self.formula.flops(self._load(batch)) for batch in batches)
        return StepTiming(
            seconds,
            phases,
            result.tokens,
            result.supervised_tokens,
            result.loss,
            self.memory.peak(),
            positions,
            flops,
        )

    def forget(self) -> None:
        """Discard the bytes counted so far, which the warm-up sent."""
        self._sent.clear()

    def network(self, steps: int) -> dict[str, Any]:
        """Return what all ranks sent, as means over ``steps`` steps."""
        return summary(self.ranks, self._sent, 0.0, steps)

    def _obstacle(self) -> str | None:
        """Return why PEFT cannot do the same work; None if it can."""
        task = self.config.task.kind
        if task != "causal_lm":
            return f"task.kind {task} has another head than PEFT's, so the two sides would not do the same work"
        if self.prepared.model.dtype is torch.float16:
            return "float16 needs a loss scale, which PEFT leaves to the training loop; use bfloat16 or float32"
        encoder = self.step.encoder
        obstacle = peft_format.obstacle(encoder.layout, encoder.peft_type, PEFT_TASKS[self.material.task.output])
        return None if obstacle is None else f"{obstacle} (method {self.config.method_name})"

    def _attention(self, state: PromptState) -> tuple[AttentionLayer, ...]:
        shape, config = self.prepared.shape, self.prepared.model.config
        return attention_layers(shape, config, state, checkpointed=self.config.backbone.gradient_checkpointing)

    def _load(self, batch: Batch) -> Load:
        batch, _ = self.prepared.run.filled(batch, batch.supervised_tokens)
        return load_of(batch, self._state, {layer.kind for layer in self.prepared.shape.layers})

    def _count(self) -> str | None:
        """Derive the formula of this run's FLOPs from one step without an update; return why, if there is none."""
        self._state = self.step.state()
        rows = self.rows(0)
        if self.ranks.world_size > 1:
            batch: Batch | None = self.batches.of(rows)[0]
        else:
            candidates = [each for count in range(1, len(rows) + 1) for each in self.batches.of(rows[:count])]
            batch = next((each for each in candidates if distinct(self._load(each))), None)
        if batch is None or self.ranks.any(
            not (batch.rows and distinct(self._load(batch)))
        ):  # all ranks continue, or none does
            return "some kinds of rows are equal in number in these batches, so they cannot be told apart"

        def step() -> None:
            self.prepared.attachment.set(self.step.encode())
            self.step.readout(self.prepared.run, batch).loss.backward()

        model, config = self.prepared.model, self.config.backbone
        head = self.prepared.attachment.head.module
        try:
            linear = observed(torch.nn.ModuleList([model, self.step.readout]), self._load(batch), step, head)
        except LookupError as error:
            return str(error)
        finally:
            self.step.optimizer.zero_grad(set_to_none=True)
        self.formula = Formula(linear, self._attention(self._state), config.gradient_checkpointing)
        return None


def started_at_random(config: RunConfig) -> RunConfig:
    """Return the run with a prompt that starts at random, because PEFT's networks can start from such a prompt."""
    settings = method(config.method_name).sizes(config.method_config())
    section = {"name": config.method_name, **{field.name: getattr(settings, field.name) for field in fields(settings)}}
    return config.model_copy(update={"method": section})
