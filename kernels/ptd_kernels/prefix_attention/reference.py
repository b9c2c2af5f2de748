"""The specification in plain torch and autograd: expand the prefix over the batch, concatenate, mask, softmax.

It is slow and memory-hungry on purpose; every other backend is tested against it. Legend of shapes: problem.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ptd_kernels.prefix_attention.problem import Backend, Problem, register_backend


def reference_attention(problem: Problem) -> Tensor:
    """Solve `problem` in float64 if its tensors are float64, else in float32."""
    if problem.prefix_index is not None and problem.prefix_index.numel():
        return _sequence_by_sequence(problem, problem.prefix_index.tolist())
    if problem.offsets is not None and len(problem.offsets) > 2:
        # Separate, not masked: a weight of 0 times a value that is not finite would reach another sequence.
        return _sequence_by_sequence(problem, None)
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
    """Return the own keys' rule as a bias ``[B or 1, Hq or 1, S, T]``: `bias` or 0 where visible, -inf where hidden."""
    S, T, device = problem.q_BHSD.shape[2], problem.k_BHTD.shape[2], problem.q_BHSD.device
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
    bias = torch.zeros(1, 1, S, T, dtype=dtype, device=device) if problem.bias is None else problem.bias.to(dtype)
    return torch.where(visible, bias, -torch.inf)


def _sequence_by_sequence(problem: Problem, prefixes: list[int] | None) -> Tensor:
    """Solve `problem` one sequence at a time, each with its own prefix (the place of each); None: all with the same."""
    p = problem
    bounds = list(pairwise(p.cu_seqlens.tolist())) if p.cu_seqlens is not None else [(0, p.q_BHSD.shape[2])]
    outs = []
    for i, prefix in enumerate(prefixes or [0] * len(bounds)):
        keys_of = slice(None)
        if prefixes is not None and p.prefix_bounds is not None:
            keys_of = slice(p.prefix_bounds[prefix], p.prefix_bounds[prefix + 1])
        prefix_k, prefix_v = (None if x is None else x[:, keys_of] for x in (p.prefix_k_HPD, p.prefix_v_HPE))
        batch, (start, end) = (0, bounds[i]) if p.cu_seqlens is not None else (i, bounds[0])
        one, rows = slice(batch, batch + 1), slice(start, end)
        keys = rows if p.cu_seqlens is not None else slice(None)
        scores = (
            None if x is None else x[one if x.shape[0] > 1 else slice(None), :, rows, keys] for x in (p.mask, p.bias)
        )
        mask, bias = scores
        alone = replace(
            p, q_BHSD=p.q_BHSD[one, :, rows], k_BHTD=p.k_BHTD[one, :, keys], v_BHTE=p.v_BHTE[one, :, keys],
            prefix_k_HPD=prefix_k, prefix_v_HPE=prefix_v,
            cu_seqlens=None, offsets=None, mask=mask, bias=bias, prefix_index=None, prefix_bounds=None,
        )  # fmt: skip
        outs.append(reference_attention(alone))
    return torch.cat(outs, dim=0 if p.cu_seqlens is None else 2)


def _round_like(prefix_HPX: Tensor, dtype: torch.dtype, work: torch.dtype) -> Tensor:
    """Return `prefix` rounded to `dtype` and stored in `work`. Its gradient is *not* rounded in the backward pass."""
    exact = prefix_HPX.to(work)
    return exact + (exact.to(dtype).to(work) - exact).detach()


register_backend(
    Backend(
        name="reference",
        run=reference_attention,
        refuses=lambda problem: None,
        explains=lambda problem: "the specification in plain torch; slow, for tests and for comparison",
        priority=0,
    )
)
