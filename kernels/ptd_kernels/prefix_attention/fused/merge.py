"""Merge the outputs and log-sum-exps of two segments in one pass, without copies in another precision.

    L = log(exp(L1) + exp(L2))        o = o1 + (o2 - o1) * exp(L2 - L)

A segment's log-sum-exp is -inf for a row that sees none of its keys. A row that sees no key at all gets 0 and L = 0, so
that its weights exp(-inf - L) are 0 in the backward pass. Legend of shapes: problem.py; M query rows of one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptd_kernels.prefix_attention.fused.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["S"])
def merge_kernel(
    first_out, first_lse, second_out, second_lse, out, lse,
    first_b, first_h, first_s, sums1_b, sums1_h, sums1_s, second_b, second_h, second_s, sums2_b, sums2_h, sums2_s,
    out_b, out_h, out_s, S, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, query heads, batch). Writes out, and lse ``[B, Hq, S]``, contiguous fp32."""
    row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row_M = row + tl.arange(0, BLOCK_M)
    inside_M = row_M < S
    row64_M = row_M.to(tl.int64)
    first_M = tl.load(first_lse + batch * sums1_b + head * sums1_h + row64_M * sums1_s, mask=inside_M, other=0.0)
    second_M = tl.load(second_lse + batch * sums2_b + head * sums2_h + row64_M * sums2_s, mask=inside_M, other=0.0)
    top_M = tl.maximum(first_M, second_M)
    top_M = tl.where(top_M == -float("inf"), 0.0, top_M)
    second_M = tl.exp(second_M - top_M)
    sum_M = tl.exp(first_M - top_M) + second_M
    blind_M = sum_M == 0.0
    sum_M = tl.where(blind_M, 1.0, sum_M)
    lse_M = tl.where(blind_M, 0.0, top_M + tl.log(sum_M))
    share_M = second_M / sum_M
    tl.store(lse + (batch * tl.num_programs(1) + head) * S + row_M, lse_M, mask=inside_M)
    first_out += batch * first_b + head * first_h
    second_out += batch * second_b + head * second_h
    first_ME = load_tile(first_out, first_s, row, S, E, BLOCK_M, BLOCK_E).to(tl.float32)
    second_ME = load_tile(second_out, second_s, row, S, E, BLOCK_M, BLOCK_E).to(tl.float32)
    merged_ME = first_ME + (second_ME - first_ME) * share_M[:, None]
    store_tile(out + batch * out_b + head * out_h, out_s, row, S, merged_ME, E, BLOCK_M, BLOCK_E)
