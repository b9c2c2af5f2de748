"""The guard detects divergence in the losses of real and of simulated runs, and never in healthy runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import chain, repeat

import pytest

from ptd.engine.guard import Divergence, Guard

# Losses of real runs, rounded to two or three decimals: the quickstart's backbone on its task, and
# SmolLM2-135M-Instruct on E2E (8 rows per step, 30 virtual tokens initialised from a text). ``…ALONE``: losses of the
# frozen backbone without a prompt on the rows of the first steps.
# fmt: off
QUICKSTART_ALONE = (4.959, 4.867, 4.75, 5.215)
MLP_AT_7E_3 = (
    5.05, 4.37, 3.77, 4.42, 3.42, 2.72, 2.48, 2.08, 1.9, 1.73, 1.48, 1.51, 1.39, 1.21, 1.03, 0.93, 0.72, 0.85, 0.62,
    0.57, 0.64, 0.65, 0.4, 0.38, 0.26, 0.39, 0.38, 0.28, 0.37, 0.24, 0.3, 0.24, 0.31, 0.35, 0.31, 0.33, 0.31, 0.34,
    0.32, 0.24, 0.24, 0.24, 0.45, 0.24, 0.21, 0.21, 0.2, 0.23, 0.19, 0.23, 0.19, 0.19, 0.28, 0.21, 0.18, 0.22, 0.24,
    0.19, 0.19, 0.14,
)
MLP_AT_7E_1 = (
    5.05, 11.19, 9.55, 10.66, 9.81, 9.34, 8.86, 8.75, 8.47, 8.18, 7.82, 7.88, 7.68, 7.63, 7.51, 7.34, 7.21, 7.11,
    6.96, 6.78, 6.99, 7.08, 6.81, 7.07, 6.8, 6.87, 6.78, 7.04, 7.19, 7.06, 6.97, 7.04, 7.03, 7.31, 7.46, 7.65, 7.92,
    7.48, 7.53,
)
RANDOM_PROMPT_AT_1 = (
    5.04, 4.52, 4.08, 4.16, 3.69, 3.62, 3.52, 3.47, 3.3, 2.94, 2.96, 3.01, 2.89, 2.57, 2.39, 2.35, 2.33, 2.35, 2.31,
    2.16, 2.19, 2.28, 2.06, 2.01, 1.87, 1.96, 1.91, 1.84, 1.8, 1.73, 1.76, 1.55, 1.67, 1.78, 1.61, 1.66, 1.65, 1.58,
    1.61, 1.41,
)
RANDOM_PROMPT_AT_1E_2 = (
    5.04, 4.86, 4.7, 5.1, 4.67, 4.72, 4.5, 4.59, 4.61, 4.24, 4.51, 4.51, 4.43, 4.06, 3.99, 3.97, 4.11, 4.13, 3.97,
    3.9, 4.03, 3.9, 3.9, 3.81, 3.76, 3.89, 3.66, 3.64, 3.52, 3.65, 3.7, 3.59, 3.67, 3.69, 3.48, 3.52, 3.41, 3.39,
    3.28, 3.31,
)
FOUR_ROWS_ALONE = (4.848, 5.083, 4.806, 4.93)
PREFIX_AT_30 = (  # 4 rows per step
    4.906, 8.982, 8.341, 7.6, 7.461, 7.057, 6.197, 6.078, 6.022, 6.029, 6.097, 5.875, 5.879, 5.885, 5.672, 5.814,
    5.702, 5.766, 5.837, 5.651, 5.771, 5.706, 5.589, 5.871, 5.779, 5.803, 6.055, 5.721, 6.039, 5.789, 5.717, 5.777,
    5.688, 5.552,
)
PREFIX_WARMED_UP_TO_15 = (  # 4 rows per step; the learning rate rises in all steps
    4.906, 4.994, 4.211, 3.7, 3.84, 3.449, 2.966, 3.1, 2.946, 2.797, 3.574, 3.291, 4.105, 3.978, 4.358, 3.935, 4.398,
    4.598, 4.443, 4.608, 4.497, 4.705, 4.572, 5.237, 5.133, 4.888, 5.479, 5.274, 5.425, 5.366, 5.546, 5.332, 5.214,
    5.236, 5.374,
)
SMOL_ALONE = (2.634, 2.606)
SMOL_AT_1E_2 = (
    2.397, 1.998, 1.942, 1.824, 1.743, 1.786, 1.76, 1.589, 2.284, 1.919, 1.582, 1.484, 1.912, 1.728, 1.295, 1.465,
    1.416, 1.901, 1.97, 1.638, 1.501, 1.738, 1.437, 1.427, 1.44, 1.498, 1.363, 1.436, 1.325, 1.697, 1.48, 1.729,
    1.351, 1.53, 1.797,
)
SMOL_AT_1 = (
    2.397, 12.107, 8.709, 10.738, 11.337, 9.503, 9.985, 10.435, 9.112, 7.711, 7.989, 7.251, 8.24, 7.248, 6.73, 7.007,
    6.775, 6.724, 6.847, 6.203, 6.47, 6.327, 6.016, 6.032, 5.851, 5.871, 5.685, 5.777, 5.525, 5.57, 5.433, 5.851, 5.417,
)
SMOL_RANDOM_PROMPT_AT_1 = (  # only its second loss is far above the baseline
    2.936, 4.924, 2.831, 2.644, 2.614, 2.569, 2.319, 2.008, 2.591, 2.154, 1.939, 1.722, 2.303, 2.103, 1.665, 1.789,
    1.743, 2.079, 2.228, 1.922, 1.859, 1.954, 1.664, 1.676, 1.704, 1.702, 1.56, 1.584, 1.537, 2.056, 1.639, 1.979,
)
# fmt: on


def judged(
    losses: Sequence[float],
    begun: Sequence[float] = QUICKSTART_ALONE,
    *,
    total: int | None = None,
    warmup: int = 0,
    alone: bool = True,
) -> Divergence | None:
    """Return the verdict on a run whose guard is saved and loaded again after each step."""
    guard = Guard(total or len(losses), warmup)
    guard.begin(begun, alone=alone)
    found = None
    for step, loss in enumerate(losses, 1):
        verdict = guard.see(step, loss)
        assert found is None or verdict is None, "it is said once"
        found = found or verdict
        after = Guard(guard.total_steps, warmup)
        after.load(json.loads(json.dumps(guard.state())))
        assert after.state() == guard.state()
        guard = after
    return found


# ---- real runs


@pytest.mark.parametrize("total", [40, 120, 2000])
@pytest.mark.parametrize(
    ("losses", "begun"),
    [
        (MLP_AT_7E_3, QUICKSTART_ALONE),
        (RANDOM_PROMPT_AT_1, QUICKSTART_ALONE),
        (RANDOM_PROMPT_AT_1E_2, QUICKSTART_ALONE),
        (SMOL_AT_1E_2, SMOL_ALONE),
        (SMOL_RANDOM_PROMPT_AT_1, SMOL_ALONE),
    ],
)
def test_real_runs_that_learn(losses: Sequence[float], begun: Sequence[float], total: int) -> None:
    assert judged(losses, begun, total=total) is None


@pytest.mark.parametrize("total", [8, 120, 5000])
def test_a_rate_a_hundred_times_too_high_is_found_out_at_once(total: int) -> None:
    verdict = judged(MLP_AT_7E_1, total=total)
    assert verdict is not None
    assert (verdict.step, verdict.good, verdict.alone) == (7, 0, True)
    assert verdict.loss == pytest.approx(math.fsum(MLP_AT_7E_1[2:7]) / 5)
    assert verdict.baseline == pytest.approx(math.fsum(QUICKSTART_ALONE) / 4)
    said = "the losses of the last 5 steps, 8.8600 to 10.6600, are far above the loss without a prompt, 4.9478"
    assert verdict.reason == said
    smol = judged(SMOL_AT_1, SMOL_ALONE, total=total)
    assert smol is not None
    assert smol.step == 7


def test_a_run_that_stays_above_the_backbone_alone() -> None:
    """The loss falls from the first window to the second, but not from the second to the third."""
    verdict = judged(PREFIX_AT_30, FOUR_ROWS_ALONE)
    assert verdict is not None
    assert (verdict.step, verdict.good) == (30, 0)
    said = "the training loss of steps 21 to 30, 5.7840, is above the loss without a prompt, 4.9168, and does not fall"
    assert verdict.reason == said
    assert judged(PREFIX_AT_30, FOUR_ROWS_ALONE, warmup=25) is None, "the rate may still have been too low"


def test_a_run_that_gives_back_what_it_had_gained() -> None:
    """The guard detects a lost gain during warm-up as well, while the learning rate still rises."""
    verdict = judged(PREFIX_WARMED_UP_TO_15, FOUR_ROWS_ALONE, warmup=60)
    assert verdict is not None
    assert (verdict.step, verdict.good) == (30, 9)
    assert "above the 3.5745 that it had reached in step 10: more than half" in verdict.reason


# ---- simulated losses


def drawn(level: Callable[[float], float], steps: int, scatter: float, seed: int, spikes: float = 0.0) -> list[float]:
    """Return random losses around a level that is a function of the completed fraction of the run."""
    noise = random.Random(seed)
    return [
        max(1e-3, level(step / steps) + noise.gauss(0, scatter)) + (8.0 if noise.random() < spikes else 0.0)
        for step in range(1, steps + 1)
    ]


HEALTHY: dict[str, tuple[Callable[[float], float], float, float]] = {
    "learns nothing": (lambda x: 2.7, 2.7, 0.15),
    "learns nothing, few rows": (lambda x: 2.7, 2.7, 0.4),
    "learns": (lambda x: 1.3 + 1.4 * math.exp(-8 * x), 2.7, 0.4),
    "learns it by heart": (lambda x: 2.7 * math.exp(-8 * x), 2.7, 0.1),
    "begins far above": (lambda x: 2 + 6 * math.exp(-3 * x), 2.7, 0.3),
    "begins far above and gets down too slowly": (lambda x: 9 - 1.5 * x, 2.7, 0.3),
    "two labels": (lambda x: 0.2 + 0.49 * math.exp(-4 * x), 0.69, 0.15),
    "two labels, not to be told apart": (lambda x: 0.69, 0.69, 0.1),
    "nothing to learn": (lambda x: 0.01, 0.01, 0.01),
    "rises a little while the rate does": (lambda x: 2.7 + 0.5 * max(0.0, 0.1 - abs(x - 0.1)) / 0.1, 2.7, 0.1),
}


@pytest.mark.parametrize("steps", [14, 40, 250, 1200])
@pytest.mark.parametrize("case", HEALTHY)
def test_healthy_runs_are_left_alone(case: str, steps: int) -> None:
    level, begins, scatter = HEALTHY[case]
    for seed in range(30 if steps < 1000 else 3):
        begun = drawn(lambda x: begins, 4, scatter / 2, -seed)  # over at least twice the rows of a step
        losses = drawn(level, steps, scatter, seed, spikes=0.02 if steps > 40 else 0.0)
        assert judged(losses, begun, warmup=steps // 10) is None, seed


DIVERGING: dict[str, Callable[[float], float]] = {
    "jumps": lambda x: 2.0 if x < 0.3 else 6.0,
    "blows up at once and sinks slowly": lambda x: 2.7 if x < 0.03 else 9 - 3 * x,
    "drifts away": lambda x: 2.7 - 3 * x if x < 0.4 else 1.5 + 5 * (x - 0.4),
    "stands above": lambda x: 2.7 if x < 0.1 else 3.6,
    "swings": lambda x: 2.5 if round(250 * x) % 3 == 0 or x < 0.03 else 9.0,
}


@pytest.mark.parametrize("steps", [40, 250, 1200])
@pytest.mark.parametrize("case", DIVERGING)
def test_diverging_runs_are_found_out(case: str, steps: int) -> None:
    for seed in range(10 if steps < 1000 else 2):
        begun = drawn(lambda x: 2.7, 4, 0.1, -seed)
        verdict = judged(drawn(DIVERGING[case], steps, 0.15, seed), begun)
        assert verdict is not None, seed
        assert verdict.good < verdict.step
        assert DIVERGING[case](verdict.good / steps) < 3.0 or verdict.good == 0


def test_the_good_step_is_before_the_trouble_began() -> None:
    """Windows have 12 of the 250 steps: the jump is in steps 61 to 72, and the window before it ends with step 60."""
    losses = [*repeat(1.5, 65), *repeat(2.2, 185)]
    verdict = judged(losses, (2.7,))
    assert verdict is not None
    assert (verdict.step, verdict.good) == (84, 59)
    at_once = judged([*repeat(1.5, 65), *repeat(9.0, 185)], (2.7,))
    assert at_once is not None
    assert (at_once.step, at_once.good) == (70, 59)


# ---- what is not judged


def test_losses_that_are_not_finite_are_left_out() -> None:
    """The guard ignores losses that are not finite: the loop skips their steps, and fails after ten in a row."""
    bad = chain.from_iterable((loss, math.nan, math.inf) for loss in MLP_AT_7E_3)
    assert judged(list(bad)) is None
    far = judged([2.7, *chain.from_iterable((9.0, math.nan) for _ in range(5))], (2.7,))
    assert far is not None
    assert far.step == 10


def test_nothing_is_judged_without_a_finite_beginning() -> None:
    guard = Guard(40)
    assert all(guard.see(step, loss) is None for step, loss in enumerate(MLP_AT_7E_1, 1))
    assert judged(MLP_AT_7E_1, (math.nan, 4.9)) is None


def test_four_losses_far_off_are_a_spike_and_so_is_one_that_falls() -> None:
    assert judged([*repeat(1.5, 20), *repeat(9.0, 4), *repeat(1.5, 40)], (2.7,)) is None
    assert judged([2.7, *(12 * 0.85**step for step in range(20)), *repeat(1.5, 20)], (2.7,)) is None


def test_a_short_run_has_no_windows() -> None:
    assert judged([2.7, *repeat(3.5, 18)], (2.7,)) is None
    assert judged([2.7, *repeat(3.5, 19)], (2.7,)) is not None


# ---- the state of a guard


def test_a_guard_that_begins_again_has_forgotten_the_steps() -> None:
    guard, fresh = Guard(40), Guard(40)
    for each in (guard, fresh):
        each.begin(QUICKSTART_ALONE, alone=True)
    for step, loss in enumerate(MLP_AT_7E_1, 1):
        guard.see(step, loss)
    assert guard.said
    guard.restart()
    assert guard.state() == fresh.state()


def test_a_guard_that_was_not_heeded_can_speak_again() -> None:
    guard = Guard(40)
    guard.begin(QUICKSTART_ALONE, alone=True)
    verdicts = []
    for step, loss in enumerate(MLP_AT_7E_1, 1):
        verdicts.append(guard.see(step, loss))
        if step == 7:
            guard.rearm()
    assert [verdict.step for verdict in verdicts if verdict is not None] == [7, 12]


def test_a_run_that_begins_elsewhere_is_compared_with_that() -> None:
    verdict = judged([0.7, *repeat(4.0, 10)], (0.69, 0.71), alone=False)
    assert verdict is not None
    assert not verdict.alone
    assert verdict.reason.endswith("are far above the loss before the first update, 0.7000")
