"""What a backend of ``prefix_attention`` is given (`Problem`) and who can solve it (`Backend`, `register`).

Shapes, here and in every file of this folder: B batch, H heads (query heads for q, out and lse; key/value heads for k,
v and the prefix, the former a multiple of the latter), S queries, T own keys, P prefix keys, D head size of queries and
keys, E head size of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class Problem:
    """Checked arguments of one call. Build it with `check`; backends may rely on all that `check` promises."""

    q_BHSD: Tensor
    k_BHTD: Tensor
    v_BHTE: Tensor
    prefix_k_HPD: Tensor | None
    prefix_v_HPE: Tensor | None
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    mask: Tensor | None
    offsets: tuple[int, ...] | None  # the values of cu_seqlens; None if they are on a GPU, or nothing is packed


@dataclass(frozen=True)
class Backend:
    """A way to compute prefix attention.

    `refuses` says why a problem is out of reach, or None; `explains` says how it would be solved. With
    ``backend="auto"`` the backend of the highest priority that does not refuse is taken.
    """

    name: str
    run: Callable[[Problem], Tensor]
    refuses: Callable[[Problem], str | None]
    explains: Callable[[Problem], str]
    priority: int


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Make `backend` known under its name. Raises ValueError if the name is taken."""
    if backend.name in _BACKENDS or backend.name == "auto":
        raise ValueError(f"prefix_attention backend name {backend.name!r} is already taken")
    _BACKENDS[backend.name] = backend
    return backend


def available_backends() -> tuple[str, ...]:
    """Names of the registered backends, the preferred first."""
    return tuple(sorted(_BACKENDS, key=lambda name: -_BACKENDS[name].priority))


def choose(problem: Problem, requested: str) -> Backend:
    """The backend to use. Raises ValueError for an unknown name or one that refuses the problem."""
    if requested == "auto":
        for name in available_backends():
            if _BACKENDS[name].refuses(problem) is None:
                return _BACKENDS[name]
        raise ValueError("no prefix_attention backend supports this problem")
    if requested not in _BACKENDS:
        raise ValueError(f"backend={requested!r} is unknown; expected 'auto' or one of {list(available_backends())}")
    if (reason := _BACKENDS[requested].refuses(problem)) is not None:
        raise ValueError(f"backend={requested!r} cannot do this: {reason}; use backend='auto'")
    return _BACKENDS[requested]


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    mask: Tensor | None,
) -> Problem:
    """Refuse what no backend could answer rightly. Reads shapes and flags only, so it never waits for a device."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            raise ValueError(f"{name}: expected a tensor [batch, heads, length, head_size], got {_describe(tensor)}")
        if tensor.dtype not in DTYPES or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} on {tensor.device}; q, k and v must share one floating dtype and device "
                f"(q is {q.dtype} on {q.device})"
            )
    B, Hq, S, D = q.shape
    Hkv, T, E = k.shape[1], k.shape[2], v.shape[3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: got {_describe(k)}, expected [{B}, kv_heads, own_keys, {D}] to match q {_describe(q)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: got {_describe(v)}, expected [{B}, {Hkv}, {T}, head_size] to match k {_describe(k)}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q has {Hq} heads and k has {Hkv}; the number of query heads must be a multiple of k's")
    if not (0 < D <= MAX_HEAD_SIZE and 0 < E <= MAX_HEAD_SIZE):
        raise ValueError(f"head sizes must be 1..{MAX_HEAD_SIZE}; got {D} (q, k) and {E} (v)")

    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v must be given together, or both be None")
    if prefix_k is not None and prefix_v is not None:
        _check_prefix("prefix_k", prefix_k, Hkv, D, q)
        _check_prefix("prefix_v", prefix_v, Hkv, E, q)
        if prefix_k.shape[1] != prefix_v.shape[1]:
            raise ValueError(f"prefix_k has {prefix_k.shape[1]} virtual tokens but prefix_v has {prefix_v.shape[1]}")

    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window: got {window!r}, expected an integer >= 1 or None")
        if not causal:
            raise ValueError("window needs causal=True; give a mask for a two-sided window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap!r}, expected a positive number or None")
    if mask is not None:
        _check_mask(mask, causal, window, (B, Hq, S, T), q)
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"max_seqlen: got {max_seqlen!r}, expected a non-negative integer or None")
    offsets = None
    if cu_seqlens is not None:
        offsets = _check_packing(cu_seqlens, max_seqlen, mask, B, S, T, q)
    return Problem(
        q, k, v, prefix_k, prefix_v, D**-0.5 if scale is None else float(scale), causal, window,
        None if softcap is None else float(softcap), cu_seqlens, max_seqlen, mask, offsets,
    )  # fmt: skip


def _check_prefix(name: str, prefix: Tensor, kv_heads: int, head_size: int, q: Tensor) -> None:
    if not isinstance(prefix, Tensor) or prefix.dim() != 3 or prefix.shape[::2] != (kv_heads, head_size):
        raise ValueError(f"{name}: got {_describe(prefix)}, expected [{kv_heads}, num_virtual_tokens, {head_size}]")
    if prefix.dtype not in DTYPES or prefix.device != q.device:
        raise ValueError(f"{name}: got {prefix.dtype} on {prefix.device}, expected a floating dtype on {q.device}")


def _check_mask(mask: Tensor, causal: bool, window: int | None, full: tuple[int, int, int, int], q: Tensor) -> None:
    if causal or window is not None:
        raise ValueError("mask is the whole rule for the own tokens: pass causal=False and window=None with it")
    B, Hq, S, T = full
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 4
        or mask.shape[0] not in (1, B)
        or mask.shape[1] not in (1, Hq)
        or mask.shape[2:] != (S, T)
    ):
        raise ValueError(f"mask: got {_describe(mask)}, expected [1 or {B}, 1 or {Hq}, {S}, {T}]")
    if not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.device != q.device:
        raise ValueError(f"mask: got {mask.dtype} on {mask.device}, expected bool or floating on {q.device}")
    if mask.requires_grad:
        raise ValueError("mask requires a gradient, which is not supported: pass mask.detach()")


def _check_packing(
    cu_seqlens: Tensor, max_seqlen: int | None, mask: Tensor | None, B: int, S: int, T: int, q: Tensor
) -> tuple[int, ...] | None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens: got {_describe(cu_seqlens)}, expected an int32 tensor [sequences + 1]")
    if cu_seqlens.numel() < 2 or cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: got {_describe(cu_seqlens)}, expected at least 2 offsets on {q.device}")
    if mask is not None:
        raise ValueError("cu_seqlens and mask exclude each other: packed sequences are separated by their offsets")
    if B != 1 or S != T:
        raise ValueError(f"cu_seqlens needs batch 1 and as many queries as keys; got batch {B}, {S} queries, {T} keys")
    if cu_seqlens.device.type != "cpu":
        return None
    offsets = tuple(cu_seqlens.tolist())
    if offsets[0] != 0 or offsets[-1] != S or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens must ascend from 0 to the {S} tokens of q; got {list(offsets)}")
    if max_seqlen is not None and max_seqlen < (longest := max(b - a for a, b in pairwise(offsets))):
        raise ValueError(f"max_seqlen={max_seqlen} is less than the longest packed sequence ({longest} tokens)")
    return offsets


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    return repr(value)
