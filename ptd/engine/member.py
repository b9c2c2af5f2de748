"""A prompt in training, with everything that belongs to it alone, and how its training ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ptd.config import TrainConfig
from ptd.data import Batches
from ptd.engine.evaluation import HeldOut
from ptd.engine.guard import Divergence, Guard
from ptd.engine.prompt_step import PendingResult, PromptStep, StepResult
from ptd.engine.records import RecordWindow
from ptd.engine.schedule import learning_rates

MAX_SKIPPED = 10
"""Consecutive steps with a non-finite loss or gradient after which a prompt's training fails; overflows of the loss
scale do not count."""


@dataclass(frozen=True)
class Stopped:
    """The run stopped on request after ``step``. ``evaluation_due``: the evaluation of this step has not run yet."""

    step: int
    evaluation_due: bool


@dataclass(frozen=True)
class Enough:
    """The training ended after ``step`` because its evaluations no longer improve; its state is saved."""

    step: int


@dataclass(frozen=True)
class Astray:
    """The training diverged and must not continue unchanged; ``step`` is the last step that ran."""

    step: int
    verdict: Divergence


@dataclass(frozen=True)
class Failed:
    """The training cannot continue after ``step``; the trained parameters are saved. ``reason``: for the user."""

    step: int
    reason: str


@dataclass(frozen=True)
class Dropped:
    """The training was dropped after ``step``, because others that are trained with it were better there."""

    step: int


OwnEnd = Enough | Astray | Failed | Dropped
"""Ways in which the training of one prompt ends while others go on."""
End = Stopped | OwnEnd


def nothing(*unused: Any) -> None:
    """Do nothing: the default of callbacks."""


@dataclass
class Member:
    """A prompt that is trained, alone or together with others over the same backbone.

    ``on_record`` receives each record, ``on_eval`` each evaluation, ``on_save`` each step whose state is to be saved.
    ``on_trained`` is called before each evaluation, and after the last step before anything else: it saves the trained
    parameters before anything that may fail. ``on_end`` is called when the training has ended before its last step,
    unless it was stopped on request. ``standing``: how good the last evaluation was; lower is better. ``enough`` is
    called after each evaluation and returns whether the training ends there. ``guard`` receives the loss of each step
    when it is read; ``on_divergence`` receives the verdict of the guard and returns whether the training ends.
    ``rate_factor`` multiplies the learning rates of the schedule. ``name``: distinguishes the prompts of a run in its
    messages; empty if there is only one.
    """

    config: TrainConfig
    step: PromptStep
    batches: Batches
    held_out: HeldOut | None = None
    name: str = ""
    on_record: Callable[[dict[str, Any]], None] = nothing
    on_eval: Callable[[int, dict[str, float]], None] = nothing
    on_save: Callable[[int], None] = nothing
    on_trained: Callable[[int], None] = nothing
    on_end: Callable[[OwnEnd], None] = nothing
    standing: Callable[[], float] = lambda: 0.0
    enough: Callable[[], bool] = lambda: False
    guard: Guard | None = None
    on_divergence: Callable[[Divergence], bool] = lambda verdict: False
    rate_factor: float = 1.0

    def said(self, text: str) -> str:
        """Return a message about this prompt."""
        return f"{self.name}: {text}" if self.name else text


@dataclass
class Progress:
    """The state of a member during a call of `ptd.engine.loop.Loop.run`, which trains it up to step ``stop``."""

    member: Member
    stop: int
    window: RecordWindow = field(default_factory=RecordWindow)
    unread: deque[tuple[int, PendingResult]] = field(default_factory=deque)
    skipped_in_a_row: int = 0
    end: End | None = None
    verdict: Divergence | None = None
    last: StepResult | None = None

    def __post_init__(self) -> None:
        self._schedule = learning_rates(self.member.config, self.stop)

    def runs(self, index: int) -> bool:
        """Return whether the member takes the step with this index."""
        return self.end is None and index < self.stop

    def rate(self, index: int) -> float:
        """Return the learning rate of the step with this index."""
        return self.member.rate_factor * self._schedule(index)

    def set_rate(self, index: int) -> None:
        for group in self.member.step.optimizer.param_groups:
            group["lr"] = self.rate(index) * group["scale"]

    def due(self, number: int, every: int | None) -> bool:
        """Return whether something that happens every so many steps, and after the last one, is due."""
        return number == self.stop or bool(every and number % every == 0)

    def read(self, behind: int) -> list[str]:
        """Read the results that are at least ``behind`` steps old (all of them once a rank asks to stop); return notes
        for the user. Sets ``end`` to `Failed` after `MAX_SKIPPED` consecutive skipped steps."""
        notes: list[str] = []
        while len(self.unread) > behind:
            number, pending = self.unread.popleft()
            result = self.last = pending.read()
            behind = 0 if result.stop else behind
            self.window.add(result)
            self._count_skipped(number, result, notes)
            judged = None if self.member.guard is None else self.member.guard.see(number, result.loss)
            self.verdict = self.verdict or judged
        return notes

    def _count_skipped(self, number: int, result: StepResult, notes: list[str]) -> None:
        if not result.skipped:
            self.skipped_in_a_row = 0
            return
        if result.overflow:  # expected: the loss scale rises until a gradient overflows
            assert result.loss_scale is not None
            lowered = f"loss scale lowered to {result.loss_scale / 2:g}"
            notes.append(self.member.said(f"step {number} skipped on all ranks: a gradient overflowed; {lowered}"))
            return
        shown = f"loss {result.loss}, gradient norm {result.grad_norm} (not finite)"
        notes.append(self.member.said(f"step {number} skipped on all ranks: {shown}"))
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            self.end = self.end or Failed(
                number,
                f"{MAX_SKIPPED} steps in a row had a loss or gradient that is not finite; lower train.learning_rate "
                "or set backbone.dtype: float32",
            )
