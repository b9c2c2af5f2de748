"""The processes of a run: who this one is, the process group, and how work done on one rank reaches the others."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import pad

from ptd.engine.meeting import Member, join
from ptd.types import PromptEncoder, UserError

T = TypeVar("T")
TIMEOUT = "PTD_TIMEOUT_MINUTES"
"""Environment variable: after so long without the others a collective fails instead of waiting for ever; default 30."""
SMALL = 1024
"""Bytes up to which a sum over nodes is one call: three would wait longer than the bytes they save take."""

# Renamed in torch 2.13; the older names warn there.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run. Rank r is on node ``r // local_world_size``."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    joined: bool = False
    """Whether it was these ranks that joined the process group, and are to leave it."""
    _groups: dict[int, ProcessGroup] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, *, needs_group: bool = False) -> Ranks:
        """Read the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR …) and join the process group.

        A single process joins a group only if ``needs_group`` (ZeRO-3 wants one even alone). Raises `UserError` for
        ranks that cannot run, `RankError` for one that does not find the others.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        device = device_of(local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            local_rank = device.index
        elif "OMP_NUM_THREADS" not in os.environ and world_size > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        if world_size > 1 or needs_group:
            for name in ("LOCAL_RANK", *{"OMPI_COMM_WORLD_LOCAL_RANK"}.intersection(os.environ)):
                os.environ[name] = str(local_rank)  # DeepSpeed takes the GPU of that number, and wants both the same
        joins = (world_size > 1 or needs_group) and not dist.is_initialized()
        if joins:
            if world_size == 1:
                _describe_single_process()
            join(Member.this(rank, local_world_size, device), device, world_size, collective_timeout())
        if world_size > 1:
            # Where nodes have different numbers of ranks all agree on what divides each of them.
            sizes: list[Any] = [None] * world_size
            dist.all_gather_object(sizes, local_world_size)
            local_world_size = math.gcd(*sizes)
        return cls(rank, world_size, local_world_size, device, joins)

    @staticmethod
    def free_port() -> int:
        """A TCP port that nothing on this machine listens on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def stop(self) -> None:
        """Leave the process group, unless it was there before."""
        if self.joined and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def nodes(self) -> int:
        """Nodes with ``local_world_size`` ranks each; 1 if the world is not made of such: then it is one."""
        nodes, uneven = divmod(self.world_size, self.local_world_size)
        return 1 if uneven else nodes

    def node_of(self, rank: int) -> int:
        return rank // self.local_world_size

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks of this node: the mesh a wide encoder layer is split over."""
        if self.nodes == 1:
            return init_device_mesh(self.device.type, (self.world_size,))
        return DeviceMesh.from_group(self._consecutive(self.local_world_size), self.device.type)

    def shard_group(self, sharding: str, group_size: int | None = None) -> ProcessGroup | None:
        """The ranks that hold one copy of a backbone with ``backbone.sharding``; None: all of them.

        ``node``: this rank's ``group_size`` consecutive ranks, by default those of its node. Every rank calls this
        together; a group is made once. Raises `UserError` if the ranks are not a multiple of the group.
        """
        size = group_size or self.local_world_size
        if sharding != "node" or size == self.world_size:
            return None
        if self.world_size % size:
            raise UserError(
                f"backbone.sharding_group_size: {self.world_size} ranks do not divide into groups of {size}; "
                "give a size that divides them, or set backbone.sharding: world"
            )
        return self._consecutive(size)

    def _consecutive(self, size: int) -> ProcessGroup:
        """This rank's group of ``size`` consecutive ranks."""
        if size not in self._groups:
            starts = range(0, self.world_size, size)
            self._groups[size] = _own_group([list(range(start, start + size)) for start in starts])
        return self._groups[size]

    @cached_property
    def _counterparts(self) -> ProcessGroup:
        """The ranks with this one's place on their node, one from each node."""
        local = self.local_world_size
        return _own_group([list(range(place, self.world_size, local)) for place in range(local)])

    def distribute(self, encoder: PromptEncoder) -> PromptEncoder:
        """Move the encoder to this rank's device and split its wide layers over the node's ranks.

        Layers with fewer rows or columns than there are ranks stay whole.
        """
        encoder.to(self.device)
        plan = dict(encoder.tensor_parallel_plan())
        sizes = [size for name in plan for weight in encoder.get_submodule(name).parameters() for size in weight.shape]
        if plan and self.world_size > 1 and min(sizes) >= self.mesh.size():
            parallelize_module(encoder, self.mesh, plan)
        return encoder

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place and the same on all of them bit for bit.

        Over n nodes of l ranks: reduce-scatter inside the node, all-reduce of 1/l between counterparts on the nodes,
        all-gather inside the node. 2(n−1)·bytes cross between nodes where one ring over all ranks sends 2(n−1/l).
        """
        if self.world_size == 1:
            return tensor
        if self.nodes == 1 or self.local_world_size == 1 or tensor.nbytes <= SMALL:
            dist.all_reduce(tensor)
            return tensor
        node, counterparts = self._consecutive(self.local_world_size), self._counterparts
        whole = pad(tensor.flatten(), (0, -tensor.numel() % self.local_world_size))
        share = whole.new_empty(whole.numel() // self.local_world_size)
        _reduce_scatter(share, whole, group=node)
        dist.all_reduce(share, group=counterparts)
        _all_gather(whole, share, group=node)
        return tensor.copy_(whole[: tensor.numel()].view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some rank. Every rank calls this together."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for the other ranks' processes, not for what their GPUs are at."""
        self.gather(None)

    def gather(self, value: T, /) -> list[T]:
        """This value of every rank, in their order. Every rank calls this together."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0; every rank returns its result, or raises the `UserError` it raised."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error
            except Exception as error:  # the others wait for an outcome, whatever it is
                if self.world_size > 1:
                    broken = [None, RuntimeError(f"rank 0 failed: {error!r}")]
                    dist.broadcast_object_list(broken, src=0)
                raise
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    @cached_property
    def _notes(self) -> Store:
        if self.world_size == 1:
            return dist.HashStore()  # type: ignore[attr-defined]
        return PrefixStore("ptd-notes", _get_default_store())

    def leave(self, name: str, value: Any) -> None:
        """Leave a value (of JSON) for rank 0, which finds it when it looks: no rank waits for another."""
        self._notes.set(f"{name}/{self.rank}", json.dumps(value))

    def left(self, name: str) -> list[Any] | None:
        """What all ranks left under ``name``, in their order; None: not all have."""
        notes = [f"{name}/{rank}" for rank in range(self.world_size)]
        return [json.loads(self._notes.get(note)) for note in notes] if self._notes.check(notes) else None

    def withdraw(self, name: str) -> None:
        """Take away what this rank left."""
        self._notes.delete_key(f"{name}/{self.rank}")


def device_of(local_rank: int) -> torch.device:
    """Where a process with this place on its node runs: on the GPU of that number, or the only one it sees.

    Slurm's ``--gpus-per-task`` and ``--gpu-bind`` show each process its own GPU alone, as number 0. Raises `UserError`
    if it sees several, and not that one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus > 1 and local_rank >= gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this process sees {gpus} GPUs, numbered from 0 (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}); start one process a GPU, with all GPUs of its node "
            "visible to it, or exactly one"
        )
    return torch.device("cuda", 0 if gpus == 1 else local_rank)


def _own_group(groups: list[list[int]]) -> ProcessGroup:
    """Make these groups, which every rank does in the same order; returns the one this rank is in."""
    group: ProcessGroup = dist.new_subgroups_by_enumeration(groups, timeout=collective_timeout())[0]
    return group


def collective_timeout() -> timedelta:
    """The process group's timeout; raises `UserError` unless the environment gives minutes, or nothing."""
    given = os.environ.get(TIMEOUT, "30")
    try:
        limit = timedelta(minutes=float(given))
    except (ValueError, OverflowError):
        limit = timedelta(0)
    if limit < timedelta(seconds=1):
        raise UserError(f"{TIMEOUT}: has to be a number of minutes, at least a second's worth; got {given!r}")
    return limit


def _describe_single_process() -> None:
    settings = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(Ranks.free_port()),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
