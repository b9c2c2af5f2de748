"""The forward kernel for few queries (decoding): the keys are split over programs, and their partial results merged.

One program takes all query rows of one key/value head (the heads of its group, S rows each) as one tile, so that each
key is loaded once per group. Of the key tiles, the prefix's first, it takes one of `splits` equal parts. It computes
output and log-sum-exp as if no other keys existed; `merge_splits_kernel` is the merge of Flash-Decoding (Dao et al.
2023). With one split there is nothing to merge, and the kernel writes the result itself.

Legend of shapes: problem.py; M query rows and N keys of one tile, C splits of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptd_kernels.prefix_attention.fused.forward import attend
from ptd_kernels.prefix_attention.fused.tiles import find_prefix, seen_keys, to_nearest


# The strides of a mask or bias change with every token, and specialised ones would be compiled again and again.
@triton.jit(do_not_specialize=["S", "T", "P", "window", "group", "bias_b", "bias_h", "bias_s"])
def decode_kernel(
    q, k, v, prefix_k, prefix_v, bias, out, lse, prefix_index, prefix_bounds,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, pk_h, pk_p, pv_h, pv_p, bias_b, bias_h, bias_s,
    out_b, out_h, out_s, S, T, P, window, group, inner, outer,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SEVERAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (splits, kv heads, batch). Writes out ``[C, B, Hq, S, E]`` and lse ``[C, B, Hq, S]``, contiguous fp32.

    Without SPLIT: out ``[B, Hq, S, E]`` in its own dtype and strides, and no lse.
    """
    part = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    index_M = tl.arange(0, BLOCK_M)
    inside_M = index_M < group * S
    # Rows past the last one repeat those of the last head, so that no address is out of bounds; they are not stored.
    head_M = kv_head * group + tl.minimum(index_M // S, group - 1)
    row_M = index_M % S
    column_D = tl.arange(0, BLOCK_D)
    pointers = q + batch * q_b + (head_M * q_h + row_M * q_s)[:, None] + column_D[None, :]
    q_MD = tl.load(pointers, mask=inside_M[:, None] & (column_D < D)[None, :], other=0.0)
    out_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    top_M = tl.full((BLOCK_M,), -float("inf"), tl.float32)

    first, P = find_prefix(prefix_index, prefix_bounds, batch, P, SEVERAL)
    low, all_low, all_high, high = seen_keys(part * 0, S, T, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    prefix_tiles = tl.cdiv(P, BLOCK_N)
    tiles = prefix_tiles + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(0))
    begin = part * share
    end = tl.minimum(begin + share, tiles)

    prefix_k += kv_head * pk_h + first * pk_p
    prefix_v += kv_head * pv_h + first * pv_p
    out_ME, sum_M, top_M = attend(
        out_ME, sum_M, top_M, q_MD, prefix_k, prefix_v, pk_p, pv_p, begin * BLOCK_N, 0, P // BLOCK_N * BLOCK_N,
        tl.minimum(end, prefix_tiles) * BLOCK_N, P, row_M, S, window, bias, bias_s, inner, outer,
        D, E, BLOCK_D, BLOCK_E, BLOCK_N, False, CAUSAL, WINDOW, SOFTCAP, BIAS,
    )  # fmt: skip
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    head_bias = (bias + batch * bias_b + head_M * bias_h)[:, None]
    out_ME, sum_M, top_M = attend(
        out_ME, sum_M, top_M, q_MD, k, v, k_t, v_t, low + tl.maximum(begin - prefix_tiles, 0) * BLOCK_N,
        all_low, all_high, low + tl.maximum(end - prefix_tiles, 0) * BLOCK_N, T, row_M, S, window,
        head_bias, bias_s, inner, outer,
        D, E, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP, BIAS,
    )  # fmt: skip

    blind_M = sum_M == 0.0
    sum_M = tl.where(blind_M, 1.0, sum_M)
    out_ME = out_ME / sum_M[:, None]
    column_E = tl.arange(0, BLOCK_E)
    inside_ME = inside_M[:, None] & (column_E < E)[None, :]
    if SPLIT:
        # The rows of a group are consecutive.
        at_M = ((part * tl.num_programs(2) + batch) * tl.num_programs(1) + kv_head) * group * S + index_M
        tl.store(lse + at_M, tl.where(blind_M, -float("inf"), top_M + tl.log2(sum_M)), mask=inside_M)
        tl.store(out + at_M[:, None] * E + column_E[None, :], out_ME, mask=inside_ME)
    else:
        pointers = out + batch * out_b + (head_M * out_h + row_M * out_s)[:, None] + column_E[None, :]
        tl.store(pointers, to_nearest(out_ME, out.dtype.element_ty), mask=inside_ME)


@triton.jit(do_not_specialize=["splits", "S"])
def merge_splits_kernel(
    outs, sums, out, out_b, out_h, out_s, splits, S,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (S, Hq, B). Merges ``outs [C, B, Hq, S, E]`` by ``sums [C, B, Hq, S]`` (base-2 log-sum-exps) into ``out``.

    A sum of -inf marks a part in which the row saw no key; a row that saw no key at all gets zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = (batch * tl.num_programs(1) + head) * S + row
    rows = tl.num_programs(2) * tl.num_programs(1) * S
    column_E = tl.arange(0, BLOCK_E)
    out_E = tl.zeros((BLOCK_E,), tl.float32)
    sum_C = tl.zeros((BLOCK_C,), tl.float32)
    top = -float("inf")
    for part in tl.range(0, splits, BLOCK_C):
        part_C = part + tl.arange(0, BLOCK_C)
        sum2_C = tl.load(sums + part_C * rows + at, mask=part_C < splits, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(sum2_C, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight_C = tl.exp2(sum2_C - base)
        pointers = outs + (part_C * rows + at)[:, None] * E + column_E[None, :]
        out_CE = tl.load(pointers, mask=(part_C < splits)[:, None] & (column_E < E)[None, :], other=0.0)
        out_E = out_E * shrink + tl.sum(weight_C[:, None] * out_CE, 0)
        sum_C = sum_C * shrink + weight_C
        top = new_top
    total = tl.sum(sum_C, 0)
    out_E = out_E / tl.where(total == 0.0, 1.0, total)
    pointers = out + batch * out_b + head * out_h + row * out_s + column_E
    tl.store(pointers, to_nearest(out_E, out.dtype.element_ty), mask=column_E < E)
