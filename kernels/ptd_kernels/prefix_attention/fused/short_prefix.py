"""The gradient of a prefix whose keys fit into one tile: one pass over the rows gives delta, dQ, dK and dV.

A program keeps the tile of keys and values, and loops over its share of the rows. It reads q, o, dO and L of a row once
and computes, with the products of backward.py,

    delta = rowsum(dO * o)    p = exp(s - L)    dV += p' dO    dS = p * (dO V' - delta)    dK += dS' Q    dQ += dS K

No other program has these rows, and no other keys contribute to this segment's dQ. So dQ is complete at once, and can
be added to the own keys' dQ in place. dK and dV are fp32 partial sums, one per program, as in backward.py.

Legend of shapes: problem.py; M query rows and N keys of one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptd_kernels.prefix_attention.fused.backward import add_keys, store_partial
from ptd_kernels.prefix_attention.fused.tiles import load_tile, product, score, store_tile


@triton.jit(do_not_specialize=["S", "P", "group", "tiles", "last_item"])
def short_prefix_kernel(
    q, prefix_k, prefix_v, out, dout, dq, partial, lse,
    q_h, q_s, pk_h, pk_p, pv_h, pv_p, out_h, out_s, dout_h, dout_s, dq_h, dq_s,
    S, P, group, tiles, last_item, inner, outer, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, splits). Writes each split's partial sums (see `store_partial`), and if QUERIES dq (ADD: adds to
    it). An item is one tile of rows of one query head of the group; a query head has `tiles` items."""
    kv_head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    split = tl.cdiv(last_item, tl.num_programs(1))
    key_N = tl.arange(0, BLOCK_N)
    k_ND = load_tile(prefix_k + kv_head * pk_h, pk_p, 0, P, D, BLOCK_N, BLOCK_D)
    v_NE = load_tile(prefix_v + kv_head * pv_h, pv_p, 0, P, E, BLOCK_N, BLOCK_E)
    dk_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for item in tl.range(part * split, tl.minimum((part + 1) * split, last_item)):
        head = kv_head * group + item // tiles
        row = item % tiles * BLOCK_M
        row_M = row + tl.arange(0, BLOCK_M)
        q_MD = load_tile(q + head * q_h, q_s, row, S, D, BLOCK_M, BLOCK_D)
        out_ME = load_tile(out + head * out_h, out_s, row, S, E, BLOCK_M, BLOCK_E)
        dout_ME = load_tile(dout + head * dout_h, dout_s, row, S, E, BLOCK_M, BLOCK_E)
        lse2_M = tl.load(lse + head * S + row_M, mask=row_M < S, other=0.0) * 1.4426950408889634
        delta_M = tl.sum(out_ME.to(tl.float32) * dout_ME.to(tl.float32), 1)
        score_NM, slope_NM = score(product(k_ND, tl.trans(q_MD)), inner, outer, SOFTCAP)
        # Keys past the end must not reach dQ; rows past the end are zeros and add zero.
        weight_NM = tl.where((key_N < P)[:, None], tl.exp2(score_NM - lse2_M[None, :]), 0.0)
        dk_ND, dv_NE, dscore_NM = add_keys(
            dk_ND, dv_NE, v_NE, q_MD, dout_ME, weight_NM, slope_NM, delta_M, SOFTCAP
        )  # fmt: skip
        if QUERIES:
            dq_MD = product(tl.trans(dscore_NM), k_ND) * scale
            if ADD:
                dq_MD += load_tile(dq + head * dq_h, dq_s, row, S, D, BLOCK_M, BLOCK_D).to(tl.float32)
            store_tile(dq + head * dq_h, dq_s, row, S, dq_MD, D, BLOCK_M, BLOCK_D)
    heads = tl.num_programs(0)
    store_partial(partial, part, kv_head, heads, 0, 0, P, P, dk_ND * scale, dv_NE, D, E, BLOCK_D, BLOCK_E)
