"""Shard a frozen backbone: every rank of a group holds its part of each weight, and DeepSpeed gathers layer by layer.

Loading needs no communication. Each rank reads each weight (from memory-mapped files, so only the pages of its own
shard unless the dtype changes), passes it to DeepSpeed, which keeps this rank's part, and drops the rest before it
reads the next weight. So no rank ever holds more than its shards and one whole weight. Checksums of the weights that
were read verify the shards.
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
from ptd.types import UserError, is_partitioned

with redirect_stdout(sys.stderr):  # DeepSpeed's logger picks its stream at import; stdout is for ptd's results
    import deepspeed

Group = dist.ProcessGroup | None
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element size in bytes -> the integer dtype of that size, to sum the bits of elements."""

PIECE = {"cpu": 2**16, "cuda": 2**24}
"""Numbers summed at a time: torch widens them first, and larger temporaries fragment the heap on a CPU."""


@dataclass(frozen=True)
class _Weight:
    """A weight after reading: its place in the model and, on the rank that summed it, the checksum of each part."""

    module: nn.Module
    name: str
    parameter: Any
    sums: list[int] | None


class Shards:
    """Receive the weights of one model and keep this rank's part of each.

    ``zero3``: DeepSpeed's configuration (stage 3); ``group``: the ranks that share one copy (None: all). Usage::

        shards = Shards(zero3, group)
        with shards.receiving():
            model = …  # built on the meta device, weights put in one by one, as transformers' from_pretrained does
        shards.run(model)

    Every rank of the group does this together. Afterwards parameters have shape ``[0]`` and a ``ds_tensor``. Raises
    `UserError` if the NVMe operator cannot be compiled.
    """

    def __init__(self, zero3: dict[str, Any], group: Group = None, *, dtype: torch.dtype = torch.float32) -> None:
        make_ready()
        # Pinned memory is for copies to a GPU; without a GPU DeepSpeed would compile an operator for it.
        if not torch.cuda.is_available():
            zero3 = copy.deepcopy(zero3)
            zero3["zero_optimization"].get("offload_param", {})["pin_memory"] = False
        self.zero3, self.group = zero3, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        offload = zero3["zero_optimization"].get("offload_param", {}).get("device")
        if offload == "nvme" and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible():
            raise UserError(
                "backbone.offload: nvme reads the disk with an operator that DeepSpeed compiles, and compiling it "
                "needs libaio and a compiler (Debian: apt install libaio-dev g++); install them, or set "
                "backbone.offload: cpu"
            )
        # Only the buffers of NVMe offload use the dtype. With a module (here an empty one) zero.Init also installs the
        # linear function that keeps no reference to a gathered weight between forward and backward pass.
        flags = {"bf16": {"enabled": dtype is torch.bfloat16}, "fp16": {"enabled": dtype is torch.float16}}
        self._zero = deepspeed.zero.Init(
            module=nn.Module(), data_parallel_group=group, config_dict_or_path={**zero3, **flags}
        )
        self._weights: list[_Weight] = []
        self._offload: Any = None

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While active, partition every parameter with values (not on the meta device) that a module registers."""
        # Otherwise transformers reads ahead from several threads, without a limit.
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
        if parameter is None or parameter.is_meta or is_partitioned(parameter):
            return
        parameter.requires_grad_(False)
        sums = None
        if len(self._weights) % self.size == self.rank:  # one rank sums each weight, so that each rank reads little
            part = -(-parameter.numel() // self.size)
            flat = parameter.data.reshape(-1)
            sums = [checksum(flat[rank * part : (rank + 1) * part]) for rank in range(self.size)]
        self._zero._convert_to_deepspeed_param(parameter)
        parameter.partition()
        parameter.data = parameter.data.to(self._zero.local_device)
        self._weights.append(_Weight(module, name, parameter, sums))

    def run(self, model: nn.Module) -> None:
        """Check every shard, and let DeepSpeed gather each layer when it is used.

        Without trainable parameters DeepSpeed builds only a parameter offloader and no optimizer; call the model itself
        and ``loss.backward()``. Raises `UserError` if ranks read different files, `RuntimeError` if a shard differs
        from the weight that was read.
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
        """Make DeepSpeed decide again, from the next passes, which weights to keep between forward and backward pass.

        DeepSpeed decides this by the first complete order of modules that it sees, and caches the decision. After a
        forward pass without a backward pass it would keep nothing and gather each weight twice in every later step.
        """
        coordinator = self._offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        settled = type(coordinator)._PartitionedParameterCoordinator__params_to_release
        for cell in settled.__closure__ or ():  # a decorator hides the cache
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()

    def _untie_different(self) -> None:
        """Untie weights that the loader tied although they differ in the checkpoint.

        The loader compares weights before it ties them, and all partitioned weights look the same to it.
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
            here = ", ".join(wrong[:5]) if wrong else "none on this rank; another rank names its own"
            raise RuntimeError(f"rank {dist.get_rank()}: these shards differ from the weights that were read: {here}")

    def _kept(self, parameter: Any) -> int:
        """Return the checksum of this rank's part of a parameter, without DeepSpeed's padding."""
        shard = part_of(parameter)
        return checksum(shard[: max(0, min(shard.numel(), parameter.ds_numel - self.rank * shard.numel()))])


@contextmanager
def gathered_parameter(parameter: Any) -> Iterator[None]:
    """Gather a sharded parameter on every rank while active. Every rank of its group enters together."""
    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def _gather(value: Any, group: Group = None) -> list[Any]:
    """Return the value of every rank of the group, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def checksum(values: Tensor) -> int:
    """Return the sum of the elements' bits, each read as an integer of its width, modulo 2**64; for any dtype."""
    if not values.numel():
        return 0
    bits = values.view(BITS[values.element_size()])
    pieces = bits.split(PIECE[values.device.type])
    return int(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum())


def make_ready() -> None:
    """Set DeepSpeed's defaults before its first use."""
    # The shared-memory op is only for all-reduces of CPU inference; building it needs a compiler and takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)
