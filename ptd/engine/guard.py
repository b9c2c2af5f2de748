"""Detect from the losses alone whether a training run diverges.

A prompt is trained to make the backbone's loss lower than it is without a prompt. So every later loss is compared with
the *baseline*: the loss of the frozen backbone without a prompt on the rows of the first steps (`Guard.begin`). Where
no such loss exists (a head is trained from scratch, or the rows contain the virtual tokens), the baseline is the loss
of the same rows before the first update. A run may start far above the baseline, with random embeddings for example.
The *reference* is therefore the baseline plus the excess of the loss of step 1 over the baseline on the same rows: a
run diverges when its loss rises above its start, not when its loss falls slowly.

Losses are grouped into consecutive windows of ``w = clamp(total_steps // 20, 10, 50)`` steps. The *level* of a window
is the smaller one of its mean and its median: a spike of a few steps moves the mean, but not the median. The *spread*
of a window is the standard deviation of a loss around the trend (`spread_of`), or the spread of the newest window
without trouble if that is larger. It allows a larger excess to batches of few rows, whose losses scatter. A run has
diverged if one of three rules applies:

1. *The loss stays above the reference.* Two windows are complete, the newer one began after the warm-up, and its level
   exceeds the reference by more than the largest of 5 % of the baseline, 0.1 nats and 5 standard errors (of the
   difference between level and baseline, from the spread). And the level does not fall: its excess is not below
   0.9 × the excess of the window before.
2. *The run has lost what it had gained.* The level of a window exceeds the lowest level so far by more than the largest
   of half of the gain of that lowest level over the baseline, 0.25 nats and 6 standard errors.
3. *The loss is far above the reference.* 5 consecutive losses are above the alarm, and the last of them is not below
   0.9 × the first. The alarm exceeds the reference by half of the reference, but at least by 1 nat and at most by 1.5,
   or by 3 × the spread if that is more. This rule needs neither two windows nor the end of the warm-up.

However much the losses scatter, the standard errors that rules 1 and 2 allow are capped at the alarm's excess over the
reference. So losses that stay level or fall raise no verdict even if the losses of single steps scatter by 0.4 nats (8
rows of text: about 0.15), and a learning rate that is a hundred times too high is mostly detected within ten steps: its
losses are several nats above the baseline. A run that is only slightly worse than the frozen backbone without a prompt
does not count as diverged; the comparison of held-out losses at the end of the run reports it.

The guard ignores losses that are not finite: the loop skips such steps, and fails after too many of them
(`ptd.engine.loop.MAX_SKIPPED`). Steps that are skipped because of the loss scale have an ordinary loss. Only rule 3
applies to a run with fewer steps than two windows.

The guard reads the losses that the loop has read anyway, in the order of the steps. All ranks see the same losses, bit
for bit, so they reach the same verdict at the same step without communication. The whole state of the guard is a few
numbers (`Guard.state`). A checkpoint saves them, so an interrupted run gets the same verdict as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

SHORTEST, LONGEST, WINDOWS = 10, 50, 20
"""Fewest and most steps of a window; a run is divided into ``WINDOWS`` windows within these limits."""
ABOVE, FLOOR, ERRORS = 0.05, 0.1, 5.0
"""The excess of a window over the reference that rule 1 allows: share of the baseline, nats, standard errors."""
FALLING = 0.9
"""A loss falls if it is below this share of the earlier one."""
GIVEN_BACK, GIVEN_BACK_NATS, GIVEN_BACK_ERRORS = 0.5, 0.25, 6.0
"""The excess over the best window that rule 2 allows: share of its gain, nats, standard errors."""
FAR, FAR_LEAST, FAR_MOST, FAR_SPREADS, IN_A_ROW = 0.5, 1.0, 1.5, 3.0, 5
"""The excess of the alarm over the reference: share of the reference, limits of that share in nats, spreads; and the
number of consecutive losses above the alarm."""


@dataclass(frozen=True)
class Divergence:
    """The verdict that a run diverged.

    ``step``: the last step that the guard has seen; ``loss``: the level of the losses there; ``baseline``: the loss to
    compare with (if ``alone`` that of the frozen backbone without a prompt, otherwise that before the first update);
    ``reason``: a clause for people; ``good``: the last step after which there was no trouble yet (0: only before
    step 1).
    """

    step: int
    loss: float
    baseline: float
    alone: bool
    reason: str
    good: int


@dataclass
class Guard:
    """Detects divergence in a run of ``total_steps`` with ``warmup_steps``: call `begin`, then `see` for each step."""

    total_steps: int
    warmup_steps: int = 0
    _begun: list[float] = field(default_factory=list, init=False)
    """Losses of the rows of the first steps, before the first update."""
    _alone: bool = field(default=False, init=False)
    """Whether they are the losses of the frozen backbone without a prompt."""
    _baseline: float | None = field(default=None, init=False)
    _reference: float | None = field(default=None, init=False)
    _window: list[tuple[int, float]] = field(default_factory=list, init=False)
    """Steps and losses of the incomplete window."""
    _before: float | None = field(default=None, init=False)
    """Level of the newest complete window."""
    _spread: float = field(default=0.0, init=False)
    """Spread of the newest window without trouble."""
    _best: tuple[float, int] | None = field(default=None, init=False)
    """Lowest level of all windows, and the last step of that window."""
    _last: list[tuple[int, float]] = field(default_factory=list, init=False)
    """The newest losses, at most `IN_A_ROW`."""
    _calm: int = field(default=0, init=False)
    """The last step whose loss was at most halfway from the reference to the alarm."""
    good: int = field(default=0, init=False)
    """The last step after which a complete window has shown no trouble."""
    said: bool = field(default=False, init=False)
    """Whether the guard has returned a verdict; it returns one at most."""

    @property
    def width(self) -> int:
        """Steps of a window."""
        return min(max(self.total_steps // WINDOWS, SHORTEST), LONGEST)

    def begin(self, losses: Sequence[float], *, alone: bool) -> None:
        """Set the losses before step 1 on the rows of step 1, step 2, … (at least of step 1).

        ``alone``: they are the losses of the frozen backbone without a prompt, otherwise of the initial prompt and
        head. Without this call, or if a loss is not finite, the guard returns no verdict.
        """
        if all(map(math.isfinite, losses)):
            self._begun, self._alone = list(losses), alone
            self._baseline = statistics.fmean(losses)

    def see(self, step: int, loss: float) -> Divergence | None:
        """Add the loss of ``step``; return the verdict if this loss leads to one. Call it in the order of the steps."""
        if self.said or self._baseline is None or not math.isfinite(loss):
            return None
        if self._reference is None:
            rise = loss - self._begun[0] if step == 1 else 0.0
            self._reference = self._baseline + max(0.0, rise)
        self._window.append((step, loss))
        self._last = [*self._last, (step, loss)][-IN_A_ROW:]
        verdict = self._far_off(step) or self._of_window()
        self.said = verdict is not None
        return verdict

    def rearm(self) -> None:
        """Allow another verdict about later steps, after a verdict that was ignored."""
        self.said, self._window, self._last = False, [], []

    def restart(self) -> None:
        """Forget all steps, but keep the losses given to `begin`."""
        fresh = Guard(self.total_steps, self.warmup_steps)
        if self._begun:
            fresh.begin(self._begun, alone=self._alone)
        self.load(fresh.state())

    def state(self) -> dict[str, Any]:
        """Return plain numbers from which `load` restores this state."""
        return {name: value for name, value in asdict(self).items() if name not in ("total_steps", "warmup_steps")}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`, also after a round trip through JSON."""
        for name, value in state.items():
            if name in ("_window", "_last"):
                value = [tuple(pair) for pair in value]
            setattr(self, name, tuple(value) if name == "_best" and value is not None else value)

    @property
    def _alarm(self) -> float:
        assert self._reference is not None
        share = min(max(FAR * self._reference, FAR_LEAST), FAR_MOST)
        return self._reference + max(share, FAR_SPREADS * self._spread)

    def _far_off(self, step: int) -> Divergence | None:
        assert self._reference is not None
        losses = [loss for _, loss in self._last]
        if losses[-1] <= (self._reference + self._alarm) / 2:
            self._calm = step
        if len(losses) < IN_A_ROW or min(losses) <= self._alarm or losses[-1] < FALLING * losses[0]:
            return None
        span = f"{min(losses):.4f} to {max(losses):.4f}"
        said = f"the losses of the last {IN_A_ROW} steps, {span}, are far above {self._than}"
        # The loss of a step measures the parameters that the steps before it left.
        return self._verdict(step, statistics.fmean(losses), said, min(self.good, max(0, self._calm - 1)))

    def _of_window(self) -> Divergence | None:
        if len(self._window) < self.width:
            return None
        assert self._baseline is not None
        assert self._reference is not None
        (first, _), (last, _) = self._window[0], self._window[-1]
        losses = [loss for _, loss in self._window]
        level, highest = sorted((statistics.fmean(losses), statistics.median(losses)))
        own, room = spread_of(losses), self._alarm - self._reference
        spread = max(own, self._spread)
        before, best, self._window, self._before = self._before, self._best, [], level

        error = spread * math.sqrt(1 / len(losses) + 1 / len(self._begun))
        allowed = max(ABOVE * self._baseline, FLOOR, min(ERRORS * error, room))
        above = level > self._reference + allowed
        falls = before is not None and level - self._reference < FALLING * (before - self._reference)
        given_back, gone = False, 0.0
        if best is not None:
            error = spread * math.sqrt(2 / len(losses))
            gone = max(GIVEN_BACK * (self._baseline - best[0]), GIVEN_BACK_NATS, min(GIVEN_BACK_ERRORS * error, room))
            given_back = best[0] < self._baseline and level > best[0] + gone
        if best is None or level < best[0]:
            self._best = (level, last)
        steps, good = f"steps {first:,} to {last:,}", self.good
        wrong = highest > self._reference + allowed / 2 or (best is not None and highest > best[0] + gone / 2)
        if not wrong:
            self.good, self._spread = last - 1, own
        if above and before is not None and first > self.warmup_steps and not falls:
            said = f"the training loss of {steps}, {level:.4f}, is above {self._than}, and does not fall"
            return self._verdict(last, level, said, good)
        if given_back and best is not None:
            said = (
                f"the training loss of {steps}, {level:.4f}, is above the {best[0]:.4f} that it had reached in step "
                f"{best[1]:,}: more than half of the gain over {self._than}, is lost"
            )
            return self._verdict(last, level, said, good)
        return None

    @property
    def _than(self) -> str:
        """The baseline as a phrase in messages."""
        what = "the loss without a prompt" if self._alone else "the loss before the first update"
        return f"{what}, {self._baseline:.4f}"

    def _verdict(self, step: int, loss: float, reason: str, good: int) -> Divergence:
        assert self._baseline is not None
        return Divergence(step, loss, self._baseline, self._alone, reason, good)


def spread_of(losses: Sequence[float]) -> float:
    """Return the standard deviation of a loss around its trend, from the median difference between neighbours.

    The difference of two normal values has √2 times their standard deviation, and the median of its absolute value is
    0.6745 times that. A trend and a few outliers hardly change the result.
    """
    return statistics.median(abs(after - before) for before, after in pairwise(losses)) / (0.6745 * math.sqrt(2))
