"""A frozen backbone in shards: every rank of a group keeps its part of each weight, DeepSpeed gathers layer by layer.

Loading communicates nothing. Each rank reads each weight (from mapped files, so only the pages of its own shard unless
the dtype changes), hands it to DeepSpeed, which keeps this rank's part, and drops the rest before it reads the next: no
rank ever holds more than its shard and one weight. What was kept is proved by checksums of what was read.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ptd.backbone import part_of
from ptd.types import UserError

with redirect_stdout(sys.stderr):  # where its logger writes is settled at import; stdout is for ptd's results
    import deepspeed

Group = dist.ProcessGroup | None
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as an element, to sum its bits."""

PIECE = {"cpu": 2**16, "cuda": 2**24}
"""Numbers summed at once: torch widens them first, and larger temporaries leave holes in a CPU's heap."""


@dataclass(frozen=True)
class _Weight:
    """A weight as it was read: where it went, and for the ranks whose turn it was, the checksum of each rank's part."""

    module: nn.Module
    name: str
    parameter: Any
    sums: list[int] | None


class Shards:
    """Receives the weights of one model and keeps this rank's part of each.

    ``zero3``: DeepSpeed's configuration (stage 3); ``group``: the ranks that share one copy (None: all). Use::

        shards = Shards(zero3, group)
        with shards.receiving():
            model = …  # built on the meta device, weights put in one by one, as transformers' from_pretrained does
        shards.run(model)

    Every rank of the group does so together. Afterwards parameters have shape ``[0]`` and a ``ds_tensor``.
    """

    def __init__(self, zero3: dict[str, Any], group: Group = None, *, dtype: torch.dtype = torch.float32) -> None:
        make_ready()
        if not torch.cuda.is_available():  # pinning is for copies to a GPU; elsewhere DeepSpeed compiles an op for it
            zero3 = copy.deepcopy(zero3)
            zero3["zero_optimization"].get("offload_param", {})["pin_memory"] = False
        self.zero3, self.group = zero3, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        offload = zero3["zero_optimization"].get("offload_param", {}).get("device")
        if offload == "nvme" and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible():
            raise UserError(
                "backbone.offload: the disk is read by an operator that DeepSpeed compiles, which needs libaio and "
                "a compiler (Debian: apt install libaio-dev g++); install them, or set offload: cpu"
            )
        # The dtype matters to the buffers of NVMe offload alone. Given a module (here an empty one), it also puts in
        # the linear function that keeps no reference to a gathered weight between forward and backward.
        flags = {"bf16": {"enabled": dtype is torch.bfloat16}, "fp16": {"enabled": dtype is torch.float16}}
        self._zero = deepspeed.zero.Init(
            module=nn.Module(), data_parallel_group=group, config_dict_or_path={**zero3, **flags}
        )
        self._weights: list[_Weight] = []
        self._offload: Any = None

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Partition every parameter that a module gets off the meta device while this is active."""
        # transformers would otherwise read ahead, from several threads and without limit.
        before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        hook = register_module_parameter_registration_hook(self._receive)
        try:
            yield
        finally:
            hook.remove()
            if before is None:
                del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
            else:
                os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before

    @torch.no_grad()
    def _receive(self, module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is None or parameter.is_meta or hasattr(parameter, "ds_id"):
            return
        parameter.requires_grad_(False)
        sums = None
        if len(self._weights) % self.size == self.rank:  # each weight is summed by one rank, so that all read little
            part = -(-parameter.numel() // self.size)
            flat = parameter.data.reshape(-1)
            sums = [checksum(flat[rank * part : (rank + 1) * part]) for rank in range(self.size)]
        self._zero._convert_to_deepspeed_param(parameter)
        parameter.partition()
        parameter.data = parameter.data.to(self._zero.local_device)
        self._weights.append(_Weight(module, name, parameter, sums))

    def run(self, model: nn.Module) -> None:
        """Check every shard, and let DeepSpeed gather each layer when it is used.

        With nothing trainable DeepSpeed builds no optimizer, only a parameter offloader; call the model itself, and
        plain ``loss.backward()``. Raises `UserError` if a shard is not what was read, or if ranks read different files.
        """
        self._untie_different()
        self._check()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._zero.local_device))
        self._weights.clear()
        engine, *_ = deepspeed.initialize(model=model, config=self.zero3)
        self._offload = engine.optimizer

    def forget_passes(self) -> None:
        """Let the passes to come settle what is kept from forward to backward.

        DeepSpeed settles it by the first order of modules that it sees complete and keeps it in a cache. A pass without
        a backward one would have it keep nothing, and gather each weight twice a step ever after.
        """
        coordinator = self._offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        settled = type(coordinator)._PartitionedParameterCoordinator__params_to_release
        for cell in settled.__closure__ or ():  # the cache is below a decorator that does not show it
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()

    def _untie_different(self) -> None:
        """Take back what the loader has tied although the checkpoint holds different weights there.

        It compares weights before it ties them, and parted ones look all alike to it.
        """
        for weight in self._weights:
            now = getattr(weight.module, weight.name)
            if now is weight.parameter or not hasattr(now, "ds_tensor"):
                continue
            same = now.ds_shape == weight.parameter.ds_shape and torch.equal(part_of(now), part_of(weight.parameter))
            if not self._all(same):
                setattr(weight.module, weight.name, weight.parameter)

    def _all(self, fact: bool) -> bool:
        return all(_gather(fact, self.group))

    def _check(self) -> None:
        own = {index: weight.sums for index, weight in enumerate(self._weights) if weight.sums is not None}
        read = [sums for _, sums in sorted(item for part in _gather(own, self.group) for item in part.items())]
        everywhere = _gather([sum(sums) for sums in read])
        if any(other != everywhere[0] for other in everywhere):
            raise UserError(
                "backbone.path: the ranks read different weights under this path; put the same checkpoint on every node"
            )
        wrong = [
            f"{type(weight.module).__name__}.{weight.name}"
            for weight, sums in zip(self._weights, read, strict=True)
            if self._kept(weight.parameter) != sums[self.rank]
        ]
        if not self._all(not wrong):
            raise RuntimeError(f"rank {dist.get_rank()}: shards that are not what was read: {', '.join(wrong[:5])}")

    def _kept(self, parameter: Any) -> int:
        """The checksum of this rank's part of a parameter, without DeepSpeed's padding."""
        shard = part_of(parameter)
        return checksum(shard[: max(0, min(shard.numel(), parameter.ds_numel - self.rank * shard.numel()))])


@contextmanager
def whole(parameter: Any) -> Iterator[None]:
    """Within it a sharded parameter is complete on every rank. Every rank of its group enters together."""
    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def _gather(value: Any, group: Group = None) -> list[Any]:
    """This value of every rank of the group, in their order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def checksum(values: Tensor) -> int:
    """Sum of the elements' bits, each as a signed integer of its width, modulo 2**64; of any dtype."""
    if not values.numel():
        return 0
    bits = values.view(BITS[values.element_size()])
    pieces = bits.split(PIECE[values.device.type])
    return int(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum())


def make_ready() -> None:
    """Settle DeepSpeed's defaults before it is first used."""
    # The shared-memory op serves CPU inference all-reduces only; building it needs a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)
