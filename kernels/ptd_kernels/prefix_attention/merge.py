"""Prefix attention as two calls to a library kernel, joined by their log-sum-exps. Exact; the prefix is never copied.

Forward: attend to the prefix and to the own tokens apart, then ``L = logaddexp(L1, L2)`` and
``o = o1 * exp(L1 - L) + o2 * exp(L2 - L)`` (the merge of Flash-Decoding and ring attention). Backward: each kernel's
own backward, given the merged o and L. Legend of shapes: problem.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptd_kernels.prefix_attention.problem import Backend, Problem, register
from ptd_kernels.prefix_attention.reference import reference_attention
from ptd_kernels.prefix_attention.segments import Gradients, Kernel, Rule, pick


class Tile(NamedTuple):
    """One kernel call: query rows q0..q1 against the keys k0..k1, the only ones they may see under `rule`."""

    q0: int
    q1: int
    k0: int
    k1: int
    rule: Rule


def tiles(kernel: Kernel, q: Tensor, k: Tensor, rule: Rule, offsets: Sequence[int] | None) -> list[Tile]:
    """Cut a segment into calls for `kernel`. The row ranges follow each other from 0 to S.

    `offsets` are the packed sequences' bounds if they are known on the host.
    """
    B, Hq, S, _ = q.shape
    if kernel.max_rows is None:
        return [Tile(0, S, 0, k.shape[2], rule)]
    if rule.cu_seqlens is not None and offsets is None:
        sequence_S = torch.searchsorted(rule.cu_seqlens, torch.arange(S, device=q.device), right=True)
        rule = rule._replace(cu_seqlens=None, sequences=(sequence_S, sequence_S))
    if offsets is None:
        return _sequence_tiles(kernel, B * Hq, (0, S), (0, k.shape[2]), rule)
    rule = rule._replace(cu_seqlens=None)
    cut: list[Tile] = []
    for bounds in pairwise(offsets):
        cut += _sequence_tiles(kernel, B * Hq, bounds, bounds, rule)
    return cut


def _sequence_tiles(kernel: Kernel, heads: int, rows: tuple[int, int], keys: tuple[int, int], rule: Rule) -> list[Tile]:
    (q0, q1), (k0, k1) = rows, keys
    num_rows, num_keys, offset, window = q1 - q0, k1 - k0, rule.offset, rule.window
    if offset is not None:
        if offset < 0:
            # More queries than keys: the first rows see none.
            dead = min(-offset, num_rows)
            rest = _sequence_tiles(kernel, heads, (q0 + dead, q1), keys, rule._replace(offset=0))
            return [Tile(q0, q0 + dead, k0, k0, rule), *rest]
        if window is not None and window >= offset + num_rows:
            window = None
        if window is None and offset >= num_keys - 1:
            offset = None
    rule = rule._replace(offset=offset, window=window)
    bounded = offset is not None and (offset > 0 or window is not None)
    step = kernel.max_rows(1, heads, num_keys, bounded) if kernel.max_rows else num_rows
    if num_rows <= step and window is None:
        return [Tile(q0, q1, k0, k1, rule)] if num_rows else []
    cut = []
    for first in range(0, num_rows, step):
        last, low, high, part = min(first + step, num_rows), 0, num_keys, rule
        if offset is not None:
            high = min(num_keys, offset + last)
            low = 0 if window is None else max(0, offset + first - window + 1)
            part = rule._replace(offset=offset + first - low)
        if rule.sequences is not None:
            part = part._replace(sequences=(rule.sequences[0][first:last], rule.sequences[1][low:high]))
        if rule.mask is not None:
            part = part._replace(mask=rule.mask[:, :, first:last, low:high])
        cut.append(Tile(q0 + first, q0 + last, k0 + low, k0 + high, part))
    return cut


def segment_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, cut: list[Tile]) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, S, E]`` (in the kernel's dtype) and log-sum-exp ``[B, Hq, S]`` over this segment alone."""
    outs, sums = [], []
    for tile, q_rows, k_part, v_part in zip(cut, _rows(q, cut), _keys(k, cut), _keys(v, cut), strict=True):
        if tile.k0 == tile.k1:
            work = torch.promote_types(q.dtype, torch.float32)
            out = q_rows.new_zeros(*q_rows.shape[:3], v.shape[3], dtype=work)
            lse = q_rows.new_full(q_rows.shape[:3], -torch.inf, dtype=work)
        else:
            out, lse = kernel.forward(q_rows, k_part, v_part, tile.rule)
        outs.append(out)
        sums.append(lse)
    return _join(outs), _join(sums)


def segment_backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cut: list[Tile],
    dq: Tensor | None = None,
) -> Gradients:
    """This segment's share of the gradients, from the output and log-sum-exp over *all* segments.

    A `dq` from another segment is added to in place, and returned.
    """
    tiles_of_rows = zip(*(_rows(x, cut) for x in (dout, q, out, lse)), strict=True)
    dqs, dks, dvs = [], [], []
    for tile, (dout_rows, q_rows, out_rows, lse_rows), k_part, v_part in zip(
        cut, tiles_of_rows, _keys(k, cut), _keys(v, cut), strict=True
    ):
        if tile.k0 == tile.k1:
            part = Gradients(torch.zeros_like(q_rows), torch.zeros_like(k_part), torch.zeros_like(v_part))
        else:
            part = kernel.backward(dout_rows, q_rows, k_part, v_part, out_rows, lse_rows, tile.rule)
        dks.append(part.k)
        dvs.append(part.v)
        if dq is None:
            dqs.append(part.q)
        else:
            dq[:, :, tile.q0 : tile.q1].add_(part.q)
    return Gradients(_join(dqs) if dq is None else dq, _sum_keys(k, cut, dks), _sum_keys(v, cut, dvs))


def _rows(x_BHSX: Tensor, cut: list[Tile]) -> Sequence[Tensor]:
    return [x_BHSX] if len(cut) == 1 else x_BHSX.split_with_sizes([tile.q1 - tile.q0 for tile in cut], dim=2)


def _keys(x_BHTX: Tensor, cut: list[Tile]) -> list[Tensor]:
    return [x_BHTX[:, :, tile.k0 : tile.k1] for tile in cut]


def _join(parts: list[Tensor]) -> Tensor:
    # The kernels lay their results out as [B, S, H, X], which makes this a straight copy.
    return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _sum_keys(x_BHTX: Tensor, cut: list[Tile], parts: list[Tensor]) -> Tensor:
    bounds = [0, *(tile.k1 for tile in cut)]
    if bounds[:-1] == [tile.k0 for tile in cut] and bounds[-1] == x_BHTX.shape[2]:
        return _join(parts)
    total = torch.zeros_like(x_BHTX, dtype=torch.promote_types(x_BHTX.dtype, torch.float32))
    for tile, part in zip(cut, parts, strict=True):
        total[:, :, tile.k0 : tile.k1].add_(part)
    return total


def _fold(x_BHSX: Tensor) -> Tensor:
    """``[1, H, B*S, X]``: the batch becomes queries of one sequence; no copy if memory is laid out [B, S, H, X]."""
    if x_BHSX.shape[0] == 1:
        return x_BHSX
    return x_BHSX.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _unfold(x_1HNX: Tensor, batch: int) -> Tensor:
    if batch == 1:
        return x_1HNX
    _, H, N, X = x_1HNX.shape
    return x_1HNX[0].transpose(0, 1).reshape(batch, N // batch, H, X).transpose(1, 2)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        rule: Rule,
        offsets: Sequence[int] | None,
    ) -> Tensor:
        own = pick(q, v.shape[3], rule.softcap, rule.mask is not None)
        out, lse = segment_forward(own, q, k, v, tiles(own, q, k, rule, offsets))
        if prefix_k is not None and prefix_v is not None and prefix_k.shape[1]:
            shared = pick(q, v.shape[3], rule.softcap, False)
            q_1HND = _fold(q)
            key, value = prefix_k.to(q.dtype)[None], prefix_v.to(q.dtype)[None]
            cut = tiles(shared, q_1HND, key, _everything(rule), None)
            prefix_out_1HNE, prefix_lse_1HN = segment_forward(shared, q_1HND, key, value, cut)
            prefix_out, prefix_lse = (
                _unfold(prefix_out_1HNE, q.shape[0]),
                _unfold(prefix_lse_1HN[..., None], q.shape[0])[..., 0],
            )
            prefix_share = torch.sigmoid(prefix_lse - lse)[..., None]
            out = out.to(prefix_share.dtype).lerp_(prefix_out.to(prefix_share.dtype), prefix_share)
            lse = torch.logaddexp(lse, prefix_lse)
        else:
            # A row that sees nothing has lse -inf and weights exp(-inf - lse), which must come out as 0, not NaN.
            lse = lse.masked_fill(lse == -torch.inf, 0.0)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, rule.mask, rule.cu_seqlens)
        ctx.rule, ctx.offsets = rule._replace(mask=None, cu_seqlens=None), offsets
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, out, lse, mask, cu_seqlens = ctx.saved_tensors
        rule = ctx.rule._replace(mask=mask, cu_seqlens=cu_seqlens)
        need_q, need_k, need_v, need_prefix_k, need_prefix_v = ctx.needs_input_grad[:5]
        dq = dk = dv = dprefix_k = dprefix_v = None
        if prefix_k is not None and not prefix_k.shape[1]:
            dprefix_k, dprefix_v = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
        elif prefix_k is not None and (need_q or need_prefix_k or need_prefix_v):
            shared = pick(q, v.shape[3], rule.softcap, False, exact_keys=True)
            q_1HND = _fold(q)
            key, value = prefix_k.to(q.dtype)[None], prefix_v.to(q.dtype)[None]
            cut = tiles(shared, q_1HND, key, _everything(rule), None)
            lse_1HN = _fold(lse[..., None])[..., 0]
            parts = segment_backward(shared, _fold(dout), q_1HND, key, value, _fold(out), lse_1HN, cut)
            dprefix_k, dprefix_v = parts.k[0].to(prefix_k.dtype), parts.v[0].to(prefix_v.dtype)
            dq = _unfold(parts.q, q.shape[0])
        if need_q or need_k or need_v:
            own = pick(q, v.shape[3], rule.softcap, rule.mask is not None)
            cut = tiles(own, q, k, rule, ctx.offsets)
            dq, dk, dv = segment_backward(own, dout, q, k, v, out, lse, cut, dq)
        return (
            dq.to(q.dtype) if need_q and dq is not None else None,
            dk.to(k.dtype) if need_k and dk is not None else None,
            dv.to(v.dtype) if need_v and dv is not None else None,
            dprefix_k if need_prefix_k else None,
            dprefix_v if need_prefix_v else None,
            None,
            None,
        )


def _everything(rule: Rule) -> Rule:
    return Rule(scale=rule.scale, softcap=rule.softcap)


def merge_attention(problem: Problem) -> Tensor:
    """Solve `problem` with the library kernels that fit it, segment by segment."""
    p = problem
    if p.q_BHSD.numel() == 0:
        return reference_attention(problem)
    offset = p.k_BHTD.shape[2] - p.q_BHSD.shape[2] if p.causal else None
    rule = Rule(p.scale, p.softcap, offset, p.window, p.mask, p.cu_seqlens, p.max_seqlen)
    out: Tensor = _Merge.apply(p.q_BHSD, p.k_BHTD, p.v_BHTE, p.prefix_k_HPD, p.prefix_v_HPE, rule, p.offsets)
    return out


def _explain(problem: Problem) -> str:
    q, head_size = problem.q_BHSD, problem.v_BHTE.shape[3]
    own = pick(q, head_size, problem.softcap, problem.mask is not None)
    prefix = pick(q, head_size, problem.softcap, False)
    prefix_backward = pick(q, head_size, problem.softcap, False, exact_keys=True)
    return (
        f"one call a segment, merged by log-sum-exp; own tokens: {own.name}; prefix: {prefix.name}, "
        f"its gradient: {prefix_backward.name}"
    )


register(Backend("merge", merge_attention, refuses=lambda problem: None, explains=_explain, priority=10))
