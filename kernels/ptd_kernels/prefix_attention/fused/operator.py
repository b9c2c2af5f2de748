"""The Triton kernels as `torch.library` operators with an autograd formula: for eager, torch.compile and checkpointing.

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

from ptd_kernels.prefix_attention.fused.backward import (
    delta_kernel,
    key_gradient_kernel,
    prefix_gradient_kernel,
    query_gradient_kernel,
)
from ptd_kernels.prefix_attention.fused.forward import forward_kernel
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

# Programs per multiprocessor that the prefix's gradient, or decoding, is split into: enough to fill the device twice.
_WAVES = 2
_FLAGS = ("CAUSAL", "WINDOW", "SOFTCAP", "PACKED", "BIAS", "SEVERAL")


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Return the compute capability (90 for 9.0; 0 in the interpreter) and the number of multiprocessors."""
    if device.type != "cuda":
        return 0, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@functools.cache
def _choices() -> Choices:
    return Choices(cache_file())


def _with_tile(name: str, common: dict[str, Any], q: Tensor, run: Callable[[Tile], Any]) -> Any:
    """Return ``run(tile)`` with the tile for this kernel and problem; if unknown, time the tiles (tuning.py)."""
    half, head_size = q.dtype != torch.float32, max(common["D"], common["E"])
    candidates = tiles_for(name, _device(q.device)[0], half, head_size, common["BIAS"])
    if len(candidates) == 1 or not allowed():
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


def _launch(kernel: Any, name: str, grid: Any, common: dict[str, Any], q: Tensor) -> None:
    """Run `kernel` with its tile; `grid` returns the launch grid for a tile."""
    _with_tile(name, common, q, lambda tile: _run(kernel, grid(tile), common, tile))


def _run(kernel: Any, grid: tuple[int, ...], common: dict[str, Any], tile: Tile) -> None:
    wanted = {key: value for key, value in common.items() if key in kernel.arg_names}
    kernel[grid](**wanted, BLOCK_M=tile.rows, BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages)


def _strides(prefix: str, axes: str, x: Tensor) -> dict[str, int]:
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}


def _like_hugging_face(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    """Return an empty ``[batch, heads, length, size]`` with the memory layout ``[batch, length, heads, size]``."""
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of all kernels by name; a launch passes those that its kernel has."""
    q, k, v = map(_unit_stride, (q, k, v))
    # Without a prefix, the loops over it have no tile, and the kernels never read its pointers.
    prefix_k = k[0, :, :0] if prefix_k is None else _unit_stride(prefix_k.to(q.dtype))
    prefix_v = v[0, :, :0] if prefix_v is None else _unit_stride(prefix_v.to(q.dtype))
    inner, outer = score_factors(scale, softcap)
    several = prefix_index is not None and prefix_bounds is not None
    bias_BHST = None if bias is None else _unit_stride(bias).expand(q.shape[0], q.shape[1], -1, -1)
    return {
        "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v,
        "bias": q if bias_BHST is None else bias_BHST,
        # q replaces a missing tensor; no kernel reads that pointer.
        "cu_seqlens": q if cu_seqlens is None else cu_seqlens,
        "prefix_index": prefix_index if several else q, "prefix_bounds": prefix_bounds if several else q,
        **_strides("q", "bhs", q), **_strides("k", "bht", k), **_strides("v", "bht", v),
        **_strides("pk", "hp", prefix_k), **_strides("pv", "hp", prefix_v),
        **_strides("bias", "bhs", q if bias_BHST is None else bias_BHST),
        "num_prefixes": 0 if prefix_bounds is None else prefix_bounds.numel() - 1,
        "num_sequences": 0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        "S": q.shape[2], "T": k.shape[2], "P": prefix_k.shape[1], "window": window or 0,
        "group": q.shape[1] // k.shape[1], "inner": inner, "outer": outer, "scale": scale,
        "D": q.shape[3], "E": v.shape[3], "BLOCK_D": padded(q.shape[3]), "BLOCK_E": padded(v.shape[3]),
        "CAUSAL": causal, "WINDOW": window is not None, "SOFTCAP": softcap is not None,
        "PACKED": cu_seqlens is not None, "BIAS": bias is not None, "SEVERAL": several,
    }  # fmt: skip


def _tiles(length: int, block: int, common: dict[str, Any]) -> int:
    """Return the maximum number of tiles, without reading cu_seqlens (see `find_tile`)."""
    return length // block + int(common["num_sequences"]) if common["PACKED"] else -(-length // block)


@torch.library.custom_op("ptd_kernels::prefix_attention", mutates_args=())
def prefix_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return output ``[B, Hq, S, E]`` and log-sum-exp ``[B, Hq, S]`` (fp32; 0 for rows that see no key)."""
    B, Hq, S, _ = q.shape
    E = v.shape[3]
    out = _like_hugging_face(B, Hq, S, E, like=q)
    lse = q.new_empty(B, Hq, S, dtype=torch.float32)
    if out.numel():
        common = _arguments(
            q, k, v, prefix_k, prefix_v, bias, cu_seqlens, prefix_index, prefix_bounds, scale, causal, window, softcap,
        )  # fmt: skip
        common |= {"out": out, "lse": lse, **_strides("out", "bhs", out)}
        with _on(q.device):
            _launch(forward_kernel, "forward", lambda t: (_tiles(S, t.rows, common), Hq, B), common, q)
    return out, lse


@prefix_attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Hq, S, _ = q.shape
    return _like_hugging_face(B, Hq, S, v.shape[3], like=q), q.new_empty(B, Hq, S, dtype=torch.float32)


@torch.library.custom_op("ptd_kernels::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
    needs_q: bool, needs_own: bool, needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, prefix_k and prefix_v; those that are not needed are empty."""
    B, Hq, S, _ = q.shape
    Hkv, T = k.shape[1:3]
    dq, dk, dv, dprefix_k, dprefix_v = _gradients(q, k, v, prefix_k, prefix_v, needs_q, needs_own, needs_prefix)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), dprefix_k.zero_(), dprefix_v.zero_()
    common = _arguments(
        q, k, v, prefix_k, prefix_v, bias, cu_seqlens, prefix_index, prefix_bounds, scale, causal, window, softcap,
    )  # fmt: skip
    dout = _unit_stride(dout)
    common |= {"out": out, "dout": dout, "lse": lse, "delta": torch.empty_like(lse)}
    common |= {**_strides("out", "bhs", out), **_strides("dout", "bhs", dout), **_strides("dq", "bhs", dq)}
    with _on(q.device):
        wanted = {key: value for key, value in common.items() if key in delta_kernel.arg_names}
        delta_kernel[(triton.cdiv(S, DELTA.rows), Hq, B)](**wanted, BLOCK_M=DELTA.rows, num_warps=DELTA.warps)
        if needs_q:
            common |= {"dq": dq}
            grid = lambda tile: (_tiles(S, tile.rows, common), Hq, B)  # noqa: E731
            _launch(query_gradient_kernel, "query_gradient", grid, common, q)
        if needs_own and T:
            own = common | {"dk": dk, "dv": dv, **_strides("dk", "bht", dk), **_strides("dv", "bht", dv)}
            grid = lambda tile: (_tiles(T, tile.keys, common), Hkv, B)  # noqa: E731
            _launch(key_gradient_kernel, "key_gradient", grid, own, q)
        if needs_prefix and common["P"]:
            partial_k, partial_v = _prefix_gradient(common, q, Hkv)
            dprefix_k.copy_(partial_k.sum(0))
            dprefix_v.copy_(partial_v.sum(0))
    return dq, dk, dv, dprefix_k, dprefix_v


def _prefix_gradient(common: dict[str, Any], q: Tensor, Hkv: int) -> tuple[Tensor, Tensor]:
    """Return partial sums ``[splits, Hkv, P, D]`` and ``[splits, Hkv, P, E]`` in fp32, to be summed over the splits."""
    P, wanted = common["P"], _WAVES * _device(q.device)[1]

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        tiles = triton.cdiv(q.shape[2], tile.rows)
        items = q.shape[0] * common["group"] * tiles
        slots = P // tile.keys + common["num_prefixes"] if common["SEVERAL"] else triton.cdiv(P, tile.keys)
        # Rounded so that no split is empty if one prefix has all items.
        split = triton.cdiv(items, max(1, min(items, triton.cdiv(wanted, slots * Hkv))))
        splits = triton.cdiv(items, split)
        partials = [q.new_empty(splits, Hkv, P, common[x], dtype=torch.float32) for x in ("D", "E")]
        arguments = common | {"dk": partials[0], "dv": partials[1], "tiles": tiles, "last_item": items}
        arguments |= dict.fromkeys(("item_bounds", "item_sequence", "item_row"), q)
        if common["SEVERAL"]:
            arguments |= _items(common, q, tile.rows)
        _run(prefix_gradient_kernel, (slots, Hkv, splits), arguments, tile)
        return partials[0], partials[1]

    sums: tuple[Tensor, Tensor] = _with_tile("prefix_gradient", common, q, run)
    return sums


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
    item = torch.arange(B * _tiles(S, block, common), device=q.device)
    position = torch.searchsorted(ends, item, right=True).clamp_(max=len(order) - 1)
    row = (item - (ends - tiles[order])[position]) * block
    readers = torch.searchsorted(prefix, torch.arange(common["num_prefixes"] + 1, device=q.device, dtype=prefix.dtype))
    bounds = torch.nn.functional.pad(ends, (1, 0))[readers]
    return {"item_bounds": bounds.int(), "item_sequence": order[position].int(), "item_row": row.int()}


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    needs_q: bool, needs_own: bool, needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, Hq, S, D = q.shape
    Hkv, T, E = k.shape[1], k.shape[2], v.shape[3]
    dq, dk, dv, dprefix_k, dprefix_v = (q.new_empty(0, 0, 0, 0) for _ in range(5))
    if needs_q:
        dq = _like_hugging_face(B, Hq, S, D, like=q)
    if needs_own:
        dk, dv = _like_hugging_face(B, Hkv, T, D, like=k), _like_hugging_face(B, Hkv, T, E, like=v)
    if needs_prefix and prefix_k is not None and prefix_v is not None:
        dprefix_k, dprefix_v = prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape)
    return dq, dk, dv, dprefix_k, dprefix_v


@prefix_attention_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None,
    cu_seqlens: Tensor | None, prefix_index: Tensor | None, prefix_bounds: Tensor | None,
    scale: float, causal: bool, window: int | None, softcap: float | None,
    needs_q: bool, needs_own: bool, needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(q, k, v, prefix_k, prefix_v, needs_q, needs_own, needs_prefix)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, causal, window, softcap = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.options = scale, causal, window, softcap


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_q, needs_k, needs_v, needs_prefix_k, needs_prefix_v = ctx.needs_input_grad[:5]
    gradients = prefix_attention_backward(
        dout, *ctx.saved_tensors, *ctx.options, needs_q, needs_k or needs_v, needs_prefix_k or needs_prefix_v
    )
    needed = zip(gradients, ctx.needs_input_grad[:5], strict=True)
    return *(gradient if needs else None for gradient, needs in needed), *(None,) * 8


prefix_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _on(device: torch.device) -> Any:
    """Return a context in which `device` is current: Triton launches on the current device, not on the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
