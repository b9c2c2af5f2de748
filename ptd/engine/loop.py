"""The training loop over prepared parts. It knows no method, no placement and no file."""

from __future__ import annotations

import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import get_scheduler

from ptd.config import TrainConfig
from ptd.data import Batches, prefetch
from ptd.engine.evaluation import HeldOut, evaluate
from ptd.engine.meter import summary
from ptd.engine.phases import OTHER, OWN, PHASES
from ptd.engine.preemption import StopRequest
from ptd.engine.prompt_step import PromptStep, StepResult
from ptd.engine.ranks import Ranks
from ptd.engine.setup import Prepared
from ptd.types import Batch, Reporter, UserError

MAX_SKIPPED = 10
"""Steps in a row that may be skipped for a loss or gradient that is not finite, beside overflows of the loss scale."""


@dataclass(frozen=True)
class Stopped:
    """A run that was asked to stop, after ``step``. ``evaluation_due``: this step's evaluation is still to come."""

    step: int
    evaluation_due: bool


@dataclass
class Loop:
    """Everything a run needs while it trains; `run` does it.

    ``on_record`` gets each record, ``on_eval`` each evaluation, ``on_save`` the steps after which to keep the state;
    ``on_boundary`` is called after every step, when all ranks have done it; ``heartbeat`` is told what begins now, at
    each micro-batch at least.
    """

    config: TrainConfig
    prepared: Prepared
    step: PromptStep
    batches: Batches
    held_out: HeldOut | None
    ranks: Ranks
    reporter: Reporter
    on_record: Callable[[dict[str, Any]], None]
    on_eval: Callable[[int, dict[str, float]], None]
    on_save: Callable[[int], None]
    on_boundary: Callable[[], None] = lambda: None
    request: StopRequest = field(default_factory=StopRequest)
    heartbeat: Callable[[str], None] = lambda doing: None

    def run(self, start: int, stop: int, *, evaluation_due: bool = False) -> Stopped | None:
        """Optimizer steps ``start`` … ``stop − 1``; a step's number in records counts from 1. None: only evaluate.

        ``evaluation_due``: first evaluate what step ``start`` left. When any rank's ``request`` asks to stop, all
        ranks do after the same step, and are told which; its state is then to be saved.
        """
        if stop == 0:
            self.evaluate(0)
            return None
        rate = learning_rates(self.config, stop)
        window = Window()
        skipped = 0
        self.reporter.start("train", stop, start)
        if evaluation_due:
            self.evaluate(start)
        self.prepared.forget_passes()
        clock = self.step.clock
        began = time.perf_counter()
        clock.begin("data")
        for index, micro_batches in prefetch(self.batches, start, stop):
            for group in self.step.optimizer.param_groups:
                group["lr"] = rate(index) * group["scale"]
            result = self.take_step(index, micro_batches)
            clock.pause()
            self.on_boundary()
            window.add(result, time.perf_counter() - began, self.step.meter.take())
            number = index + 1
            skipped = self._count_skipped(number, skipped, result)
            line = None
            if number % self.config.logging_steps == 0 or number == stop:
                record = window.record(number, rate(index), result, self.ranks, clock.take())
                self.on_record(record)
                line = f"loss {result.loss:.4f}  lr {rate(index):.2e}  {record['tokens_per_second']:.0f} tokens/s"
                window = Window()
            self.reporter.advance("train", number, line)
            evaluates = number == stop or bool(self.config.eval_steps and number % self.config.eval_steps == 0)
            if result.stop:  # at once: an evaluation may take longer than there is time
                self.reporter.finish("train")
                return Stopped(number, evaluates and self.held_out is not None)
            if evaluates:
                self.evaluate(number)
            if number == stop or (self.config.save_steps and number % self.config.save_steps == 0):
                self.heartbeat(f"saving after step {number}")
                self.on_save(number)
            began = time.perf_counter()
            clock.begin("data")
        self.reporter.finish("train")
        return None

    def take_step(self, index: int, micro_batches: list[Batch]) -> StepResult:
        """One optimizer step. Its clock goes on in the last phase."""
        self.heartbeat(f"step {index + 1}")
        # Randomness is a function of seed and step: a resumed run needs no generator state, all ranks draw alike.
        torch.manual_seed(self.config.seed * 1_000_003 + index)
        clock = self.step.clock
        clock.begin("encoder")
        self.prepared.attachment.set(self.step.encode())
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        tokens = supervised = 0
        for batch in micro_batches:
            self.heartbeat(f"step {index + 1}")
            clock.begin("forward")
            reading = self.step.readout(self.prepared.run, batch)
            clock.begin("backward")
            if batch.rows or reading.loss.requires_grad:  # with nothing but a head, a filler depends on nothing trained
                self.step.loss_scale.apply(reading.loss).backward()
            sums += torch.stack([torch.as_tensor(value).detach().to(sums) for value in (reading.loss, reading.weight)])
            tokens += batch.tokens
            supervised += batch.supervised_tokens
        return self.step.finish(sums[0], sums[1], tokens, supervised, stop=self.request.wanted)

    def evaluate(self, number: int) -> None:
        """Loss and metrics of what is trained, as it stands now, on the held-out rows."""
        if self.held_out is None:
            return
        self.prepared.attachment.set(self.step.state())
        metrics = evaluate(self.held_out, self.prepared, self.step.readout, self.ranks, self.reporter)
        self.step.meter.take()  # what an evaluation gathers is no step's
        shown = {key: value for key, value in metrics.items() if isinstance(value, float)}
        line = "eval " + "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
        self.reporter.advance("train", number, line) if number else self.reporter.note(line)
        self.on_record({"step": number, **{f"eval_{key}": value for key, value in metrics.items()}})
        self.on_eval(number, metrics)

    def _count_skipped(self, number: int, so_far: int, result: StepResult) -> int:
        if not result.skipped:
            return 0
        if result.overflow:  # the scale was too high, which is how its limit is found
            lowered = f"loss scale lowered to {self.step.loss_scale.value:g}"
            self.reporter.note(f"step {number} skipped on all ranks: a gradient overflowed; {lowered}")
            return so_far
        self.reporter.note(
            f"step {number} skipped on all ranks: loss {result.loss}, gradient norm {result.grad_norm} (not finite)"
        )
        if so_far + 1 >= MAX_SKIPPED:
            raise UserError(
                f"{MAX_SKIPPED} steps in a row had a loss or gradient that is not finite; lower train.learning_rate "
                "or set backbone.dtype: float32"
            )
        return so_far + 1


class Window:
    """What happened between two records."""

    def __init__(self) -> None:
        self.steps = self.tokens = self.supervised = self.skipped = 0
        self.seconds = 0.0
        self.network: defaultdict[tuple[str, str, str], float] = defaultdict(float)

    def add(self, result: StepResult, seconds: float, network: dict[tuple[str, str, str], float]) -> None:
        self.steps += 1
        self.seconds += seconds
        self.tokens += result.tokens
        self.supervised += result.supervised_tokens
        self.skipped += result.skipped
        for key, size in network.items():
            self.network[key] += size

    def record(
        self, number: int, learning_rate: float, last: StepResult, ranks: Ranks, phases: dict[str, float]
    ) -> dict[str, Any]:
        """``loss``, ``lr``, ``grad_norm`` and ``loss_scale`` are the last step's.

        Tokens are sums, seconds and bytes means a step; tokens and bytes count all ranks, which call this together,
        seconds are this rank's. ``phases``: its seconds of each phase in all these steps.
        """
        split = {name: phases.get(name, 0.0) / self.steps for name in PHASES}
        # A GPU finishes a step's last phase while the process is in the next step, which may leave less than nothing.
        split[OTHER] = max(0.0, self.seconds / self.steps - sum(split.values()))
        return {
            "step": number,
            "loss": last.loss,
            "lr": learning_rate,
            "grad_norm": last.grad_norm,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "tokens_per_second": self.tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
            "phase_seconds": split,
            "peak_memory_bytes": peak_memory_bytes(),
            **summary(ranks, self.network, sum(phases.get(name, 0.0) for name in OWN), self.steps),
            "skipped_steps": self.skipped,
            **({} if last.loss_scale is None else {"loss_scale": last.loss_scale}),
        }


def peak_memory_bytes() -> int:
    """Peak of this process: of the GPU's allocator, or of resident memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def learning_rates(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step index; transformers' schedules as a plain function, so that resuming needs no state."""
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total_steps)
    probe = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=config.learning_rate)  # polynomial looks at it
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type, probe, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except ValueError as error:
        raise UserError(f"train.lr_scheduler_type: {config.lr_scheduler_type} cannot start: {error}") from error
    return lambda step: config.learning_rate * schedule.lr_lambdas[0](step)
