"""Simulate which weights DeepSpeed's ZeRO-3 holds gathered on a rank during a micro-batch, and what it gathers.

This is a model of ``PartitionedParameterCoordinator`` (DeepSpeed 0.19.8,
runtime/zero/partitioned_param_coordinator.py) in its steady state: from the third training step on it knows the order
of the modules. Before a module runs, the coordinator gathers the weights of the module, and prefetches those of the
next modules up to ``prefetch_bucket_size`` numbers. Afterwards it releases the weights, unless the forward or backward
pass uses them again within ``max_reuse_distance`` numbers. It decides this once, by the first complete order of modules
that it sees (``functools.lru_cache`` on ``__params_to_release``); `Shards.forget_passes` makes that the order of a
training step. Weights of up to ``param_persistence_threshold`` numbers are never released.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple


class Use(NamedTuple):
    """A module begins (``fetch``) or ends (``release``), in a forward or a ``backward`` pass."""

    kind: Literal["fetch", "release"]
    module: int
    backward: bool = False


@dataclass(frozen=True)
class Weight:
    """The storage of a frozen parameter: ``numel`` numbers of ``itemsize`` bytes."""

    numel: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's ``zero_optimization`` keys without the prefix ``stage3_``, in numbers, with DeepSpeed's defaults."""

    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def read(cls, zero3: dict[str, Any] | None) -> Limits:
        """Read the limits from a DeepSpeed configuration; missing keys and ``"auto"`` mean the defaults."""
        section = (zero3 or {}).get("zero_optimization", {})
        found = {name: section.get(f"stage3_{name}", section.get(name)) for name in cls.__dataclass_fields__}
        return cls(**{name: int(value) for name, value in found.items() if isinstance(value, int | float)})


class Moment(NamedTuple):
    """Bytes of gathered weights: ``live`` until the next use, ``while_gathering`` briefly before that."""

    live: int
    while_gathering: int


class Gathered(NamedTuple):
    """The gathers of a micro-batch.

    ``moments``: one after each use; ``nbytes``: bytes gathered per micro-batch, padded to whole shards.
    """

    moments: list[Moment]
    nbytes: int


class _Bucket:
    """Weights that one collective gathers.

    Several weights are copied out of its buffer, which is freed when all of them have been copied.
    """

    def __init__(self, members: Iterable[int], weights: Sequence[Weight], group: int) -> None:
        self.members = set(members)
        self.padded = sum(-(-weights[i].numel // group) * group * weights[i].itemsize for i in self.members)
        self.buffer = self.padded if len(self.members) > 1 and group > 1 else 0
        self.arrived = False


class _Coordinator:
    def __init__(self, weights: Sequence[Weight], modules: Sequence[Sequence[int]], uses: Sequence[Use], group: int,
                 limits: Limits, stages: bool) -> None:  # fmt: skip
        self.stages, self.staged = stages, 0
        self.weights, self.modules, self.group, self.limits = weights, modules, group, limits
        fetches = [use for use in uses if use.kind == "fetch"]
        self.order = [use.module for use in fetches]
        numels = [sum(weights[i].numel for i in modules[module]) for module in self.order]
        self.before = [0, *accumulate(numels)]
        self.steps_of: dict[int, list[int]] = {}
        for step, module in enumerate(self.order):
            for weight in modules[module]:
                self.steps_of.setdefault(weight, []).append(step)
        self.persistent = {i for i, w in enumerate(weights) if w.numel <= limits.param_persistence_threshold}
        self.available: set[int] = set()
        self.in_flight: dict[int, _Bucket] = {}
        self.settled: dict[tuple[int, int], set[int]] = {}  # which weights a module releases at a step
        self.nbytes = 0
        self.begin()

    def begin(self) -> None:
        """Begin the next forward pass."""
        self.step = self.live_numel = 0
        self.in_flight.clear()
        self.queue = [(step, weight) for step, module in enumerate(self.order) for weight in self.modules[module]]
        self.queue.reverse()
        self.fetched_for: dict[int, int] = {}
        self.active: dict[int, set[int]] = {}

    def use(self, use: Use) -> Moment:
        if use.kind == "release":
            self._release(use.module)
            return Moment(self._live(), 0)
        return self._fetch(use.module)

    def _live(self) -> int:
        buffers = {id(bucket): bucket for bucket in self.in_flight.values()}.values()
        # A gather in flight has a buffer; after arrival its weights exist as copies in addition to the buffer.
        coming = sum(0 if bucket.arrived else max(bucket.padded - bucket.buffer, 0) for bucket in buffers)
        return sum(self.weights[i].nbytes for i in self.available) + coming + sum(bucket.buffer for bucket in buffers)

    def _gather(self, members: set[int]) -> None:
        if members:
            bucket = _Bucket(members, self.weights, self.group)
            self.nbytes += bucket.padded
            self.staged += bucket.padded if self.stages else 0
            self.live_numel += sum(self.weights[i].numel for i in members)
            self.in_flight.update(dict.fromkeys(members, bucket))

    def _fetch(self, module: int) -> Moment:
        needed = set(self.modules[module])
        self._gather({i for i in needed if i not in self.available and i not in self.in_flight})
        peak = 0
        for weight in needed:
            self.active.setdefault(weight, set()).add(module)
            bucket = self.in_flight.get(weight)
            if bucket is not None:
                if not bucket.arrived:
                    bucket.arrived = True
                    self.available |= bucket.members
                    peak = max(peak, self._live())
                del self.in_flight[weight]
        self._prefetch({i for i in needed if self.fetched_for.get(i, -1) < self.step})
        self.step += 1
        live = self._live()
        staged, self.staged = self.staged, 0
        return Moment(live, max(peak, live + staged))

    def _prefetch(self, unexpected: set[int]) -> None:
        while self.queue and unexpected:
            step, weight = self.queue.pop()
            self.fetched_for[weight] = step
            unexpected.discard(weight)
        room = min(self.limits.max_live_parameters - self.live_numel, self.limits.prefetch_bucket_size)
        chosen: set[int] = set()
        numel = 0
        while self.queue and numel < room:
            step, weight = self.queue.pop()
            self.fetched_for[weight] = max(self.fetched_for.get(weight, -1), step)
            if weight not in self.available and weight not in self.in_flight and weight not in chosen:
                chosen.add(weight)
                numel += self.weights[weight].numel
        self._gather(chosen)

    def _release(self, module: int) -> None:
        if (module, self.step) not in self.settled:
            self.settled[module, self.step] = {i for i in self.modules[module] if not self._used_soon(i)}
        for weight in self.modules[module]:
            self.active.get(weight, set()).discard(module)
            if weight in self.available and not self.active.get(weight) and weight in self.settled[module, self.step]:
                self.available.discard(weight)
                self.live_numel -= self.weights[weight].numel

    def _used_soon(self, weight: int) -> bool:
        if weight in self.persistent or self.fetched_for.get(weight, -1) > self.step:
            return True
        steps = self.steps_of[weight]
        following = bisect_left(steps, self.step)
        return following < len(steps) and (
            self.before[steps[following]] - self.before[self.step] < self.limits.max_reuse_distance
        )


def gathers(
    weights: Sequence[Weight],
    modules: Sequence[Sequence[int]],
    uses: Sequence[Use],
    group: int,
    limits: Limits,
    *,
    stages: bool = False,
) -> Gathered:
    """Simulate the gathers of a micro-batch on a rank of a group of ``group`` ranks.

    ``modules``: for each module the indices of its own weights; ``uses``: the uses of a micro-batch, in order.
    ``stages``: the collective first gathers into a separate tensor, as gloo's does (newLikeFlat in ProcessGroupGloo).
    """
    coordinator = _Coordinator(weights, modules, uses, group, limits, stages)
    for use in uses:  # the first micro-batch only sets the state with which the second one begins
        coordinator.use(use)
    coordinator.begin()
    coordinator.nbytes = 0
    return Gathered([coordinator.use(use) for use in uses], coordinator.nbytes)
