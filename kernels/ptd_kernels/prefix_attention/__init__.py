"""Attention over [a shared trained prefix] + [each sequence's own tokens], exact, without concatenation.

A new backend is one file that ends in ``register(Backend(...))`` and one import below.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ptd_kernels.prefix_attention import (  # noqa: F401  (importing registers the backend)
    joined,
    merge,
    reference,
    triton_backend,
)
from ptd_kernels.prefix_attention.problem import Prefix, available_backends, check, choose

__all__ = ["available_backends", "explain_backend", "prefix_attention"]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Prefix,
    prefix_v: Prefix,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every query to all P prefix keys and to the own keys its rule allows.

    Args:
        q: ``[B, Hq, S, D]``, any strides; the layout ``[B, S, Hq, D]`` transposed (as Hugging Face gives it) is the
            one that needs no copy. The same goes for k and v.
        k: ``[B, Hkv, T, D]``; Hq must be a multiple of Hkv, query head h reads kv head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, T, E]``; E may differ from D.
        prefix_k: ``[Hkv, P, D]`` or None; P may be 0. A dtype other than q's is cast to q's inside; its gradient
            comes back in its own dtype, summed in at least fp32 and cast once. With a `prefix_index`
            ``[N, Hkv, P, D]``, or a list of N tensors ``[Hkv, P_i, D]``.
        prefix_v: ``[Hkv, P, E]`` or None; with a `prefix_index` like prefix_k.
        scale: factor on q·k, default ``D ** -0.5``.
        causal: query i, at own position ``i + T - S``, sees own keys up to that position.
        window: of these it sees only the last `window` (its own included). Never hides the prefix.
        softcap: scores s become ``softcap * tanh(s / softcap)`` for prefix and own keys, before masking.
        cu_seqlens: int32 ``[sequences + 1]``, from 0 to S, ascending: B is 1 and holds this many sequences end to
            end, which do not see each other. On a GPU the values are not checked, as reading them would wait for it.
        max_seqlen: length of the longest packed sequence, or more; a GPU needs it to be fast, a CPU not at all.
        mask: ``[B or 1, Hq or 1, S, T]`` bool, True: visible. It is the whole rule for the own keys: requires
            ``causal=False, window=None``. A query that it allows no own key gets the answer of the prefix alone, or
            zeros if P is 0. What lies under a hidden key must be finite.
        bias: ``[B or 1, Hq or 1, S, T]`` floating, added to the scores of the own keys after the softcap; goes with
            every rule. -inf hides a key. It gets no gradient.
        prefix_index: int64 or int32 ``[B]``, packed ``[sequences]``: which of the N prefixes each sequence reads. On
            q's device or on the CPU. On a GPU its values are not checked, as reading them would wait for it.
        backend: a name of `available_backends()` or "auto".

    Returns:
        ``[B, Hq, S, E]`` in q's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a combination nobody can compute.

    Prefix-tuning: Li & Liang 2021, arXiv:2101.00190. README.md in this folder has the maths.
    """
    device_type = q.device.type if isinstance(q, Tensor) else "cpu"
    checked = partial(
        check, prefix_k=prefix_k, prefix_v=prefix_v, scale=scale, causal=causal, window=window, softcap=softcap,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, mask=mask, bias=bias, prefix_index=prefix_index,
    )  # fmt: skip
    if torch.is_autocast_enabled(device_type):
        # As torch's own attention does: autocast decides the inputs' precision, and none of the inner matmuls'.
        low = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(low) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in (q, k, v))
        with torch.autocast(device_type, enabled=False):
            problem = checked(q, k, v)
            return choose(problem, backend).run(problem)
    problem = checked(q, k, v)
    return choose(problem, backend).run(problem)


def explain_backend(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    value_head_dim: int | None = None,
    softcap: float | None = None,
    masked: bool = False,
    biased: bool = False,
    packed: bool = False,
    virtual_tokens: int = 1,
    backend: str = "auto",
) -> tuple[str, str]:
    """Which backend a training step's calls would get, and why: ``(name, reason)``, both to be read by people.

    Allocates a few bytes on `device`. Raises ValueError like `prefix_attention`.
    """
    # Two tokens stand for many: some libraries refuse a single query row or key.
    q, v = (torch.zeros(1, 1, 2, d, device=device, dtype=dtype) for d in (head_dim, value_head_dim or head_dim))
    mask = torch.ones(1, 1, 2, 2, device=device, dtype=torch.bool) if masked else None
    bias = torch.zeros(1, 1, 2, 2, device=device) if biased else None
    cu_seqlens = torch.tensor([0, 2], device=device, dtype=torch.int32) if packed else None
    prefix_k, prefix_v = (x[0, :, :1].expand(1, virtual_tokens, -1) for x in (q, v))
    problem = check(
        q, q, v, prefix_k, prefix_v, causal=not masked, softcap=softcap, cu_seqlens=cu_seqlens,
        max_seqlen=2 if packed else None, mask=mask, bias=bias,
    )  # fmt: skip
    chosen = choose(problem, backend)
    return chosen.name, chosen.explains(problem)
