"""A model of the seconds of an optimizer step on many ranks: compute, traffic inside a node, traffic between nodes.

Each rank computes ``flops`` per step at a fixed rate, and needs ``fixed`` seconds for other work. A collective costs a
latency, and its bytes divided by a bandwidth, inside nodes and between them. A collective of n ranks has ceil(log2 n)
latencies, as in a tree. Gathers of weights may overlap with the computation (``overlap`` 1: as far as the computation
is long enough; 0: not at all); the sums at the end of a step cannot. The bytes come from `ptd.planner.placement`, which
the tests compare with real collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Link:
    """``latency`` in seconds per hop; ``bytes_per_second`` sent by a rank (inside a node) or by a node (between)."""

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
    """The machines that run a step; ``fixed``: seconds per step that do not depend on the number of tokens."""

    flops_per_second: float
    fixed: float
    inside: Link
    between: Link


@dataclass(frozen=True)
class Traffic:
    """The traffic of one step: collectives, bytes a rank sends inside its node, and bytes a node sends to others."""

    messages: float = 0.0
    inside: float = 0.0
    between: float = 0.0


@dataclass(frozen=True)
class Work:
    """One optimizer step of a rank: ``weights`` is the traffic that gathers frozen weights, ``training`` the traffic
    that sums gradients."""

    flops: float
    weights: Traffic = Traffic()
    training: Traffic = Traffic()


def step_seconds(work: Work, cluster: Cluster, *, ranks_per_node: int, nodes: int, overlap: float = 0.0) -> float:
    """Return the seconds of one step on ``nodes`` nodes of ``ranks_per_node`` ranks, each of which does ``work``."""

    def travel(traffic: Traffic) -> float:
        inside = cluster.inside.seconds(traffic.messages, traffic.inside, ranks_per_node)
        crossing = traffic.messages if traffic.between else 0.0
        return inside + cluster.between.seconds(crossing, traffic.between, nodes)

    compute, gathers = work.flops / cluster.flops_per_second, travel(work.weights)
    hidden = overlap * min(compute, gathers)
    return cluster.fixed + compute + gathers - hidden + travel(work.training)


@dataclass(frozen=True)
class Measurement:
    """``seconds`` of a step in which ``ranks`` ranks shared ``cores`` cores; each rank did ``work``."""

    name: str
    work: Work
    ranks: int
    cores: int
    seconds: float

    @property
    def share(self) -> float:
        """The number of ranks per core, at least 1: a core does their work, including gloo's copies, sequentially."""
        return max(1.0, self.ranks / self.cores)

    def terms(self) -> np.ndarray:
        """Return the coefficients of fixed, 1 / FLOP/s, latency and 1 / bandwidth (inside a node)."""
        both = [self.work.weights, self.work.training]
        hops = math.ceil(math.log2(self.ranks)) if self.ranks > 1 else 0
        return self.share * np.array(
            [1.0, self.work.flops, hops * sum(t.messages for t in both), sum(t.inside for t in both)]
        )


def fit(measurements: Sequence[Measurement]) -> Cluster:
    """Return the cluster that explains the measurements best: least squares of relative errors, no negative term."""
    rows = np.array([each.terms() / each.seconds for each in measurements])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    fixed, per_flop, latency, per_byte = found / scale
    link = Link(latency, 1 / per_byte if per_byte else math.inf)
    return Cluster(1 / per_flop if per_flop else math.inf, fixed, link, link)


def predicted(each: Measurement, cluster: Cluster) -> float:
    """Return the seconds that the model predicts for a measurement."""
    shared = replace(
        cluster,
        flops_per_second=cluster.flops_per_second / each.share,
        fixed=cluster.fixed * each.share,
        inside=Link(cluster.inside.latency * each.share, cluster.inside.bytes_per_second / each.share),
    )
    return step_seconds(each.work, shared, ranks_per_node=each.ranks, nodes=1)


def left_out(measurements: Sequence[Measurement]) -> list[float]:
    """Return the relative error of each measurement's prediction from the other measurements alone."""
    errors = []
    for index, each in enumerate(measurements):
        cluster = fit([other for place, other in enumerate(measurements) if place != index])
        errors.append(predicted(each, cluster) / each.seconds - 1)
    return errors
