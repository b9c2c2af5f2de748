"""Run the training loop over prepared parts. The loop does not depend on methods, placements or files."""

from __future__ import annotations

import math
import resource
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from ptd.async_copy import together
from ptd.config import TrainConfig
from ptd.data import Batches, prefetch
from ptd.distributed.network_meter import summary
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, evaluate_held_out
from ptd.engine.guard import Divergence, Guard
from ptd.engine.phases import OTHER, OWN, PHASES
from ptd.engine.preemption import StopRequest
from ptd.engine.prompt_step import PendingResult, PromptStep, StepResult
from ptd.engine.setup import Prepared
from ptd.types import Batch, Reporter, UserError

MAX_SKIPPED = 10
"""Consecutive steps with a non-finite loss or gradient after which the run fails; overflows of the loss scale do not
count."""

BEHIND = 1
"""The host reads the result of a step from a GPU this many steps after it queued the step, so that the GPU has a whole
step of work meanwhile. One is enough. Stop signals, skipped steps and divergences also take effect that much later."""

FIRST_ROWS, FEWEST_ROWS, FIRST_SHARE = 32, 16, 20
"""The initial loss of a run is measured on the rows of its first steps: on `FIRST_ROWS` rows if they are within the
first 1 / `FIRST_SHARE` of the steps, and on at least `FEWEST_ROWS` rows. A forward pass takes a third of a step, so
this mostly costs less than 2 % of a run."""


@dataclass(frozen=True)
class Stopped:
    """The run stopped on request after ``step``. ``evaluation_due``: the evaluation of this step has not run yet."""

    step: int
    evaluation_due: bool


@dataclass(frozen=True)
class Enough:
    """The run ended after ``step`` because its evaluations no longer improve; its state is saved."""

    step: int


@dataclass(frozen=True)
class Astray:
    """The run diverged and must not continue unchanged; ``step`` is the last step that ran."""

    step: int
    verdict: Divergence


@dataclass
class Loop:
    """Everything that a run needs during training; `run` trains.

    ``on_record`` receives each record, ``on_eval`` each evaluation, ``on_save`` each step whose state is to be saved.
    ``on_trained`` is called before each evaluation, and after the last step before anything else: it saves the trained
    parameters before anything that may fail. ``on_boundary`` is called after every step except the last.
    ``heartbeat`` receives the name of the work that begins, at least once per micro-batch.
    ``behind``: the number of steps after which the result of a step is read, unless a record, an evaluation or a
    checkpoint is due; None: `BEHIND` on a GPU, 0 on a CPU.
    ``enough`` is called after each evaluation and returns whether the run ends there.
    ``guard`` receives the loss of each step when it is read; ``on_divergence`` receives the verdict of the guard and
    returns whether the run ends. ``rate_factor`` multiplies the learning rates of the schedule.
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
    on_trained: Callable[[int], None] = lambda step: None
    on_boundary: Callable[[], None] = lambda: None
    request: StopRequest = field(default_factory=StopRequest)
    heartbeat: Callable[[str], None] = lambda doing: None
    behind: int | None = None
    enough: Callable[[], bool] = lambda: False
    guard: Guard | None = None
    on_divergence: Callable[[Divergence], bool] = lambda verdict: False
    rate_factor: float = 1.0
    _skipped_in_a_row: int = field(default=0, init=False, repr=False)

    def run(self, start: int, stop: int, *, evaluation_due: bool = False) -> Stopped | Enough | Astray | None:
        """Run the optimizer steps with indices ``start`` … ``stop − 1``; with ``stop`` 0 only evaluate.

        Records number the steps from 1. ``evaluation_due``: first evaluate the state after step ``start``. When the
        ``request`` of any rank asks to stop, all ranks stop after the same step; the caller then saves the state.
        Returns what ended the run before its last step, the same on all ranks; None if the run is complete. Raises
        `UserError` after `MAX_SKIPPED` consecutive steps with a non-finite loss or gradient.
        """
        if stop == 0:
            self.evaluate(0)
            return None
        schedule, factor = learning_rates(self.config, stop), self.rate_factor

        def rate(index: int) -> float:
            return factor * schedule(index)

        window, unread = RecordWindow(), deque[tuple[int, PendingResult]]()
        self._skipped_in_a_row = 0
        self.reporter.start("train", stop, start)
        if evaluation_due:
            self.evaluate(start)
            if start < stop and self.enough():
                return self._enough(start)
        self.prepared.forget_passes()
        clock = self.step.clock
        began = time.perf_counter()
        clock.begin("data")
        for index, micro_batches in prefetch(self.batches, start, stop):
            for group in self.step.optimizer.param_groups:
                group["lr"] = rate(index) * group["scale"]
            unread.append((index + 1, self.take_step(index, micro_batches)))
            clock.pause()
            number = index + 1
            if number < stop:  # after the last step nothing may wait before `on_trained`
                self.on_boundary()
            logs, evaluates, saves = (
                number == stop or bool(every and number % every == 0)
                for every in (self.config.logging_steps, self.config.eval_steps, self.config.save_steps)
            )
            stops, verdict = False, None
            for step, result in self._results(unread, everything=logs or evaluates or saves):
                window.add(result)
                stops |= result.stop
                judged = None if self.guard is None else self.guard.see(step, result.loss)
                verdict = verdict or judged
            astray = verdict is not None and self.on_divergence(verdict)
            if astray:
                for _, result in self._results(unread, everything=True):
                    window.add(result)
                logs = True  # the run ends here, and its last step has to be on record
            window.pass_by(time.perf_counter() - began, self.step.meter.take())
            if number == stop or (evaluates and self.held_out is not None):
                self.on_trained(number)
            line = None
            if logs:
                record = window.record(number, rate(index), result, self.ranks, clock.take())
                self.on_record(record)
                line = f"loss {result.loss:.4f}  lr {rate(index):.2e}  {record['tokens_per_second']:.0f} tokens/s"
                window = RecordWindow()
            self.reporter.advance("train", number, line)
            if astray and verdict is not None:
                self.reporter.finish("train")
                return Astray(number, verdict)
            if stops:  # before the evaluation, which may take longer than the time left
                self.reporter.finish("train")
                return Stopped(number, evaluates and self.held_out is not None)
            if evaluates:
                self.evaluate(number)
                if self.held_out is not None and number < stop and self.enough():
                    return self._enough(number)
            if saves:
                self._save(number)
            began = time.perf_counter()
            clock.begin("data")
        self.reporter.finish("train")
        return None

    def _save(self, number: int) -> None:
        self.heartbeat(f"saving after step {number}")
        self.on_save(number)

    def _enough(self, number: int) -> Enough:
        self.reporter.finish("train")
        self._save(number)
        return Enough(number)

    def _results(
        self, unread: deque[tuple[int, PendingResult]], *, everything: bool
    ) -> Iterator[tuple[int, StepResult]]:
        """Read and yield the results that are at least ``behind`` steps old; all of them if ``everything`` is set or
        once a rank asks to stop."""
        on_gpu = self.ranks.device.type == "cuda"
        behind = self.behind if self.behind is not None else BEHIND if on_gpu else 0
        while len(unread) > (0 if everything else behind):
            number, pending = unread.popleft()
            result = pending.read()
            everything |= result.stop
            self._skipped_in_a_row = self._count_skipped(number, self._skipped_in_a_row, result)
            yield number, result

    def take_step(self, index: int, micro_batches: list[Batch]) -> PendingResult:
        """Run one optimizer step; on a GPU, return once it is queued. The clock keeps running in the last phase."""
        self.heartbeat(f"step {index + 1}")
        # Randomness depends on seed and step only: a resumed run needs no generator state, and all ranks draw the same.
        torch.manual_seed(self.config.seed * 1_000_003 + index)
        clock = self.step.clock
        clock.begin("encoder")
        self.prepared.attachment.set(self.step.encode())
        loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        weight: Tensor | float = 0.0
        tokens = supervised = 0
        for batch in micro_batches:
            self.heartbeat(f"step {index + 1}")
            clock.begin("forward")
            reading = self.step.readout(self.prepared.run, batch)
            clock.begin("backward")
            # If only a head is trained, the loss of a padding batch does not depend on any trained parameter.
            if batch.rows or reading.loss.requires_grad:
                self.step.loss_scale.apply(reading.loss).backward()
            loss += reading.loss.detach()
            weight += reading.weight.detach().double() if isinstance(reading.weight, Tensor) else reading.weight
            tokens += batch.tokens
            supervised += batch.supervised_tokens
        return self.step.finish(loss, weight, tokens, supervised, stop=self.request.wanted)

    def measure_start(self, stop: int, *, alone: bool) -> None:
        """Measure the initial loss of a run of ``stop`` steps, before step 1. Every rank calls this together.

        ``alone``: measure the frozen backbone without a prompt. Otherwise measure the initial prompt and head, for
        tasks on which the backbone has no loss without them. The ``guard`` receives the losses on the rows of the first
        steps. With ``alone`` one record of step 0 holds their mean as ``frozen_train_loss`` and the metrics of the
        held-out rows under ``frozen_…``.
        """
        self.prepared.attachment.set(None if alone else self.step.state())
        if alone:
            with self.prepared.attachment.any_backend():  # the configured attention backend may need a prefix
                losses = self._measure_alone(stop)
        else:
            losses = self._first_losses(stop)
        self.step.meter.take()  # these gathers belong to no step
        if self.guard is not None:
            self.guard.begin(losses, alone=alone)

    def _measure_alone(self, stop: int) -> list[float]:
        found: dict[str, Any] = {}
        said = "the frozen backbone, without a prompt: "
        if self.held_out is not None:
            metrics = evaluate_held_out(self.held_out, self.prepared, self.step.readout, self.ranks, self.reporter)
            found = {f"frozen_{key}": value for key, value in metrics.items()}
            shown = [f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
            said += f"held-out {'  '.join(shown)}  "
        losses = self._first_losses(stop)
        found["frozen_train_loss"] = math.fsum(losses) / len(losses)
        self.reporter.note(f"{said}training loss {found['frozen_train_loss']:.4f}")
        self.on_record({"step": 0, **found})
        return losses

    @torch.no_grad()
    def _first_losses(self, stop: int) -> list[float]:
        """Return the current model's loss on the rows of step 1, step 2, …, each the mean over all ranks."""
        sums: list[Tensor] = []
        rows = 0
        while len(sums) < stop and rows < (FIRST_ROWS if len(sums) < stop // FIRST_SHARE else FEWEST_ROWS):
            loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
            weight: Tensor | float = 0.0
            rows += len(self.batches.rows(len(sums)))
            for batch in self.batches.step(len(sums)):
                self.heartbeat("measuring the first rows")
                reading = self.step.readout(self.prepared.run, batch)
                loss += reading.loss
                weight += reading.weight.double() if isinstance(reading.weight, Tensor) else reading.weight
            sums.append(together([loss, weight], loss.device))
        totals = self.ranks.all_reduce(torch.stack(sums))
        return [loss / weight for loss, weight in totals.tolist()]

    def evaluate(self, number: int) -> None:
        """Evaluate the current prompt and head on the held-out rows, and write the record."""
        if self.held_out is None:
            return
        self.prepared.attachment.set(self.step.state())
        metrics = evaluate_held_out(self.held_out, self.prepared, self.step.readout, self.ranks, self.reporter)
        self.step.meter.take()  # the gathers of an evaluation belong to no step
        shown = {key: value for key, value in metrics.items() if isinstance(value, float)}
        line = "eval " + "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
        self.reporter.advance("train", number, line) if number else self.reporter.note(line)
        self.on_record({"step": number, **{f"eval_{key}": value for key, value in metrics.items()}})
        self.on_eval(number, metrics)

    def _count_skipped(self, number: int, so_far: int, result: StepResult) -> int:
        if not result.skipped:
            return 0
        if result.overflow:  # expected: the loss scale rises until a gradient overflows
            assert result.loss_scale is not None
            lowered = f"loss scale lowered to {result.loss_scale / 2:g}"
            self.reporter.note(f"step {number} skipped on all ranks: a gradient overflowed; {lowered}")
            return so_far
        self.reporter.note(
            f"step {number} skipped on all ranks: loss {result.loss}, gradient norm {result.grad_norm} (not finite)"
        )
        if so_far + 1 >= MAX_SKIPPED:
            self.on_trained(number)  # the skipped steps have not changed the parameters
            raise UserError(
                f"{MAX_SKIPPED} steps in a row had a loss or gradient that is not finite; lower train.learning_rate "
                "or set backbone.dtype: float32"
            )
        return so_far + 1


class RecordWindow:
    """Sums over the steps between two records."""

    def __init__(self) -> None:
        self.steps = self.tokens = self.supervised = self.skipped = 0
        self.seconds = 0.0
        self.network: defaultdict[tuple[str, str, str], float] = defaultdict(float)

    def add(self, result: StepResult) -> None:
        """Add the result of one step."""
        self.steps += 1
        self.tokens += result.tokens
        self.supervised += result.supervised_tokens
        self.skipped += result.skipped

    def pass_by(self, seconds: float, network: dict[tuple[str, str, str], float]) -> None:
        """Add elapsed time and network bytes, whichever step they belong to."""
        self.seconds += seconds
        for key, size in network.items():
            self.network[key] += size

    def record(
        self, number: int, learning_rate: float, last: StepResult, ranks: Ranks, phases: dict[str, float]
    ) -> dict[str, Any]:
        """Return the record of these steps. Every rank calls this together.

        ``loss``, ``lr``, ``grad_norm`` and ``loss_scale`` are those of the last step. Token counts are sums over the
        steps; seconds and bytes are means per step. Tokens and bytes cover all ranks, seconds this rank only.
        ``phases``: seconds of this rank in each phase, summed over the steps.
        """
        split = {name: phases.get(name, 0.0) / self.steps for name in PHASES}
        # A GPU finishes a step's last phase while the process runs the next step, so this difference may be negative.
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
    """Return this process's peak memory: of the CUDA allocator, or the resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the number of steps in which the learning rate rises."""
    return config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total_steps)


def learning_rates(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Return transformers' schedule as a function from step index to learning rate, so that resuming needs no state.

    Raises `UserError` if transformers cannot build the schedule.
    """
    warmup = warmup_steps(config, total_steps)
    # The polynomial schedule reads the learning rate of the optimizer.
    probe = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=config.learning_rate)
    try:
        schedule = get_scheduler(
            config.lr_scheduler_type, probe, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except ValueError as error:
        raise UserError(
            f"train.lr_scheduler_type: transformers cannot build the schedule {config.lr_scheduler_type}: {error}; "
            "choose another schedule"
        ) from error
    return lambda step: config.learning_rate * schedule.lr_lambdas[0](step)
