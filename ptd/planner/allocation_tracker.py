"""Record allocations over time and floating-point operations of code that runs on tensors without data.

Under torch's ``FakeTensorMode`` every operation runs on shapes alone. `Allocations` is a dispatch mode around it: it
counts the live storages by category, and supplies results that would need data.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
SMALL = 1 << 16
"""Integer tensors from factory functions keep their data if they are smaller than this many numbers: lengths,
positions, sequence boundaries."""
_FACTORIES = {aten.arange, aten.zeros, aten.ones, aten.full, aten.empty, aten.randperm, aten.scalar_tensor}


def _grouped_mm(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Return a tensor of the product's shape, ``[T, K]`` by ``[experts, K, N]``.

    torch's own shape rule accepts bfloat16 only.
    """
    assert a.ndim == 2
    assert b.ndim == 3
    return a.new_empty(a.shape[0], b.shape[2])


_SHAPES = {aten._grouped_mm: _grouped_mm}


@dataclass(frozen=True)
class Interval:
    """The time between two events, with the live bytes by category at its peak.

    ``event``: what ended the interval (see `Allocations.mark`); ``peak``: category -> bytes at the peak; ``start``: the
    same at the beginning of the interval.
    """

    event: Any
    peak: dict[str, int]
    start: dict[str, int]


class Allocations(TorchDispatchMode):
    """A dispatch mode that counts allocations; enter it inside ``FakeTensorMode(allow_non_fake_inputs=True)``.

    Tensors whose values matter (the integers of a batch) may be real: operations on real tensors only are executed.
    Scalars read from tensors without data are 1, booleans are False.

    Args:
        granularity: allocations are rounded up to multiples of these bytes (512 in torch's CUDA allocator).
        workspaces: operator (overload packet) -> bytes it allocates internally, from its arguments and its result.
        flops: operator -> floating-point operations, in addition to those in torch's ``flop_registry``.
    """

    def __init__(
        self,
        granularity: int = 1,
        workspaces: dict[Any, Callable[..., int]] | None = None,
        flops: dict[Any, Callable[..., int]] | None = None,
    ) -> None:
        super().__init__()
        self.granularity, self.workspaces = granularity, workspaces or {}
        self.flop_formulas = flops or {}
        self.flops = 0
        self.timeline: list[Interval] = []
        self.category = "activations"
        self.classify: Callable[[Tensor], str | None] = lambda tensor: None
        self._alive: Counter[str] = Counter()
        self._total = self._peak_total = 0
        self._peak: dict[str, int] = {}
        self._start: dict[str, int] = {}
        self._known: dict[int, tuple[Any, str, int]] = {}

    @contextmanager
    def kind(self, category: str) -> Iterator[None]:
        """Count everything allocated inside as ``category``."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def own(self, tensors: Any, category: str) -> None:
        """Count the storages of these tensors as ``category``, even if they were counted before."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, FakeTensor):
                self._forget(_key(tensor))
                self._add(tensor, category)

    def mark(self, event: Any) -> None:
        """End the current interval of the timeline with ``event``."""
        self.timeline.append(Interval(event, self._peak, self._start))
        self._start = dict(self._alive)
        self._peak, self._peak_total = self._start, self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # the most frequent call by far
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        args, answer = self._without_data(func, args, kwargs)
        if answer is not None:
            return answer[0]
        packet = func.overloadpacket
        out = _SHAPES[packet](*args, **kwargs) if packet in _SHAPES else func(*args, **kwargs)
        if packet in _FACTORIES and isinstance(out, FakeTensor) and not out.is_floating_point() and out.numel() < SMALL:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._add(tensor, self.classify(tensor) or self.category)
        if packet in self.workspaces:
            self._peek(self.workspaces[packet](*args, **kwargs, out_val=out))
        formula = self.flop_formulas.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out

    def _without_data(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[Any] | None]:
        """Return the arguments, changed so that no data is needed, and the result in a tuple if it is known already."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        packet = func.overloadpacket
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return args, (func(*args, **kwargs),)
        if packet is aten._local_scalar_dense:
            dtype = args[0].dtype
            return args, (False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1,)
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
            indices: list[Any] = []
            for index in args[1]:  # a real mask has values, so the positions it selects are known
                if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
                    with unset_fake_temporarily():
                        indices += index.nonzero().unbind(1)
                else:
                    indices.append(index)
            return (args[0], indices, *args[2:]), None
        return args, None

    def _add(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = math.ceil(storage.nbytes() / self.granularity) * self.granularity
        self._known[key] = weakref.ref(storage, partial(self._freed, key)), category, size
        self._alive[category] += size
        self._total += size
        self._peek(0)

    def _peek(self, workspace: int) -> None:
        if self._total + workspace > self._peak_total:
            self._peak_total = self._total + workspace
            self._peak = dict(self._alive)
            if workspace:
                self._peak[self.category] = self._peak.get(self.category, 0) + workspace

    def _freed(self, key: int, _: Any) -> None:
        self._forget(key)

    def _forget(self, key: int) -> None:
        if key in self._known:
            _, category, size = self._known.pop(key)
            self._alive[category] -= size
            self._total -= size


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
