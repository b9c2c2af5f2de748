"""The cost model of benchmarks/scaling.py: a fit recovers the machine, and each term means what its name says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from scaling_model import Cluster, Link, Measurement, Traffic, Work, fit, left_out, predicted, step_seconds

MACHINE = Cluster(5e10, 0.03, Link(2e-4, 8e8), Link(2e-4, 8e8))


def measured(name: str, ranks: int, flops: float, messages: float, size: float) -> Measurement:
    work = Work(flops, Traffic(messages), Traffic(3 if ranks > 1 else 0, size if ranks > 1 else 0))
    each = Measurement(name, work, ranks, cores=2, seconds=1.0)
    return Measurement(name, work, ranks, 2, predicted(each, MACHINE))


CASES = [
    measured(f"{ranks} ranks, {flops:g}, {size:g}", ranks, flops, 40 if size > 1e8 else 0, size)
    for ranks in (1, 2, 4)
    for flops in (2e9, 8e9)
    for size in (3e6, 5e7, 6e8)
]


def test_a_machine_that_follows_the_model_is_found_again() -> None:
    found = fit(CASES)
    assert found.flops_per_second == pytest.approx(MACHINE.flops_per_second, rel=1e-6)
    assert found.fixed == pytest.approx(MACHINE.fixed, rel=1e-6)
    assert found.inside.latency == pytest.approx(MACHINE.inside.latency, rel=1e-6)
    assert found.inside.bytes_per_second == pytest.approx(MACHINE.inside.bytes_per_second, rel=1e-6)
    assert max(map(abs, left_out(CASES))) < 1e-6


def test_ranks_that_share_a_core_take_turns() -> None:
    alone, two, four = (measured("", ranks, 8e9, 0, 0) for ranks in (1, 2, 4))
    assert two.seconds == pytest.approx(alone.seconds + 3 * 2e-4)
    assert four.seconds == pytest.approx(2 * alone.seconds + 2 * 2 * 3 * 2e-4)


def test_what_overlaps_hides_behind_computation_and_no_further() -> None:
    cluster = Cluster(1e12, 0.0, Link(0, 1e9), Link(0, 1e8))
    gathers, sums = Traffic(inside=1e9), Traffic(between=1e8)

    def seconds(flops: float, overlap: float) -> float:
        return step_seconds(Work(flops, gathers, sums), cluster, ranks_per_node=8, nodes=2, overlap=overlap)

    assert seconds(2e12, 0.0) == pytest.approx(2 + 1 + 1)
    assert seconds(2e12, 1.0) == pytest.approx(2 + 1)
    assert seconds(5e11, 1.0) == pytest.approx(1 + 1)
    assert step_seconds(Work(1e12, gathers, sums), cluster, ranks_per_node=1, nodes=1) == pytest.approx(1)
