"""Seconds of an optimizer step on many ranks: compute, what travels inside a node, what travels between nodes.

One rank does ``flops`` a step at a rate, and ``fixed`` seconds of other work. Collectives cost a latency each and their
bytes a bandwidth, inside nodes and between them. A collective of n ranks has ceil(log2 n) latencies, as in trees. What
gathers weights may run beside the computation (``overlap`` of 1: as far as there is computation to hide behind; 0: not
at all); what is summed at the end of a step cannot. Bytes are those of `ptd.engine.placement`, which the tests compare
with the collectives that run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Link:
    """``latency`` in seconds a hop, ``bytes_per_second`` that a rank (inside a node) or a node (between) sends."""

    latency: float
    bytes_per_second: float

    def seconds(self, messages: float, size: float, members: int) -> float:
        return (
            0.0
            if members < 2
            else messages * math.ceil(math.log2(members)) * self.latency + (size / self.bytes_per_second)
        )


@dataclass(frozen=True)
class Cluster:
    """What a step runs on; ``fixed``: seconds a step that do not depend on tokens."""

    flops_per_second: float
    fixed: float
    inside: Link
    between: Link


@dataclass(frozen=True)
class Traffic:
    """Of one step: collectives, bytes a rank sends inside its node, and bytes a node sends to others."""

    messages: float = 0.0
    inside: float = 0.0
    between: float = 0.0


@dataclass(frozen=True)
class Work:
    """One optimizer step of a rank: ``weights`` is what gathers frozen weights, ``training`` what sums gradients."""

    flops: float
    weights: Traffic = Traffic()
    training: Traffic = Traffic()


def step_seconds(work: Work, cluster: Cluster, *, ranks_per_node: int, nodes: int, overlap: float = 0.0) -> float:
    """Seconds of one step on ``nodes`` of ``ranks_per_node``; each rank does ``work``."""

    def travel(traffic: Traffic) -> float:
        inside = cluster.inside.seconds(traffic.messages, traffic.inside, ranks_per_node)
        crossing = traffic.messages if traffic.between else 0.0
        return inside + cluster.between.seconds(crossing, traffic.between, nodes)

    compute, gathers = work.flops / cluster.flops_per_second, travel(work.weights)
    hidden = overlap * min(compute, gathers)
    return cluster.fixed + compute + gathers - hidden + travel(work.training)


@dataclass(frozen=True)
class Measurement:
    """``seconds`` of a step in which ``ranks`` shared ``cores``, each doing ``work``."""

    name: str
    work: Work
    ranks: int
    cores: int
    seconds: float

    @property
    def share(self) -> float:
        """How many ranks a core carries: all work of theirs is done one after the other, the copies of gloo too."""
        return max(1.0, self.ranks / self.cores)

    def terms(self) -> np.ndarray:
        """Coefficients of fixed, 1 / FLOP/s, latency and 1 / bandwidth (inside a node)."""
        both = [self.work.weights, self.work.training]
        hops = math.ceil(math.log2(self.ranks)) if self.ranks > 1 else 0
        return self.share * np.array(
            [1.0, self.work.flops, hops * sum(t.messages for t in both), sum(t.inside for t in both)]
        )


def fit(measurements: Sequence[Measurement]) -> Cluster:
    """The machine that explains them best: least squares of relative errors, no term negative."""
    rows = np.array([each.terms() / each.seconds for each in measurements])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    fixed, per_flop, latency, per_byte = found / scale
    link = Link(latency, 1 / per_byte if per_byte else math.inf)
    return Cluster(1 / per_flop if per_flop else math.inf, fixed, link, link)


def predicted(each: Measurement, cluster: Cluster) -> float:
    """Seconds of a measurement by the model."""
    shared = replace(
        cluster,
        flops_per_second=cluster.flops_per_second / each.share,
        fixed=cluster.fixed * each.share,
        inside=Link(cluster.inside.latency * each.share, cluster.inside.bytes_per_second / each.share),
    )
    return step_seconds(each.work, shared, ranks_per_node=each.ranks, nodes=1)


def left_out(measurements: Sequence[Measurement]) -> list[float]:
    """Relative error of each, predicted from the others alone."""
    errors = []
    for index, each in enumerate(measurements):
        cluster = fit([other for place, other in enumerate(measurements) if place != index])
        errors.append(predicted(each, cluster) / each.seconds - 1)
    return errors
