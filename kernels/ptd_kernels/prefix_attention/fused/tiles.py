"""The parts that the Triton kernels of `prefix_attention` share: find a tile and the keys it sees, load, score.

Legend of shapes: problem.py; in addition, M query rows and N keys of one tile. Tiles are padded to powers of two;
columns past D and E, and rows past the end of a sequence, are loaded as zeros. Row i of a sequence has the own position
``i + offset``, offset = own keys - rows, and sees the own keys j with ``position - window < j <= position`` (causal).

Scores are in base 2, because the hardware has ``exp2``: ``score2 = log2(e) * softcap(scale * q.k)``. With a softcap c,
``c * tanh(x / c)`` is ``c * (1 - 2 / (1 + exp(2x / c)))``. So two factors, computed once on the host, are enough.
Without a softcap, ``score2 = qk * inner``; with one, ``t = 1 - 2 / (1 + exp2(qk * inner))`` and ``score2 = t * outer``.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return `inner` and `outer` of the scores (see the module docstring)."""
    if softcap is None:
        return scale * LOG2_E, 1.0
    return 2 * scale * LOG2_E / softcap, softcap * LOG2_E


def padded(head_size: int) -> int:
    """Return the width of a tile for this head size: a power of two that tensor cores support."""
    return max(16, 1 << (head_size - 1).bit_length())


@triton.jit
def find_tile(cu_seqlens, slot, num_sequences, length, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Return the tile of `slot`: its sequence's first token and length, the tile's first row in it, and its number.

    Packed sequence i owns the slots from ``cu_seqlens[i] // BLOCK + i`` on. They are always enough for its tiles, and
    at most one too many. Bisection finds the sequence on the device, so the host never reads cu_seqlens. The first row
    of a surplus slot is past the end of the sequence.
    """
    start = slot * 0
    low = slot * 0
    row = slot * BLOCK
    if PACKED:
        high = low + num_sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            begins = tl.load(cu_seqlens + middle) // BLOCK + middle
            low = tl.where(begins <= slot, middle, low)
            high = tl.where(begins <= slot, high, middle - 1)
        start = tl.load(cu_seqlens + low)
        length = tl.load(cu_seqlens + low + 1) - start
        row = (slot - start // BLOCK - low) * BLOCK
    return tl.cast(start, tl.int64), length, row, low


@triton.jit
def find_prefix(prefix_index, prefix_bounds, sequence, P, SEVERAL: tl.constexpr):
    """Return the first key and the number of keys of the prefix that `sequence` reads; P concatenates all prefixes."""
    first = tl.cast(sequence * 0, tl.int64)
    if SEVERAL:
        chosen = tl.load(prefix_index + sequence)
        start = tl.load(prefix_bounds + chosen)
        first = tl.cast(start, tl.int64)
        P = tl.load(prefix_bounds + chosen + 1) - start
    return first, P


@triton.jit
def seen_keys(
    row, rows, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Return four bounds of the own keys that the tile of rows from `row` on can see.

    Some row sees the keys between the first and the last bound; all rows see those between the second and the third.
    Tiles outside the bounds are never loaded.
    """
    offset = keys - rows
    low = 0
    high = keys
    all_low = 0
    all_high = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.maximum(tl.minimum(keys, row + offset + BLOCK_M), 0)
        all_high = tl.maximum(tl.minimum(keys, row + offset + 1), 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        low = tl.maximum(row + offset - window + 1, 0) // BLOCK_N * BLOCK_N
        all_low = tl.minimum(tl.cdiv(tl.maximum(row + offset + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, high)
    return low, all_low, tl.maximum(all_low, all_high), high


@triton.jit
def seeing_rows(
    key, rows, keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Return four bounds of the rows that see some of the tile of keys from `key` on; the middle two, all of them."""
    offset = keys - rows
    low = 0
    high = rows
    all_low = 0
    all_high = rows
    if CAUSAL:
        low = tl.maximum(key - offset, 0) // BLOCK_M * BLOCK_M
        all_low = tl.cdiv(tl.maximum(key + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        high = tl.maximum(tl.minimum(rows, key + BLOCK_N - 1 - offset + window), 0)
        all_high = tl.minimum(tl.maximum(key - offset + window, 0) // BLOCK_M * BLOCK_M, high)
    all_low = tl.minimum(all_low, high)
    return low, all_low, tl.maximum(all_low, all_high), high


@triton.jit
def visible(row_M, key_N, rows, keys, window, OWN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return whether a row sees a key; `row_M` and `key_N` broadcast. Without OWN: the prefix, which is all visible."""
    seen = key_N < keys
    if OWN and CAUSAL:
        distance = row_M + (keys - rows) - key_N
        seen = seen & (distance >= 0)
        if WINDOW:
            seen = seen & (distance < window)
    return seen


@triton.jit
def load_tile(base, stride, first, length, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Load ``[BLOCK, BLOCK_SIZE]`` from row `first` on, with zeros from row `length` and column SIZE on."""
    index = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + (index * stride + column)
    inside = first + index < length
    if BLOCK_SIZE != SIZE:
        inside = inside & (column < SIZE)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(base, stride, first, length, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Store a tile where `load_tile` would load it from."""
    index = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + (index * stride + column)
    tl.store(pointers, to_nearest(tile, base.dtype.element_ty), mask=(first + index < length) & (column < SIZE))


@triton.jit
def load_bias(bias, stride, row_M, key_N, rows, keys):
    """Load the own keys' bias, in base 2 like the scores; `row_M` and `key_N` broadcast against each other.

    A boolean bias is a mask: 0 where it is true, else -inf.
    """
    pointers = bias + row_M.to(tl.int64) * stride + key_N
    found = tl.load(pointers, mask=(row_M < rows) & (key_N < keys), other=0)
    if found.dtype == tl.int1:
        found = tl.where(found, 0.0, -float("inf"))
    return found.to(tl.float32) * 1.4426950408889634


@triton.jit
def to_nearest(x, dtype: tl.constexpr):
    """Return the fp32 tile `x` in another type, rounded to nearest; by itself, the interpreter truncates to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, total=None):
    """Return ``total + a b``, summed in fp32. The interpreter multiplies bf16 as integers, so it gets fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def score(qk, inner, outer, SOFTCAP: tl.constexpr):
    """Return the base-2 score of a product q.k, and the derivative of the softcap at that product."""
    if SOFTCAP:
        tanh = 1 - 2 / (1 + tl.exp2(qk * inner))
        value = tanh * outer
        slope = 1 - tanh * tanh
    else:
        value = qk * inner
        slope = value
    return value, slope
