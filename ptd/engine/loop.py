"""Run the training loop over prepared parts. The loop does not depend on methods, placements or files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptd.data import prefetch
from ptd.distributed.ranks import Ranks
from ptd.engine.evaluation import HeldOut, evaluate_held_out
from ptd.engine.joint_pass import JointPart, read_jointly
from ptd.engine.member import Astray, Dropped, End, Enough, Failed, Member, Progress, Stopped
from ptd.engine.preemption import StopRequest
from ptd.engine.prompt_step import PendingResult, StepSums, finish_step
from ptd.engine.setup import Prepared
from ptd.types import Batch, Prompts, PromptState, Reporter

BEHIND = 1
"""The host reads the result of a step from a GPU this many steps after it queued the step, so that the GPU has a whole
step of work meanwhile. One is enough. Stop signals, skipped steps and divergences also take effect that much later."""

FIRST_ROWS, FEWEST_ROWS, FIRST_SHARE = 32, 16, 20
"""The initial loss of a run is measured on the rows of its first steps: on `FIRST_ROWS` rows if they are within the
first 1 / `FIRST_SHARE` of the steps, and on at least `FEWEST_ROWS` rows. A forward pass takes a third of a step, so
this mostly costs less than 2 % of a run."""


@dataclass
class Loop:
    """The training of one prompt, or of several prompts together over the same backbone; `run` trains.

    A step of the loop is one optimizer step of every member that has steps left. The members' micro-batches run in one
    forward and backward pass, at most ``together`` members per pass (None: all). The members do not affect each other.

    ``on_boundary`` is called after every step except the last. ``heartbeat`` receives the name of the work that begins,
    at least once per micro-batch. ``behind``: the number of steps after which the result of a step is read, unless a
    record, an evaluation or a checkpoint is due; None: `BEHIND` on a GPU, 0 on a CPU. ``rungs``: after these steps all
    members are evaluated, and only so many of them, the best ones, go on (successive halving, Jamieson & Talwalkar
    2016, https://proceedings.mlr.press/v51/jamieson16.html).
    """

    prepared: Prepared
    ranks: Ranks
    reporter: Reporter
    members: Sequence[Member]
    on_boundary: Callable[[], None] = lambda: None
    request: StopRequest = field(default_factory=StopRequest)
    heartbeat: Callable[[str], None] = lambda doing: None
    behind: int | None = None
    together: int | None = None
    rungs: Mapping[int, int] = field(default_factory=dict)

    def run(
        self,
        start: int,
        stops: Sequence[int],
        *,
        evaluation_due: bool = False,
        ended: Sequence[End | None] | None = None,
    ) -> list[End | None]:
        """Run the optimizer steps with indices ``start`` … ``stops[m] − 1`` of every member m; 0: only evaluate it.

        Records number the steps from 1. ``evaluation_due``: first evaluate the state after step ``start``. ``ended``:
        what ended members before step ``start``. When the ``request`` of any rank asks to stop, all ranks stop after
        the same step; the caller then saves the state. Returns what ended each member before its last step, the same on
        all ranks; None if it is complete.
        """
        ended = ended or [None] * len(stops)
        for member, stop in zip(self.members, stops, strict=True):
            if stop == 0:
                self.evaluate(0, member)
        progress = [
            Progress(member, stop, end=end)
            for member, stop, end in zip(self.members, stops, ended, strict=True)
            if stop
        ]
        last = max(stops)
        if last == 0:
            return [None] * len(stops)
        self.reporter.start("train", last, start)
        if evaluation_due:
            for each in progress:
                if each.stop >= start and each.end is None:
                    self.evaluate(start, each.member)
                    self._stop_if_enough(each, start)
        self.prepared.forget_passes()
        clock = self.members[0].step.clock
        with ExitStack() as stack:
            batches = {
                id(each): stack.enter_context(closing(prefetch(each.member.batches, start, each.stop)))
                for each in progress
                if each.runs(start)
            }
            began = time.perf_counter()
            clock.begin("data")
            for index in range(start, last):
                active = [each for each in progress if each.runs(index)]
                if not active:
                    break
                micro_batches = [next(batches[id(each)])[1] for each in active]
                for each in active:
                    each.set_rate(index)
                results = self.take_step(index, micro_batches, [each.member for each in active])
                for each, result in zip(active, results, strict=True):
                    each.unread.append((index + 1, result))
                clock.pause()
                if any(index + 1 < each.stop for each in active):  # after the last step, `on_trained` comes first
                    self.on_boundary()
                self._after_step(index, active, began)
                began = time.perf_counter()
                clock.begin("data")
        self.reporter.finish("train")
        return [next((each.end for each in progress if each.member is member), None) for member in self.members]

    def _after_step(self, index: int, active: list[Progress], began: float) -> None:
        """Read results; write the records, evaluations and checkpoints that are due; set the ``end`` of members."""
        number = index + 1
        judged = {id(each): self._judge(each, number) for each in active}
        stops = any(each.last is not None and each.last.stop for each in active)
        if any(judged.values()) or stops:
            for each in active:
                self._read(each, 0)
        elapsed, sent = time.perf_counter() - began, active[0].member.step.meter.take()
        for each in active:
            each.window.pass_by(elapsed, sent)
        logs = {id(each): judged[id(each)] or each.due(number, each.member.config.logging_steps) for each in active}
        if any(logs.values()):
            phases = active[0].member.step.clock.take()
            for each in active:
                each.window.add_phases(phases)
        for each in active:
            self._close_step(each, index, logs=logs[id(each)], stops=stops)
        if number in self.rungs and not stops:
            self._drop(active, number, self.rungs[number])

    def _drop(self, active: list[Progress], number: int, keep: int) -> None:
        """Let only the best members go on."""
        left = [each for each in active if each.runs(number)]
        for each in sorted(left, key=lambda each: each.member.standing())[keep:]:
            each.end = Dropped(number)
            each.member.on_end(each.end)
            self.reporter.note(each.member.said(f"dropped after step {number}"))

    def _judge(self, each: Progress, number: int) -> bool:
        """Read the results that are due; return whether the member's training has diverged and ends."""
        config = each.member.config
        intervals = (config.logging_steps, config.eval_steps, config.save_steps)
        due = any(each.due(number, every) for every in intervals) or number in self.rungs
        on_gpu = self.ranks.device.type == "cuda"
        self._read(each, 0 if due else self.behind if self.behind is not None else BEHIND if on_gpu else 0)
        verdict, each.verdict = each.verdict, None
        if verdict is None or not each.member.on_divergence(verdict):
            return False
        each.end = each.end or Astray(number, verdict)
        return True

    def _read(self, each: Progress, behind: int) -> None:
        for note in each.read(behind):
            self.reporter.note(note)

    def _close_step(self, each: Progress, index: int, *, logs: bool, stops: bool) -> None:
        member, number = each.member, index + 1
        if isinstance(each.end, Failed):
            member.on_trained(number)  # the skipped steps have not changed the parameters
            member.on_end(each.end)
            return
        evaluates = each.due(number, member.config.eval_steps) or number in self.rungs
        evaluates = evaluates and member.held_out is not None
        if number == each.stop or evaluates:
            member.on_trained(number)
        line = None
        if logs:
            assert each.last is not None
            record = each.window.record(number, each.rate(index), each.last, self.ranks)
            member.on_record(record)
            shown = f"{record['tokens_per_second']:.0f} tokens/s"
            line = member.said(f"loss {each.last.loss:.4f}  lr {each.rate(index):.2e}  {shown}")
            each.window.clear()
        self.reporter.advance("train", number, line)
        if isinstance(each.end, Astray):
            member.on_end(each.end)
            return
        if stops:  # before the evaluation, which may take longer than the time left
            each.end = Stopped(number, evaluates)
            return
        if evaluates:
            self.evaluate(number, member)
            if number < each.stop:
                self._stop_if_enough(each, number)
        if each.end is None and each.due(number, member.config.save_steps):
            self._save(member, number)

    def _stop_if_enough(self, each: Progress, number: int) -> None:
        if number < each.stop and each.member.enough():
            each.end = Enough(number)
            each.member.on_end(each.end)
            self._save(each.member, number)

    def _save(self, member: Member, number: int) -> None:
        self.heartbeat(f"saving after step {number}")
        member.on_save(number)

    def take_step(
        self, index: int, micro_batches: Sequence[Sequence[Batch]], members: Sequence[Member] | None = None
    ) -> list[PendingResult]:
        """Run one optimizer step of ``members`` (None: of all), each with its own ``micro_batches``.

        On a GPU, return once the step is queued. The clock keeps running in the last phase.
        """
        members = self.members if members is None else members
        self.heartbeat(f"step {index + 1}")
        # Randomness depends on seed and step only: a resumed run needs no generator state, and all ranks draw the same.
        torch.manual_seed(members[0].config.seed * 1_000_003 + index)
        clock = members[0].step.clock
        clock.begin("encoder")
        self.prepared.attachment.set(_together([member.step.encode() for member in members]))
        sums = [StepSums.zero(self.ranks.device) for _ in members]
        for turn in range(max(map(len, micro_batches))):
            here = [place for place, batches in enumerate(micro_batches) if turn < len(batches)]
            for places in _chunks(here, self.together):
                self.heartbeat(f"step {index + 1}")
                clock.begin("forward")
                parts = [JointPart(members[place].step.readout, micro_batches[place][turn], place) for place in places]
                readings = read_jointly(self.prepared.run, parts)
                clock.begin("backward")
                # If only a head is trained, the loss of a padding batch does not depend on any trained parameter.
                losses = [
                    members[part.member].step.loss_scale.apply(reading.loss)
                    for part, reading in zip(parts, readings, strict=True)
                    if part.batch.rows or reading.loss.requires_grad
                ]
                if losses:
                    torch.autograd.backward(losses)
                for part, reading in zip(parts, readings, strict=True):
                    sums[part.member].add(reading, part.batch)
        for each in sums:
            each.stop = self.request.wanted
        return finish_step([member.step for member in members], sums)

    def measure_start(self, stops: Sequence[int], *, alone: bool) -> None:
        """Measure the initial loss of a run, before step 1. Every rank calls this together.

        It is the loss on the rows of each member's first steps, from the backbone ``alone``, or from the current
        prompt and head. Without a prompt, the loss of the held-out rows is measured too. The record of step 0 has the
        losses of the backbone alone as ``frozen_…``. The guards receive the losses of the steps.
        """
        known: dict[int, dict[str, Any]] = {}
        for member, stop in zip(self.members, stops, strict=True):
            self.prepared.attachment.set(None if alone else member.step.state())
            if alone:
                with self.prepared.attachment.any_backend():  # the configured attention backend may need a prefix
                    losses = self._measure_alone(member, stop, known)
            else:
                losses = self._first_losses(member, stop)
            member.step.meter.take()  # these gathers belong to no step
            if member.guard is not None:
                member.guard.begin(losses, alone=alone)

    def _measure_alone(self, member: Member, stop: int, known: dict[int, dict[str, Any]]) -> list[float]:
        """Measure the backbone without a prompt; ``known``: metrics by id of the held-out rows, which members share."""
        found: dict[str, Any] = {}
        said = "the frozen backbone, without a prompt: "
        if member.held_out is not None:
            rows = id(member.held_out)
            if rows not in known:
                known[rows] = self._metrics(member, member.held_out)
            found = {f"frozen_{key}": value for key, value in known[rows].items()}
            shown = [f"{key} {value:.4f}" for key, value in known[rows].items() if isinstance(value, float)]
            said += f"held-out {'  '.join(shown)}  "
        losses = self._first_losses(member, stop)
        found["frozen_train_loss"] = math.fsum(losses) / len(losses)
        self.reporter.note(member.said(f"{said}training loss {found['frozen_train_loss']:.4f}"))
        member.on_record({"step": 0, **found})
        return losses

    @torch.no_grad()
    def _first_losses(self, member: Member, stop: int) -> list[float]:
        """Return the current model's loss on the rows of step 1, step 2, …, each the mean over all ranks."""
        sums: list[Tensor] = []
        rows = 0
        while len(sums) < stop and rows < (FIRST_ROWS if len(sums) < stop // FIRST_SHARE else FEWEST_ROWS):
            found = StepSums.zero(self.ranks.device)
            rows += len(member.batches.rows(len(sums)))
            for batch in member.batches.step(len(sums)):
                self.heartbeat("measuring the first rows")
                found.add(member.step.readout(self.prepared.run, batch), batch)
            sums.append(found.tensor())
        totals = self.ranks.all_reduce(torch.stack(sums))
        return [loss / weight for loss, weight, *_ in totals.tolist()]

    def evaluate(self, number: int, member: Member) -> None:
        """Evaluate the member's current prompt and head on its held-out rows, and write the record."""
        if member.held_out is None:
            return
        self.prepared.attachment.set(member.step.state())
        metrics = self._metrics(member, member.held_out)
        member.step.meter.take()  # the gathers of an evaluation belong to no step
        shown = {key: value for key, value in metrics.items() if isinstance(value, float)}
        line = member.said("eval " + "  ".join(f"{key} {value:.4f}" for key, value in shown.items()))
        self.reporter.advance("train", number, line) if number else self.reporter.note(line)
        member.on_record({"step": number, **{f"eval_{key}": value for key, value in metrics.items()}})
        member.on_eval(number, metrics)

    def _metrics(self, member: Member, held_out: HeldOut) -> dict[str, Any]:
        return evaluate_held_out(held_out, self.prepared, member.step.readout, self.ranks, self.reporter)


def _together(states: Sequence[PromptState]) -> PromptState | Prompts:
    return states[0] if len(states) == 1 else Prompts(tuple(states))


def _chunks(items: list[int], size: int | None) -> Iterator[list[int]]:
    """Yield consecutive lists of at most ``size`` items; None: one list."""
    for begin in range(0, len(items), size or len(items)):
        yield items[begin : begin + (size or len(items))]
