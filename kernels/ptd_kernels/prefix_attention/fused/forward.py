"""The fused forward kernel: one online softmax over the prefix's tiles and then over the own tiles.

With base-2 scores s of a tile of keys (tiles.py), a row keeps its maximum m, its sum l and its output o:

    m' = max(m, max s)    p = exp2(s - m')    l' = l exp2(m - m') + sum p    o' = o exp2(m - m') + p V

(Milakov & Gimelshein 2018, arXiv:1805.02867; FlashAttention-2, Dao 2023, arXiv:2307.08691). After the last tile the
output is o / l and the log-sum-exp ``ln 2 * m + ln l``; a row that saw no key gets 0 and 0. The prefix needs a
mask only for its tail; an own tile needs one only if the diagonal, the window's edge or the sequence's end crosses it.

Legend of shapes: problem.py; M query rows and N keys of one tile. One program: one tile of queries of one head.
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
    seen_keys,
    store_tile,
    visible,
)


@triton.jit
def attend(
    out_ME, sum_M, top_M, q_MD, k, v, k_t, v_t, low, all_low, all_high, high, keys, row_M, rows, window,
    bias, bias_s, inner, outer,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Continue the softmax over the keys from `low` to `high`; those from `all_low` to `all_high` need no mask."""
    for key in tl.range(low, high, BLOCK_N):
        k_ND = load_tile(k, k_t, key, keys, D, BLOCK_N, BLOCK_D)
        score_MN, _ = score(product(q_MD, tl.trans(k_ND)), inner, outer, SOFTCAP)
        key_N = key + tl.arange(0, BLOCK_N)
        if OWN and BIAS:
            score_MN += load_bias(bias, bias_s, row_M[:, None], key_N[None, :], rows, keys)
        if (key < all_low) | (key >= all_high):
            seen_MN = visible(row_M[:, None], key_N[None, :], rows, keys, window, OWN, CAUSAL, WINDOW)
            score_MN = tl.where(seen_MN, score_MN, -float("inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MN, 1))
        # A row that has seen no key yet has the maximum -inf, and must not compute -inf - -inf.
        base_M = tl.where(new_top_M == -float("inf"), 0.0, new_top_M)
        weight_MN = tl.exp2(score_MN - base_M[:, None])
        shrink_M = tl.exp2(top_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
        v_NE = load_tile(v, v_t, key, keys, E, BLOCK_N, BLOCK_E)
        out_ME = product(weight_MN.to(v_NE.dtype), v_NE, out_ME * shrink_M[:, None])
        top_M = new_top_M
    return out_ME, sum_M, top_M


@triton.jit(do_not_specialize=["num_sequences", "S", "T", "P", "window", "group"])
def forward_kernel(
    q, k, v, prefix_k, prefix_v, bias, out, lse, cu_seqlens, prefix_index, prefix_bounds,
    q_b, q_h, q_s, k_b, k_h, k_t, v_b, v_h, v_t, pk_h, pk_p, pv_h, pv_p, bias_b, bias_h, bias_s, out_b, out_h, out_s,
    num_sequences, S, T, P, window, group, inner, outer,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    BIAS: tl.constexpr, SEVERAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles or slots, query heads, batch). Writes out and lse ``[B, Hq, S]``, contiguous fp32."""
    # The last tiles see the most keys: start with them.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, rows, row, sequence = find_tile(cu_seqlens, slot, num_sequences, S, BLOCK_M, PACKED)
    keys = rows if PACKED else T
    if row < rows:
        kv_head = head // group
        row_M = row + tl.arange(0, BLOCK_M)
        q_MD = load_tile(q + batch * q_b + head * q_h + start * q_s, q_s, row, rows, D, BLOCK_M, BLOCK_D)
        out_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        sum_M = tl.zeros((BLOCK_M,), tl.float32)
        top_M = tl.full((BLOCK_M,), -float("inf"), tl.float32)

        first, P = find_prefix(prefix_index, prefix_bounds, sequence if PACKED else batch, P, SEVERAL)
        prefix_k += kv_head * pk_h + first * pk_p
        prefix_v += kv_head * pv_h + first * pv_p
        out_ME, sum_M, top_M = attend(
            out_ME, sum_M, top_M, q_MD, prefix_k, prefix_v, pk_p, pv_p, 0, 0, P // BLOCK_N * BLOCK_N, P, P,
            row_M, rows, window, bias, bias_s, inner, outer,
            D, E, BLOCK_D, BLOCK_E, BLOCK_N, False, CAUSAL, WINDOW, SOFTCAP, BIAS,
        )  # fmt: skip
        # With packing, the bias is [S, T] over the whole pack.
        bias += batch * bias_b + head * bias_h + start * bias_s + start
        k += batch * k_b + kv_head * k_h + start * k_t
        v += batch * v_b + kv_head * v_h + start * v_t
        low, all_low, all_high, high = seen_keys(row, rows, keys, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        out_ME, sum_M, top_M = attend(
            out_ME, sum_M, top_M, q_MD, k, v, k_t, v_t, low, all_low, all_high, high, keys,
            row_M, rows, window, bias, bias_s, inner, outer,
            D, E, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, SOFTCAP, BIAS,
        )  # fmt: skip

        blind_M = sum_M == 0.0
        sum_M = tl.where(blind_M, 1.0, sum_M)
        lse_M = tl.where(blind_M, 0.0, top_M * 0.6931471805599453 + tl.log(sum_M))
        lse += (batch * tl.num_programs(1) + head) * S + start
        tl.store(lse + row_M, lse_M, mask=row_M < rows)
        out += batch * out_b + head * out_h + start * out_s
        store_tile(out, out_s, row, rows, out_ME / sum_M[:, None], E, BLOCK_M, BLOCK_E)
