"""The fused backward kernels: delta, then dQ (prefix and own keys), own dK and dV, prefix dK and dV.

With the output o and log-sum-exp L over *all* keys (FlashAttention-2, Dao 2023, arXiv:2307.08691), per tile of keys

    delta = rowsum(dO * o)    p = exp(s - L)    dV = p' dO    dS = p * (dO V' - delta)    dQ = dS K    dK = dS' Q

With a softcap, dS is multiplied by the softcap's derivative; dQ and dK are multiplied by the scale at the end. Every
number is the sum of one program's loop in a fixed order, without atomics. Own keys: a program owns a tile of keys and
loops over the query heads of its group and the rows that see the tile. The prefix has few keys and very many rows, so
its rows are split over programs. Each program writes an fp32 partial sum; the partial sums are then added in a fixed
order.

Legend of shapes: problem.py; M query rows and N keys of one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptd_kernels.prefix_attention.fused.tiles import (
    find_prefix,
    find_tile,
    load_bias,
    load_tile,
    product,
    score,
    seeing_rows,
    seen_keys,
    store_tile,
    to_nearest,
    visible,
)


@triton.jit(do_not_specialize=["S"])
def delta_kernel(
    out, dout, delta, out_b, out_h, out_s, dout_b, dout_h, dout_s, S,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, query heads, batch). Writes delta ``[B, Hq, S]``, contiguous fp32."""
    row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    out_ME = load_tile(out + batch * out_b + head * out_h, out_s, row, S, E, BLOCK_M, BLOCK_E)
    dout_ME = load_tile(dout + batch * dout_b + head * dout_h, dout_s, row, S, E, BLOCK_M, BLOCK_E)
    row_M = row + tl.arange(0, BLOCK_M)
    delta_M = tl.sum(out_ME.to(tl.float32) * dout_ME.to(tl.float32), 1)
    tl.store(delta + (batch * tl.num_programs(1) + head) * S + row_M, delta_M, mask=row_M < S)


@triton.jit
def _query_gradient(
    dq_MD, q_MD, dout_ME, lse2_M, delta_M, k, v, k_t, v_t, low, all_low, all_high, high, keys, row_M, rows, window,
    bias, bias_s, inner, outer,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Add to dQ the share of the keys `low` to `high`, without the scale; keys `all_low` to `all_high` need no mask."""
    for key in tl.range(low, high, BLOCK_N):
        k_ND = load_tile(k, k_t, key, keys, D, BLOCK_N, BLOCK_D)
        v_NE = load_tile(v, v_t, key, keys, E, BLOCK_N, BLOCK_E)
        score_MN, slope_MN = score(product(q_MD, tl.trans(k_ND)), inner, outer, SOFTCAP)
        key_N = key + tl.arange(0, BLOCK_N)
        if OWN and BIAS:
            score_MN += load_bias(bias, bias_s, row_M[:, None], key_N[None, :], rows, keys)
        weight_MN = tl.exp2(score_MN - lse2_M[:, None])
        if (key < all_low) | (key >= all_high):
            seen_MN = visible(row_M[:, None], key_N[None, :], rows, keys, window, OWN, CAUSAL, WINDOW)
            weight_MN = tl.where(seen_MN, weight_MN, 0.0)
        if SOFTCAP:
            weight_MN *= slope_MN
        dweight_MN = product(dout_ME, tl.trans(v_NE))
        dscore_MN = weight_MN * (dweight_MN - delta_M[:, None])
        dq_MD = product(to_nearest(dscore_MN, k_ND.dtype), k_ND, dq_MD)
    return dq_MD


@triton.jit(do_not_specialize=["num_sequences", "S", "T", "P", "window", "group"])
def query_gradient_kernel(
    q, k, v, prefix_k, prefix_v, bias, dout, dq, lse, delta, cu_seqlens, prefix_index, prefix_bounds,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, pk_h, pk_p, pv_h, pv_p, bias_b, bias_h, bias_s,
    dout_b, dout_h, dout_s, dq_b, dq_h, dq_s,
    num_sequences, S, T, P, window, group, inner, outer, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    BIAS: tl.constexpr, SEVERAL: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles or slots, query heads, batch). Writes dq (ADD: adds to it); it reads the prefix first, as forward."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, rows, row, sequence = find_tile(cu_seqlens, slot, num_sequences, S, BLOCK_M, PACKED)
    keys = rows if PACKED else T
    if row < rows:
        kv_head = head // group
        row_M = row + tl.arange(0, BLOCK_M)
        sums = (batch * tl.num_programs(1) + head) * S + start + row_M
        lse2_M = tl.load(lse + sums, mask=row_M < rows, other=0.0) * 1.4426950408889634
        delta_M = tl.load(delta + sums, mask=row_M < rows, other=0.0)
        q_MD = load_tile(q + batch * q_b + head * q_h + start * q_s, q_s, row, rows, D, BLOCK_M, BLOCK_D)
        dout += batch * dout_b + head * dout_h + start * dout_s
        dout_ME = load_tile(dout, dout_s, row, rows, E, BLOCK_M, BLOCK_E)
        dq_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

        first, P = find_prefix(prefix_index, prefix_bounds, sequence if PACKED else batch, P, SEVERAL)
        prefix_k += kv_head * pk_h + first * pk_p
        prefix_v += kv_head * pv_h + first * pv_p
        dq_MD = _query_gradient(
            dq_MD, q_MD, dout_ME, lse2_M, delta_M, prefix_k, prefix_v, pk_p, pv_p, 0, 0, P // BLOCK_N * BLOCK_N, P, P,
            row_M, rows, window, bias, bias_s, inner, outer,
            D, E, BLOCK_D, BLOCK_E, BLOCK_N, False, CAUSAL, WINDOW, SOFTCAP, BIAS,
        )  # fmt: skip
        bias += batch * bias_b + head * bias_h + start * bias_s + start
        k += batch * k_b + kv_head * k_h + start * k_t
        v += batch * v_b + kv_head * v_h + start * v_t
        low, all_low, all_high, high = seen_keys(row, rows, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        dq_MD = _query_gradient(
            dq_MD, q_MD, dout_ME, lse2_M, delta_M, k, v, k_t, v_t, low, all_low, all_high, high, keys,
            row_M, rows, window, bias, bias_s, inner, outer,
            D, E, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP, BIAS,
        )  # fmt: skip
        dq_MD *= scale
        dq += batch * dq_b + head * dq_h + start * dq_s
        if ADD:
            dq_MD += load_tile(dq, dq_s, row, rows, D, BLOCK_M, BLOCK_D).to(tl.float32)
        store_tile(dq, dq_s, row, rows, dq_MD, D, BLOCK_M, BLOCK_D)


@triton.jit
def add_keys(dk_ND, dv_NE, v_NE, q_MD, dout_ME, weight_NM, slope_NM, delta_M, SOFTCAP: tl.constexpr):
    """Add to dk (without the scale) and dv the share of the rows with these weights; also return their dS."""
    dv_NE = product(to_nearest(weight_NM, dout_ME.dtype), dout_ME, dv_NE)
    if SOFTCAP:
        weight_NM *= slope_NM
    dweight_NM = product(v_NE, tl.trans(dout_ME))
    dscore_NM = to_nearest(weight_NM * (dweight_NM - delta_M[None, :]), q_MD.dtype)
    return product(dscore_NM, q_MD, dk_ND), dv_NE, dscore_NM


@triton.jit
def _key_gradient(
    dk_ND, dv_NE, k_ND, v_NE, key_N, q, dout, lse, delta, q_s, dout_s, row, all_low, all_high, rows, keys, window,
    bias, bias_s, inner, outer,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv the share of one tile of rows, without the scale; rows `all_low` to `all_high` need no mask.

    Rows past the end are zeros and add zero; keys past the end are never stored. So neither of them needs a mask.
    """
    row_M = row + tl.arange(0, BLOCK_M)
    q_MD = load_tile(q, q_s, row, rows, D, BLOCK_M, BLOCK_D)
    lse2_M = tl.load(lse + row_M, mask=row_M < rows, other=0.0) * 1.4426950408889634
    score_NM, slope_NM = score(product(k_ND, tl.trans(q_MD)), inner, outer, SOFTCAP)
    if OWN and BIAS:
        score_NM += load_bias(bias, bias_s, row_M[None, :], key_N[:, None], rows, keys)
    weight_NM = tl.exp2(score_NM - lse2_M[None, :])
    if OWN and CAUSAL:  # noqa: SIM102 (only the outer condition is known at compile time)
        if (row < all_low) | (row >= all_high):
            seen_NM = visible(row_M[None, :], key_N[:, None], rows, keys, window, OWN, CAUSAL, WINDOW)
            weight_NM = tl.where(seen_NM, weight_NM, 0.0)
    dout_ME = load_tile(dout, dout_s, row, rows, E, BLOCK_M, BLOCK_E)
    delta_M = tl.load(delta + row_M, mask=row_M < rows, other=0.0)
    dk_ND, dv_NE, _ = add_keys(dk_ND, dv_NE, v_NE, q_MD, dout_ME, weight_NM, slope_NM, delta_M, SOFTCAP)
    return dk_ND, dv_NE


@triton.jit(do_not_specialize=["num_sequences", "S", "T", "window", "group"])
def key_gradient_kernel(
    q, k, v, bias, dout, dk, dv, lse, delta, cu_seqlens,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_s,
    dout_b, dout_h, dout_s, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    num_sequences, S, T, window, group, inner, outer, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    BIAS: tl.constexpr, SEVERAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles or slots of own keys, kv heads, batch). The first tiles start first: the most rows see them."""
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, keys, key, _ = find_tile(cu_seqlens, tl.program_id(0), num_sequences, T, BLOCK_N, PACKED)
    rows = keys if PACKED else S
    if key < keys:
        key_N = key + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k + batch * k_b + kv_head * k_h + start * k_t, k_t, key, keys, D, BLOCK_N, BLOCK_D)
        v_NE = load_tile(v + batch * v_b + kv_head * v_h + start * v_t, v_t, key, keys, E, BLOCK_N, BLOCK_E)
        dk_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        low, all_low, all_high, high = seeing_rows(key, rows, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        q += batch * q_b + kv_head * group * q_h + start * q_s
        dout += batch * dout_b + kv_head * group * dout_h + start * dout_s
        bias += batch * bias_b + kv_head * group * bias_h + start * bias_s + start
        sums = (batch * tl.num_programs(1) + kv_head) * group * S + start
        # One loop over heads and rows, not two nested ones: the next head's first loads start early.
        tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
        for item in tl.range(0, group * tiles):
            member = tl.cast(item // tiles, tl.int64)
            dk_ND, dv_NE = _key_gradient(
                dk_ND, dv_NE, k_ND, v_NE, key_N, q + member * q_h, dout + member * dout_h,
                lse + sums + member * S, delta + sums + member * S, q_s, dout_s, low + item % tiles * BLOCK_M,
                all_low, all_high, rows, keys, window, bias + member * bias_h, bias_s, inner, outer,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, True, CAUSAL, WINDOW, SOFTCAP, BIAS,
            )  # fmt: skip
        dk += batch * dk_b + kv_head * dk_h + start * dk_t
        store_tile(dk, dk_t, key, keys, dk_ND * scale, D, BLOCK_N, BLOCK_D)
        store_tile(dv + batch * dv_b + kv_head * dv_h + start * dv_t, dv_t, key, keys, dv_NE, E, BLOCK_N, BLOCK_E)


@triton.jit
def store_partial(
    partial, part, kv_head, heads, first, key, keys, P, dk_ND, dv_NE,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store a split's sums of dk and dv for a tile of keys, in fp32: a split has dk ``[P, Hkv, D]``, then dv."""
    BLOCK_N: tl.constexpr = dk_ND.shape[0]
    partial += tl.cast(part, tl.int64) * P * heads * (D + E)
    at = first * heads + kv_head
    store_tile(partial + at * D, heads * D, key, keys, dk_ND, D, BLOCK_N, BLOCK_D)
    partial += tl.cast(P, tl.int64) * heads * D
    store_tile(partial + at * E, heads * E, key, keys, dv_NE, E, BLOCK_N, BLOCK_E)


@triton.jit(do_not_specialize=["num_prefixes", "S", "P", "group", "tiles", "last_item"])
def prefix_gradient_kernel(
    q, prefix_k, prefix_v, dout, partial, lse, delta, cu_seqlens, prefix_bounds, item_bounds, item_sequence, item_row,
    q_b, q_h, q_s, pk_h, pk_p, pv_h, pv_p, dout_b, dout_h, dout_s, num_prefixes, S, P, group, tiles, last_item,
    inner, outer, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr, SEVERAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (prefix tiles or slots, kv heads, splits). Writes each split's partial sums (see `store_partial`).

    An item is one tile of rows of one query head of the group. All items read a single shared prefix: `tiles` items per
    batch entry and query head, regardless of packing. Of several prefixes, prefix n is read by the row tiles
    ``item_bounds[n]`` to ``item_bounds[n + 1]`` of a list (sequence and first row of each tile) sorted by prefix. The
    items of a prefix are divided evenly among the splits.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    first, keys, key, prefix = find_tile(prefix_bounds, tl.program_id(0), num_prefixes, P, BLOCK_N, SEVERAL)
    if key < keys:
        first_item = part * 0
        if SEVERAL:
            first_item = tl.load(item_bounds + prefix) * group
            last_item = tl.load(item_bounds + prefix + 1) * group
        split = tl.cdiv(last_item - first_item, tl.num_programs(2))
        first_item += part * split
        key_N = key + tl.arange(0, BLOCK_N)
        k_ND = load_tile(prefix_k + kv_head * pk_h + first * pk_p, pk_p, key, keys, D, BLOCK_N, BLOCK_D)
        v_NE = load_tile(prefix_v + kv_head * pv_h + first * pv_p, pv_p, key, keys, E, BLOCK_N, BLOCK_E)
        dk_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for item in tl.range(first_item, tl.minimum(first_item + split, last_item)):
            start = tl.cast(item * 0, tl.int64)
            rows = S
            if SEVERAL:
                batch = tl.load(item_sequence + item // group)
                row = tl.load(item_row + item // group)
                head = kv_head * group + item % group
                if PACKED:
                    start = tl.load(cu_seqlens + batch).to(tl.int64)
                    rows = tl.load(cu_seqlens + batch + 1) - tl.load(cu_seqlens + batch)
                    batch = batch * 0
                batch = batch.to(tl.int64)
            else:
                member = item // tiles
                batch = tl.cast(member // group, tl.int64)
                head = kv_head * group + member % group
                row = item % tiles * BLOCK_M
            sums = (batch * tl.num_programs(1) * group + head) * S + start
            dk_ND, dv_NE = _key_gradient(
                dk_ND, dv_NE, k_ND, v_NE, key_N, q + batch * q_b + head * q_h + start * q_s,
                dout + batch * dout_b + head * dout_h + start * dout_s, lse + sums, delta + sums, q_s, dout_s, row,
                0, 0, rows, keys, 0, q, 0, inner, outer,
                D, E, BLOCK_D, BLOCK_E, BLOCK_M, False, False, False, SOFTCAP, False,
            )  # fmt: skip
        heads = tl.num_programs(1)
        store_partial(partial, part, kv_head, heads, first, key, keys, P, dk_ND * scale, dv_NE, D, E, BLOCK_D, BLOCK_E)
