"""The processes of a run: who this one is, the process group, and how work done on one rank reaches the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from ptd.types import PromptEncoder, UserError

T = TypeVar("T")
TIMEOUT = "PTD_TIMEOUT_MINUTES"
"""Environment variable: after so long without the others a collective fails instead of waiting for ever; default 30."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, *, needs_group: bool = False) -> Ranks:
        """Read the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR …) and join the process group.

        A single process joins a group only if ``needs_group`` (ZeRO-3 wants one even alone).
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            if "OMP_NUM_THREADS" not in os.environ and world_size > 1:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        if (world_size > 1 or needs_group) and not dist.is_initialized():
            if world_size == 1:
                _describe_single_process()
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=collective_timeout())
        return cls(rank, world_size, local_world_size, device)

    @staticmethod
    def free_port() -> int:
        """A TCP port that nothing on this machine listens on."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks of this node: the mesh a wide encoder layer is split over."""
        nodes, uneven = divmod(self.world_size, self.local_world_size)
        if nodes == 1 or uneven:
            return init_device_mesh(self.device.type, (self.world_size,))
        names = ("node", "local")
        return init_device_mesh(self.device.type, (nodes, self.local_world_size), mesh_dim_names=names)["local"]

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

    def shard_group(self, sharding: str, size: int | None) -> dist.ProcessGroup | None:
        """The ranks that share one copy of the backbone with this one; None: all of them.

        ``sharding: node``: consecutive ranks, ``size`` of them or those of a node. Every rank calls this together.
        Raises `UserError` if the ranks do not divide into such groups.
        """
        if sharding != "node":
            return None
        size = size or self.local_world_size
        if self.world_size % size:
            raise UserError(
                f"backbone.sharding_group_size: {self.world_size} ranks do not divide into groups of {size}; "
                "give a size that divides them, or set backbone.sharding: world"
            )
        own: dist.ProcessGroup = dist.new_subgroups(size)[0]
        return own

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

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
                    dist.broadcast_object_list(broken, src=0, device=self.device)
                raise
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])


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
