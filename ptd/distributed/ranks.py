"""Manage the processes of a run: this process's rank, the process groups, and communication between ranks."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import pad

from ptd.config import BackboneConfig
from ptd.distributed.long_work import LongWork
from ptd.distributed.rendezvous import Participant, join_group
from ptd.types import PromptEncoder, UserError

T = TypeVar("T")
TIMEOUT = "PTD_TIMEOUT_MINUTES"
"""Environment variable: minutes that a collective waits for the other ranks before it fails; default 30."""
SMALL = 1024
"""Up to this many bytes a sum over nodes is one collective: the latency of three costs more than they save."""

# torch 2.13 renamed these functions; the older names warn there.
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
    """Whether `start` joined the process group, so that `stop` has to leave it."""
    _groups: dict[int, ProcessGroup] = field(default_factory=dict, init=False, repr=False, compare=False)
    _long_works: Iterator[int] = field(default_factory=count, init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, *, needs_group: bool = False) -> Ranks:
        """Read the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR …) and join the process group.

        A single process joins a group only if ``needs_group`` (ZeRO-3 needs one even for a single process). Raises
        `UserError` if the ranks cannot run together, `RankError` if this rank cannot reach the others.
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
                os.environ[name] = str(local_rank)  # DeepSpeed uses the GPU of this number; both have to be equal
        joins = (world_size > 1 or needs_group) and not dist.is_initialized()
        if joins:
            if world_size == 1:
                _describe_single_process()
            join_group(Participant.this(rank, local_world_size, device), device, world_size, collective_timeout())
        if world_size > 1:
            # If nodes have different numbers of ranks, all ranks use their greatest common divisor.
            sizes: list[Any] = [None] * world_size
            dist.all_gather_object(sizes, local_world_size)
            local_world_size = math.gcd(*sizes)
        return cls(rank, world_size, local_world_size, device, joins)

    @staticmethod
    def free_port() -> int:
        """Return a TCP port that no process on this machine listens on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def stop(self) -> None:
        """Leave the process group, unless it existed before `start`."""
        if self.joined and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def nodes(self) -> int:
        """Number of nodes with ``local_world_size`` ranks each; 1 if that does not divide ``world_size``."""
        nodes, uneven = divmod(self.world_size, self.local_world_size)
        return 1 if uneven else nodes

    def node_of(self, rank: int) -> int:
        return rank // self.local_world_size

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The device mesh of this node's ranks, over which wide encoder layers are split."""
        if self.nodes == 1:
            return init_device_mesh(self.device.type, (self.world_size,))
        return DeviceMesh.from_group(self._consecutive(self.local_world_size), self.device.type)

    def shard_group(self, backbone: BackboneConfig) -> ProcessGroup | None:
        """Return the ranks that share one copy of a sharded ``backbone`` with this rank; None: all of them.

        A group has consecutive ranks. Every rank calls this together; each group is created once. Raises `UserError`
        as `BackboneConfig.ranks_per_copy` does.
        """
        size = backbone.ranks_per_copy(self.world_size, self.local_world_size)
        return None if size == self.world_size else self._consecutive(size)

    def _consecutive(self, size: int) -> ProcessGroup:
        """Return this rank's group of ``size`` consecutive ranks."""
        if size not in self._groups:
            starts = range(0, self.world_size, size)
            self._groups[size] = _own_group([list(range(start, start + size)) for start in starts])
        return self._groups[size]

    @cached_property
    def _counterparts(self) -> ProcessGroup:
        """The group of ranks with the same local rank, one from each node."""
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
        """Sum a tensor over all ranks, in place; the result is the same on all ranks, bit for bit.

        Over n nodes of l ranks: a reduce-scatter inside the node, an all-reduce of 1/l of the tensor between ranks with
        the same local rank, and an all-gather inside the node. 2(n−1)·bytes cross between nodes; one ring over all
        ranks would send 2(n−1/l)·bytes.
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
        """Return whether ``flag`` is true on any rank. Every rank calls this together."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for the other ranks' processes, but not for the work queued on their GPUs."""
        self.gather(None)

    def gather(self, value: T, /) -> list[T]:
        """Return the value of every rank, in rank order. Every rank calls this together."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T], *, long: bool = False) -> T:
        """Run ``work`` on rank 0; return its result, or raise its `UserError`, on every rank.

        Any other exception of ``work`` is a `RuntimeError` on the other ranks. ``long``: the work may take longer than
        a collective waits, so the other ranks wait as long as rank 0 is alive.
        """
        outcome: list[Any] = [None, None]
        waiting = None
        if long and self.world_size > 1:
            waiting = LongWork(self._notes, next(self._long_works), collective_timeout().total_seconds())
            if not self.is_main:
                waiting.wait()
        if self.is_main:
            try:
                outcome[0] = work() if waiting is None else waiting.run(work)
            except UserError as error:
                outcome[1] = error
            except Exception as error:  # the other ranks wait for an outcome of any kind
                if self.world_size > 1:
                    broken = [None, RuntimeError(f"rank 0 failed: {error!r}")]
                    dist.broadcast_object_list(broken, src=0)
                raise
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])

    @property
    def first_of_node(self) -> int:
        """The first rank of this rank's node, as `nodes` counts them."""
        return 0 if self.nodes == 1 else self.rank - self.rank % self.local_world_size

    def to_nodes(self, block: Tensor) -> None:
        """Send a CPU tensor of rank 0 to the first rank of every node, in place; the other ranks need not have it.

        Every rank calls this together, with a tensor of the same shape and dtype.
        """
        if self.nodes > 1:
            group = self._counterparts
            if self.rank == self.first_of_node:
                dist.broadcast(block, src=0, group=group)

    @cached_property
    def _notes(self) -> Store:
        if self.world_size == 1:
            return dist.HashStore()  # type: ignore[attr-defined]
        return PrefixStore("ptd-notes", _get_default_store())

    def leave(self, name: str, value: Any) -> None:
        """Store a JSON value under ``name`` for rank 0 to read later; no rank waits for another."""
        self._notes.set(f"{name}/{self.rank}", json.dumps(value))

    def left(self, name: str) -> list[Any] | None:
        """Return the values that all ranks stored under ``name``, in rank order; None if a value is missing."""
        notes = [f"{name}/{rank}" for rank in range(self.world_size)]
        return [json.loads(self._notes.get(note)) for note in notes] if self._notes.check(notes) else None

    def withdraw(self, name: str) -> None:
        """Delete the value that this rank stored under ``name``."""
        self._notes.delete_key(f"{name}/{self.rank}")


def device_of(local_rank: int) -> torch.device:
    """Return the device of the process with this local rank: the GPU of that number, or the only GPU that it sees.

    Slurm's ``--gpus-per-task`` and ``--gpu-bind`` show each process only its own GPU, as number 0. Raises `UserError`
    if the process sees several GPUs, but none with that number.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus > 1 and local_rank >= gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this process sees {gpus} GPUs, numbered from 0 (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}); start one process per GPU, and let each process see all "
            "GPUs of its node or exactly one"
        )
    return torch.device("cuda", 0 if gpus == 1 else local_rank)


def _own_group(groups: list[list[int]]) -> ProcessGroup:
    """Create these groups, in the same order on every rank; return the group of this rank."""
    group: ProcessGroup = dist.new_subgroups_by_enumeration(groups, timeout=collective_timeout())[0]
    return group


def collective_timeout() -> timedelta:
    """Return the process group's timeout; raise `UserError` if the environment variable is not a number of minutes."""
    given = os.environ.get(TIMEOUT, "30")
    try:
        limit = timedelta(minutes=float(given))
    except (ValueError, OverflowError):
        limit = timedelta(0)
    if limit < timedelta(seconds=1):
        raise UserError(
            f"{TIMEOUT}: got {given!r}, which is not a number of minutes of at least one second; correct it, or unset "
            "it for 30 minutes"
        )
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
