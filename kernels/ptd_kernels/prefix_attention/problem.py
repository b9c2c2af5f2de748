"""The input of a ``prefix_attention`` backend (`Problem`) and the registry of backends (`Backend`, `register_backend`).

Shapes, here and in every file of this folder: B batch; H heads (query heads for q, out and lse, key/value heads for k,
v and the prefix; the number of query heads is a multiple of the number of key/value heads); S queries; T own keys;
P prefix keys (of all prefixes, if there are several); D head size of queries and keys; E head size of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
Prefix: TypeAlias = Tensor | Sequence[Tensor] | None
stand_in: ContextVar[tuple[int, int] | None] = ContextVar("ptd_kernels_stand_in", default=None)
"""Compute capability of the NVIDIA GPU that CPU tensors represent, while a pass without data (FakeTensorMode) finds out
what that GPU would do. None: CPU tensors represent themselves."""


def stood_in_for() -> tuple[int, int] | None:
    """Return the value of `stand_in`; None while torch.compile traces, which cannot read it and needs data anyway."""
    return None if torch.compiler.is_compiling() else stand_in.get()


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU; for the CPU, the value of `stand_in`; None for other devices."""
    if device.type == "cpu":
        return stood_in_for()
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Problem:
    """Checked arguments of one call. `check_problem` builds it; backends may rely on everything that it verifies.

    With a `prefix_index`, the prefixes are concatenated along P: prefix n is the keys ``prefix_bounds[n]`` to
    ``prefix_bounds[n + 1]``, and ``prefix_index[i]`` is the prefix of sequence i (batch entry or packed sequence).
    """

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
    bias: Tensor | None
    offsets: tuple[int, ...] | None  # the values of cu_seqlens; None if they are on a GPU or nothing is packed
    prefix_index: Tensor | None
    prefix_bounds: tuple[int, ...] | None


@dataclass(frozen=True)
class Backend:
    """A way to compute prefix attention.

    `refuses` returns why the backend cannot solve a problem, or None; `explains` returns how it would solve the
    problem. ``backend="auto"`` selects the backend with the highest priority that does not refuse.
    """

    name: str
    run: Callable[[Problem], Tensor]
    refuses: Callable[[Problem], str | None]
    explains: Callable[[Problem], str]
    priority: int


_BACKENDS: dict[str, Backend] = {}
"""By name; the highest priority first."""


def register_backend(backend: Backend) -> Backend:
    """Register `backend` under its name. Raises `ValueError` if the name is taken."""
    if backend.name in _BACKENDS or backend.name == "auto":
        raise ValueError(f"prefix_attention backend name {backend.name!r} is already taken; choose another name")
    _BACKENDS[backend.name] = backend
    ordered = sorted(_BACKENDS.values(), key=lambda each: -each.priority)
    _BACKENDS.clear()
    _BACKENDS.update({each.name: each for each in ordered})
    return backend


def available_backends() -> tuple[str, ...]:
    """Return the names of the registered backends, the highest priority first."""
    return tuple(_BACKENDS)


def choose_backend(problem: Problem, requested: str) -> Backend:
    """Return the backend to use. Raises `ValueError` if the name is unknown or the backend refuses the problem."""
    if requested == "auto":
        for backend in _BACKENDS.values():
            if backend.refuses(problem) is None:
                return backend
        raise ValueError("no prefix_attention backend supports this problem")
    if requested not in _BACKENDS:
        raise ValueError(f"backend={requested!r} is unknown; expected 'auto' or one of {list(available_backends())}")
    if (reason := _BACKENDS[requested].refuses(problem)) is not None:
        raise ValueError(f"backend={requested!r} cannot do this: {reason}; use backend='auto'")
    return _BACKENDS[requested]


def check_problem(
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
) -> Problem:
    """Check the arguments of `prefix_attention` and return them as a `Problem`.

    Raises `ValueError` for arguments that no backend can compute correctly. Reads shapes and flags, and values only of
    CPU tensors, so it never waits for a device.
    """
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
        raise ValueError(f"q has {Hq} heads and k has {Hkv}; the number of query heads must be a multiple of k's heads")
    if not (0 < D <= MAX_HEAD_SIZE and 0 < E <= MAX_HEAD_SIZE):
        raise ValueError(f"head sizes must be from 1 to {MAX_HEAD_SIZE}; got {D} (q, k) and {E} (v)")

    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v must be given together, or both be None")
    flat_k = flat_v = None
    prefix_bounds: tuple[int, ...] | None = None
    if prefix_k is not None and prefix_v is not None:
        flat_k, lengths_k = _flat_prefix("prefix_k", prefix_k, prefix_index is not None, Hkv, D, q)
        flat_v, lengths_v = _flat_prefix("prefix_v", prefix_v, prefix_index is not None, Hkv, E, q)
        if lengths_k != lengths_v:
            numbers = (", ".join(map(str, lengths)) for lengths in (lengths_k, lengths_v))
            raise ValueError(
                "prefix_k has {} virtual tokens but prefix_v has {}; both need the same number".format(*numbers)
            )
        if prefix_index is not None:
            prefix_bounds = tuple(accumulate(lengths_k, initial=0))

    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window: got {window!r}, expected an integer >= 1 or None")
        if not causal:
            raise ValueError("window needs causal=True; pass a mask for a two-sided window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap!r}, expected a positive number or None")
    if mask is not None:
        if causal or window is not None:
            raise ValueError("mask is the whole rule for the own tokens: pass causal=False and window=None with it")
        _check_scores("mask", mask, (B, Hq, S, T), q)
        if mask.dtype != torch.bool:
            raise ValueError(
                f"mask: got {mask.dtype}, expected bool (True: visible); pass numbers to add to scores as `bias`"
            )
    if bias is not None:
        _check_scores("bias", bias, (B, Hq, S, T), q)
        if not bias.is_floating_point():
            raise ValueError(f"bias: got {bias.dtype}, expected a floating dtype; pass a boolean rule as `mask`")
        if bias.requires_grad:
            raise ValueError("bias requires a gradient, which is not supported: pass bias.detach()")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"max_seqlen: got {max_seqlen!r}, expected a non-negative integer or None")
    offsets = None
    if cu_seqlens is not None:
        offsets = _check_packing(cu_seqlens, max_seqlen, mask, B, S, T, q)
    if prefix_index is not None:
        _check_index(prefix_index, B if cu_seqlens is None else cu_seqlens.numel() - 1, prefix_bounds, q)
    return Problem(
        q, k, v, flat_k, flat_v, D**-0.5 if scale is None else float(scale), causal, window,
        None if softcap is None else float(softcap), cu_seqlens, max_seqlen, mask, bias, offsets,
        prefix_index, prefix_bounds,
    )  # fmt: skip


def _flat_prefix(
    name: str, prefix: Tensor | Sequence[Tensor], several: bool, kv_heads: int, head_size: int, q: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the prefix ``[Hkv, P, D or E]`` and the number of keys of each prefix.

    Several prefixes are concatenated along P (a view if they are already laid out so in memory).
    """
    if not several:
        wanted = f"[{kv_heads}, num_virtual_tokens, {head_size}]"
        if not isinstance(prefix, Tensor) or prefix.dim() != 3 or prefix.shape[::2] != (kv_heads, head_size):
            hint = "" if isinstance(prefix, Tensor) and prefix.dim() == 3 else " (several prefixes need a prefix_index)"
            raise ValueError(f"{name}: got {_describe(prefix)}, expected {wanted}{hint}")
        _check_prefix_dtype(name, prefix, q)
        return prefix, (prefix.shape[1],)
    wanted = f"[prefixes, {kv_heads}, num_virtual_tokens, {head_size}], or a list of tensors without the first axis"
    if isinstance(prefix, Tensor):
        if prefix.dim() != 4 or not prefix.shape[0] or prefix.shape[1::2] != (kv_heads, head_size):
            raise ValueError(f"{name}: got {_describe(prefix)} with a prefix_index, expected {wanted}")
        _check_prefix_dtype(name, prefix, q)
        return prefix.transpose(0, 1).flatten(1, 2), (prefix.shape[2],) * prefix.shape[0]
    if not isinstance(prefix, Sequence) or not prefix:
        raise ValueError(f"{name}: got {prefix!r} with a prefix_index, expected {wanted}")
    for i, one in enumerate(prefix):
        if not isinstance(one, Tensor) or one.dim() != 3 or one.shape[::2] != (kv_heads, head_size):
            raise ValueError(
                f"{name}[{i}]: got {_describe(one)}, expected [{kv_heads}, num_virtual_tokens, {head_size}]"
            )
        _check_prefix_dtype(f"{name}[{i}]", one, q)
        if one.dtype != prefix[0].dtype:
            raise ValueError(
                f"{name}[{i}]: got {one.dtype}, but {name}[0] is {prefix[0].dtype}; all need the same dtype"
            )
    return torch.cat(list(prefix), dim=1), tuple(one.shape[1] for one in prefix)


def _check_prefix_dtype(name: str, prefix: Tensor, q: Tensor) -> None:
    if prefix.dtype not in DTYPES or prefix.device != q.device:
        raise ValueError(f"{name}: got {prefix.dtype} on {prefix.device}, expected a floating dtype on {q.device}")


def _check_index(index: Tensor, sequences: int, prefix_bounds: tuple[int, ...] | None, q: Tensor) -> None:
    if prefix_bounds is None:
        raise ValueError("prefix_index selects among several prefixes: give prefix_k and prefix_v with it")
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
        raise ValueError(f"prefix_index: got {_describe(index)}, expected an int64 or int32 tensor [sequences]")
    if index.numel() != sequences:
        raise ValueError(
            f"prefix_index: got {index.numel()} entries for {sequences} sequences; expected one per sequence"
        )
    if index.device.type != "cpu" and index.device != q.device:
        raise ValueError(f"prefix_index: got a tensor on {index.device}, expected one on {q.device} or on the CPU")
    # torch.compile cannot trace a check of values, so only eager calls check them.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high, prefixes = int(index.min()), int(index.max()), len(prefix_bounds) - 1
        if low < 0 or high >= prefixes:
            raise ValueError(
                f"prefix_index: got values from {low} to {high}, but the {prefixes} prefixes are numbered from 0"
            )


def _check_scores(name: str, given: Tensor, full: tuple[int, int, int, int], q: Tensor) -> None:
    B, Hq, S, T = full
    if (
        not isinstance(given, Tensor)
        or given.dim() != 4
        or given.shape[0] not in (1, B)
        or given.shape[1] not in (1, Hq)
        or given.shape[2:] != (S, T)
    ):
        raise ValueError(f"{name}: got {_describe(given)}, expected [1 or {B}, 1 or {Hq}, {S}, {T}]")
    if given.device != q.device:
        raise ValueError(f"{name}: got a tensor on {given.device}, expected one on {q.device}")


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
    if cu_seqlens.device.type != "cpu" or stood_in_for() is not None:
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
