"""Bytes on the network, counted from the collectives that really run.

The convention is that of ring algorithms: what one rank sends. For a buffer of b bytes over n ranks an all-reduce sends
2(n−1)/n·b, an all-gather or reduce-scatter of a full buffer of b bytes (n−1)/n·b, a broadcast b from its source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_C10D: Any = torch._C._distributed_c10d
FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
}
_KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
}
_SILENT = {"wait_tensor", "barrier", "monitored_barrier_", "_wrap_tensor_autograd"}
"""Operations of the same namespaces that send nothing worth counting."""


def _bytes(tensors: Any) -> int:
    return max((t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor)), default=0)


class NetworkMeter(TorchDispatchMode):
    """Counts collectives while it is active (a context manager) into ``sent``: bytes by ``(source, collective)``."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.sent: Counter[tuple[str, str]] = Counter()

    def add(self, source: str, kind: str, size: int, group_size: int) -> None:
        if group_size > 1:
            self.sent[source, kind] += round(FACTORS[kind](group_size) * size)

    def take(self) -> dict[str, int]:
        """Bytes by source (``prompt``, ``backbone``) since the last call."""
        total: Counter[str] = Counter()
        for (source, _), size in self.sent.items():
            total[source] += size
        self.sent.clear()
        return dict(total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # a mode comes before a subclass: let DTensor unfold into the collectives it needs first
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in _SILENT:
                self.add("prompt", _KINDS[name], self._payload(name, args), self._group_size(args))
        return func(*args, **(kwargs or {}))

    def _payload(self, name: str, args: Any) -> int:
        if name == "all_gather_into_tensor":  # functional: its argument is the shard
            return _bytes(args[0]) * int(args[1])
        return _bytes(args[:2])

    def _group_size(self, args: Any) -> int:
        for value in args:
            if isinstance(value, str) and value not in ("sum", "avg", "min", "max"):
                return int(_C10D._resolve_process_group(value).size())
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                return int(dist.ProcessGroup.unbox(value).size())
        return self.world_size


@contextmanager
def metered_deepspeed(meter: NetworkMeter) -> Iterator[None]:
    """Also count what DeepSpeed's own communication backend sends (source ``backbone``)."""
    from deepspeed.comm import comm

    backend = comm.cdb
    if backend is None:
        yield
        return
    watched = {
        "all_gather_into_tensor": "all_gather",
        "all_gather": "all_gather",
        "all_reduce": "all_reduce",
        "broadcast": "broadcast",
        "reduce_scatter_tensor": "reduce_scatter",
    }

    def counting(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            meter.add("backbone", kind, _bytes((args, kwargs)), dist.get_world_size(group))
            return call(*args, **kwargs)

        return counted

    for name, kind in watched.items():
        setattr(backend, name, counting(getattr(backend, name), kind))
    try:
        yield
    finally:
        for name in watched:
            delattr(backend, name)
