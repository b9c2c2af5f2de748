"""What a launch of a Triton kernel reads, writes and computes: from its source, its arguments and its tile.

`Launches` (gpu_model_trace.py) counts each tensor once that the source loads from or stores to, as for torch's
operations: programs that read the same rows run at the same time and share them in the L2 cache. A kernel that an
emulated GPU launches on shapes alone never runs, so its memory accesses cannot be observed. FLOPs are those that run:
the products of whole tiles, padded heads and keys included. Only ptd's attention has kernels with products.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import language as tl

Arguments = dict[str, Any]
Names = frozenset[str]
NOTHING: Names = frozenset()
ATOMIC = {name for name in dir(tl) if name.startswith("atomic_")}
"""Operations that read and write."""
DOT = {name for name in dir(tl) if name.startswith("dot")}


class Work(NamedTuple):
    """``read``, ``written``: the tensors; ``flops``; ``rate``: which of the GPU's rates bounds the FLOPs."""

    read: list[Tensor]
    written: list[Tensor]
    flops: int
    rate: str


def work_of(kernel: Callable[..., Any], arguments: Arguments) -> Work:
    """Return the work of a launch with these arguments by name.

    Raises `RuntimeError` for a kernel with products that is not in `TILE_PRODUCTS`.
    """
    found = touched(kernel, arguments)
    read, written = ([arguments[name] for name in names] for names in (found.loaded, found.stored))
    if not found.multiplies:
        return Work(read, written, 0, "memory")
    name = kernel.__name__
    if name not in TILE_PRODUCTS:
        raise RuntimeError(
            f"the model has no FLOPs for the Triton kernel {name}, which multiplies matrices; add it to TILE_PRODUCTS "
            "in benchmarks/gpu_model_triton.py"
        )
    products = TILE_PRODUCTS[name]
    of_keys = products.of_keys + bool(name == "short_prefix_kernel" and arguments["QUERIES"])
    channels = of_keys * arguments["BLOCK_D"] + products.of_values * arguments["BLOCK_E"]
    rate = "fp32" if arguments["q"].dtype == torch.float32 else products.rate
    return Work(read, written, 2 * channels * _pairs(name, arguments), rate)


# ---- FLOPs


class Products(NamedTuple):
    """Products per pair of a row and a key: over the channels of keys, and over those of values; with which keys."""

    of_keys: int
    of_values: int
    segments: tuple[str, ...]
    rate: str


BOTH = "prefix", "own"
TILE_PRODUCTS = {
    "forward_kernel": Products(1, 1, BOTH, "flash forward"),
    "decode_kernel": Products(1, 1, BOTH, "flash forward"),
    "query_gradient_kernel": Products(2, 1, BOTH, "flash backward"),
    "key_gradient_kernel": Products(2, 2, ("own",), "flash backward"),
    "prefix_gradient_kernel": Products(2, 2, ("prefix",), "flash backward"),
    "short_prefix_kernel": Products(2, 2, ("prefix",), "flash backward"),
}
"""ptd's attention kernels with products: of the scores, the output, dO V', dV, dK and dQ, those that the kernel has.
`short_prefix_kernel` has that of dQ only if it is asked for dQ."""


def _pairs(name: str, arguments: Arguments) -> int:
    """Return the pairs of a row and a key in the tiles of all heads; packed sequences are taken as equally long."""
    batch, heads, rows, _ = arguments["q"].shape
    block_rows, block_keys = arguments["BLOCK_M"], arguments["BLOCK_N"]
    sequences = arguments["cu_seqlens"].numel() - 1 if arguments.get("PACKED") else 1
    rows, keys = rows // sequences, arguments.get("T", 0) // sequences
    segments = TILE_PRODUCTS[name].segments
    prefix = arguments.get("P", 0) // max(1, arguments.get("num_prefixes", 0)) if "prefix" in segments else 0
    first_rows = range(0, rows, block_rows)
    if name == "decode_kernel":  # one tile has the rows of all heads that share a key
        heads, first_rows = heads // arguments["group"], range(1)
    tiles = len(first_rows) * math.ceil(prefix / block_keys)
    if "own" in segments:
        tiles += sum(_tiles_of_keys(first, rows, keys, arguments) for first in first_rows)
    return int(batch * heads * sequences * tiles * block_rows * block_keys)


def _tiles_of_keys(first: int, rows: int, keys: int, arguments: Arguments) -> int:
    """Return the tiles of own keys that the tile of rows from ``first`` on sees."""
    low, high = 0, keys
    if arguments["CAUSAL"]:
        high = min(keys, keys - rows + min(rows, first + arguments["BLOCK_M"]))
        if arguments["WINDOW"]:
            low = max(0, keys - rows + first - arguments["window"] + 1)
    return math.ceil(max(0, high - low) / arguments["BLOCK_N"])


# ---- memory


class Touched(NamedTuple):
    """The names of the tensors from which a kernel loads, of those to which it stores, and whether it multiplies."""

    loaded: Names
    stored: Names
    multiplies: bool


def touched(kernel: Callable[..., Any], arguments: Arguments) -> Touched:
    """Return what a launch accesses and whether it has matrix products.

    ``arguments``: the launch's arguments by name. A branch counts unless its condition is false for the arguments.
    """
    seen = _Accesses(kernel, {name: value for name, value in arguments.items() if _is_plain(value)})
    seen.walk({name: frozenset([name]) for name, value in arguments.items() if isinstance(value, Tensor)})
    return Touched(frozenset(seen.loaded), frozenset(seen.stored), seen.multiplies)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tl.constexpr)


@cache
def _code(function: Callable[..., Any]) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


class _Accesses:
    """Follows pointers through the assignments and calls of one function: variable -> parameters of the kernel."""

    def __init__(self, function: Callable[..., Any], known: dict[str, Any]) -> None:
        self.code = _code(function)
        self.names: dict[str, Any] = function.__globals__
        self.known = {name: value.value if isinstance(value, tl.constexpr) else value for name, value in known.items()}
        self.loaded: set[str] = set()
        self.stored: set[str] = set()
        self.returned: set[str] = set()
        self.multiplies = False

    def walk(self, pointers: dict[str, Names]) -> Names:
        """Collect the accesses, and return the parameters to which the function's results may point."""
        self.pointers = dict(pointers)
        self._run(self.code.body)
        return frozenset(self.returned)

    def _run(self, lines: Iterable[ast.stmt]) -> None:
        for line in lines:
            match line:
                case ast.Assign(targets=targets, value=value):
                    found = self._points(value)
                    for target in targets:
                        self._set(target, found)
                case ast.AugAssign(target=target, value=value):
                    self._set(target, self._points(target) | self._points(value))
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._set(target, self._points(value))
                case ast.Return(value=ast.expr() as value):
                    self.returned |= self._points(value)
                case ast.Expr(value=value):
                    self._points(value)
                case ast.If(test=test, body=body, orelse=orelse):
                    holds = self._holds(test)
                    self._run([] if holds is False else body)
                    self._run([] if holds is True else orelse)
                case ast.For(body=body):
                    self._run([*body, *body])  # twice: a pointer may move on at the end
                case ast.While(body=body):
                    self._run([*body, *body])

    def _set(self, target: ast.expr, found: Names) -> None:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for name in names:
            if isinstance(name, ast.Name):
                self.pointers[name.id] = found
                self.known.pop(name.id, None)

    def _holds(self, test: ast.expr) -> bool | None:
        """Return whether a condition holds; None if it depends on more than the launch's plain arguments."""
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        constants = {name: value.value for name, value in self.names.items() if isinstance(value, tl.constexpr)}
        if not names <= {*self.known, *constants}:
            return None
        return bool(eval(compile(ast.Expression(test), "", "eval"), {}, {**constants, **self.known}))

    def _points(self, value: ast.expr) -> Names:
        """Return the parameters to which an expression may point; collect the accesses in it."""
        if isinstance(value, ast.Name):
            return self.pointers.get(value.id, NOTHING)
        if isinstance(value, ast.Call):
            return self._called(value)
        return NOTHING.union(
            *(self._points(each) for each in ast.iter_child_nodes(value) if isinstance(each, ast.expr))
        )

    def _called(self, call: ast.Call) -> Names:
        given = [self._points(each) for each in call.args]
        named = {each.arg: self._points(each.value) for each in call.keywords if each.arg is not None}
        target = call.func
        of_triton = isinstance(target, ast.Attribute) and self._value(target.value) is tl
        if isinstance(target, ast.Attribute) and of_triton and target.attr in ("load", "store", *ATOMIC):
            where = given[0] if given else named["pointer"]
            self.loaded |= where if target.attr != "store" else NOTHING
            self.stored |= where if target.attr != "load" else NOTHING
            return NOTHING
        if isinstance(target, ast.Attribute) and of_triton and target.attr in DOT:
            self.multiplies = True
        helper = None if of_triton else getattr(self._value(target), "fn", None)
        if helper is None:  # an operation on values, such as x.to(dtype) or tl.where(…)
            inside = self._points(target.value) if isinstance(target, ast.Attribute) else NOTHING
            return inside.union(*given, *named.values())
        bind = inspect.signature(helper).bind
        passed = bind(*call.args, **{str(each.arg): each.value for each in call.keywords}).arguments
        known = {name: self._plain(node) for name, node in passed.items() if self._holds_plain(node)}
        inner = _Accesses(helper, known)
        results = inner.walk(bind(*given, **named).arguments)
        self.loaded |= inner.loaded
        self.stored |= inner.stored
        self.multiplies |= inner.multiplies
        return results

    def _value(self, node: ast.expr) -> Any:
        """Return the object of the function's module that a dotted name stands for; None if there is none."""
        if isinstance(node, ast.Attribute):
            return getattr(self._value(node.value), node.attr, None)
        return self.names.get(node.id) if isinstance(node, ast.Name) else None

    def _holds_plain(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in self.known)

    def _plain(self, node: ast.expr) -> Any:
        return (
            node.value
            if isinstance(node, ast.Constant)
            else self.known[node.id]
            if isinstance(node, ast.Name)
            else None
        )
