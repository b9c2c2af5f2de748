"""Exact attention over [a shared trained prefix] + [each sequence's own tokens], without concatenating the two.

A new backend is one file that ends with ``register_backend(Backend(...))``, and one import below.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ptd_kernels.prefix_attention import joined, merge, reference  # noqa: F401  (importing registers the backends)
from ptd_kernels.prefix_attention.fused import backend as _  # noqa: F401
from ptd_kernels.prefix_attention.problem import Prefix, available_backends, check_problem, choose_backend

__all__ = ["COMPLETE", "available_backends", "explain_backend", "prefix_attention"]

COMPLETE = ("merge", "merge-plain-torch", "reference")
"""The backends that solve every problem on every device."""


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
    """Attend from every query to all P prefix keys and to the own keys that its visibility rule allows.

    Args:
        q: ``[B, Hq, S, D]``, any strides. The memory layout ``[B, S, Hq, D]`` (Hugging Face models pass its transpose)
            needs no copy. The same holds for k and v.
        k: ``[B, Hkv, T, D]``. Hq must be a multiple of Hkv; query head h reads key/value head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, T, E]``; E may differ from D.
        prefix_k: ``[Hkv, P, D]`` or None; P may be 0. With a `prefix_index`: ``[N, Hkv, P, D]``, or a list of N tensors
            ``[Hkv, P_i, D]``. A prefix of another dtype is cast to q's dtype internally; its gradient is summed in at
            least fp32, cast once, and returned in the prefix's own dtype.
        prefix_v: ``[Hkv, P, E]`` or None. With a `prefix_index`: like prefix_k, with E in place of D.
        scale: factor on q·k; default ``D ** -0.5``.
        causal: query i, at own position ``i + T - S``, sees the own keys up to that position.
        window: of these keys, a query sees only the last `window` (its own position included). Never hides the prefix.
        softcap: scores s become ``softcap * tanh(s / softcap)`` for prefix and own keys, before masking.
        cu_seqlens: int32 ``[sequences + 1]``, ascending from 0 to S: B is 1, and q, k and v hold this many concatenated
            sequences, which do not see each other. Its values are not checked on a GPU: reading them would wait for
            the device.
        max_seqlen: upper bound on the length of the packed sequences. GPU kernels need it to be fast; CPU kernels do
            not use it.
        mask: ``[B or 1, Hq or 1, S, T]`` bool, True: visible. It is the whole rule for the own keys and requires
            ``causal=False, window=None``. A query that may see no own key gets the output of the prefix alone, or
            zeros if P is 0. Hidden keys and their values must be finite.
        bias: ``[B or 1, Hq or 1, S, T]`` floating, added to the scores of the own keys after the softcap. It can be
            combined with every rule. -inf hides a key. It gets no gradient.
        prefix_index: int64 or int32 ``[B]`` (packed: ``[sequences]``), on q's device or on the CPU: which of the N
            prefixes each sequence reads. Its values are not checked on a GPU: reading them would wait for the device.
        backend: a name from `available_backends()`, or "auto".

    Returns:
        ``[B, Hq, S, E]`` in q's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot compute the combination.

    Prefix-tuning: Li & Liang 2021, arXiv:2101.00190. README.md in this folder gives the maths.
    """
    device_type = q.device.type if isinstance(q, Tensor) else "cpu"
    checked = partial(
        check_problem, prefix_k=prefix_k, prefix_v=prefix_v, scale=scale, causal=causal, window=window, softcap=softcap,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, mask=mask, bias=bias, prefix_index=prefix_index,
    )  # fmt: skip
    if torch.is_autocast_enabled(device_type):
        # As in torch's own attention, autocast sets the precision of the inputs but not of the matrix products inside.
        low = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(low) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in (q, k, v))
        with torch.autocast(device_type, enabled=False):
            problem = checked(q, k, v)
            return choose_backend(problem, backend).run(problem)
    problem = checked(q, k, v)
    return choose_backend(problem, backend).run(problem)


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
    tokens: int = 2,
    backend: str = "auto",
) -> tuple[str, str]:
    """Return ``(name, reason)``: the backend that a training step's calls would use, and why, as text for people.

    `tokens`: the length of the sequences, of which some choices depend; two stand for any short length (some libraries
    refuse one). Allocates a few bytes on `device`. Raises `ValueError` in the same cases as `prefix_attention`.
    """
    sizes = head_dim, value_head_dim or head_dim
    q, v = (
        torch.zeros(1, 1, 1, d, device=device, dtype=dtype, requires_grad=True).expand(-1, -1, tokens, -1)
        for d in sizes
    )
    scores = 1, 1, tokens, tokens
    mask = torch.ones(1, 1, 1, 1, device=device, dtype=torch.bool).expand(scores) if masked else None
    bias = torch.zeros(1, 1, 1, 1, device=device, dtype=dtype).expand(scores) if biased else None
    cu_seqlens = torch.tensor([0, tokens], device=device, dtype=torch.int32) if packed else None
    prefix_k, prefix_v = (x[0, :, :1].expand(1, virtual_tokens, -1) for x in (q, v))
    with torch.enable_grad():
        problem = check_problem(
            q, q, v, prefix_k, prefix_v, causal=not masked, softcap=softcap, cu_seqlens=cu_seqlens,
            max_seqlen=tokens if packed else None, mask=mask, bias=bias,
        )  # fmt: skip
        chosen = choose_backend(problem, backend)
    return chosen.name, chosen.explains(problem)
