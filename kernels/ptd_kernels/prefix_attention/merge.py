"""Prefix attention as two calls to a library kernel, merged by log-sum-exp. Exact; the prefix is never copied.

Forward attends to the prefix and to the own tokens separately, then computes ``L = logaddexp(L1, L2)`` and
``o = o1 * exp(L1 - L) + o2 * exp(L2 - L)`` (the merge of Flash-Decoding and ring attention). Backward calls each
kernel's own backward with the merged o and L. Legend of shapes: problem.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptd_kernels.prefix_attention.fused.availability import refuses_unasked
from ptd_kernels.prefix_attention.merge_decode import decode_forward, number_of_parts
from ptd_kernels.prefix_attention.merge_groups import (
    Group,
    fold,
    groups_of,
    place_rows,
    put_rows,
    take_rows,
    unfold,
)
from ptd_kernels.prefix_attention.merge_outputs import finite_sums, merge_outputs
from ptd_kernels.prefix_attention.problem import Backend, Problem, nvidia_capability, register_backend
from ptd_kernels.prefix_attention.reference import reference_attention
from ptd_kernels.prefix_attention.segments import EAGER, ON_REQUEST, Gradients, Kernel, Need, Rule, explain_pick, pick

# The fewest rows of a call of plain torch on a pack whose offsets are unknown; many short calls would cost more.
_FEWEST_ROWS = 512


class MergedTile(NamedTuple):
    """One kernel call: query rows q0..q1 attend to the keys k0..k1. Under `rule` they see no key outside that range."""

    q0: int
    q1: int
    k0: int
    k1: int
    rule: Rule


def tiles(kernel: Kernel, q: Tensor, k: Tensor, rule: Rule, offsets: Sequence[int] | None) -> list[MergedTile]:
    """Cut a segment into calls for `kernel`. The row ranges of the calls are consecutive and cover 0 to S.

    `offsets` are the bounds of the packed sequences, if they are known on the host.
    """
    B, Hq, S, _ = q.shape
    if kernel.max_rows is None:
        return [MergedTile(0, S, 0, k.shape[2], rule)]
    most = partial(kernel.max_rows, q.device, B * Hq)
    if rule.cu_seqlens is not None and offsets is None:
        sequence_S = torch.searchsorted(rule.cu_seqlens, torch.arange(S, device=q.device), right=True)
        rule = rule._replace(cu_seqlens=None, sequences=(sequence_S, sequence_S))
    if offsets is None:
        return _sequence_tiles(most, (0, S), (0, k.shape[2]), rule)
    rule = rule._replace(cu_seqlens=None)
    cut: list[MergedTile] = []
    for bounds in pairwise(offsets):
        cut += _sequence_tiles(most, bounds, bounds, rule)
    return cut


def _sequence_tiles(
    most: Callable[[int, bool], int], rows: tuple[int, int], keys: tuple[int, int], rule: Rule
) -> list[MergedTile]:
    """Cut these rows into calls. ``most``: the most rows of a call, by its number of keys and whether it is bounded."""
    (q0, q1), (k0, k1) = rows, keys
    num_rows, num_keys, offset, window = q1 - q0, k1 - k0, rule.offset, rule.window
    if offset is not None:
        if offset < 0:
            # More queries than keys: the first rows see no key.
            dead = min(-offset, num_rows)
            rest = _sequence_tiles(most, (q0 + dead, q1), keys, rule._replace(offset=0))
            return [MergedTile(q0, q0 + dead, k0, k0, rule), *rest]
        if window is not None and window >= offset + num_rows:
            window = None
        if window is None and offset >= num_keys - 1:
            offset = None
    rule = rule._replace(offset=offset, window=window)
    bounded = rule.bias is not None or (offset is not None and (offset > 0 or window is not None))
    step = most(num_keys, bounded)
    # Of a pack whose offsets are unknown, a row sees no key farther away than the longest sequence is long.
    reach = rule.max_seqlen if rule.sequences is not None else None
    if reach is not None:
        step = min(step, max(2 * reach, _FEWEST_ROWS))
    if num_rows <= step and window is None:
        return [MergedTile(q0, q1, k0, k1, _part(rule, q0, q1, k0, k1))] if num_rows else []
    cut = []
    for first in range(0, num_rows, step):
        last, low, high = min(first + step, num_rows), 0, num_keys
        if offset is not None:
            high = min(num_keys, offset + last)
            low = 0 if window is None else max(0, offset + first - window + 1)
        if reach is not None:
            low, high = max(low, first - reach + 1), min(high, last + reach - 1)
        part = rule if offset is None else rule._replace(offset=offset + first - low)
        tile = q0 + first, q0 + last, k0 + low, k0 + high
        cut.append(MergedTile(*tile, _part(part, *tile)))
    return cut


def _part(rule: Rule, q0: int, q1: int, k0: int, k1: int) -> Rule:
    """Return `rule` with its tensors restricted to these rows and keys."""
    mask, bias = (None if x is None else x[:, :, q0:q1, k0:k1] for x in (rule.mask, rule.bias))
    sequences = rule.sequences and (rule.sequences[0][q0:q1], rule.sequences[1][k0:k1])
    return rule._replace(mask=mask, bias=bias, sequences=sequences)


def segment_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, cut: list[MergedTile]) -> tuple[Tensor, Tensor]:
    """Return output ``[B, Hq, S, E]`` (in the kernel's dtype) and log-sum-exp ``[B, Hq, S]`` over this segment only."""
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
    cut: list[MergedTile],
    dq: Tensor | None = None,
) -> Gradients:
    """Return this segment's share of the gradients, given the output and log-sum-exp over *all* segments.

    If `dq` from another segment is given, this segment's share is added to it in place.
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


def _rows(x_BHSX: Tensor, cut: list[MergedTile]) -> Sequence[Tensor]:
    return [x_BHSX] if len(cut) == 1 else x_BHSX.split_with_sizes([tile.q1 - tile.q0 for tile in cut], dim=2)


def _keys(x_BHTX: Tensor, cut: list[MergedTile]) -> list[Tensor]:
    return [x_BHTX[:, :, tile.k0 : tile.k1] for tile in cut]


def _join(parts: list[Tensor]) -> Tensor:
    # The kernels' results have the memory layout [B, S, H, X], so this concatenation is a contiguous copy.
    return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _sum_keys(x_BHTX: Tensor, cut: list[MergedTile], parts: list[Tensor]) -> Tensor:
    bounds = [0, *(tile.k1 for tile in cut)]
    if bounds[:-1] == [tile.k0 for tile in cut] and bounds[-1] == x_BHTX.shape[2]:
        return _join(parts)
    total = torch.zeros_like(x_BHTX, dtype=torch.promote_types(x_BHTX.dtype, torch.float32))
    for tile, part in zip(cut, parts, strict=True):
        total[:, :, tile.k0 : tile.k1].add_(part)
    return total


def _prefix_kernel(
    q: Tensor, prefix_v: Tensor, rule: Rule, groups: list[Group], preferred: Kernel | None, exact: bool
) -> Kernel:
    """Return the kernel for the prefix: one for the call with the fewest keys and for the call with the fewest rows."""
    keys = min(group.last_key - group.first_key for group in groups)
    rows = min(sum(last - first for first, last in group.rows) for group in groups)
    shape_of_rows = q[:1, :, :1].expand(-1, -1, rows, -1)
    return pick(Need(shape_of_rows, keys, prefix_v.shape[2], _everything(rule), exact), preferred)


def _prefix_forward(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, rule: Rule, groups: list[Group], preferred: Kernel | None
) -> tuple[Tensor, Tensor]:
    """Return output ``[B, Hq, S, E]`` and log-sum-exp ``[B, Hq, S]`` over each sequence's prefix.

    The log-sum-exp is -inf where a sequence has no prefix.
    """
    q_1HND = fold(q)
    kernel = _prefix_kernel(q, prefix_v, rule, groups, preferred, exact=False)
    outs, sums = [], []
    for group in groups:
        rows, key, value = _prefix_segment(q_1HND, prefix_k, prefix_v, group)
        out, lse = segment_forward(kernel, rows, key, value, tiles(kernel, rows, key, _everything(rule), None))
        outs.append(out)
        sums.append(lse[..., None])
    out_1HNE, lse_1HN1 = (place_rows(x, groups, q_1HND.shape[2], fill) for x, fill in ((outs, 0.0), (sums, -torch.inf)))
    return unfold(out_1HNE, q.shape[0]), unfold(lse_1HN1, q.shape[0])[..., 0]


def _prefix_backward(
    kernel: Kernel, dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, rule: Rule,
    groups: list[Group], dq: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Return dq, dprefix_k and dprefix_v; a prefix without readers gets zeros.

    A kernel that adds to dq needs `dq`, the own keys' share, and returns the sum; without `dq` it computes none. For
    every other kernel, the returned dq is the prefix's share.
    """
    batch, keys = q.shape[0], prefix_k.shape[1]
    folded = [fold(x) for x in (dout, q, out, lse[..., None])]
    total = None if dq is None else fold(dq)
    dqs, dks, dvs = [], [], []
    for group in groups:
        dout_rows, q_rows, out_rows, lse_rows = (take_rows(x, group.rows) for x in folded)
        _, key, value = _prefix_segment(folded[1], prefix_k, prefix_v, group)
        given = dout_rows, q_rows, key, value, out_rows, lse_rows[..., 0]
        if kernel.add_backward is not None:
            dq_rows = None if total is None else take_rows(total, group.rows)
            dk, dv = kernel.add_backward(*given, _everything(rule), dq_rows)
            if total is not None and dq_rows is not None and len(group.rows) > 1:
                put_rows(total, group.rows, dq_rows)
        else:
            part = segment_backward(kernel, *given, tiles(kernel, q_rows, key, _everything(rule), None))
            dqs.append(part.q)
            dk, dv = part.k, part.v
        dks.append(dk[0])
        dvs.append(dv[0])
    if kernel.add_backward is None:
        total = place_rows(dqs, groups, folded[1].shape[2], 0.0)
    ranges = [(group.first_key, group.last_key) for group in groups]
    dprefix_k, dprefix_v = (_all_keys(x, ranges, like, keys) for x, like in ((dks, prefix_k), (dvs, prefix_v)))
    return None if total is None else unfold(total, batch), dprefix_k, dprefix_v


def _all_keys(parts: list[Tensor], ranges: list[tuple[int, int]], like_HPX: Tensor, keys: int) -> Tensor:
    """Return the gradient of all prefixes, given those of some ranges of their keys; it is zero elsewhere."""
    if ranges == [(0, keys)]:
        return parts[0].to(like_HPX.dtype)
    whole = torch.zeros_like(like_HPX)
    for (first, last), part in zip(ranges, parts, strict=True):
        whole[:, first:last] = part
    return whole


def _prefix_segment(q_1HND: Tensor, prefix_k: Tensor, prefix_v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of `group`, each with batch size 1."""
    keys = slice(group.first_key, group.last_key)
    key, value = (x[:, keys].to(q_1HND.dtype)[None] for x in (prefix_k, prefix_v))
    return take_rows(q_1HND, group.rows), key, value


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
        groups: list[Group],
        preferred: Kernel | None,
    ) -> Tensor:
        own = pick(Need(q, k.shape[2], v.shape[3], rule), preferred)
        if q.shape[2] == 1 and rule.cu_seqlens is None:
            out, lse = _decode(own, q, k, v, rule)
        else:
            out, lse = segment_forward(own, q, k, v, tiles(own, q, k, rule, offsets))
        if prefix_k is not None and prefix_v is not None and groups:
            of_prefix = _prefix_forward(q, prefix_k, prefix_v, rule, groups, preferred)
            out, lse = merge_outputs(out, lse, *of_prefix, q.dtype, plain=preferred is EAGER)
        else:
            out, lse = out.to(q.dtype), finite_sums(lse)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, rule.mask, rule.bias, rule.cu_seqlens)
        ctx.rule, ctx.offsets, ctx.groups = rule._replace(mask=None, bias=None, cu_seqlens=None), offsets, groups
        ctx.preferred = preferred
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, out, lse, mask, bias, cu_seqlens = ctx.saved_tensors
        rule = ctx.rule._replace(mask=mask, bias=bias, cu_seqlens=cu_seqlens)
        need_q, need_k, need_v, need_prefix_k, need_prefix_v = ctx.needs_input_grad[:5]
        dq = dk = dv = dprefix_k = dprefix_v = None
        groups, preferred = ctx.groups, ctx.preferred
        needs_own = need_q or need_k or need_v
        kernel = None
        if groups and (need_q or need_prefix_k or need_prefix_v):
            kernel = _prefix_kernel(q, prefix_v, rule, groups, preferred, exact=True)
        elif prefix_k is not None and not groups:
            dprefix_k, dprefix_v = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)

        def own(dq: Tensor | None) -> Gradients:
            of_own = pick(Need(q, k.shape[2], v.shape[3], rule), preferred)
            return segment_backward(of_own, dout, q, k, v, out, lse, tiles(of_own, q, k, rule, ctx.offsets), dq)

        def prefix(dq: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
            assert kernel is not None
            return _prefix_backward(kernel, dout, q, prefix_k, prefix_v, out, lse, rule, groups, dq)

        if kernel is not None and kernel.add_backward is not None:  # adds to the own keys' dq
            if needs_own:
                dq, dk, dv = own(None)
            dq, dprefix_k, dprefix_v = prefix(dq if need_q else None)
        else:
            if kernel is not None:
                dq, dprefix_k, dprefix_v = prefix(None)
            if needs_own:
                dq, dk, dv = own(dq)
        return (
            dq.to(q.dtype) if need_q and dq is not None else None,
            dk.to(k.dtype) if need_k and dk is not None else None,
            dv.to(v.dtype) if need_v and dv is not None else None,
            dprefix_k if need_prefix_k else None,
            dprefix_v if need_prefix_v else None,
            *(None,) * 4,
        )


def _everything(rule: Rule) -> Rule:
    return Rule(scale=rule.scale, softcap=rule.softcap)


def _decode(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Attend from one query row to its own tokens: to the last `window` keys, or to all keys without a window."""
    if rule.window is not None and rule.window < k.shape[2]:
        k, v = (x[:, :, -rule.window :] for x in (k, v))
        mask, bias = (None if x is None else x[..., -rule.window :] for x in (rule.mask, rule.bias))
        rule = rule._replace(mask=mask, bias=bias)
    return decode_forward(kernel, q, k, v, rule, number_of_parts(k))


def _rule(problem: Problem) -> Rule:
    p = problem
    offset = p.k_BHTD.shape[2] - p.q_BHSD.shape[2] if p.causal else None
    return Rule(p.scale, p.softcap, offset, p.window, p.mask, p.bias, p.cu_seqlens, p.max_seqlen)


def merge_attention(problem: Problem, preferred: Kernel | None = None) -> Tensor:
    """Solve `problem` segment by segment, each with a library kernel that supports it, `preferred` where it does."""
    p = problem
    if p.q_BHSD.numel() == 0:
        return reference_attention(problem)
    tensors = p.q_BHSD, p.k_BHTD, p.v_BHTE, p.prefix_k_HPD, p.prefix_v_HPE
    out: Tensor = _Merge.apply(*tensors, _rule(p), p.offsets, groups_of(p), preferred)
    return out


def _explain(problem: Problem, preferred: Kernel | None = None) -> str:
    q, head_size, rule = problem.q_BHSD, problem.v_BHTE.shape[3], _rule(problem)
    own = explain_pick(Need(q, problem.k_BHTD.shape[2], head_size, rule), preferred)
    keys = 1 if problem.prefix_k_HPD is None else problem.prefix_k_HPD.shape[1]
    prefix, prefix_backward = (
        explain_pick(Need(q, keys, head_size, _everything(rule), exact), preferred) for exact in (False, True)
    )
    wanted = preferred is None and nvidia_capability(q.device) is not None
    missing = refuses_unasked(q) if wanted else None
    return (
        f"one call per segment, merged by log-sum-exp; own tokens: {own}; prefix: {prefix}; "
        f"gradient of the prefix: {prefix_backward}" + (f" (Triton cannot be used: {missing})" if missing else "")
    )


def _refuses(problem: Problem, preferred: Kernel) -> str | None:
    need = Need(problem.q_BHSD, problem.k_BHTD.shape[2], problem.v_BHTE.shape[3], _rule(problem))
    reason = preferred.refuses(need)
    return None if reason is None else f"{preferred.name}: {reason}"


register_backend(Backend("merge", merge_attention, refuses=lambda problem: None, explains=_explain, priority=10))
for _kernel in ON_REQUEST:
    register_backend(
        Backend(
            f"merge-{_kernel.name.replace(' ', '-').lower()}",
            partial(merge_attention, preferred=_kernel),
            refuses=partial(_refuses, preferred=_kernel),
            explains=partial(_explain, preferred=_kernel),
            priority=-2,
        )
    )
