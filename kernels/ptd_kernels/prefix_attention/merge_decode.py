"""One segment for a single query row: the heads of a group become rows, and long keys are split over idle workers.

With S = 1, the query sees every key that the window leaves. So the G query heads of a group become G rows of one head,
and each key is read once per group instead of G times. If there are fewer heads than workers (threads or
multiprocessors), the keys are split into equal parts. One call computes all parts as a batch, and log-sum-exp merges
them (Flash-Decoding, Dao et al. 2023). Legend of shapes: problem.py; G query heads per kv head, C parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.segments import Kernel, Rule

# The smallest number of keys per part.
_FEWEST_KEYS = 512
_ALIGNED = 16


def number_of_parts(k: Tensor) -> int:
    """Return into how many parts to split ``k [B, Hkv, T, D]``; 1 if B > 1, because the parts would not be one view."""
    B, Hkv, T, _ = k.shape
    if B > 1:
        return 1
    workers = torch.get_num_threads()
    if k.device.type == "cuda":
        workers = torch.cuda.get_device_properties(k.device).multi_processor_count
    return max(1, min(T // _FEWEST_KEYS, workers // Hkv))


def decode_forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rule: Rule, parts: int) -> tuple[Tensor, Tensor]:
    """Return output ``[B, Hq, 1, E]`` and log-sum-exp ``[B, Hq, 1]`` of the rows ``q [B, Hq, 1, D]`` over all keys.

    Of `rule`, only scale, softcap, mask and bias ``[B or 1, Hq or 1, 1, T]`` are used. `parts` above 1 requires B = 1.
    """
    B, Hq, _, D = q.shape
    Hkv, T = k.shape[1:3]
    rows_BHGD = q.reshape(B, Hkv, -1, D)
    mask, bias = (_by_group(x, Hkv) for x in (rule.mask, rule.bias))
    rule = Rule(rule.scale, rule.softcap, mask=mask, bias=bias)
    length = -(-T // parts // _ALIGNED) * _ALIGNED if parts > 1 else T
    whole = T // length if length else 0
    outs, sums = [], []
    if whole > 1:
        cut = whole * length
        part = rule._replace(mask=_split(mask, length, cut), bias=_split(bias, length, cut))
        q_CHGD = rows_BHGD.expand(whole, -1, -1, -1)
        out, lse = kernel.forward(q_CHGD, _parts(k, length, cut), _parts(v, length, cut), part)
        outs, sums = [out], [lse]
    rest = whole * length if whole > 1 else 0
    if rest < T:
        mask, bias = (None if x is None else x[..., rest:] for x in (mask, bias))
        out, lse = kernel.forward(rows_BHGD, k[:, :, rest:], v[:, :, rest:], rule._replace(mask=mask, bias=bias))
        if not outs:
            return out.reshape(B, Hq, 1, -1), lse.reshape(B, Hq, 1)
        outs, sums = [*outs, out], [*sums, lse]
    if not outs:
        work = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(B, Hq, 1, v.shape[3], dtype=work), q.new_full((B, Hq, 1), -torch.inf, dtype=work)
    lse_CHG = torch.cat(sums)
    lse_HG = lse_CHG.logsumexp(0)
    share_CHG = (lse_CHG - lse_HG.masked_fill(lse_HG == -torch.inf, 0.0)).exp()
    out_HGE = (torch.cat(outs) * share_CHG[..., None]).sum(0)
    return out_HGE.reshape(1, Hq, 1, -1), lse_HG.reshape(1, Hq, 1)


def _by_group(x: Tensor | None, kv_heads: int) -> Tensor | None:
    """Reshape ``[B, Hq, 1, T]`` to ``[B, Hkv, G, T]``; a tensor shared by all heads broadcasts and stays unchanged."""
    return x if x is None or x.shape[1] == 1 else x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _parts(x_1HTX: Tensor, length: int, cut: int) -> Tensor:
    """Return ``[C, H, length, X]``, a view."""
    x_HCTX: Tensor = x_1HTX[0, :, :cut].unflatten(1, (-1, length))
    return x_HCTX.transpose(0, 1)


def _split(x_1HGT: Tensor | None, length: int, cut: int) -> Tensor | None:
    if x_1HGT is None:
        return None
    x_HGCT: Tensor = x_1HGT[0, ..., :cut].unflatten(-1, (-1, length))
    return x_HGCT.movedim(-2, 0)
