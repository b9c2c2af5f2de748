"""Estimate a traced step under a placement of the frozen weights: memory per rank, network bytes and cost per token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ptd.planner.step_trace import Trace
from ptd.planner.zero3_gathers import Gathered, Limits, Use, gathers

Quantization = Literal["none", "int8", "nf4", "fp8"]
Sharding = Literal["none", "world", "node"]
Offload = Literal["none", "cpu", "nvme"]

GIB = 1 << 30
GPU_CONTEXT_BYTES = 1 * GIB
"""CUDA context, loaded kernels, cuBLAS and NCCL workspaces: 0.5–1 GiB on A100 and H100, outside torch's allocator."""
FRAGMENTATION = 0.05
"""Memory that torch's caching allocator holds beyond its peak in blocks it cannot use then, as a share of that peak."""

# Only the order of the placements depends on these sustained (not peak) speeds of an A100/H100-class GPU with NVLink.
FLOPS_PER_SECOND = 3e14
MEMORY_BYTES_PER_SECOND = 2e12
NODE_BYTES_PER_SECOND = 1.5e11
"""Bandwidth from a rank to the other ranks of its node."""
NETWORK_BYTES_PER_SECOND = 2.5e10
"""Bandwidth from a node to the other nodes: 200 Gbit/s."""
HOST_BYTES_PER_SECOND = 2e10
"""Bandwidth from host memory to a GPU (PCIe 4)."""
NVME_BYTES_PER_SECOND = 5e9


@dataclass(frozen=True)
class Machine:
    """``nodes`` of ``ranks_per_node`` ranks each, with ``memory`` bytes per rank."""

    ranks_per_node: int
    nodes: int
    memory: int
    is_gpu: bool = True

    @property
    def world_size(self) -> int:
        return self.ranks_per_node * self.nodes

    @property
    def usable(self) -> int:
        """The part of ``memory``, in bytes, that the tensors of a step may use."""
        return int((self.memory - GPU_CONTEXT_BYTES) / (1 + FRAGMENTATION)) if self.is_gpu else self.memory


@dataclass(frozen=True)
class Placement:
    """The placement of the frozen weights: ``backbone.quantization``, ``sharding`` over ``group_size`` ranks, and
    ``offload``."""

    quantization: Quantization = "none"
    sharding: Sharding = "none"
    offload: Offload = "none"
    group_size: int = 1

    @property
    def name(self) -> str:
        parts: list[str] = [self.quantization] if self.quantization != "none" else []
        parts += [self.sharding] if self.sharding != "none" else []
        parts += [f"offload {self.offload}"] if self.offload != "none" else []
        return " + ".join(parts) or "none"

    @property
    def shards(self) -> bool:
        return self.group_size > 1 or self.offload != "none"


@dataclass(frozen=True)
class Estimate:
    """The estimate for one placement of a run. Bytes are per rank at the memory peak of a step; see `estimate`."""

    placement: Placement
    items: dict[str, int]
    host_bytes: int
    fits: bool
    largest_rows: int
    sent_inside: int
    sent_between: int
    seconds_per_token: float
    sent_for_weights: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.items.values())


ITEMS = ("weights", "gather_buffers", "activations", "logits", "encoder", "optimizer", "prompt")


def estimate(
    trace: Trace, placement: Placement, machine: Machine, *, rows: int, accumulation: int, limits: Limits
) -> Estimate:
    """Estimate the memory and traffic of a rank in a step of ``accumulation`` micro-batches of ``rows`` rows.

    ``items``: bytes at the peak; those of the encoder are its weights, gradients and the tensors of its passes.
    ``sent_inside``: bytes per step from a rank to others in its node; ``sent_between``: bytes per step from a node to
    other nodes, where each ring crosses once. ``largest_rows``: rows of the largest micro-batch that fits, if
    activations and logits grow with the rows.
    """
    gathered, static, host = None, trace.weight_bytes, 0
    if placement.shards:
        group = placement.group_size
        gathered = gathers(trace.weights, trace.modules, _uses(trace), group, limits, stages=not machine.is_gpu)
        shard = sum(math.ceil(weight.numel / group) * weight.itemsize for weight in trace.weights)
        on_device = shard if placement.offload == "none" else 0
        host = shard if placement.offload == "cpu" else 0
        static = trace.fixed_bytes + on_device
    moments = list(_moments(trace, gathered, static))
    items = max(moments, key=lambda moment: sum(moment.values()))
    inside, between = _sent_for_weights(placement, machine, gathered, accumulation)
    prompt_inside, prompt_between = _sent_for_training(trace, machine)
    fullest = min(_rows_that_fit(moment, machine.usable, rows) for moment in moments)
    fits = sum(items.values()) <= machine.usable
    return Estimate(
        placement,
        items,
        host,
        fits,
        max(rows, fullest) if fits else min(rows - 1, fullest),
        inside + prompt_inside,
        between + prompt_between,
        _seconds(trace, placement, machine, gathered, inside, between, accumulation),
        {"inside": inside, "between": between},
    )


def _uses(trace: Trace) -> list[Use]:
    return [interval.event for interval in trace.timeline if interval.event is not None]


def _moments(trace: Trace, gathered: Gathered | None, static: int) -> list[dict[str, int]]:
    """Return the items at the peak of each interval and during each gather."""
    found: list[dict[str, int]] = []
    steady = iter(gathered.moments) if gathered is not None else iter(())
    live = gathered.moments[-1].live if gathered is not None and gathered.moments else 0
    for interval, following in zip(trace.timeline, [*trace.timeline[1:], None], strict=True):
        found.append(_items(interval.peak, static, live))
        if interval.event is not None and gathered is not None:
            moment = next(steady)
            live = moment.live
            if following is not None and moment.while_gathering:
                found.append(_items(following.peak, static, moment.while_gathering))
    return found


def _items(alive: dict[str, int], weights: int, gather_buffers: int) -> dict[str, int]:
    own = {"weights": weights, "gather_buffers": gather_buffers}
    return {name: own[name] if name in own else alive.get(name, 0) for name in ITEMS}


def _rows_that_fit(items: dict[str, int], usable: int, rows: int) -> int:
    by_row = (items["activations"] + items["logits"]) / rows
    room = usable - sum(items.values()) + by_row * rows
    return 1 << 30 if by_row == 0 and room >= 0 else max(0, int(room // by_row)) if by_row else 0


def _sent_for_weights(
    placement: Placement, machine: Machine, gathered: Gathered | None, accumulation: int
) -> tuple[int, int]:
    """Return the bytes for weights that a rank sends inside its node and a node sends to others.

    An all-gather passes all shards but one along a ring.
    """
    if gathered is None or placement.group_size == 1:
        return 0, 0
    group = placement.group_size
    passed = accumulation * gathered.nbytes * (group - 1) // group
    return passed, passed if group > machine.ranks_per_node else 0


def _sent_for_training(trace: Trace, machine: Machine) -> tuple[int, int]:
    """Return the bytes for training that a rank sends inside its node and a node sends to others.

    The prompt's gradient (fp32) needs a reduce-scatter and an all-gather inside a node and an all-reduce of each rank's
    part between nodes. The sums of a split encoder stay inside a node; a head's gradient passes through all ranks.
    """
    local, nodes, world = machine.ranks_per_node, machine.nodes, machine.world_size
    prompt, flow, head = (4 * numel for numel in (trace.prompt_numel, trace.prompt_flow, trace.head_numel))
    around = 2 * (world - 1) * head // world
    inside = 2 * (local - 1) * (prompt + flow) // local + around
    between = 2 * (nodes - 1) * prompt // nodes + (around if nodes > 1 else 0)
    return inside, between


def _seconds(
    trace: Trace,
    placement: Placement,
    machine: Machine,
    gathered: Gathered | None,
    inside: int,
    between: int,
    accumulation: int,
) -> float:
    """Return the seconds per token of this rank: computation plus transfers of weights, without overlap."""
    tokens = max(1, trace.tokens) * accumulation
    seconds = accumulation * trace.flops / FLOPS_PER_SECOND
    if placement.quantization == "fp8":
        # Backward transposes the weights. The higher speed of fp8 products is not counted; it is not measured yet.
        turned = sum(weight.nbytes for weight in trace.weights if weight.itemsize == 1)
        seconds += accumulation * 2 * turned / MEMORY_BYTES_PER_SECOND
    elif placement.quantization != "none":
        # Each pass writes the weights in the compute dtype and reads them again.
        passes, stored = (2, 0.5) if placement.quantization == "nf4" else (1, 1.0)
        numbers = sum(weight.nbytes for weight in trace.weights if weight.itemsize == 1) / stored
        seconds += accumulation * passes * (stored + 4) * numbers / MEMORY_BYTES_PER_SECOND
    seconds += inside / NODE_BYTES_PER_SECOND + between / NETWORK_BYTES_PER_SECOND
    if placement.offload != "none" and gathered is not None:
        speed = HOST_BYTES_PER_SECOND if placement.offload == "cpu" else NVME_BYTES_PER_SECOND
        seconds += accumulation * gathered.nbytes / placement.group_size / speed
    return seconds / tokens
