"""The clock of a step's phases: the time that it counts for each phase, and that its marks do not accumulate."""

from __future__ import annotations

import time

import pytest
import torch

from ptd.engine.phases import PENDING, PhaseClock

CPU = torch.device("cpu")
PAUSE = 0.004


def test_a_clock_splits_what_it_measures() -> None:
    clock = PhaseClock(CPU)
    clock.begin("forgotten")
    clock.start("data")
    for name in ("forward", "backward", "forward"):
        clock.begin(name)
        time.sleep(0.001)
    seconds, phases = clock.stop()
    assert set(phases) == {"data", "forward", "backward"}
    assert sum(phases.values()) == pytest.approx(seconds, abs=1e-3)
    assert phases["forward"] >= 0.002
    assert clock.take() == {}


def test_what_comes_in_a_pause_is_in_no_phase() -> None:
    clock = PhaseClock(CPU)
    began = time.perf_counter()
    for _ in range(2):
        clock.begin("forward")
        time.sleep(PAUSE)
        clock.pause()
        time.sleep(2 * PAUSE)
    taken = clock.take()
    assert set(taken) == {"forward"}
    assert 2 * PAUSE <= taken["forward"] <= time.perf_counter() - began - 4 * PAUSE


def test_a_phase_that_goes_on_is_taken_in_two_parts() -> None:
    clock = PhaseClock(CPU)
    began = time.perf_counter()
    clock.begin("forward")
    time.sleep(PAUSE)
    assert clock.take() == {}, "up to the last mark"
    clock.begin("backward")
    assert PAUSE <= clock.take()["forward"] <= time.perf_counter() - began


def test_thousands_of_marks_do_not_pile_up_and_none_is_lost() -> None:
    clock = PhaseClock(CPU)
    began, steps = time.perf_counter(), 5000
    for _ in range(steps):
        clock.begin("forward")
        clock.begin("backward")
        clock.pause()
    most = time.perf_counter() - began
    assert len(clock._marks) <= PENDING
    assert len(clock._free) <= PENDING, "moments are used again"
    time.sleep(0.01)
    taken = clock.take()
    assert set(taken) == {"forward", "backward"}
    assert 0 < sum(taken.values()) <= most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="events of a GPU")
def test_on_a_gpu_it_waits_for_the_device_only_when_it_is_read() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)
    clock = PhaseClock(device)
    clock.start("forward")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4 * PENDING):
            clock.begin("forward")
            _ = matrix @ matrix
            clock.begin("backward")
            _ = matrix @ matrix @ matrix
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds, phases = clock.stop()
    assert sum(phases.values()) == pytest.approx(seconds, rel=0.1)
    assert phases["backward"] == pytest.approx(2 * phases["forward"], rel=0.3)
