"""The specification: expand the prefix over the batch, concatenate, mask, softmax. Plain torch and autograd.

Slow and memory-hungry on purpose; every other backend is tested against it. Legend of shapes: problem.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import Backend, Problem, register


def reference_attention(problem: Problem) -> Tensor:
    """Solve `problem` in float64 if its tensors are, else in float32."""
    q, k, v = problem.q_BHSD, problem.k_BHTD, problem.v_BHTE
    B, Hq = q.shape[:2]
    work = torch.promote_types(q.dtype, torch.float32)
    q_BHSD, k_BHTD, v_BHTE = q.to(work), k.to(work), v.to(work)
    prefix_len = 0
    if problem.prefix_k_HPD is not None and problem.prefix_v_HPE is not None:
        prefix_len = problem.prefix_k_HPD.shape[1]
        prefix_k_BHPD, prefix_v_BHPE = (
            _round_like(prefix, q.dtype, work).expand(B, -1, -1, -1)
            for prefix in (problem.prefix_k_HPD, problem.prefix_v_HPE)
        )
        k_BHTD = torch.cat([prefix_k_BHPD, k_BHTD], dim=2)
        v_BHTE = torch.cat([prefix_v_BHPE, v_BHTE], dim=2)
    group = Hq // k.shape[1]
    k_BHTD, v_BHTE = k_BHTD.repeat_interleave(group, dim=1), v_BHTE.repeat_interleave(group, dim=1)

    scores_BHST = q_BHSD @ k_BHTD.mT * problem.scale
    if problem.softcap is not None:
        scores_BHST = problem.softcap * torch.tanh(scores_BHST / problem.softcap)
    bias_BHST = torch.nn.functional.pad(own_bias(problem, work), (prefix_len, 0)).expand_as(scores_BHST)
    dead_BHS1 = (bias_BHST == -torch.inf).all(dim=-1, keepdim=True)
    bias_BHST = bias_BHST.masked_fill(dead_BHS1, 0.0)
    weights_BHST = torch.softmax(scores_BHST + bias_BHST, dim=-1).masked_fill(dead_BHS1, 0.0)
    return (weights_BHST @ v_BHTE).to(q.dtype)


def own_bias(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The own tokens' rule as a bias ``[B or 1, Hq or 1, S, T]``: 0 where visible, -inf where hidden."""
    S, T, device = problem.q_BHSD.shape[2], problem.k_BHTD.shape[2], problem.q_BHSD.device
    if problem.mask is not None and problem.mask.dtype != torch.bool:
        return problem.mask.to(dtype)
    if problem.mask is not None:
        visible = problem.mask
    else:
        position_S1 = torch.arange(S, device=device)[:, None] + (T - S)
        distance_ST = position_S1 - torch.arange(T, device=device)
        visible = torch.ones(1, 1, S, T, dtype=torch.bool, device=device)
        if problem.causal:
            visible = visible & (distance_ST >= 0)
        if problem.window is not None:
            visible = visible & (distance_ST < problem.window)
        if problem.cu_seqlens is not None:
            sequence_S = torch.searchsorted(problem.cu_seqlens, torch.arange(S, device=device), right=True)
            visible = visible & (sequence_S[:, None] == sequence_S)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)


def _round_like(prefix_HPX: Tensor, dtype: torch.dtype, work: torch.dtype) -> Tensor:
    """`prefix` rounded to `dtype`, held in `work`, with a gradient that is *not* rounded on its way back."""
    exact = prefix_HPX.to(work)
    return exact + (exact.to(dtype).to(work) - exact).detach()


register(
    Backend(
        name="reference",
        run=reference_attention,
        refuses=lambda problem: None,
        explains=lambda problem: "the specification in plain torch; slow, for tests and for comparison",
        priority=0,
    )
)
