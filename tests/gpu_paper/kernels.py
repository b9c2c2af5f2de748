"""Compute in plain fp32 on the host the operations of GPU libraries for which a CPU has no kernel.

Each function checks what the library's own kernel would refuse, as far as its callers have to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


# ---- FlashAttention-2 (Dao 2023, arXiv:2307.08691), as in torch


def _check_flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> None:
    for x in (q, k, v):
        assert x.dtype in HALF, x.dtype
        assert x.stride(-1) == 1, x.stride()
        assert x.shape[-1] % 8 == 0, x.shape
        assert x.dim() == (4 if starts is None else 3), x.shape
    assert q.shape[-2] % k.shape[-2] == 0, (q.shape, k.shape)
    if starts is not None:
        assert starts.dtype == torch.int32, starts.dtype


def _sequences(q: Tensor, k: Tensor, starts_q: Tensor | None, starts_k: Tensor | None) -> Iterator[tuple[Any, Any]]:
    """Yield for each sequence the indices that select its queries and its keys, each as ``[S, H, D]``."""
    if starts_q is None or starts_k is None:
        for row in range(q.shape[0]):
            yield row, row
        return
    bounds = zip(starts_q.tolist(), starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:], strict=False)
    for first_q, end_q, first_k, end_k in bounds:
        yield slice(first_q, end_q), slice(first_k, end_k)


def _scores(q: Tensor, k: Tensor, scale: float | None, causal: bool, left: int | None, right: int | None) -> Tensor:
    """Return ``[H, S, T]`` in fp32, hidden scores as −inf; bounds are relative to the last query and the last key."""
    heads = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(heads, dim=1)
    scores = torch.einsum("shd,thd->hst", q.float(), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    columns = torch.arange(k.shape[0])
    hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    right = 0 if causal else right
    if right is not None and right >= 0:
        hidden |= columns > rows + right
    if left is not None and left >= 0:
        hidden |= columns < rows - left
    return scores.masked_fill(hidden, -torch.inf)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor | None, starts_k: Tensor | None, longest_q: int, longest_k: int,
    dropout: float, causal: bool, debug: bool, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_flash(q, k, v, starts_q)
    assert dropout == 0.0
    if starts_q is not None:
        assert longest_q >= int(starts_q.diff().max()), "max_q is less than the longest sequence"
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    packed = starts_q is not None
    sizes = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(sizes, torch.inf)
    for here, there in _sequences(q, k, starts_q, starts_k):
        scores = _scores(q[here], k[there], scale, causal, window_size_left, window_size_right)
        values = v[there].float().repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
        weights = torch.softmax(scores, -1).nan_to_num()
        out[here] = torch.einsum("hst,thd->shd", weights, values).to(q.dtype)
        found = scores.logsumexp(-1)
        found = found.masked_fill(found == -torch.inf, torch.inf)
        if packed:
            lse[:, here] = found
        else:
            lse[here] = found
    state = torch.zeros(2, dtype=torch.uint64)
    return out, lse, state, torch.zeros((), dtype=torch.uint64), torch.empty(0, dtype=q.dtype)


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts_q: Tensor | None,
    starts_k: Tensor | None, longest_q: int, longest_k: int, dropout: float, causal: bool, state: Tensor,
    unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Use only ``out`` and ``lse``, which may be those of a softmax over more keys (algorithm 2 of the paper)."""
    _check_flash(q, k, v, starts_q)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    gradients = tuple(torch.zeros_like(x) for x in (q, k, v))
    group = q.shape[-2] // k.shape[-2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for here, there in _sequences(q, k, starts_q, starts_k):
        known = lse[:, here] if starts_q is not None else lse[here]
        scores = _scores(q[here], k[there], scale, causal, window_size_left, window_size_right)
        weights = (scores - known[..., None]).exp()
        values = v[there].float().repeat_interleave(group, dim=1)
        keys = k[there].float().repeat_interleave(group, dim=1)
        given = dout[here].float()
        delta = (given * out[here].float()).sum(-1).t()
        dscores = weights * (torch.einsum("shd,thd->hst", given, values) - delta[..., None]) * factor
        dq = torch.einsum("hst,thd->shd", dscores, keys)
        dk = torch.einsum("hst,shd->thd", dscores, q[here].float())
        dv = torch.einsum("hst,shd->thd", weights, given)
        for gradient, where, found in zip(gradients, (here, there, there), (dq, dk, dv), strict=True):
            shape = (found.shape[0], gradient.shape[-2], -1, found.shape[-1])
            gradient[where] = found.view(shape).sum(2).to(gradient.dtype)
    return gradients


# ---- cuDNN's attention: [B, H, S, D], and a log-sum-exp whose last axis has size one


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, wants_lse: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    assert bias is None
    assert wants_lse
    assert not causal or q.shape[2] == k.shape[2]
    assert min(q.shape[2], k.shape[2]) > 1, "cuDNN takes no single row or key"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_forward(q, k, v, None, None, q.shape[1], k.shape[1], dropout, causal, debug, scale=scale)
    state = torch.zeros((), dtype=torch.int64)
    return out.transpose(1, 2), lse[..., None], None, None, q.shape[1], k.shape[1], state, state, None


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
    bias: Tensor | None, starts_q: Tensor | None, starts_k: Tensor | None, longest_q: int, longest_k: int,
    dropout: float, causal: bool, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    found = _flash_backward(
        dout, q, k, v, out, lse[..., 0].contiguous(), None, None, longest_q, longest_k, dropout, causal, seed, offset,
        scale=scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in found)


# ---- torch's memory-efficient attention (xFormers' CUTLASS kernels): [B, S, H, X], as many heads of keys as of queries


def _check_efficient(*tensors: Tensor) -> None:
    for x in tensors:
        numbers = 16 // x.element_size()
        assert x.dtype in (torch.float32, *HALF), x.dtype
        assert x.dtype == tensors[0].dtype, "another dtype is read as if it were this one"
        assert x.stride(-1) == 1, x.stride()
        assert x.shape[-1] % numbers == 0, x.shape
        assert not any(stride % numbers for stride in x.stride()[:-1]), x.stride()
        assert x.data_ptr() % 16 == 0, "an address that is no multiple of 16 bytes"
        assert x.shape[2] == tensors[0].shape[2], "the heads of keys are not repeated"


def _check_bias(bias: Tensor | None, q: Tensor, k: Tensor, packed: bool) -> None:
    if bias is not None:
        assert not packed, "a bias and packing exclude each other"
        assert bias.dtype == q.dtype
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), bias.shape
        assert bias.stride(3) == 1
        assert not any(stride % (16 // bias.element_size()) for stride in bias.stride()[:3]), bias.stride()
        assert bias.data_ptr() % 16 == 0


def _efficient_scores(
    q: Tensor, k: Tensor, bias: Tensor | None, here: Any, there: Any, scale: float | None, kind: int
) -> Tensor:
    """Return ``[H, S, T]`` in fp32. ``kind``: 0 all keys; 1 row i sees key i; 2 the last row sees the last key."""
    rows, keys = q[here].shape[0], k[there].shape[0]
    assert kind != 2 or rows <= keys, "rows without keys keep what was in the memory of the output"
    scores = _scores(q[here], k[there], scale, False, None, None)
    if bias is not None:
        scores = scores + bias[here].float()
    if kind:
        seen = torch.arange(rows)[:, None] + (keys - rows if kind == 2 else 0) >= torch.arange(keys)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, starts_q: Tensor | None, starts_k: Tensor | None,
    longest_q: int | None, longest_k: int | None, dropout: float, kind: int, wants_lse: bool = False, *,
    scale: float | None = None, seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    packed = starts_q is not None
    _check_efficient(q, k, v)
    _check_bias(bias, q, k, packed)
    assert wants_lse
    assert dropout == 0.0
    assert seqlen_k is window_size is None
    assert not packed or q.shape[0] == 1
    longest = q.shape[1] if longest_q is None else longest_q
    assert starts_q is None or longest >= int(starts_q.diff().max()), "max_q is less than the longest sequence"
    out = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype)
    sequences = q.shape[0] if starts_q is None else starts_q.numel() - 1
    lse = torch.full((sequences, q.shape[2], -(-longest // 32) * 32), torch.nan)
    for number, (here, there) in enumerate(_sequences(q, k, starts_q, starts_k)):
        here, there = ((0, here), (0, there)) if packed else (here, there)
        scores = _efficient_scores(q, k, bias, here, there, scale, kind)
        weights = torch.softmax(scores, -1).nan_to_num()
        out[here] = torch.einsum("hst,thd->shd", weights, v[there].float()).to(q.dtype)
        rows = scores.shape[1]
        found = scores.logsumexp(-1)
        lse[number, :, :rows] = found.masked_fill(found == -torch.inf, 0.0)
        lse[number, :, rows : -(-rows // 32) * 32] = torch.inf
    state = torch.zeros((), dtype=torch.int64)
    return out, lse, state, state.clone(), longest, k.shape[1] if longest_k is None else longest_k


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, starts_q: Tensor | None,
    starts_k: Tensor | None, longest_q: int, longest_k: int, lse: Tensor, dropout: float, seed: Tensor, offset: Tensor,
    kind: int, needs_bias: bool, *, scale: float | None = None, num_splits_key: int | None = None,
    window_size: int | None = None, shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Use only ``out`` and ``lse``, which may be those of a softmax over more keys."""
    packed = starts_q is not None
    _check_efficient(dout.contiguous(), q, k, v, out)
    _check_bias(bias, q, k, packed)
    assert out.is_contiguous(), "the kernel does not read its strides"
    assert lse.dtype == torch.float32
    assert not any(stride % 8 for stride in lse.stride()[:2]), lse.stride()
    assert lse.shape[2] % 32 == 0, lse.shape
    assert window_size is None, "its formula for a window ignores that the last query may see the last key"
    assert not needs_bias
    assert longest_q <= q.shape[1]
    assert longest_k <= k.shape[1]
    gradients = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    for number, (here, there) in enumerate(_sequences(q, k, starts_q, starts_k)):
        here, there = ((0, here), (0, there)) if packed else (here, there)
        scores = _efficient_scores(q, k, bias, here, there, scale, kind)
        rows = scores.shape[1]
        assert bool(lse[number, :, rows : -(-rows // 32) * 32].isposinf().all()), "rows of no query are not inf"
        weights = (scores - lse[number, :, :rows, None]).exp()
        given = dout[here].float()
        delta = (given * out[here].float()).sum(-1).t()
        dscores = weights * (torch.einsum("shd,thd->hst", given, v[there].float()) - delta[..., None]) * factor
        found = (
            torch.einsum("hst,thd->shd", dscores, k[there].float()),
            torch.einsum("hst,shd->thd", dscores, q[here].float()),
            torch.einsum("hst,shd->thd", weights, given),
        )
        for gradient, where, one in zip(gradients, (here, there, there), found, strict=True):
            gradient[where] = one.to(gradient.dtype)
    return *gradients, torch.zeros(())


def _efficient_backward_shapes(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), q.new_empty(())


# ---- an LSTM's cell


def _lstm_cell(
    of_input: Tensor, of_hidden: Tensor, cx: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    gates = of_input + of_hidden
    if bias is not None and hidden_bias is not None:
        gates = gates + bias + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    dhy: Tensor | None, dcy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    i, f, g, o = workspace.chunk(4, 1)
    dhy = torch.zeros_like(cy) if dhy is None else dhy
    dc = dhy * o * (1 - cy.tanh().square())
    dc = dc if dcy is None else dc + dcy
    dgates = torch.cat(
        [dc * g * i * (1 - i), dc * cx * f * (1 - f), dc * i * (1 - g.square()), dhy * cy.tanh() * o * (1 - o)], 1
    )
    return dgates, dc * f, dgates.sum(0) if has_bias else None


# ---- a product in fp8


def _scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, result: Tensor | None = None,
    out_dtype: torch.dtype | None = None, fast: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply as Hopper does: rows by columns, both contiguous along the summed axis, one scale per row and column."""
    assert a.stride(1) == 1, a.stride()
    assert b.stride(0) == 1, b.stride()
    assert all(side % 16 == 0 for side in b.shape), b.shape
    assert scale_a.shape == (a.shape[0], 1), scale_a.shape
    assert scale_b.shape == (1, b.shape[1]), scale_b.shape
    assert scale_a.dtype == scale_b.dtype == torch.float32
    return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)


# ---- operations whose CPU kernel does not convert dtypes


def _softmax(x: Tensor, dim: int, half_to_float: bool, *, out: Tensor | None = None) -> Tensor:
    found = torch.softmax(x.float() if half_to_float else x, dim)
    return found if out is None else out.resize_(found.shape).copy_(found)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool, *, out: Tensor | None = None) -> Tensor:
    found = torch.log_softmax(x.float() if half_to_float else x, dim)
    return found if out is None else out.resize_(found.shape).copy_(found)


def _histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    return torch.histc(x.float(), bins, min, max).to(x.dtype)


def _sdp_choice(*args: Any, **kwargs: Any) -> int:
    """Return the kernel that torch's own attention uses: plain math."""
    return 0


KERNELS: dict[Any, Any] = {
    aten._flash_attention_forward: _flash_forward,
    aten._flash_attention_backward: _flash_backward,
    aten._scaled_dot_product_cudnn_attention: _cudnn_forward,
    aten._scaled_dot_product_cudnn_attention_backward: _cudnn_backward,
    aten._efficient_attention_forward: _efficient_forward,
    aten._efficient_attention_backward: _efficient_backward,
    aten._thnn_fused_lstm_cell: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl: _lstm_cell_backward,
    aten._scaled_mm: _scaled_mm,
    aten._softmax: _softmax,
    aten._log_softmax: _log_softmax,
    aten.histc: _histc,
    aten._fused_sdp_choice: _sdp_choice,
}
SHAPES: dict[Any, Any] = {aten._efficient_attention_backward: _efficient_backward_shapes}
"""Results without numbers of operations for which torch's own function for this fails."""
