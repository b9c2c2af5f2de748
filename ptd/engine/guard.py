"""Whether a training run diverges, judged by its losses alone.

A prompt is trained to make the backbone's loss smaller than it is without a prompt. So the loss of the backbone alone,
on the rows of the first steps, is the *baseline* that every later loss is compared with (`Guard.begin`). Where the
backbone cannot be asked alone (a head that is trained from nothing, virtual tokens among those of the rows) the loss of
the same rows before the first update takes its place. What a run starts from may lie far above the baseline (random
embeddings do). The *reference* is therefore the baseline plus what the loss of step 1 is above it on the same rows: a
run diverges when it leaves where it was, not when it comes down slowly.

Losses are put together in windows of ``w = clamp(total_steps // 20, 10, 50)`` steps, one behind the other. The *level*
of a window is its mean or its median, whichever is smaller: a spike of a few steps moves the one, never the other. Its
*spread* is the standard deviation of a loss about the trend (`spread_of`), or the spread of the newest window in which
nothing was wrong, whichever is larger. Batches of few rows, whose losses scatter, are given more room by it. A run has
diverged when

1. *it stands above the reference*: two windows are complete, the newer one began behind the warm-up, its level is above
   the reference by more than 5 % of the baseline, 0.1 nats and 5 standard errors (of the level and of the baseline, by
   the spread), and it does not fall: what it is above is not below 0.9 × what the window before was above;
2. *it has given back what it gained*: the level of a window is above the lowest one so far by more than half of what
   that one had gained below the baseline, 0.25 nats and 6 standard errors;
3. *it is far off*: 5 losses in a row are above the alarm, and the last of them is not below 0.9 × the first. The alarm
   is above the reference by half of it, but by 1 nat at least and 1.5 at most, or by 3 × the spread where that is more.
   This needs neither two windows nor the end of the warm-up.

However much the losses scatter, the room that 1 and 2 give them for it ends at the alarm. So losses that stand still
or fall are left alone even where those of a step scatter by 0.4 nats (8 rows of text: about 0.15), and a learning rate
that is a hundred times too high is found out mostly within ten steps: its losses are several nats above the baseline.
What is only a little worse than the backbone alone is not called diverged; the end of a run compares the held-out
losses.

Losses that are not finite are left out: the loop skips such steps, and ends a run with too many of them
(`ptd.engine.loop.MAX_SKIPPED`). A loss scale's skipped steps have an ordinary loss. A run of fewer steps than two
windows is judged by 3 alone.

The guard reads what the loop has read anyway, in the order of the steps. All ranks see the same losses, bit for bit, so
they come to the same verdict at the same step without a word. Its whole state is a few numbers (`Guard.state`), which
a checkpoint keeps: an interrupted run is judged as one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

SHORTEST, LONGEST, WINDOWS = 10, 50, 20
"""Steps of a window, at least and at most; and windows of a run whose windows are neither."""
ABOVE, FLOOR, ERRORS = 0.05, 0.1, 5.0
"""How far above the reference a window stands out: share of the baseline, nats, standard errors."""
FALLING = 0.9
"""What falls is below this share of what was before."""
GIVEN_BACK, GIVEN_BACK_NATS, GIVEN_BACK_ERRORS = 0.5, 0.25, 6.0
"""How much above the best window is too much: share of its gain, nats, standard errors."""
FAR, FAR_LEAST, FAR_MOST, FAR_SPREADS, IN_A_ROW = 0.5, 1.0, 1.5, 3.0, 5
"""How far the alarm is above the reference: share of it, within these nats; spreads; and how many losses in a row."""


@dataclass(frozen=True)
class Divergence:
    """A verdict. ``step``: the last one it looked at; ``loss``: its level there; ``baseline``: what that is compared
    with, which is the loss of the backbone ``alone`` or that before the first update; ``reason``: a clause for people.

    ``good``: the last step after which nothing was wrong yet; 0: only before step 1.
    """

    step: int
    loss: float
    baseline: float
    alone: bool
    reason: str
    good: int


@dataclass
class Guard:
    """Judges a run of ``total_steps`` with ``warmup_steps``: give it what `begin` wants, then each step to `see`."""

    total_steps: int
    warmup_steps: int = 0
    _begun: list[float] = field(default_factory=list, init=False)
    """Losses of the rows of the first steps, before the first update."""
    _alone: bool = field(default=False, init=False)
    """Whether they are those of the backbone alone."""
    _baseline: float | None = field(default=None, init=False)
    _reference: float | None = field(default=None, init=False)
    _window: list[tuple[int, float]] = field(default_factory=list, init=False)
    """Step and loss, of the window that is not complete."""
    _before: float | None = field(default=None, init=False)
    """Level of the newest complete window."""
    _spread: float = field(default=0.0, init=False)
    """Of the newest window in which nothing was wrong."""
    _best: tuple[float, int] | None = field(default=None, init=False)
    """Lowest level of all windows, and the last step of that one."""
    _last: list[tuple[int, float]] = field(default_factory=list, init=False)
    """The newest losses, at most `IN_A_ROW`."""
    _calm: int = field(default=0, init=False)
    """The last step whose loss was less than half way from the reference to the alarm."""
    good: int = field(default=0, init=False)
    """The last step with a complete window behind it in which nothing was wrong."""
    said: bool = field(default=False, init=False)
    """Whether there was a verdict: there is one at most."""

    @property
    def width(self) -> int:
        """Steps of a window."""
        return min(max(self.total_steps // WINDOWS, SHORTEST), LONGEST)

    def begin(self, losses: Sequence[float], *, alone: bool) -> None:
        """Before step 1: the losses of the rows of step 1, step 2, … (at least those of step 1), of the backbone
        ``alone`` or of what the run starts from. Without this, or if one is not finite, nothing is judged."""
        if all(map(math.isfinite, losses)):
            self._begun, self._alone = list(losses), alone
            self._baseline = statistics.fmean(losses)

    def see(self, step: int, loss: float) -> Divergence | None:
        """Take the loss of ``step``; returns the verdict when this loss brings it. Steps come in their order."""
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
        """After a verdict that nobody acted on: another one may come, of later steps."""
        self.said, self._window, self._last = False, [], []

    def restart(self) -> None:
        """Forget all steps; what `begin` was told stays."""
        fresh = Guard(self.total_steps, self.warmup_steps)
        if self._begun:
            fresh.begin(self._begun, alone=self._alone)
        self.load(fresh.state())

    def state(self) -> dict[str, Any]:
        """Plain numbers from which `load` goes on."""
        return {name: value for name, value in asdict(self).items() if name not in ("total_steps", "warmup_steps")}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, here or through JSON."""
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
        # The loss of a step is that of what the steps before it left.
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
                f"the training loss of {steps}, {level:.4f}, is above the {best[0]:.4f} that it had come to in step "
                f"{best[1]:,}: more than half of what was gained over {self._than}, is lost"
            )
            return self._verdict(last, level, said, good)
        return None

    @property
    def _than(self) -> str:
        """What the reference is, for people."""
        what = "that of the backbone alone" if self._alone else "that it began with"
        return f"{what}, {self._baseline:.4f}"

    def _verdict(self, step: int, loss: float, reason: str, good: int) -> Divergence:
        assert self._baseline is not None
        return Divergence(step, loss, self._baseline, self._alone, reason, good)


def spread_of(losses: Sequence[float]) -> float:
    """Standard deviation of a loss about its trend, by the median of the differences between neighbours.

    The difference of two normal values has √2 times the standard deviation, and the median of its size is 0.6745 times
    that. Neither a trend nor a few outliers count.
    """
    return statistics.median(abs(after - before) for before, after in pairwise(losses)) / (0.6745 * math.sqrt(2))
