"""Packed sequences on a CPU with a short prefix: copy the prefix before each sequence's keys, one kernel call per tile.

A second kernel call and a merge cost more than copying a short prefix (README.md has the measurements). A sequence's
keys are the P keys of its prefix and its n own keys; row i sees the first P + i + 1 of them, so the mask is a
staircase. The staircase is the same for all sequences, layers and tiles of rows, so all masks are views of one strip,
which is made once. Legend of shapes: problem.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ptd_kernels.prefix_attention.problem import Backend, Problem, register_backend, stood_in_for
from ptd_kernels.prefix_attention.segments.kernel import Rule, unit_stride
from ptd_kernels.prefix_attention.segments.torch_flash_cpu import TORCH_FLASH_CPU, VECTOR, attend, attend_backward

ROWS = 192
"""Query rows per tile. With fewer, the kernel's matrix products shrink; with more, it computes more hidden scores."""
LONGEST_PREFIX = 64
"""Measured: from about 100 virtual tokens on, the copies cost more than they save."""
LONGEST_SEQUENCE = 2**14
"""Limits the size of the strip: 13 MB in fp32."""


class JoinedTile(NamedTuple):
    """Rows q0..q1 of the pack attend to the joined keys k0..k1. The first row sees the keys up to ``k0 + seen``."""

    q0: int
    q1: int
    k0: int
    k1: int
    seen: int


class JoinedSequence(NamedTuple):
    """The tiles of a sequence, and the range of the keys of its prefix among those of all prefixes."""

    tiles: list[JoinedTile]
    first: int
    last: int

    @property
    def prefix(self) -> int:
        """Number of keys of the prefix."""
        return self.last - self.first


class TilePlan(NamedTuple):
    """``source``: the index in [prefixes, own keys] of each joined key; each sequence's joined keys are padded to a
    multiple of `VECTOR` with its own first key, so that no value of another sequence's prefix reaches it.
    ``sequences``: those that are not empty. ``rows``, ``seen``: the maximum over all tiles."""

    source: Tensor
    sequences: list[JoinedSequence]
    rows: int
    seen: int


def _up(keys: int) -> int:
    return -(-keys // VECTOR) * VECTOR


def _plan(offsets: tuple[int, ...], total: int, ranges: tuple[tuple[int, int], ...], causal: bool) -> TilePlan:
    """Plan a pack. ``total``: keys of all prefixes; ``ranges``: those of each sequence's prefix, or one for all."""
    source, sequences, begin = [], [], 0
    for index, (first, last) in enumerate(pairwise(offsets)):
        of_prefix = ranges[index if len(ranges) > 1 else 0]
        prefix = of_prefix[1] - of_prefix[0]
        keys = prefix + last - first
        padding = _up(keys) - keys
        if first == last:
            continue
        own = torch.arange(total + first, total + last)
        source += [torch.arange(*of_prefix), own, own[:1].expand(padding)]
        tiles = [JoinedTile(first, last, begin, begin + keys + padding, keys - 1)]
        if causal:
            cuts = [*range(first, last, ROWS), last]
            tiles = [
                JoinedTile(q0, q1, begin, begin + _up(prefix + q1 - first), prefix + q0 - first)
                for q0, q1 in pairwise(cuts)
            ]
        sequences.append(JoinedSequence(tiles, *of_prefix))
        begin += keys + padding
    every = _tiles(sequences)
    rows, seen = max(tile.q1 - tile.q0 for tile in every), max(tile.seen for tile in every)
    return TilePlan(torch.cat(source), sequences, rows, seen)


def _tiles(sequences: Iterable[JoinedSequence]) -> list[JoinedTile]:
    return list(chain.from_iterable(sequence.tiles for sequence in sequences))


_kept_plan = lru_cache(8)(_plan)


@lru_cache(16)
def _strip(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return ``[1, 1, rows, width + rows + VECTOR]``: 0 up to column ``width + row``, -inf after it."""
    row, column = torch.arange(rows)[:, None], torch.arange(width + rows + VECTOR)
    return torch.zeros(1, 1, rows, len(column), dtype=dtype).masked_fill_(column > width + row, -torch.inf)


class _Masks:
    """The masks of a plan's tiles, for scores of one dtype. ``real``: tensors have data, and the strip is cached."""

    def __init__(self, plan: TilePlan, causal: bool, dtype: torch.dtype, real: bool) -> None:
        self.width = 1 << plan.seen.bit_length()
        rows = min(ROWS, 1 << plan.rows.bit_length()) if causal else 1
        self.causal = causal
        if real:
            self.strip = _strip(rows, self.width, dtype)
        else:  # stride 0: a pass without data counts almost no memory for it, as for a strip that is already cached
            self.strip = torch.zeros(1, 1, 1, 1, dtype=dtype).expand(1, 1, rows, self.width + rows + VECTOR)

    def __call__(self, tile: JoinedTile) -> Tensor:
        """Return the mask of `tile`: ``[1, 1, rows, keys]``; without a causal rule, where only padding is hidden,
        ``[1, 1, 1, keys]``."""
        begin = self.width - tile.seen
        rows = tile.q1 - tile.q0 if self.causal else 1
        return self.strip[:, :, :rows, begin : begin + tile.k1 - tile.k0]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        scale: float,
        causal: bool,
        offsets: tuple[int, ...],
        ranges: tuple[tuple[int, int], ...],
    ) -> Tensor:
        ctx.real = not isinstance(q, FakeTensor)
        plan = (_kept_plan if ctx.real else _plan)(offsets, prefix_k.shape[1], ranges, causal)
        mask_of = _Masks(plan, causal, q.dtype, ctx.real)
        q, keys, values = unit_stride(q), _join(prefix_k, k, plan), _join(prefix_v, v, plan)
        outs, sums = [], []
        for tile in _tiles(plan.sequences):
            part = slice(tile.k0, tile.k1)
            out, lse = attend(
                q[:, :, tile.q0 : tile.q1], keys[:, :, part], values[:, :, part], 0.0, False, attn_mask=mask_of(tile),
                scale=scale,
            )  # fmt: skip
            outs.append(out.transpose(1, 2))
            sums.append(lse)
        out = torch.cat(outs, dim=1).transpose(1, 2)
        ctx.save_for_backward(q, keys, values, out, torch.cat(sums, dim=2))
        ctx.plan, ctx.scale, ctx.causal = plan, scale, causal
        ctx.several = ranges != ((0, prefix_k.shape[1]),)
        ctx.total, ctx.dtypes = prefix_k.shape[1], [x.dtype for x in (q, k, v, prefix_k, prefix_v)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, out, lse = ctx.saved_tensors
        if any(ctx.needs_input_grad[:3]) or ctx.several:
            # In half precision, the kernel's backward is slower and rounds dk and dv after every block of queries.
            work = torch.promote_types(q.dtype, torch.float32)
            dout, q, keys, values, out = (unit_stride(x.to(work)) for x in (dout, q, keys, values, out))
            gradients = _all_gradients(ctx, dout, q, keys, values, out, lse)
        else:  # a first layer: its tokens depend on no trained parameter, so only the prefix needs a gradient
            prefix = slice(0, ctx.total)
            shares = TORCH_FLASH_CPU.backward(
                dout, q, keys[:, :, prefix], values[:, :, prefix], out, lse, Rule(ctx.scale)
            )
            gradients = [q, keys, values, shares.k[0], shares.v[0]]  # the first three are placeholders: not needed
        found = zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(x.to(dtype) if needed else None for x, dtype, needed in found), None, None, None, None)


def _all_gradients(
    ctx: Any, dout: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """Return the gradients of q, k, v, prefix_k and prefix_v, in the dtype of the tensors given."""
    mask_of = _Masks(ctx.plan, ctx.causal, q.dtype, ctx.real)
    # Gradients [1, rows or keys, H, X]: dq per tile; dk, dv and each sequence's share of its prefix's per sequence.
    dq: list[Tensor] = []
    dk: list[Tensor] = []
    dv: list[Tensor] = []
    dprefix_k: list[Tensor] = []
    dprefix_v: list[Tensor] = []
    for sequence in ctx.plan.sequences:
        tiles, prefix = sequence.tiles, sequence.prefix
        of_keys: list[Tensor] = []
        of_values: list[Tensor] = []
        for tile in tiles:
            rows, part = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
            found = attend_backward(
                dout[:, :, rows], q[:, :, rows], keys[:, :, part], values[:, :, part], out[:, :, rows],
                lse[:, :, rows], 0.0, False, attn_mask=mask_of(tile), scale=ctx.scale,
            )  # fmt: skip
            for parts, gradient in zip((dq, of_keys, of_values), found, strict=True):
                parts.append(gradient.transpose(1, 2))
        own = slice(prefix, prefix + tiles[-1].q1 - tiles[0].q0)
        for parts, of_own, of_prefix in ((of_keys, dk, dprefix_k), (of_values, dv, dprefix_v)):
            total = _sum(parts)
            of_own.append(total[:, own])
            of_prefix.append(total[:, :prefix])
    tokens = [torch.cat(parts, dim=1).transpose(1, 2) for parts in (dq, dk, dv)]
    return tokens + [_of_prefixes(ctx, parts).transpose(0, 1) for parts in (dprefix_k, dprefix_v)]


def _of_prefixes(ctx: Any, parts: list[Tensor]) -> Tensor:
    """Return the gradient of all prefixes, ``[P, H, X]``, from the sequences' shares ``[1, P, H, X]``."""
    if not ctx.several:
        return torch.cat(parts).sum(0)
    whole = parts[0].new_zeros(ctx.total, *parts[0].shape[2:])
    for sequence, part in zip(ctx.plan.sequences, parts, strict=True):
        whole[sequence.first : sequence.last] += part[0]
    return whole


def _join(prefix_HPX: Tensor, own_1HTX: Tensor, plan: TilePlan) -> Tensor:
    """Return the joined keys or values ``[1, H, joined keys, X]``, in the memory layout ``[1, joined keys, H, X]``."""
    both = torch.cat([prefix_HPX.transpose(0, 1).to(own_1HTX.dtype), own_1HTX[0].transpose(0, 1)])
    return both.index_select(0, plan.source)[None].transpose(1, 2)


def _sum(parts: list[Tensor]) -> Tensor:
    """Sum a sequence's gradients ``[1, keys, H, X]``, in place. Each part covers more keys than the one before it."""
    total = parts[-1]
    for part in parts[:-1]:
        total[:, : part.shape[1]] += part
    return total


def joined_attention(problem: Problem) -> Tensor:
    """Solve a `problem` that `_refuses` does not refuse."""
    p = problem
    tensors = p.q_BHSD, p.k_BHTD, p.v_BHTE, p.prefix_k_HPD, p.prefix_v_HPE
    out: Tensor = _Joined.apply(*tensors, p.scale, p.causal, p.offsets, _ranges(p))
    return out


def _ranges(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Return the range of the keys of each sequence's prefix; one range if all sequences read all keys."""
    p = problem
    if p.prefix_index is None or p.prefix_bounds is None:
        return ((0, 0 if p.prefix_k_HPD is None else p.prefix_k_HPD.shape[1]),)
    every = list(pairwise(p.prefix_bounds))
    return tuple(every[index] for index in p.prefix_index.tolist())


def _refuses(problem: Problem) -> str | None:
    p = problem
    if p.q_BHSD.device.type != "cpu" or stood_in_for() is not None:
        return f"it needs tensors on the CPU, but they are on {p.q_BHSD.device}"
    if p.offsets is None or not p.q_BHSD.shape[2]:
        return "it needs a packed batch (cu_seqlens) of at least one token"
    prefixes = [last - first for first, last in _ranges(p)]
    if not 0 < max(prefixes) <= LONGEST_PREFIX:
        return f"it needs prefixes of 1 to {LONGEST_PREFIX} keys"
    if p.window is not None or p.softcap is not None or p.bias is not None:
        return "it supports no window, softcap or bias"
    if p.q_BHSD.shape[3] != p.v_BHTE.shape[3]:
        return "it needs the same head size for keys and values"
    longest = max(last - first for first, last in pairwise(p.offsets))
    if longest > LONGEST_SEQUENCE:
        return f"it supports sequences of up to {LONGEST_SEQUENCE} tokens, the longest has {longest}"
    return None


def _explain(problem: Problem) -> str:
    return "the prefix is copied before each sequence's keys; one call of torch's flash attention (CPU) per tile"


register_backend(Backend("joined", joined_attention, _refuses, _explain, priority=20))
