"""Plain torch: the whole contract, on every device, in slices of bounded memory. Legend of shapes: problem.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import stood_in_for
from ptd_kernels.prefix_attention.segments.kernel import Gradients, Kernel, Rule, visible_keys


def _scores(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the scaled queries ``[B, Hkv, G*S, D]`` and the keys in the working dtype, the scores ``[B, Hq, S, T]``
    with -inf where hidden, and the derivative of the softcap (None without a softcap)."""
    B, Hq, S, D = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    k_BHTD = k.to(work)
    q_BHGD = (q.to(work) * rule.scale).reshape(B, k.shape[1], -1, D)
    scores_BHST = (q_BHGD @ k_BHTD.mT).view(B, Hq, S, -1)
    slope_BHST = None
    if rule.softcap is not None:
        tanh_BHST = torch.tanh_(scores_BHST.div_(rule.softcap))
        slope_BHST = 1 - tanh_BHST.square()
        scores_BHST = tanh_BHST.mul_(rule.softcap)
    visible = visible_keys(S, k.shape[2], rule, q.device)
    if visible is not None:
        scores_BHST.masked_fill_(~visible, -torch.inf)
    if rule.mask is not None:
        scores_BHST.masked_fill_(~rule.mask, -torch.inf)
    if rule.bias is not None:
        scores_BHST += rule.bias
    return q_BHGD, k_BHTD, scores_BHST, slope_BHST


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    B, Hq, S, _ = q.shape
    q_BHGD, _, scores_BHST, _ = _scores(q, k, rule)
    top_BHS1 = scores_BHST.amax(dim=-1, keepdim=True)
    top_BHS1 = top_BHS1.masked_fill(top_BHS1 == -torch.inf, 0.0)
    weights_BHST = scores_BHST.sub_(top_BHS1).exp_()
    total_BHS1 = weights_BHST.sum(dim=-1, keepdim=True)
    out_BHGE = weights_BHST.view(*q_BHGD.shape[:3], -1) @ v.to(q_BHGD.dtype)
    out = out_BHGE.view(B, Hq, S, -1) / total_BHS1.masked_fill(total_BHS1 == 0, 1.0)
    return out, (top_BHS1 + total_BHS1.log()).squeeze(-1)


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    q_BHGD, k_BHTD, scores_BHST, slope_BHST = _scores(q, k, rule)
    work, folded = q_BHGD.dtype, q_BHGD.shape[:3]
    dout_BHSE = dout.to(work)
    delta_BHS1 = (dout_BHSE * out).sum(dim=-1, keepdim=True)
    weights_BHST = scores_BHST.sub_(lse[..., None]).exp_()
    weights_BHGT = weights_BHST.view(*folded, -1)
    dout_BHGE = dout_BHSE.reshape(*folded, -1)
    dv_BHTE = weights_BHGT.mT @ dout_BHGE
    dscores_BHST = (dout_BHGE @ v.to(work).mT).view_as(weights_BHST).sub_(delta_BHS1).mul_(weights_BHST)
    if slope_BHST is not None:
        dscores_BHST *= slope_BHST
    dscores_BHGT = dscores_BHST.view(*folded, -1)
    dq = (dscores_BHGT @ k_BHTD).mul_(rule.scale).view(q.shape)
    return Gradients(dq, dscores_BHGT.mT @ q_BHGD, dv_BHTE)


CPU_SCORES = 1 << 22
"""Scores of a slice on a CPU: 16 MiB in fp32, so that the caches keep some of them."""
SHARE = 1 << 10
"""On a GPU, bytes of its memory per score of a slice. Up to four fp32 tensors of scores are alive at once, so a slice
takes up to 1/64 of the memory. The memory that is free does not count: the sum over slices has to be the same whatever
else is allocated."""
STAND_IN_MEMORY = 80 << 30
"""Memory of the GPU that CPU tensors without data represent."""


def _max_rows(device: torch.device, heads: int, keys: int, bounded: bool) -> int:
    scores = CPU_SCORES
    if device.type == "cuda":
        scores = torch.cuda.get_device_properties(device).total_memory // SHARE
    elif stood_in_for() is not None:
        scores = STAND_IN_MEMORY // SHARE
    return max(1, scores // max(1, heads * keys))


EAGER = Kernel("plain torch", _forward, _backward, lambda need: None, _max_rows)
