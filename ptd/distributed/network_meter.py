"""Count the bytes on the network from the collectives that actually run.

The count assumes ring algorithms over the ranks of a group in order: every rank sends to the next one, and its bytes
cross between nodes if the next rank is on another node. For a buffer of b bytes over n ranks each rank sends
2(n−1)/n·b in an all-reduce and (n−1)/n·b in an all-gather or reduce-scatter whose full buffer is b. In a broadcast each
rank except the last sends b along the ring, from the source to the rank before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptd.distributed.ranks import Ranks

_C10D: Any = torch._C._distributed_c10d
PLACES = ("inside_nodes", "between_nodes")
SOURCES = ("prompt", "backbone")
FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
}
KEYS = [(place, source, kind) for place in PLACES for source in SOURCES for kind in FACTORS]
"""The keys of the byte counts: place, source and collective."""

# Operation -> its collective, and the index of the argument with the full buffer or all of its parts.
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),  # functional: a shard, followed by the number of shards
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "broadcast_": ("broadcast", 0),
}
_SILENT = {"wait_tensor", "barrier", "monitored_barrier_", "_wrap_tensor_autograd"}
"""Operations of the same namespaces that send no or negligible data."""
# DeepSpeed function -> its collective, its leading parameters, and the name of the parameter with the full buffer.
_DEEPSPEED = {
    "all_gather_into_tensor": ("all_gather", ("output_tensor", "input_tensor", "group"), "output_tensor"),
    "all_gather": ("all_gather", ("tensor_list", "tensor", "group"), "tensor_list"),
    "all_reduce": ("all_reduce", ("tensor", "op", "group"), "tensor"),
    "broadcast": ("broadcast", ("tensor", "src", "group"), "tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", ("output_tensor", "input_tensor", "op", "group"), "input_tensor"),
}


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))


class NetworkMeter(TorchDispatchMode):
    """A context manager that counts the bytes that this rank sends in collectives into ``sent``, by `KEYS`.

    Collectives that run inside it count as ``prompt``, those that `metered_deepspeed` sees as ``backbone``.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent: defaultdict[tuple[str, str, str], float] = defaultdict(float)

    def add(self, source: str, kind: str, size: int, members: list[int], root: int = 0) -> None:
        """Count a collective of ``size`` bytes over ``members``, the ranks in group order (``root``: an index)."""
        own = members.index(self.ranks.rank)
        following = (own + 1) % len(members)
        if len(members) == 1 or (kind == "broadcast" and following == root):
            return
        apart = self.ranks.node_of(members[following]) != self.ranks.node_of(self.ranks.rank)
        self.sent[PLACES[apart], source, kind] += FACTORS[kind](len(members)) * size

    def take(self) -> dict[tuple[str, str, str], float]:
        """Return the bytes that this rank sent since the last call, and reset the counts."""
        taken = dict(self.sent)
        self.sent.clear()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # modes run before subclasses: first let DTensor run its collectives
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in _SILENT:
                kind, buffer = _OPERATIONS[name]
                size = _bytes(args[buffer]) * (int(args[1]) if name == "all_gather_into_tensor" else 1)
                self.add("prompt", kind, size, _members(args), int(args[2]) if kind == "broadcast" else 0)
        return func(*args, **(kwargs or {}))


def _members(args: Any) -> list[int]:
    """Return the ranks of the process group among an operation's arguments."""
    group = None
    for value in args:
        if isinstance(value, str) and value not in ("sum", "avg", "min", "max"):
            group = _C10D._resolve_process_group(value)
        elif isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            group = dist.ProcessGroup.unbox(value)
    return dist.get_process_group_ranks(group)


def summary(ranks: Ranks, sent: dict[tuple[str, str, str], float], own_seconds: float, steps: int) -> dict[str, Any]:
    """Return the record fields for the bytes sent by all ranks and the working time per rank, as means over ``steps``.

    ``own_seconds``: working time of this rank, summed over these steps. Every rank calls this together.
    """
    *sent_by_key, seconds = zip(*ranks.gather([*(sent.get(key, 0.0) for key in KEYS), own_seconds]), strict=True)
    bytes_of = {key: round(sum(each) / steps) for key, each in zip(KEYS, sent_by_key, strict=True)}
    nested: dict[str, Any] = {}
    for (place, source, kind), size in bytes_of.items():
        if size:
            nested.setdefault(place, {}).setdefault(source, {})[kind] = size
    return {
        "network_bytes": sum(bytes_of.values()),
        **{f"network_bytes_{name}": sum(size for key, size in bytes_of.items() if name in key) for name in SOURCES},
        "network_bytes_between_nodes": sum(size for key, size in bytes_of.items() if "between_nodes" in key),
        "network": nested,
        **(_slowest([each / steps for each in seconds]) if ranks.world_size > 1 else {}),
    }


def _slowest(seconds: list[float]) -> dict[str, Any]:
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "slowest_rank": slowest,
        "slowest_rank_seconds": seconds[slowest],
        "mean_rank_seconds": sum(seconds) / len(seconds),
    }


@contextmanager
def metered_deepspeed(meter: NetworkMeter) -> Iterator[None]:
    """Also count what DeepSpeed's communication backend sends (source ``backbone``)."""
    from deepspeed.comm import comm

    backend = comm.cdb
    if backend is None:
        yield
        return

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        kind, parameters, buffer = _DEEPSPEED[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            members = dist.get_process_group_ranks(given.get("group"))
            root = members.index(given["src"]) if kind == "broadcast" else 0
            meter.add("backbone", kind, _bytes(given[buffer]), members, root)
            return call(*args, **kwargs)

        return counted

    for name in _DEEPSPEED:
        setattr(backend, name, counting(name, getattr(backend, name)))
    try:
        yield
    finally:
        for name in _DEEPSPEED:
            delattr(backend, name)
