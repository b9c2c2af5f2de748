"""Kernels that attend to one segment of keys and also return the log-sum-exp: adapters to torch's own, and `eager`.

Every kernel answers one `Rule`. Forward: ``(q, k, v, rule) -> out, lse``. Backward: ``(dout, q, k, v, out, lse, rule)
-> dq, dk, dv``, where out and lse may be those of a softmax over *more* keys than k: the gradients are then the exact
share of these keys in the whole (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2, reads nothing but out and
lse of the forward pass). ``lse`` must be finite there. Legend of shapes: problem.py; G query heads per kv head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


class Rule(NamedTuple):
    """Which keys of the segment query row i sees: keys j with ``i + offset - window < j <= i + offset``, if `mask`
    allows them too; `bias` is added to their scores. No offset: no such bound. `cu_seqlens` (with equally many queries
    and keys): own sequence only; `sequences`, the number of the sequence of each row and of each key, says the same to kernels without packing."""

    scale: float
    softcap: float | None = None
    offset: int | None = None
    window: int | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    sequences: tuple[Tensor, Tensor] | None = None


class Gradients(NamedTuple):
    """Of one segment's queries, keys and values, in the kernel's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Kernel:
    """`max_rows` (batch, heads, keys, has a bound other than plain causal) is how many query rows one call should get;
    None: all rows of all packed sequences at once."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Rule], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Rule], Gradients]
    max_rows: Callable[[int, int, int, bool], int] | None


def pick(q: Tensor, value_head_size: int, softcap: float | None, masked: bool, exact_keys: bool = False) -> Kernel:
    """The fastest kernel that can do it. `exact_keys`: dk and dv must be summed over the queries, and over the query
    heads of a group, in fp32 even if q is half precision; FlashAttention-2 rounds each head's sum to q's dtype."""
    if softcap is None and q.shape[3] == value_head_size:
        if q.device.type == "cpu":
            return CPU_FLASH
        if (
            q.device.type == "cuda"
            and torch.version.cuda is not None
            and q.dtype in HALF
            and not (masked or exact_keys)
            and q.shape[3] % 8 == 0
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
        ):
            return CUDA_FLASH
    return EAGER


def visible_keys(rows: int, keys: int, rule: Rule, device: torch.device) -> Tensor | None:
    """``[rows, keys]`` bool of the rule without its mask, or None if all are visible."""
    if rule.offset is None and rule.sequences is None:
        return None
    row_S1, key_T = torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)
    visible = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if rule.offset is not None:
        visible = key_T <= row_S1 + rule.offset
        if rule.window is not None:
            visible &= key_T > row_S1 + (rule.offset - rule.window)
    if rule.sequences is not None:
        row_sequence, key_sequence = rule.sequences
        visible &= row_sequence[:, None] == key_sequence
    return visible


def _unit_stride(x: Tensor) -> Tensor:
    # The library kernels read the last axis as contiguous without checking, and return garbage if it is not.
    return x if x.stride(-1) == 1 else x.contiguous()


# --- torch's flash attention for CPU ----------------------------------------------------------------------------------


# Its inner matrix products are up to twice as slow when the number of keys is no multiple of the vector length.
_CPU_VECTOR = 16
_CPU_FEW_ROWS = 32


def _cpu_keys(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor, bool, Tensor | None]:
    """Keys, values, is_causal and float bias as this kernel wants them. Its causal mask starts at the top left."""
    rows, keys = q.shape[2], k.shape[2]
    extra = -keys % _CPU_VECTOR if rows >= _CPU_FEW_ROWS else 0
    if extra:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (k, v))
    free = rule.mask is None and rule.bias is None
    if free and rule.offset == 0 and rule.window is None and (rows <= keys or not extra):
        return k, v, True, None
    work = torch.promote_types(q.dtype, torch.float32)
    visible = visible_keys(rows, keys, rule, q.device)
    if rule.mask is None and visible is None and not extra:
        return k, v, False, None if rule.bias is None else rule.bias.to(work)
    given = [x.shape for x in (visible, rule.mask, rule.bias) if x is not None]
    shape = torch.broadcast_shapes((1, 1, 1, keys), *given)
    bias = torch.full((*shape[:3], keys + extra), -torch.inf, dtype=work, device=q.device)
    inside = bias[..., :keys].copy_(torch.zeros((), device=q.device) if rule.bias is None else rule.bias)
    for shown in (visible, rule.mask):
        if shown is not None:
            inside.masked_fill_(~shown, -torch.inf)
    return k, v, False, bias


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    k, v, causal, bias = _cpu_keys(q, k, v, rule)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        _unit_stride(q), _unit_stride(k), _unit_stride(v), 0.0, causal, attn_mask=bias, scale=rule.scale
    )
    if bias is not None and not (rule.mask is None and rule.bias is None):
        # Where every key is hidden the kernel reports lse 0, which the merge would take for a sum of one.
        lse = lse.masked_fill(bias.amax(dim=-1) == -torch.inf, -torch.inf)
    return out, lse


def _cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> Gradients:
    keys = k.shape[2]
    if q.dtype in HALF:
        # In half precision this kernel rounds dk and dv after every block of queries, and is three times slower.
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    k, v, causal, bias = _cpu_keys(q, k, v, rule)
    dout, q, k, v, out = map(_unit_stride, (dout, q, k, v, out))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=rule.scale
    )
    return Gradients(dq, dk[:, :, :keys], dv[:, :, :keys])


CPU_FLASH = Kernel(
    "torch flash (CPU)",
    _cpu_flash_forward,
    _cpu_flash_backward,
    # A bound that needs a bias gets it in slices, so that its memory stays linear in the number of keys.
    max_rows=lambda batch, heads, keys, bounded: 256 if bounded else 1 << 62,
)


# --- torch's flash attention for CUDA (FlashAttention-2) --------------------------------------------------------------


def _cuda_lengths(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor | None, int, int]:
    if rule.cu_seqlens is None:
        return None, q.shape[2], k.shape[2]
    longest = q.shape[2] if rule.max_seqlen is None else rule.max_seqlen
    return rule.cu_seqlens, longest, longest


def _cuda_layout(x_BHSX: Tensor, packed: bool) -> Tensor:
    x_BSHX = _unit_stride(x_BHSX).transpose(1, 2)
    return x_BSHX[0] if packed else x_BSHX


def _from_cuda_layout(x: Tensor, packed: bool) -> Tensor:
    return (x[None] if packed else x).transpose(1, 2)


def _cuda_window(rule: Rule) -> dict[str, int | None]:
    if rule.window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": rule.window - 1, "window_size_right": 0}


def _cuda_flash_forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    cu_seqlens, max_q, max_k = _cuda_lengths(q, k, rule)
    packed = cu_seqlens is not None
    out, lse, *_ = aten._flash_attention_forward(
        *(_cuda_layout(x, packed) for x in (q, k, v)), cu_seqlens, cu_seqlens, max_q, max_k, 0.0,
        rule.offset is not None, False, scale=rule.scale, **_cuda_window(rule),
    )  # fmt: skip
    # Rows without any key (more queries than keys) come back as +inf.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return _from_cuda_layout(out, packed), lse[None] if packed else lse


def _cuda_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> Gradients:
    cu_seqlens, max_q, max_k = _cuda_lengths(q, k, rule)
    packed = cu_seqlens is not None
    # Without dropout the random state is never read.
    no_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = aten._flash_attention_backward(
        *(_cuda_layout(x, packed) for x in (dout, q, k, v, out)), (lse[0] if packed else lse).contiguous(),
        cu_seqlens, cu_seqlens, max_q, max_k, 0.0, rule.offset is not None, no_state, no_state,
        scale=rule.scale, **_cuda_window(rule),
    )  # fmt: skip
    return Gradients(*(_from_cuda_layout(x, packed) for x in gradients))


CUDA_FLASH = Kernel("torch flash (CUDA)", _cuda_flash_forward, _cuda_flash_backward, max_rows=None)


# --- plain torch ------------------------------------------------------------------------------------------------------


def _eager_scores(q: Tensor, k: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scaled queries ``[B, Hkv, G*S, D]`` and keys in the working dtype, scores ``[B, Hq, S, T]`` with -inf where
    hidden, and the softcap's derivative."""
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


def _eager_forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    B, Hq, S, _ = q.shape
    q_BHGD, _, scores_BHST, _ = _eager_scores(q, k, rule)
    top_BHS1 = scores_BHST.amax(dim=-1, keepdim=True)
    top_BHS1 = top_BHS1.masked_fill(top_BHS1 == -torch.inf, 0.0)
    weights_BHST = scores_BHST.sub_(top_BHS1).exp_()
    total_BHS1 = weights_BHST.sum(dim=-1, keepdim=True)
    out_BHGE = weights_BHST.view(*q_BHGD.shape[:3], -1) @ v.to(q_BHGD.dtype)
    out = out_BHGE.view(B, Hq, S, -1) / total_BHS1.masked_fill(total_BHS1 == 0, 1.0)
    return out, (top_BHS1 + total_BHS1.log()).squeeze(-1)


def _eager_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule) -> Gradients:
    q_BHGD, k_BHTD, scores_BHST, slope_BHST = _eager_scores(q, k, rule)
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


EAGER = Kernel(
    "plain torch",
    _eager_forward,
    _eager_backward,
    max_rows=lambda batch, heads, keys, bounded: max(1, (1 << 22) // max(1, batch * heads * keys)),
)
