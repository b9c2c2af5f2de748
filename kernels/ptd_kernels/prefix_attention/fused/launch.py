"""Launch the Triton kernels: their arguments, grids and tiles.

Importing this module imports Triton, which then decides whether kernels are compiled, or interpreted with
TRITON_INTERPRET=1. Legend of shapes: problem.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ptd_kernels.prefix_attention.fused.backward import delta_kernel, prefix_gradient_kernel
from ptd_kernels.prefix_attention.fused.tile_table import DELTA, Tile, tiles_for
from ptd_kernels.prefix_attention.fused.tiles import padded, score_factors
from ptd_kernels.prefix_attention.fused.tuning import (
    Choices,
    allowed,
    cache_file,
    choose_candidate,
    run_first,
    size_class,
)
from ptd_kernels.prefix_attention.segments.kernel import unit_stride

# Programs per multiprocessor that the prefix's gradient, or decoding, is split into: enough to fill the device twice.
WAVES = 2
_FLAGS = ("CAUSAL", "WINDOW", "SOFTCAP", "PACKED", "BIAS", "SEVERAL")


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """Return the compute capability (90 for 9.0; 0 in the interpreter) and the number of multiprocessors."""
    if device.type != "cuda":
        return 0, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@functools.cache
def _choices() -> Choices:
    return Choices(cache_file())


def with_tile(name: str, common: dict[str, Any], q: Tensor, run: Callable[[Tile], Any], timed: bool = True) -> Any:
    """Return ``run(tile)`` with the tile for this kernel and problem; if unknown, time the tiles (tuning.py).

    Without `timed`, ``run`` gets the table's first tile that fits, and returns only once.
    """
    half, head_size = q.dtype != torch.float32, max(common["D"], common["E"])
    candidates = tiles_for(name, device_facts(q.device)[0], half, head_size, common["BIAS"])
    if len(candidates) == 1 or not timed or not allowed():
        return run_first(name, candidates, run, _asks_too_much)
    flags = [flag for flag in _FLAGS if common[flag]]
    sizes = size_class(q.shape[0] * q.shape[1], common["S"], common["T"], common["P"])
    key = " ".join(
        [torch.cuda.get_device_name(q.device), f"triton-{triton.__version__}", name, str(q.dtype),
         f"{common['D']},{common['E']}", f"group-{common['group']}", sizes, *flags]
    )  # fmt: skip

    def measure(tile: Tile) -> float:
        try:
            return float(triton.testing.do_bench(lambda: run(tile), warmup=10, rep=30, return_mode="median"))
        except Exception as error:
            if not _asks_too_much(error):
                raise
            return math.inf

    capturing = torch.cuda.is_current_stream_capturing()
    chosen = choose_candidate(key, candidates, measure, _choices(), may_measure=not capturing)
    others = [tile for tile in candidates if tile != chosen]
    return run_first(name, [chosen, *others], run, _asks_too_much)


def _asks_too_much(error: Exception) -> bool:
    """Return whether `error` is a lack of shared memory or registers (Triton's OutOfResources), or of memory.

    torch and Triton's launcher report a lack of memory differently.
    """
    known = (triton.runtime.errors.OutOfResources, torch.OutOfMemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def launch_kernel(
    kernel: Any, name: str, grid: Any, common: dict[str, Any], q: Tensor, timed: bool = True
) -> None:  # fmt: skip
    """Run `kernel` with its tile; `grid` returns the launch grid for a tile."""
    with_tile(name, common, q, lambda tile: run_kernel(kernel, grid(tile), common, tile), timed)


def run_kernel(kernel: Any, grid: tuple[int, ...], common: dict[str, Any], tile: Tile) -> None:
    wanted = {key: value for key, value in common.items() if key in kernel.arg_names}
    kernel[grid](**wanted, BLOCK_M=tile.rows, BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages)


def strides_of(prefix: str, axes: str, x: Tensor) -> dict[str, int]:
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}


def like_hugging_face(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    """Return an empty ``[batch, heads, length, size]`` with the memory layout ``[batch, length, heads, size]``."""
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def kernel_arguments(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of all kernels by name; a launch passes those that its kernel has."""
    q, k, v = map(unit_stride, (q, k, v))
    # Without a prefix, the loops over it have no tile, and the kernels never read its pointers.
    prefix_k = k[0, :, :0] if prefix_k is None else unit_stride(prefix_k.to(q.dtype))
    prefix_v = v[0, :, :0] if prefix_v is None else unit_stride(prefix_v.to(q.dtype))
    inner, outer = score_factors(scale, softcap)
    several = prefix_index is not None and prefix_bounds is not None
    bias_BHST = None if bias is None else unit_stride(bias).expand(q.shape[0], q.shape[1], -1, -1)
    return {
        "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v,
        "bias": q if bias_BHST is None else bias_BHST,
        # q replaces a missing tensor; no kernel reads that pointer.
        "cu_seqlens": q if cu_seqlens is None else cu_seqlens,
        "prefix_index": prefix_index if several else q, "prefix_bounds": prefix_bounds if several else q,
        **strides_of("q", "bhs", q), **strides_of("k", "bht", k), **strides_of("v", "bht", v),
        **strides_of("pk", "hp", prefix_k), **strides_of("pv", "hp", prefix_v),
        **strides_of("bias", "bhs", q if bias_BHST is None else bias_BHST),
        "num_prefixes": 0 if prefix_bounds is None else prefix_bounds.numel() - 1,
        "num_sequences": 0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        "S": q.shape[2], "T": k.shape[2], "P": prefix_k.shape[1], "window": window or 0,
        "group": q.shape[1] // k.shape[1], "inner": inner, "outer": outer, "scale": scale,
        "D": q.shape[3], "E": v.shape[3], "BLOCK_D": padded(q.shape[3]), "BLOCK_E": padded(v.shape[3]),
        "CAUSAL": causal, "WINDOW": window is not None, "SOFTCAP": softcap is not None,
        "PACKED": cu_seqlens is not None, "BIAS": bias is not None, "SEVERAL": several, "ADD": False,
    }  # fmt: skip


def count_tiles(length: int, block: int, common: dict[str, Any]) -> int:
    """Return the maximum number of tiles, without reading cu_seqlens (see `find_tile`)."""
    return length // block + int(common["num_sequences"]) if common["PACKED"] else -(-length // block)


def compute_delta(common: dict[str, Any]) -> None:
    """Fill ``delta`` ``[B, Hq, S]``: the row sums of dout * out."""
    B, Hq, S = common["delta"].shape
    wanted = {key: value for key, value in common.items() if key in delta_kernel.arg_names}
    delta_kernel[(triton.cdiv(S, DELTA.rows), Hq, B)](**wanted, BLOCK_M=DELTA.rows, num_warps=DELTA.warps)


def split_rows(items: int, programs: int, q: Tensor) -> int:
    """Return into how many equal parts to split `items` tiles of rows if each part gets `programs` programs."""
    wanted = triton.cdiv(WAVES * device_facts(q.device)[1], programs)
    # Rounded so that no part is empty.
    return int(triton.cdiv(items, triton.cdiv(items, max(1, min(items, wanted)))))


def prefix_partials(common: dict[str, Any], q: Tensor, Hkv: int, timed: bool = True) -> Tensor:
    """Return partial sums of dk and dv in fp32, to be summed over the splits (first axis; see `store_partial`)."""
    P = common["P"]

    def run(tile: Tile) -> Tensor:
        tiles = triton.cdiv(q.shape[2], tile.rows)
        items = q.shape[0] * common["group"] * tiles
        slots = P // tile.keys + common["num_prefixes"] if common["SEVERAL"] else triton.cdiv(P, tile.keys)
        splits = split_rows(items, slots * Hkv, q)
        partial = q.new_empty(splits, P * Hkv * (common["D"] + common["E"]), dtype=torch.float32)
        arguments = common | {"partial": partial, "tiles": tiles, "last_item": items}
        arguments |= dict.fromkeys(("item_bounds", "item_sequence", "item_row"), q)
        if common["SEVERAL"]:
            arguments |= _items(common, q, tile.rows)
        run_kernel(prefix_gradient_kernel, (slots, Hkv, splits), arguments, tile)
        return partial

    partial: Tensor = with_tile("prefix_gradient", common, q, run, timed)
    return partial


def _items(common: dict[str, Any], q: Tensor, block: int) -> dict[str, Tensor]:
    """Return the tiles of `block` rows of all sequences, sorted by the prefix they read, and where each prefix starts.

    The device computes them, because the host knows neither the lengths nor the prefixes of the sequences.
    """
    B, _, S, _ = q.shape
    index = common["prefix_index"]
    if common["PACKED"]:
        tiles = (common["cu_seqlens"].diff() + (block - 1)) // block
    else:
        tiles = torch.full((B,), triton.cdiv(S, block), dtype=torch.int32, device=q.device)
    prefix, order = index.sort(stable=True)
    ends = tiles[order].cumsum(0)
    item = torch.arange(B * count_tiles(S, block, common), device=q.device)
    position = torch.searchsorted(ends, item, right=True).clamp_(max=len(order) - 1)
    row = (item - (ends - tiles[order])[position]) * block
    readers = torch.searchsorted(prefix, torch.arange(common["num_prefixes"] + 1, device=q.device, dtype=prefix.dtype))
    bounds = torch.nn.functional.pad(ends, (1, 0))[readers]
    return {"item_bounds": bounds.int(), "item_sequence": order[position].int(), "item_row": row.int()}


def launching_on(device: torch.device) -> Any:
    """Return a context in which `device` is current: Triton launches on the current device, not on the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
